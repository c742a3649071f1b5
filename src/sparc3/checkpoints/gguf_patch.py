"""A circuit taken out of a GGUF itself: in its quantised blocks, every other byte as it was, with the patch
that undoes it."""

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
    """What was done to a GGUF, and the bytes that undo it.

    Attributes:
        file, size: name and bytes of the file before.
        sha256_before, sha256_after: of all its bytes.
        circuit: what was removed: unit, members, strength or strengths, fingerprint and the model it was
            found on.
        checked: how sure it is that the circuit is this model's, in words.
        changes: where, and the bytes before.
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
        """How many bytes differ: of the rows and columns in it some were what they are now."""
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
            good = all(change.fits(patch.size) for change in changes)
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
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

    A neuron's rows, or a head's columns, become zeros in the blocks of the file's own types, which is what
    `ablate_` does to the dequantised model. At other strengths than 1 the scales of the blocks are
    multiplied, where the result is exact.

    Args:
        name: as `find_gguf` takes it.
        out: the new file; it appears whole or not at all.
        in_place: change the file itself; the patch is on the disk before the first byte changes.
        force: apply a circuit that was found on other weights; names and shapes must fit all the same.

    Returns:
        The patch, and the path it was written to: beside the new file, or the changed one.

    Raises:
        UserError: weights, a circuit that was measured by mean ablation, a file of another model, a type or
            width whose blocks cannot hold the change, or a place that cannot be written.
        Sparc3Error: the file was changed by another process, or the disk is full.
    """
    circuit.require_exportable()
    path = locate_gguf(name)
    target = _target(path, name, out, in_place)
    with _watch_for_changes(path, in_place) as require_unchanged:
        reader, architecture = read_gguf(path)
        changes, checked = plan_changes(path, reader, architecture, circuit)
        del reader  # and its map of the file
        checked = checked if force else _check_weights(path, circuit, checked)
        before, after = _digests(path, [(c, c.after) for c in changes])
        described = {key: getattr(circuit, key) for key in ("unit", "fingerprint", "strength", "model")}
        if circuit.strengths:
            described["strengths"] = {key: list(own) for key, own in circuit.strengths.items()}
        described["members"] = {key: list(units) for key, units in circuit.members.items()}
        patch = GgufPatch(path.name, path.stat().st_size, before, after, described, checked, tuple(changes))
        kept = _free_name(target) if in_place else target.with_name(target.name + SUFFIX)
        with _rewritten(path, target, require_unchanged) as opened:
            patch.save(kept)
            _write(opened, [(c, c.after) for c in changes])
    return patch, kept


def undo_patch(
    name: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
) -> GgufPatch:
    """Put the bytes back that a patch took; also after a change in place that was interrupted. The result
    has the checksum of the file before.

    Raises:
        UserError: another file, or one that was changed since in other places; nothing has been touched then.
    """
    path, undone = locate_gguf(name), GgufPatch.load(patch)
    target = _target(path, name, out, in_place)
    with _watch_for_changes(path, in_place) as require_unchanged:
        size, back = path.stat().st_size, [(c, c.before) for c in undone.changes]
        if size != undone.size:
            raise UserError(
                f"{path} has {size:,} bytes, and {patch} is for a file of {undone.size:,}; give the file "
                "that it was made with"
            )
        if _digests(path, back)[1] != undone.sha256_before:
            raise UserError(
                f"{path} differs from the file that {patch} was made with in other places too; undo later "
                "patches first, or give that file"
            )
        with _rewritten(path, target, require_unchanged) as opened:
            _write(opened, back)
    return undone


def locate_gguf(name: str | os.PathLike[str]) -> Path:
    """The GGUF of that name. Raises UserError where it means something else."""
    path = find_gguf(os.fspath(name))
    if path is None:
        raise UserError(f"{name} is not a GGUF; give the path of one")
    return path


def _target(path: Path, name: Any, out: str | os.PathLike[str] | None, in_place: bool) -> Path:
    """The file to be written. Raises UserError where it cannot be, or is not the user's to change."""
    if in_place == (out is not None):
        raise UserError("give either --out, the new file, or --in-place")
    if out is None:
        if Path(name).absolute() != path.absolute() or path.is_symlink():
            raise UserError(
                f"{name} means {path.resolve()}, which others may use too; give --out, or that path"
            )
        require_place(path)
        try:
            path.open("r+b").close()
        except OSError as error:
            raise UserError(f"cannot change {path}: {error.strerror}; give --out") from None
        return path
    if Path(out).exists():
        raise UserError(f"{out} is there already; give another name, or remove it first")
    require_place(out)
    return Path(out)


def _free_name(path: Path) -> Path:
    """A new name for the patch of a change in place: they are undone in the opposite order."""
    names = (path.with_name(f"{path.name}{f'.{n}' if n > 1 else ''}{SUFFIX}") for n in range(1, 10**6))
    return next(name for name in names if not name.exists())


@contextmanager
def _watch_for_changes(path: Path, alone: bool) -> Iterator[Any]:
    """Gives a check that raises Sparc3Error where the file changed since; UserError where it is changing."""

    def stamp() -> tuple[int, ...]:
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    first = stamp()

    def require_unchanged() -> None:
        if stamp() != first:
            raise Sparc3Error(
                f"{path} was changed while it was read; wait until nothing writes it, and run again"
            )

    with path.open("rb") as opened:
        try:
            fcntl.flock(opened, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path} is being changed by another process; run again when it is done"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield require_unchanged


@contextmanager
def _rewritten(path: Path, target: Path, require_unchanged: Any) -> Iterator[BinaryIO]:
    """The file to write changes into: a copy that takes the target's name in the end, or the file itself."""
    if target == path:
        require_unchanged()
        with path.open("r+b", buffering=0) as opened:
            yield opened
            os.fsync(opened.fileno())
        return
    with whole_file(target) as temporary:
        shutil.copyfile(path, temporary)
        require_unchanged()
        with temporary.open("r+b") as copied:
            yield copied


def _spread(changes: Iterable[tuple[Change, bytes]]) -> list[tuple[int, bytes]]:
    """(offset, bytes) of every contiguous piece, in the order of the file."""
    pieces = [
        (change.offset + n * change.stride, content[n * change.length : (n + 1) * change.length])
        for change, content in changes
        for n in range(change.count)
    ]
    return sorted(pieces)


def _write(opened: BinaryIO, changes: Iterable[tuple[Change, bytes]]) -> None:
    for offset, content in _spread(changes):
        opened.seek(offset)
        opened.write(content)


def _digests(path: Path, changes: list[tuple[Change, bytes]]) -> tuple[str, str]:
    """The SHA-256 of a file, and of what it would be with these changes."""
    asis, changed = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as opened:
        for offset, content in [*_spread(changes), (path.stat().st_size, b"")]:
            while same := opened.read(min(CHUNK, max(0, offset - opened.tell()))):
                asis.update(same)
                changed.update(same)
            asis.update(opened.read(len(content)))
            changed.update(content)
    return asis.hexdigest(), changed.hexdigest()


def _check_weights(path: Path, circuit: Circuit, checked: str) -> str:
    """How sure it is that the circuit is this model's. Raises UserError for one found on a GGUF of other
    weights.

    One that was found on a GGUF names the fingerprint of its dequantised weights, and these are computed; a
    quantised file does not tell that of the original checkpoint.
    """
    if not str(circuit.model.get("id", "")).lower().endswith(".gguf"):
        return checked
    from ..models.load import load_weights

    circuit.require_model(load_weights(str(path), device="cpu"))
    return "its dequantised weights are those that the circuit was found on"
