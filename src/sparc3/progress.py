"""Progress of a long stage: a bar on a terminal, or one line per minute elsewhere, such as in a cluster's
log."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from . import distributed

T = TypeVar("T")
log = logging.getLogger("sparc3")
EVERY = 60.0
"""Seconds between two lines."""


class Progress:
    """A progress display, to be used in a `with` statement or closed; `update` counts finished items.

    Without a terminal, `update` logs the finished and total items and the time left every `EVERY` seconds,
    so that a stage of less than a minute writes nothing.

    Args:
        total: number of items that this process works on.
        label, unit: what the stage does, and what it counts: "lrp", "sample".
        show: False for silence; in any case only rank 0 shows progress.
    """

    def __init__(self, total: int, label: str, unit: str, *, show: bool = True) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = 0
        self.began = self.said = time.monotonic()
        self.shown = show and distributed.is_main()
        self.bar: Any = None
        if self.shown and _has_terminal():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=label, unit=unit)

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and time.monotonic() - self.said >= EVERY and self.done < self.total:
            self.said = time.monotonic()
            _tell(f"{self.label}: {self.done:,} of {self.total:,} {self.unit}s, {self._time_left()} left")

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which counts as finished when the next one is requested."""
        for item in items:
            yield item
            self.update()

    def _time_left(self) -> str:
        if not self.done:
            return "an unknown time"
        return write_duration((time.monotonic() - self.began) / self.done * (self.total - self.done))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def write_duration(seconds: float) -> str:
    """A duration such as "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _has_terminal() -> bool:
    # A notebook has no terminal, but can show a bar.
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _tell(line: str) -> None:
    """Write to the log, or to stderr if the program that imports the package has not set the log's level."""
    if log.isEnabledFor(logging.INFO):
        log.info(line)
    else:
        print(line, file=sys.stderr, flush=True)
