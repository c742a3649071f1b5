"""Sums on disk: where an interrupted attribution resumes, and what the shards of a job array leave for
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
    """What a file of sums was computed from. Sums may be added only if all of it agrees.

    Attributes:
        settings: the method's settings.
        model: id, architecture, fingerprint and dtype; for samples that are texts also the tokenizer's
            fingerprint.
        samples_fingerprint: of the whole reference set, even if a shard covers only a part.
        tokens_fingerprint: of its tokens and targets, which also depend on the tokenizer and on truncation.
        count: number of samples in the reference set.
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
        """As plain data, without device and checkpointing: sums from a GPU and from a CPU may be added."""
        content = asdict(self)
        del content["settings"]["sums_device"], content["settings"]["gradient_checkpointing"]
        for name in ("epsilon", "words"):
            if not content["settings"][name]:  # older files have neither
                del content["settings"][name]
        return content

    def stand_ins(self) -> list[Site]:
        """The sites without their modules, which suffice unless a method needs the weights' values."""
        return [Site(*site[:3], nn.Identity(), *site[3:]) for site in self.sites]

    def share(self) -> range:
        """The indices, in the reference set, of this shard's samples."""
        number, shards = self.shard or (1, 1)
        return range(number - 1, self.count, shards)


def parse_shard(shard: str) -> tuple[int, int]:
    """(2, 3) for "2/3". Raises UserError for anything else."""
    number, slash, shards = shard.partition("/")
    if not (slash and number.isdigit() and shards.isdigit() and 1 <= int(number) <= int(shards)):
        raise UserError(
            f"shard '{shard}' has the wrong form; write the first of three as 1/3, the last as 3/3"
        )
    return int(number), int(shards)


def save_sums(path: str | os.PathLike[str], task: Task, sums: Sums, positions: Iterable[int]) -> None:
    """Write sums with their task and the indices of their samples; after an error no partial file is left."""
    counts = {key: getattr(sums, key) for key in COUNTS}
    header = {**task.to_plain(), **counts, "positions": sorted(positions), "task": task.fingerprint}
    save_tensors(path, FORMAT, {name: total.cpu() for name, total in sums.totals.items()}, header)


def load_sums(path: str | os.PathLike[str]) -> tuple[Task, Sums, frozenset[int]]:
    """Read what `save_sums` wrote. Raises UserError for another kind of file, DamagedFile for invalid
    content."""
    tensors, header = load_tensors(path, FORMAT)
    try:
        model_and_samples = {
            key: header[key] for key in ("model", "samples_fingerprint", "tokens_fingerprint", "count")
        }
        task = Task(
            **model_and_samples,
            settings=Settings(**header["settings"]),
            sites=tuple(tuple(site) for site in header["sites"]),
            shard=tuple(header["shard"]) if header["shard"] else None,
        )
        sums = Sums(task.settings, tensors, *(header[key] for key in COUNTS))
        positions = frozenset(header["positions"])
        is_valid = header["task"] == task.fingerprint and is_model(task.model) and _fit(task, sums, positions)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} lacks what a shard file has ({error}); make it again") from None
    if not is_valid:
        raise DamagedFile(f"{path}: the task, sums and counts do not follow {FORMAT}; create the file again")
    return task, sums, positions


def _fit(task: Task, sums: Sums, positions: frozenset[int]) -> bool:
    """Whether the parts of a shard file are consistent."""
    names = {site[0] for site in task.sites}
    counts = (task.count, sums.samples, sums.tokens, sums.targets, *sums.skipped, *positions)
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and sums.samples + len(sums.skipped) == len(positions)
        and positions <= set(task.share())
        and all(name in names and total.is_floating_point() for name, total in sums.totals.items())
    )


def read_positions(path: Path) -> tuple[str, frozenset[int]]:
    """The task's fingerprint and the sample indices of a shard file, without reading its tensors."""
    header = read_header(path)
    try:
        return str(header["task"]), frozenset(header["positions"])
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{path} lacks what a shard file has ({error}); make it again") from None


