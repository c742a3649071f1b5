"""Whole files or none: everything written under a temporary name and renamed last, and checked when read back."""

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DamagedFile, Sparc3Error, UserError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; on success it takes the name `path`, on any failure it is removed.

    Raises:
        Sparc3Error: the folder cannot be written, or the disk is full; the message names the file.
    """
    path = Path(path)
    with _beside(path) as temporary, _told(path, "the earlier file, if any, is untouched"):
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder; on success it takes the name `path`, on any failure it is removed.

    Raises:
        UserError: `path` exists and is not an empty folder.
        Sparc3Error: it cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already; choose a new folder, or remove it first")
    with _beside(path) as temporary, _told(path, "nothing of it was left behind"):
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own beside `path`: safetensors too writes under names of its own making.

    The folder is gone in the end. Of a process that was killed it stays until the next one, but not its lock.
    """
    with _told(path, "choose a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name))
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _told(path, "choose a folder that can be written"), open(folder / ".lock", "w") as lock:
            with suppress(OSError):  # a file system without locks: what a killed process leaves stays
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path, names: str | None = None) -> None:
    """Remove what killed processes left of writing files with such names (a glob pattern), or any in the folder and below it.

    What is being written stays.
    """
    for left in list(folder.glob(f".{names}.????????.tmp") if names else folder.rglob(".*.????????.tmp")):
        with suppress(OSError):
            if not any(left.iterdir()):
                left.rmdir()
                continue
            with open(left / ".lock", "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _told(path: Path, end: str) -> Iterator[None]:
    """A failure to write inside becomes one line that names the file."""
    try:
        yield
    except Sparc3Error:
        raise
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, OSError | SafetensorError):
            raise
        number = re.search(r"os error (\d+)", str(error))
        said = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or error
        raise Sparc3Error(f"cannot write {path}: {said}; {end}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file the user named; UserError where it is missing, a folder, or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `content` as readable JSON with a checksum of itself under "sha256"."""
    body = {**content, "sha256": fingerprint(content)}
    write_text(path, json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], format: str) -> dict[str, Any]:
    """Read what `write_json` wrote, or a file a person wrote by hand without a checksum.

    Raises:
        UserError: no such file, or it is another kind of file.
        DamagedFile: not JSON, or its checksum does not fit its content.
    """
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedFile(f"{path} is not JSON ({error}); make it again") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        raise UserError(f"{path} is not a {format} file (its format is {found!r})")
    checksum = content.pop("sha256", None)
    if checksum is not None and checksum != fingerprint(content):
        raise DamagedFile(f"{path} was changed after it was written: its checksum does not fit; make it again")
    return dict(content)


def fingerprint(value: Any) -> str:
    """A short, stable name of a JSON-able value: the first 16 hex digits of the SHA-256 of its canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
