"""Remove a circuit from a GGUF file directly, in its quantised blocks. Every other byte stays, and a patch
file can undo the change."""

import base64
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..circuits.circuit import Circuit
from ..errors import DamagedFile, Sparc3Error, UserError
from ..models.gguf import find_gguf, read_gguf
from ..storage import read_json, require_place, whole_file, write_json
from .gguf_blocks import Change, plan_changes

FORMAT = "sparc3.gguf-patch/1"
SUFFIX = ".patch.json"
CHUNK = 2**24


@dataclass(frozen=True)
class GgufPatch:
    """A change of a GGUF, and the bytes that undo it.

    Attributes:
        file, size: name and size in bytes of the file before.
        sha256_before, sha256_after: checksums of the whole file.
        circuit: what was removed: unit, members, strength or strengths, fingerprint, and the model on which
            it was found.
        checked: a sentence on how it was verified that the circuit belongs to this model.
        changes: places, with the bytes before.
    """

    file: str
    size: int
    sha256_before: str
    sha256_after: str
    circuit: dict[str, Any]
    checked: str
    changes: tuple[Change, ...]

    @property
    def bytes_changed(self) -> int:
        """The number of bytes that differ; some bytes of the changed rows and columns may stay the same."""
        import numpy

        return sum(
            int((numpy.frombuffer(c.before, numpy.uint8) != numpy.frombuffer(c.after, numpy.uint8)).sum())
            for c in self.changes
        )

    def save(self, path: Path) -> None:
        changes = [{**vars(c), "before": base64.b64encode(c.before).decode()} for c in self.changes]
        for change in changes:
            del change["after"]
        write_json(path, {"format": FORMAT, **vars(self), "changes": changes})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "GgufPatch":
        """Read what `save` wrote, without the bytes after. Raises UserError and DamagedFile."""
        content = read_json(path, FORMAT)
        try:
            changes = tuple(
                Change(**{**change, "before": base64.b64decode(change["before"], validate=True)})
                for change in content.pop("changes")
            )
            del content["format"]
            patch = cls(**content, changes=changes)
            is_valid = all(change.fits(patch.size) for change in changes)
        except (KeyError, TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise DamagedFile(f"{path} does not follow {FORMAT}; use the file that sparc3 ablate wrote")
        return patch


def patch_gguf(
    name: str | os.PathLike[str],
    circuit: Circuit,
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    force: bool = False,
) -> tuple[GgufPatch, Path]:
    """Remove a circuit from a GGUF without loading the model.

    A neuron's rows, or a head's columns, become zeros in blocks of the file's own types, which has the
    same effect as `ablate_` on the dequantised model. At other strengths than 1, the scales of the blocks
    are multiplied, if the result is exact.

    Args:
        name: as for `find_gguf`.
        out: the new file; after an error no partial file is left.
        in_place: change the file itself; the patch is on the disk before the first byte changes.
        force: apply a circuit that was found on other weights; names and shapes must still fit.

    Returns:
        The patch, and its path: next to the new file, or to the changed one.

    Raises:
        UserError: a circuit of weights or one that was measured by mean ablation, a file of another model,
            blocks that cannot represent the change, or a path that cannot be written.
        Sparc3Error: the file was changed by another process, or the disk is full.
    """
    circuit.require_exportable()
    path = locate_gguf(name)
    target = _choose_target(path, name, out, in_place)
    with _watch_for_changes(path, in_place) as require_unchanged:
        reader, architecture = read_gguf(path)
        changes, checked = plan_changes(path, reader, architecture, circuit)
        del reader  # closes its memory map of the file
        checked = checked if force else _check_weights(path, circuit, checked)
        before, after = _hash_before_and_after(path, [(c, c.after) for c in changes])
        circuit_info = {key: getattr(circuit, key) for key in ("unit", "fingerprint", "strength", "model")}
        if circuit.strengths:
            circuit_info["strengths"] = {key: list(values) for key, values in circuit.strengths.items()}
        circuit_info["members"] = {key: list(units) for key, units in circuit.members.items()}
        patch = GgufPatch(
            path.name, path.stat().st_size, before, after, circuit_info, checked, tuple(changes)
        )
        patch_path = _free_name(target) if in_place else target.with_name(target.name + SUFFIX)
        with _open_for_rewriting(path, target, require_unchanged) as file:
            patch.save(patch_path)
            _write(file, [(c, c.after) for c in changes])
    return patch, patch_path


def undo_patch(
    name: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
) -> GgufPatch:
    """Restore the bytes that a patch replaced, also after an interrupted change in place. The result has
    the checksum of the original file.

    Raises:
        UserError: another file, or one with later changes in other places; nothing has been touched then.
    """
    path, undone = locate_gguf(name), GgufPatch.load(patch)
    target = _choose_target(path, name, out, in_place)
    with _watch_for_changes(path, in_place) as require_unchanged:
        size, restored = path.stat().st_size, [(c, c.before) for c in undone.changes]
        if size != undone.size:
            raise UserError(
                f"{path} has {size:,} bytes, but {patch} is for a file of {undone.size:,} bytes; give the "
                "file that it was made with"
            )
        if _hash_before_and_after(path, restored)[1] != undone.sha256_before:
            raise UserError(
                f"{path} differs from the file that {patch} was made with in other places too; undo later "
                "patches first, or give that file"
            )
        with _open_for_rewriting(path, target, require_unchanged) as file:
            _write(file, restored)
    return undone


def locate_gguf(name: str | os.PathLike[str]) -> Path:
    """The GGUF file of that name. Raises UserError if the name means something else."""
    path = find_gguf(os.fspath(name))
    if path is None:
        raise UserError(f"{name} is not a GGUF; give the path of one")
    return path


def _choose_target(path: Path, name: Any, out: str | os.PathLike[str] | None, in_place: bool) -> Path:
    """The file to write. Raises UserError if it cannot be written, or is shared with others."""
    if in_place == (out is not None):
        raise UserError("give either --out, the new file, or --in-place")
    if out is None:
        if Path(name).absolute() != path.absolute() or path.is_symlink():
            raise UserError(
                f"{name} means {path.resolve()}, which others may use too; give --out, or that path itself"
            )
        require_place(path)
        try:
            path.open("r+b").close()
        except OSError as error:
            raise UserError(f"cannot change {path}: {error.strerror}; give --out") from None
        return path
    if Path(out).exists():
        raise UserError(f"{out} already exists; give another name, or remove it first")
    require_place(out)
    return Path(out)


def _free_name(path: Path) -> Path:
    """An unused name for the patch of a change in place; several patches are numbered, and undone in
    reverse."""
    names = (path.with_name(f"{path.name}{f'.{n}' if n > 1 else ''}{SUFFIX}") for n in range(1, 10**6))
    return next(name for name in names if not name.exists())


@contextmanager
def _watch_for_changes(path: Path, exclusive: bool) -> Iterator[Any]:
    """Yield a function that raises Sparc3Error if the file has changed since. Raises UserError if another
    process is changing it now."""

    def stamp() -> tuple[int, ...]:
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    original = stamp()

    def require_unchanged() -> None:
        if stamp() != original:
            raise Sparc3Error(
                f"{path} was changed while it was read; wait until nothing writes it, and run again"
            )

    with path.open("rb") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path} is being changed by another process; run again when it is done"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield require_unchanged


