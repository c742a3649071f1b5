"""Partial sums, saved while they grow, so that a run that was killed goes on where it was."""

import glob
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import distributed
from ..batches import Batch, make_batch
from ..errors import UserError
from ..files import remove_leftovers
from .shards import Task, load_sums, read_positions, save_sums
from .sums import Sums

log = logging.getLogger("sparc3")

SHARE = 0.05
"""At most this share of the time goes into saving, however large the sums are."""


class Keeper:
    """Keeps this rank's sums on disk.

    A single process writes `path`; of several, each writes a file of its own beside it. Files of another number of ranks are taken
    over: what they hold is shared out, and each place of the reference set counts once.
    """

    def __init__(self, path: Path, task: Task, every: float) -> None:
        self.path, self.task, self.every = path, task, every
        self.positions: set[int] = set()
        self.stop = 0  # the signal that asks to end
        self.saved, self.pause = time.monotonic(), every

    @property
    def own(self) -> Path:
        return self.path if distributed.world() == 1 else self.path.with_name(f"{self.path.name}.rank{distributed.rank()}of{distributed.world()}")

    def files(self) -> list[Path]:
        """Everything of ours that is on disk, of whatever number of ranks."""
        return [*([self.path] if self.path.is_file() else []), *sorted(self.path.parent.glob(f"{self.path.name}.rank*of*"))]

    def begin(self, sums: Sums) -> frozenset[int]:
        """Take over what is on disk, and say which places of the reference set are done, on whichever rank."""
        there, usable = distributed.first((self.files(), self._usable() if distributed.is_main() else []))
        for path in usable[distributed.rank() :: distributed.world()]:
            _, found, positions = load_sums(path)
            sums.absorb(found)
            self.positions |= positions
        done = frozenset(place for part in distributed.gather(sorted(self.positions)) for place in part)
        if done and distributed.is_main():
            log.info("going on: %d of %d samples are done", len(done), len(self.task.share()))
        if set(there) - {path for part in distributed.gather([self.own]) for path in part}:
            self.save(sums)
            self._remove_others()
        return done

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
                    log.warning("%s is of another model, other samples or settings; starting anew", path.name)
            except UserError as error:
                log.warning("%s; starting anew", error)
        held: set[int] = set()
        usable = []
        for path, positions in sorted(found, key=lambda pair: (-len(pair[1]), pair[0])):
            if not positions & held:
                usable.append(path)
                held |= positions
        return usable

    def left(self, batches: list[Batch], done: frozenset[int]) -> list[Batch]:
        """The batches without what is done. Whole batches stay whole, so that sums come out the same to the last bit."""
        kept = [(batch, [sample for sample in batch.samples if sample.index not in done]) for batch in batches]
        return [batch if len(some) == len(batch.samples) else make_batch(some, batch.ids.device) for batch, some in kept if some]

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
        """All is done: leave the sums of all ranks at `path` where they are a shard, and nothing otherwise."""
        positions = {place for part in distributed.gather(sorted(self.positions)) for place in part}
        if self.task.shard and distributed.is_main():
            save_sums(self.path, self.task, whole, positions)
        distributed.wait()
        if distributed.is_main():
            for path in self.files():
                if path != self.path or not self.task.shard:
                    path.unlink(missing_ok=True)
            remove_leftovers(self.path.parent, f"{glob.escape(self.path.name)}*")

    def _remove_others(self) -> None:
        owned = {path for part in distributed.gather([self.own]) for path in part}
        if distributed.is_main():
            for path in set(self.files()) - owned:
                path.unlink(missing_ok=True)
        distributed.wait()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM (SLURM's time limit) and the first Ctrl-C let the batch under way end and the sums be saved before the process ends."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _asked(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt
        self.stop = number
