"""Whole files or none: everything written under a temporary name and renamed last, and checked when read back."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DamagedFile, Sparc3Error, UserError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the name `path`, on any failure it is removed.

    Raises:
        Sparc3Error: the folder cannot be written, or the disk is full; the message names the file.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise Sparc3Error(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Sparc3Error(f"cannot write {path}: {error.strerror or error}; the earlier file, if any, is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the name `path`, on any failure it is removed.

    Raises:
        UserError: `path` exists and is not an empty folder.
        Sparc3Error: it cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already; choose a new folder, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise Sparc3Error(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise Sparc3Error(f"cannot write {path}: {error.strerror or error}; nothing of it was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