@contextmanager
def _open_for_rewriting(path: Path, target: Path, require_unchanged: Any) -> Iterator[BinaryIO]:
    """The open file to change: a copy that is renamed to the target at the end, or the file itself."""
    if target == path:
        require_unchanged()
        with path.open("r+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        return
    with whole_file(target) as temporary:
        shutil.copyfile(path, temporary)
        require_unchanged()
        with temporary.open("r+b") as file:
            yield file


def _split_pieces(changes: Iterable[tuple[Change, bytes]]) -> list[tuple[int, bytes]]:
    """(offset, bytes) of every contiguous piece, in the order of the file."""
    pieces = [
        (change.offset + n * change.stride, content[n * change.length : (n + 1) * change.length])
        for change, content in changes
        for n in range(change.count)
    ]
    return sorted(pieces)


def _write(file: BinaryIO, changes: Iterable[tuple[Change, bytes]]) -> None:
    for offset, content in _split_pieces(changes):
        file.seek(offset)
        file.write(content)


def _hash_before_and_after(path: Path, changes: list[tuple[Change, bytes]]) -> tuple[str, str]:
    """The SHA-256 of a file as it is, and as it would be with these changes."""
    unchanged_hash, changed_hash = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        for offset, content in [*_split_pieces(changes), (path.stat().st_size, b"")]:
            while chunk := file.read(min(CHUNK, max(0, offset - file.tell()))):
                unchanged_hash.update(chunk)
                changed_hash.update(chunk)
            unchanged_hash.update(file.read(len(content)))
            changed_hash.update(content)
    return unchanged_hash.hexdigest(), changed_hash.hexdigest()


def _check_weights(path: Path, circuit: Circuit, checked: str) -> str:
    """A sentence on how it was verified that the circuit belongs to this model. Raises UserError for a
    circuit that was found on a GGUF with other weights.

    A circuit found on a GGUF records the fingerprint of the dequantised weights, which can be computed
    again; that of the original checkpoint cannot be computed from a quantised file.
    """
    if not str(circuit.model.get("id", "")).lower().endswith(".gguf"):
        return checked
    from ..models.load import load_weights

    circuit.require_model(load_weights(str(path), device="cpu"))
    return "its dequantised weights are those that the circuit was found on"
