"""Sums on disk: what an interrupted attribution goes on from, and what the shards of a job array leave for
`merge`."""

import glob
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import distributed
from ..errors import DamagedFile, UserError
from ..models.sites import Site
from ..samples.batches import Batch, make_batch
from ..scores import is_model
from ..storage import fingerprint, load_tensors, read_header, remove_leftovers, save_tensors
from .sums import Settings, Sums

FORMAT = "sparc3.shard/1"
COUNTS = ("samples", "tokens", "targets", "skipped")


@dataclass(frozen=True)
class Task:
    """What a set of sums is about; sums add up only where all of it agrees.

    Attributes:
        settings: of the method.
        model: id, architecture, fingerprint; the dtype it was run in; and of samples that are texts the
            tokenizer's fingerprint.
        samples_fingerprint: of the whole reference set, of which a shard has seen a part.
        tokens_fingerprint: of its tokens and targets, which also depend on the tokenizer and on truncation.
        count: how many samples the reference set has.
        sites: (name, role, layer, out, in, heads) of every site.
        shard: (2, 3) for the second of three, None for all samples.
    """

    settings: Settings
    model: dict[str, str]
    samples_fingerprint: str
    tokens_fingerprint: str
    count: int
    sites: tuple[tuple[str, str, int, int, int, int], ...]
    shard: tuple[int, int] | None = None

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.to_plain())

    def to_plain(self) -> dict[str, Any]:
        """As plain data, without where and how it is computed: sums from a GPU and from a CPU add up."""
        plain = asdict(self)
        del plain["settings"]["sums_device"], plain["settings"]["gradient_checkpointing"]
        if not self.settings.epsilon:  # which files from before there was one lack
            del plain["settings"]["epsilon"]
        if not self.settings.words:  # likewise
            del plain["settings"]["words"]
        return plain

    def stand_ins(self) -> list[Site]:
        """The sites without their modules: enough for all that does not need the weights' values."""
        return [Site(*site[:3], nn.Identity(), *site[3:]) for site in self.sites]

    def share(self) -> range:
        """The places, in the reference set, of the samples of this shard."""
        number, shards = self.shard or (1, 1)
        return range(number - 1, self.count, shards)


def parse_shard(shard: str) -> tuple[int, int]:
    """(2, 3) of "2/3". Raises UserError for anything else."""
    number, slash, shards = shard.partition("/")
    if not (slash and number.isdigit() and shards.isdigit() and 1 <= int(number) <= int(shards)):
        raise UserError(
            f"shard '{shard}' has the wrong form; write the first of three as 1/3, the last as 3/3"
        )
    return int(number), int(shards)


def save_sums(path: str | os.PathLike[str], task: Task, sums: Sums, positions: Iterable[int]) -> None:
    """Write sums, with their task and the places of the samples they are over; all of it or nothing."""
    counts = {key: getattr(sums, key) for key in COUNTS}
    header = {**task.to_plain(), **counts, "positions": sorted(positions), "task": task.fingerprint}
    save_tensors(path, FORMAT, {name: total.cpu() for name, total in sums.totals.items()}, header)


def load_sums(path: str | os.PathLike[str]) -> tuple[Task, Sums, frozenset[int]]:
    """What `save_sums` wrote. Raises UserError for another kind of file, DamagedFile where the content does
    not fit."""
    tensors, header = load_tensors(path, FORMAT)
    try:
        plain = {key: header[key] for key in ("model", "samples_fingerprint", "tokens_fingerprint", "count")}
        task = Task(
            **plain,
            settings=Settings(**header["settings"]),
            sites=tuple(tuple(site) for site in header["sites"]),
            shard=tuple(header["shard"]) if header["shard"] else None,
        )
        sums = Sums(task.settings, tensors, *(header[key] for key in COUNTS))
        positions = frozenset(header["positions"])
        good = header["task"] == task.fingerprint and is_model(task.model) and _fit(task, sums, positions)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} lacks what a shard file has ({error}); make it again") from None
    if not good:
        raise DamagedFile(f"{path}: its task, sums and counts are not as {FORMAT} has them; make it again")
    return task, sums, positions


