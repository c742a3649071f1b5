"""Atomic files: everything is written under a temporary name and renamed at the end, and verified when
read."""

import fcntl
import glob
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DamagedFile, NonFinite, Sparc3Error, UserError
from .safe_text import shareable

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` on success and removed on failure.

    Raises:
        Sparc3Error: the folder cannot be written, or the disk is full; the message names the file.
    """
    path = Path(path)
    with (
        _temporary_path(path) as temporary,
        _raise_user_errors(path, "the earlier file, if any, is untouched"),
    ):
        yield temporary
        _make_readable(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `path` on success and removed on failure.

    Raises:
        UserError: `path` exists and is not an empty folder.
        Sparc3Error: it cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists; choose a new folder, or remove it first")
    with _temporary_path(path) as temporary, _raise_user_errors(path, "nothing of it was left behind"):
        temporary.mkdir()
        yield temporary
        for entry in temporary.rglob("*"):
            _make_readable(entry)
        if path.exists():
            path.rmdir()
        temporary.rename(path)


def _make_readable(path: Path) -> None:
    """Give a file or folder the usual permissions; safetensors writes files that only their owner can
    read."""
    os.umask(mask := os.umask(0))
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def _temporary_path(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder next to `path`; a folder, because safetensors itself
    writes under temporary names. It is removed at the end, or, if the process was killed, by the next one."""
    if "\0" in str(path):
        raise UserError(f"{path} contains a NUL byte, which file names cannot; choose another name")
    with _raise_user_errors(path, "choose a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name))
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with (
            _raise_user_errors(path, "choose a folder that can be written"),
            open(folder / ".lock", "w") as lock,
        ):
            with suppress(OSError):  # a file system without locks: leftovers stay
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path, names: str | None = None) -> None:
    """Remove temporary folders that killed processes left while writing files with these names (a glob
    pattern), or any below the folder. Folders in use stay."""
    for leftover in list(folder.glob(f".{names}.????????.tmp") if names else folder.rglob(".*.????????.tmp")):
        with suppress(OSError):
            if not any(leftover.iterdir()):
                leftover.rmdir()
                continue
            with open(leftover / ".lock", "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _raise_user_errors(path: Path, end: str) -> Iterator[None]:
    """Inside, failures to write become a Sparc3Error that names the file."""
    try:
        yield
    except Sparc3Error:
        raise
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, OSError | SafetensorError):
            raise
        number = re.search(r"os error (\d+)", str(error))
        reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or error
        raise Sparc3Error(f"cannot write {path}: {reason}; {end}") from error


def require_place(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raise UserError, before any work, if a file (or folder) of that name cannot be written."""
    target = Path(path).absolute()
    if not folder and target.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file in it")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write {path}: {existing} is a file, not a folder; choose another place")
    try:
        with tempfile.TemporaryDirectory(prefix=".sparc3-", dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose a folder that can be written"
        ) from None


@contextmanager
def claim_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, reserve a file for this process, by a lock next to it that the system frees when the process
    ends. Raises UserError if another process holds it."""
    lock_path = Path(f"{path}.lock")
    with open(lock_path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is making {path}; wait for it, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        if not lock_path.exists() or not os.path.samestat(os.fstat(lock.fileno()), lock_path.stat()):
            raise UserError(f"another process has just made {path}; use that file, or run this again")
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


GZIP = b"\x1f\x8b"
"""The first bytes of every gzip file."""
LARGEST = 2**30
"""Maximum size of a text that is read at once, in bytes."""


def read_text(path: str | os.PathLike[str], largest: int = LARGEST) -> str:
    """The text of a user's file with "\\n" as line ends and without a byte order mark; gzip is unpacked.

    Raises:
        UserError: it is missing, a folder, or longer than `largest` bytes.
        DamagedFile: it is not UTF-8 text.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            raw = (gzip.GzipFile(fileobj=file) if packed else file).read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a file in it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFile(f"{path} is an incomplete gzip file ({error}); download it again") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; check the path") from None
    if len(raw) > largest:
        raise UserError(f"{path} is longer than {largest:,} bytes; give a smaller file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DamagedFile(f"{path} is not UTF-8 text; convert it, or make it again") from None
    if "\0" in text:
        raise DamagedFile(
            f"{path} contains NUL bytes, so it is not a text file; convert it, or make it again"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `content`, with its paths made `shareable`, as JSON with a checksum. Raises NonFinite for NaN or
    Inf."""
    content = shareable(content)
    body = {**content, "sha256": fingerprint(content)}
    try:
        text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        remedy = "load the model in bfloat16 or float32"
        raise NonFinite(f"cannot write {path}: a figure in it is not finite ({error}); {remedy}") from None
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str], format: str, by_hand: Collection[str] = ()) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Args:
        by_hand: the keys of a format that may also be written by hand, without a checksum; such a file
            must not have other keys.

    Raises:
        UserError: a missing file, or another kind of file.
        DamagedFile: the file is not JSON, or its checksum is missing or wrong.
    """
    text = read_text(path)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not JSON ({error}); make it again") from None
    actual = content.get("format") if isinstance(content, dict) else None
    if actual != format:
        raise UserError(
            f"{path} is not a {format} file (its format is {actual!r}); name one, or make it again"
        )
    checksum = content.pop("sha256", None)
    if checksum is None and (not by_hand or (unknown_keys := sorted(content.keys() - by_hand))):
        unknown = f"an unknown key {unknown_keys[0]!r} and " if by_hand else ""
        raise DamagedFile(f"{path} has {unknown}no checksum; make it again")
    if checksum is not None and checksum != fingerprint(content):
        raise _changed_error(path)
    return dict(content)


def _changed_error(path: str | os.PathLike[str]) -> DamagedFile:
    return DamagedFile(f"{path} was changed after it was written (wrong checksum); make it again")


def parse_json(text: str) -> Any:
    """Strict JSON: no repeated keys, no NaN. Raises ValueError or RecursionError."""

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)!r} appears twice")
        return mapping

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=each_once, parse_constant=finite, parse_float=finite)


def canonical(value: Any) -> str:
    """A JSON-able value as text that does not depend on the order of its keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def fingerprint(value: Any) -> str:
    """A short, stable hash of a JSON-able value: 16 hex digits of its canonical JSON's SHA-256."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Files of tensors (safetensors) with a header of metadata and a checksum of everything.


def save_tensors(
    path: str | os.PathLike[str], format: str, tensors: Mapping[str, "Tensor"], header: Mapping[str, Any]
) -> None:
    """Write tensors (on the CPU) under a header of JSON-able values with the format and a checksum."""
    from safetensors.torch import save_file

    content = shareable(json.loads(json.dumps({"format": format, **header})))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content["sha256"] = _checksum(content, contiguous)
    with whole_file(path) as temporary:
        save_file(contiguous, temporary, {key: _serialize(value) for key, value in content.items()})


def load_tensors(path: str | os.PathLike[str], format: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors, and the header without its format and checksum.

    Raises:
        UserError: a missing file, or another kind of file.
        DamagedFile: the file is not safetensors, or its checksum is wrong.
    """
    header, tensors = read_header(path), {}
    if header.get("format") != format:
        raise UserError(f"{path} is a safetensors file, but not a {format} file; name one, or make it again")
    with _open_tensors(path) as file:
        # Copies, because the library maps the file: overwriting it would change numbers after the check.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    checksum = header.pop("sha256", None)
    if checksum != _checksum(header, tensors):
        raise _changed_error(path)
    del header["format"]
    return tensors, header


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors file with parsed JSON values; its content is not checked."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}; check the path")
    with _open_tensors(path) as file:
        return {key: _parse_header(value) for key, value in (file.metadata() or {}).items()}


@contextmanager
def _open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """safe_open, whose errors become DamagedFile."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except Exception as error:  # the library raises its own errors, Python's and torch's
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFile(f"{path} is not a readable safetensors file ({first}); make it again") from None


def _serialize(value: Any) -> str:
    """A header's value as text: a string stays as it is, unless it would be parsed as something else."""
    return value if isinstance(value, str) and _parse_header(value) is value else json.dumps(value)


def _parse_header(value: str) -> Any:
    try:
        return json.loads(value) if value[:1] in '{["-0123456789tfnNI' else value
    except (ValueError, RecursionError):
        return value


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, "Tensor"]) -> str:
    content = canonical(header) + digest({name: tensors[name] for name in sorted(tensors)})
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def digest(tensors: Mapping[str, "Tensor"]) -> str:
    """The SHA-256 of names, shapes, dtypes and values, in their order."""
    import torch

    hasher = hashlib.sha256()
    for name, tensor in tensors.items():
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
