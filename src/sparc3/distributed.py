"""Ranks of a distributed run. Without torchrun this process is rank 0 of 1, and nothing is communicated."""

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
    """Whether this process writes files and logs: rank 0 does."""
    return rank() == 0


def start() -> None:
    """Join the group that torchrun announced; does nothing in a single process, or when already joined."""
    if world() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        # gloo communicates over the CPU. It is available on every machine, and the sums are only a few
        # megabytes.
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
        atexit.register(_leave)


def end(code: int = 0) -> None:
    """The last call of a program under torchrun: wait for every rank if all went well, and end this
    process. Does nothing in a single process.

    os._exit skips Python's shutdown. Otherwise a thread of gloo that still holds the last collective's
    tensors may ask for the interpreter's lock to release them while the interpreter shuts down, which
    aborts the process after everything is written. destroy_process_group does not wait for that thread.
    """
    if world() == 1:
        return
    import torch.distributed as dist

    if code == 0 and dist.is_initialized():
        with suppress(LostRank):  # ranks that have left were done
            wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave() -> None:
    """At exit, for programs that do not call end()."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _detect_lost_rank() -> Iterator[None]:
    """Inside, gloo's broken connections, by which a killed rank shows, become LostRank."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and "onnection" not in str(error):
            raise
        raise LostRank(
            f"rank {rank()} lost another one, which ended early; run the same command again to resume"
        ) from error


def stride(items: Sequence[T]) -> Sequence[T]:
    """This rank's share: every world-th item, starting at its rank."""
    return items[rank() :: world()]


def sum_(tensors: Iterable[Any]) -> None:
    """Add each tensor over all ranks, in place (tensors on the CPU)."""
    if world() == 1:
        return
    import torch.distributed as dist

    with _detect_lost_rank():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; for small plain objects."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    with _detect_lost_rank():
        dist.all_gather_object(values, value)
    return values


def first(value: T) -> T:
    """Rank 0's value on every rank, so that all take the same decision."""
    return gather(value)[0]


def run_in_parallel(items: Sequence[T], work: Callable[[Sequence[T]], list[Made]]) -> list[Made]:
    """work() over all items, each rank on its share; every rank gets all results, in the items' order."""
    parts = gather(work(stride(items)) if items else [])
    results: list[Any] = [None] * len(items)
    for first, part in enumerate(parts):
        results[first :: world()] = part
    return results


def wait() -> None:
    """Wait until every rank has called this."""
    if world() > 1:
        import torch.distributed as dist

        with _detect_lost_rank():
            dist.barrier()