def combine_shards(paths: Sequence[str | os.PathLike[str]]) -> tuple[Task, Sums]:
    """The sums of all shards of one reference set, as if a single process had computed them.

    Raises:
        UserError: shards of different tasks, shards that overlap, or a missing sample; the message names the
            file and the difference.
    """
    if not paths:
        raise UserError("No shard was given; name the files that attribute --shard left.")
    parts = sorted(
        ((*load_sums(path), str(path)) for path in paths), key=lambda part: (part[0].shard or (0, 0), part[3])
    )
    task, first = parts[0][0], parts[0][3]
    total = Sums(task.settings)
    path_of_position: dict[int, str] = {}
    for part_task, sums, positions, path in parts:
        _require_same(task, part_task, first, path)
        if repeated := sorted(positions & path_of_position.keys()):
            raise UserError(
                f"sample {repeated[0]} is in {path_of_position[repeated[0]]} and in {path} ({len(repeated)} "
                "are in both); give each shard once"
            )
        path_of_position.update(dict.fromkeys(positions, path))
        total.absorb(sums)
    for part_task, _, positions, path in parts:
        if unfinished := set(part_task.share()) - positions:
            raise UserError(
                f"{path} is not finished: {len(unfinished)} of its {len(part_task.share())} samples are "
                "missing; run that shard again"
            )
    if task.shard:
        numbers, shards = {part_task.shard and part_task.shard[0] for part_task, *_ in parts}, task.shard[1]
        if missing := [f"{number}/{shards}" for number in range(1, shards + 1) if number not in numbers]:
            raise UserError(
                f"shard{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing; give the files of all "
                f"{shards} shards"
            )
    return task, total


def _require_same(expected: Task, actual: Task, first: str, path: str) -> None:
    expected_plain, actual_plain = expected.to_plain(), actual.to_plain()
    for kind in ("model", "samples_fingerprint", "tokens_fingerprint", "settings", "sites"):
        if expected_plain[kind] != actual_plain[kind]:
            expected_value, actual_value = expected_plain[kind], actual_plain[kind]
            if isinstance(expected_value, dict):
                kind = next(key for key in expected_value if expected_value[key] != actual_value.get(key))
                expected_value, actual_value = expected_value[kind], actual_value.get(kind)
            values = "" if kind == "sites" else f" ({actual_value} and {expected_value})"
            raise UserError(
                f"{path} and {first} differ in {kind.replace('_', ' ')}{values}; merge shards of one "
                "attribution only"
            )
    if expected.shard and actual.shard and expected.shard[1] != actual.shard[1]:
        raise UserError(
            f"{path} is one of {actual.shard[1]} shards and {first} one of {expected.shard[1]}; merge shards "
            "of one attribution only"
        )


# Partial sums, saved while they grow, so that a killed run resumes where it stopped.


log = logging.getLogger("sparc3")

SHARE = 0.05
"""At most this share of the time is spent on saving, however large the sums are."""


