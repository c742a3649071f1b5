"""Rank and world. Without torchrun this is rank 0 of 1, and every function below is the plain thing."""

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from .errors import LostRank

T = TypeVar("T")
Made = TypeVar("Made")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def start() -> None:
    """Join the group that torchrun announced; does nothing in a single process, or when already joined."""
    if world() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        # gloo moves the sums, a few megabytes, over the CPU: it is there on every machine, and needs no
        # device of its own.
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
        atexit.register(_leave)


def end(code: int = 0) -> None:
    """The last line of a program under torchrun: wait for every rank where all is well, and end this process;
    nothing in a single process.

    The interpreter is not taken down. A thread of gloo may still hold the last collective's tensors, asks for
    the interpreter's lock to give them back, and finds an interpreter that is being taken down, which ends
    that thread in a way that aborts the process, after everything is done and written. destroy_process_group
    does not wait for that thread.
    """
    if world() == 1:
        return
    import torch.distributed as dist

    if code == 0 and dist.is_initialized():
        with suppress(LostRank):  # whoever has gone already was done
            wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave() -> None:
    """For programs that do not call end()."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """A rank that was killed shows as a connection that broke."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and "onnection" not in str(error):
            raise
        raise LostRank(
            f"rank {rank()} lost another one, which ended early; run the same command again to resume"
        ) from error


def stride(items: Sequence[T]) -> Sequence[T]:
    """This rank's share: every world-th item, from its rank on."""
    return items[rank() :: world()]


def sum_(tensors: Iterable[Any]) -> None:
    """Add each tensor over all ranks, in place (tensors on the CPU)."""
    if world() == 1:
        return
    import torch.distributed as dist

    with _together():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; for small plain objects."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    with _together():
        dist.all_gather_object(values, value)
    return values


def first(value: T) -> T:
    """Rank 0's value, on every rank, so that all take the same turn."""
    return gather(value)[0]


def in_parallel(items: Sequence[T], work: Callable[[Sequence[T]], list[Made]]) -> list[Made]:
    """work() over all items, each rank on its share; every rank gets all results, in the items' order."""
    parts = gather(work(stride(items)) if items else [])
    made: list[Any] = [None] * len(items)
    for first, part in enumerate(parts):
        made[first :: world()] = part
    return made


def wait() -> None:
    """Go on when every rank is here."""
    if world() > 1:
        import torch.distributed as dist

        with _together():
            dist.barrier()