def _fit(task: Task, sums: Sums, positions: frozenset[int]) -> bool:
    """Whether the parts of a shard file fit each other."""
    names = {site[0] for site in task.sites}
    counts = (task.count, sums.samples, sums.tokens, sums.targets, *sums.skipped, *positions)
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and sums.samples + len(sums.skipped) == len(positions)
        and positions <= set(task.share())
        and all(name in names and total.is_floating_point() for name, total in sums.totals.items())
    )


def read_positions(path: Path) -> tuple[str, frozenset[int]]:
    """The fingerprint of the task and the places of the samples of a shard file, without its tensors."""
    header = read_header(path)
    try:
        return str(header["task"]), frozenset(header["positions"])
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{path} lacks what a shard file has ({error}); make it again") from None


def combine_shards(paths: Sequence[str | os.PathLike[str]]) -> tuple[Task, Sums]:
    """The sums of all shards of one reference set, as if they had been made in one go.

    Raises:
        UserError: shards that are not of one task, that overlap, or that leave a sample out; the message
            names the file and what differs.
    """
    if not paths:
        raise UserError("No shard was given; name the files that attribute --shard left.")
    parts = sorted(
        ((*load_sums(path), str(path)) for path in paths), key=lambda part: (part[0].shard or (0, 0), part[3])
    )
    task, first = parts[0][0], parts[0][3]
    whole = Sums(task.settings)
    held: dict[int, str] = {}
    for other, sums, positions, path in parts:
        _require_same(task, other, first, path)
        if both := sorted(positions & held.keys()):
            raise UserError(
                f"sample {both[0]} is in {held[both[0]]} and in {path} ({len(both)} are in both); give each "
                "shard once"
            )
        held.update(dict.fromkeys(positions, path))
        whole.absorb(sums)
    for other, _, positions, path in parts:
        if left := set(other.share()) - positions:
            raise UserError(
                f"{path} is not finished: {len(left)} of its {len(other.share())} samples are missing; run "
                "that shard again"
            )
    if task.shard:
        there, shards = {other.shard and other.shard[0] for other, *_ in parts}, task.shard[1]
        if missing := [f"{number}/{shards}" for number in range(1, shards + 1) if number not in there]:
            raise UserError(
                f"shard{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing; give the files of all "
                f"{shards} shards"
            )
    return task, whole


def _require_same(one: Task, other: Task, first: str, path: str) -> None:
    here, there = one.to_plain(), other.to_plain()
    for kind in ("model", "samples_fingerprint", "tokens_fingerprint", "settings", "sites"):
        if here[kind] != there[kind]:
            mine, theirs = here[kind], there[kind]
            if isinstance(mine, dict):
                kind = next(key for key in mine if mine[key] != theirs.get(key))
                mine, theirs = mine[kind], theirs.get(kind)
            values = "" if kind == "sites" else f" ({theirs} and {mine})"
            raise UserError(
                f"{path} and {first} differ in {kind.replace('_', ' ')}{values}; merge shards of one "
                "attribution only"
            )
    if one.shard and other.shard and one.shard[1] != other.shard[1]:
        raise UserError(
            f"{path} is one of {other.shard[1]} shards and {first} one of {one.shard[1]}; merge shards of "
            "one attribution only"
        )


# Partial sums, saved while they grow, so that a run that was killed goes on where it was.


log = logging.getLogger("sparc3")

SHARE = 0.05
"""At most this share of the time goes into saving, however large the sums are."""


