"""What to do when an allocation fails: halve the batch and go on. And how to need less."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def give_back() -> None:
    """Hand memory that was freed back to the system; otherwise glibc keeps it in pieces too small for the matrices that come next."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    """glibc's malloc_trim; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


_ROOM: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def room(model: Any, work: str, most: int) -> int:
    """How much of this work on this model to do at once: `most`, or less where this process has met the end of memory before."""
    return min(most, _ROOM.get(model, {}).get(work, most))


def remember(model: Any, work: str, fits: int) -> None:
    """Let later work of this kind on this model begin with what fits."""
    _ROOM.setdefault(model, {})[work] = fits


def in_batches(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], list[Made]], done: Callable[[int], object] = int, *, of: tuple[Any, str]
) -> list[Made]:
    """work() over the items in batches of `size`, halved whenever one does not fit into memory; results in the items' order.

    Args:
        done: told the number of items after each batch, for a progress bar.
        of: the model and the kind of work, for which it is remembered what fits.
    """
    made: list[Made] = []
    size = room(*of, size)
    while len(made) < len(items):
        batch = items[len(made) : len(made) + size]
        try:
            made += work(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not (out_of_memory(error) or isinstance(error, MemoryError)):
                raise
            size = max(1, len(batch) // 2)
            remember(*of, size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            done(len(batch))
    return made