class PartialSums:
    """Keeps this rank's sums on disk.

    A single process writes `path`; with several ranks, each writes a file of its own beside it. After a
    change of the number of ranks, the new ranks share the old files, and each sample counts once.
    """

    def __init__(self, path: Path, task: Task, save_every: float) -> None:
        self.path, self.task, self.save_every = path, task, save_every
        self.positions: set[int] = set()
        self.stop = 0  # the signal that asked the process to end
        self.saved, self.pause = time.monotonic(), save_every

    @property
    def own(self) -> Path:
        if distributed.world() == 1:
            return self.path
        return self.path.with_name(f"{self.path.name}.rank{distributed.rank()}of{distributed.world()}")

    def files(self) -> list[Path]:
        """All our files on disk, whatever number of ranks wrote them."""
        ranks = sorted(self.path.parent.glob(f"{self.path.name}.rank*of*"))
        return [self.path, *ranks] if self.path.is_file() else ranks

    def begin(self, sums: Sums) -> frozenset[int]:
        """Load this rank's share of the files on disk, and return the indices of all finished samples."""
        files, usable = distributed.first((self.files(), self._usable() if distributed.is_main() else []))
        for path in usable[distributed.rank() :: distributed.world()]:
            _, loaded, positions = load_sums(path)
            sums.absorb(loaded)
            self.positions |= positions
        done = self._gather_positions()
        if done and distributed.is_main():
            log.info("resuming: %d of %d samples are done", len(done), len(self.task.share()))
        current = set(distributed.gather(self.own))
        if set(files) - current:
            self.save(sums)
            distributed.wait()
            self._remove(set(files) - current)
        return done

    def _gather_positions(self) -> frozenset[int]:
        return frozenset(position for part in distributed.gather(sorted(self.positions)) for position in part)

    def _remove(self, paths: Iterable[Path]) -> None:
        if distributed.is_main():
            for path in paths:
                path.unlink(missing_ok=True)
        distributed.wait()

    def _usable(self) -> list[Path]:
        """Files of this task whose samples do not overlap, those with the most samples first."""
        candidates: list[tuple[Path, frozenset[int]]] = []
        for path in self.files():
            try:
                task, positions = read_positions(path)
                if task == self.task.fingerprint:
                    load_sums(path)
                    candidates.append((path, positions))
                else:
                    log.warning(
                        "%s belongs to another model, other samples or settings; starting from the beginning",
                        path.name,
                    )
            except UserError as error:
                log.warning("%s; starting from the beginning", error)
        covered: set[int] = set()
        usable = []
        for path, positions in sorted(candidates, key=lambda pair: (-len(pair[1]), pair[0])):
            if not positions & covered:
                usable.append(path)
                covered |= positions
        return usable

    def skip_done(self, batches: list[Batch], done: frozenset[int]) -> list[Batch]:
        """The batches without finished samples. Untouched batches stay as they are, so that sums are the same
        to the last bit."""
        remaining = []
        for batch in batches:
            samples = [sample for sample in batch.samples if sample.index not in done]
            if samples:
                is_whole = len(samples) == len(batch.samples)
                remaining.append(batch if is_whole else make_batch(samples, batch.ids.device))
        return remaining

    def record(self, batch: Batch, sums: Sums) -> None:
        """Note that the batch is in the sums. Save them if it is time, or if the process was asked to end;
        then end it."""
        self.positions |= {sample.index for sample in batch.samples}
        if self.stop or time.monotonic() - self.saved >= self.pause:
            self.save(sums)
        if self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop:
            # Die of the signal itself, so that the parent (SLURM, a shell) sees the right status.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def save(self, sums: Sums) -> None:
        start = time.monotonic()
        save_sums(self.own, self.task, sums, self.positions)
        self.saved = time.monotonic()
        self.pause = max(self.save_every, (self.saved - start) / SHARE)

    def end(self, total: Sums) -> None:
        """Remove the files, except that a shard leaves the sums of all ranks at `path`."""
        positions, keep = self._gather_positions(), self.task.shard is not None
        if keep and distributed.is_main():
            save_sums(self.path, self.task, total, positions)
        distributed.wait()
        self._remove(path for path in self.files() if not (keep and path == self.path))
        if distributed.is_main():
            remove_leftovers(self.path.parent, f"{glob.escape(self.path.name)}*")

    @contextmanager
    def finish_batch_first(self) -> Iterator[None]:
        """Inside, SIGTERM (SLURM's time limit) and the first Ctrl-C let the current batch finish and the sums
        be saved before the process ends."""
        if threading.current_thread() is not threading.main_thread():  # only it may set signal handlers
            yield
            return
        signals = (signal.SIGTERM, signal.SIGINT)
        handlers = {number: signal.signal(number, self._note_request) for number in signals}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _note_request(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt
        self.stop = number