class PartialSums:
    """Keeps this rank's sums on disk.

    A single process writes `path`; of several, each writes a file of its own beside it. Files of another
    number of ranks are taken over: what they hold is shared out, and each place of the reference set counts
    once.
    """

    def __init__(self, path: Path, task: Task, every: float) -> None:
        self.path, self.task, self.every = path, task, every
        self.positions: set[int] = set()
        self.stop = 0  # the signal that asks to end
        self.saved, self.pause = time.monotonic(), every

    @property
    def own(self) -> Path:
        if distributed.world() == 1:
            return self.path
        return self.path.with_name(f"{self.path.name}.rank{distributed.rank()}of{distributed.world()}")

    def files(self) -> list[Path]:
        """Everything of ours that is on disk, of whatever number of ranks."""
        ranks = sorted(self.path.parent.glob(f"{self.path.name}.rank*of*"))
        return [self.path, *ranks] if self.path.is_file() else ranks

    def begin(self, sums: Sums) -> frozenset[int]:
        """Load the sums on disk, and return the places of the reference set that any rank has done."""
        there, usable = distributed.first((self.files(), self._usable() if distributed.is_main() else []))
        for path in usable[distributed.rank() :: distributed.world()]:
            _, found, positions = load_sums(path)
            sums.absorb(found)
            self.positions |= positions
        done = self._gather_positions()
        if done and distributed.is_main():
            log.info("resuming: %d of %d samples are done", len(done), len(self.task.share()))
        owned = set(distributed.gather(self.own))
        if set(there) - owned:
            self.save(sums)
            distributed.wait()
            self._remove(set(there) - owned)
        return done

    def _gather_positions(self) -> frozenset[int]:
        return frozenset(place for part in distributed.gather(sorted(self.positions)) for place in part)

    def _remove(self, paths: Iterable[Path]) -> None:
        if distributed.is_main():
            for path in paths:
                path.unlink(missing_ok=True)
        distributed.wait()

    def _usable(self) -> list[Path]:
        """Files of this task whose samples do not overlap, the fullest first."""
        found: list[tuple[Path, frozenset[int]]] = []
        for path in self.files():
            try:
                task, positions = read_positions(path)
                if task == self.task.fingerprint:
                    load_sums(path)
                    found.append((path, positions))
                else:
                    log.warning(
                        "%s belongs to another model, other samples or settings; starting from the beginning",
                        path.name,
                    )
            except UserError as error:
                log.warning("%s; starting anew", error)
        held: set[int] = set()
        usable = []
        for path, positions in sorted(found, key=lambda pair: (-len(pair[1]), pair[0])):
            if not positions & held:
                usable.append(path)
                held |= positions
        return usable

    def skip_done(self, batches: list[Batch], done: frozenset[int]) -> list[Batch]:
        """The batches without what is done. Whole batches stay whole, so that sums come out the same to the
        last bit."""
        kept = []
        for batch in batches:
            left = [sample for sample in batch.samples if sample.index not in done]
            if left:
                whole = len(left) == len(batch.samples)
                kept.append(batch if whole else make_batch(left, batch.ids.device))
        return kept

    def after(self, batch: Batch, sums: Sums) -> None:
        """A batch is in the sums: save them where it is time, or where the process was asked to end."""
        self.positions |= {sample.index for sample in batch.samples}
        if self.stop or time.monotonic() - self.saved >= self.pause:
            self.save(sums)
        if self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def save(self, sums: Sums) -> None:
        began = time.monotonic()
        save_sums(self.own, self.task, sums, self.positions)
        self.saved = time.monotonic()
        self.pause = max(self.every, (self.saved - began) / SHARE)

    def end(self, whole: Sums) -> None:
        """Finish: for a shard, leave the sums of all ranks at `path`; otherwise leave nothing."""
        positions, keep = self._gather_positions(), self.task.shard is not None
        if keep and distributed.is_main():
            save_sums(self.path, self.task, whole, positions)
        distributed.wait()
        self._remove(path for path in self.files() if not (keep and path == self.path))
        if distributed.is_main():
            remove_leftovers(self.path.parent, f"{glob.escape(self.path.name)}*")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM (SLURM's time limit) and the first Ctrl-C let the batch under way end and the sums
        be saved before the process ends."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asked = (signal.SIGTERM, signal.SIGINT)
        earlier = {number: signal.signal(number, self._note_request) for number in asked}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _note_request(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt
        self.stop = number
