"""Memory: halve the batch when an allocation fails, return freed memory, and compute logits only where
needed."""

import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import Sparc3Error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Item = TypeVar("Item")
Made = TypeVar("Made")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU, on the CPU, or in pinned memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch raises a plain RuntimeError if the CPU, or pinned memory, has no room; only its text tells.
    message = str(error) if isinstance(error, RuntimeError) else ""
    return "can't allocate memory" in message or "CUDA error: out of memory" in message


def too_large(description: str, error: BaseException) -> Sparc3Error:
    """The error for a single sample that does not fit."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Sparc3Error(
        f"{description} alone does not fit into memory; shorten it, load the model in bfloat16, or use a "
        f"device with more ({reason})"
    )


def available(device: torch.device) -> int | None:
    """Free bytes on a device; for a CPU, of its machine or control group. None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, current = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current")
        )
        return min(free, limit - current)
    except (OSError, ValueError):  # no control group (version 2), or its limit is "max"
        return free


def return_memory() -> None:
    """Return freed memory to the system; glibc keeps it in pieces that are too small for later
    allocations."""
    if trim := _trim():
        trim(0)


class _Growth:
    """The growth of this process in bytes after which freed memory is returned; 0 before the first check."""

    FIRST = 64 * 2**20
    began = limit = 0

    @classmethod
    def look(cls, *_: Any) -> None:
        size = resident()
        if not cls.limit:
            cls.began, cls.limit = size, cls.FIRST
        if size - cls.began > cls.limit:
            return_memory()
            cls.limit = max(cls.limit * 3 // 2, resident() - cls.began)


@contextmanager
def limit_fragmentation(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, call `return_memory` after a layer whenever the process has grown by another half.

    Tensors kept by autograd lie between freed blocks, and glibc does not reuse a hole for an aligned block
    of the same size, so holes eventually take as much memory as the kept tensors. Returning them costs
    page faults later, so it is only done while the process grows.
    """
    with ExitStack() as stack:
        if _trim() and resident():
            _Growth.look()
            for layer in layers:
                stack.callback(layer.register_forward_hook(_Growth.look).remove)
        yield


def resident() -> int:
    """Resident memory of this process in bytes; 0 on systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


@functools.cache
def _trim() -> Any:
    """glibc's malloc_trim; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


_ROOM: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def room(model: Any, work: str, limit: int) -> int:
    """How much of this work to do at once: `limit`, or less if memory was too small for it before."""
    return min(limit, _ROOM.get(model, {}).get(work, limit))


def remember(model: Any, work: str, fits: int) -> None:
    """Let later work of this kind on this model start with a size that fits."""
    _ROOM.setdefault(model, {})[work] = fits


def run_in_batches(
    items: Sequence[Item],
    size: int,
    work: Callable[[Sequence[Item]], list[Made]],
    done: Callable[[int], object] = int,
    *,
    memory_key: tuple[Any, str],
) -> list[Made]:
    """work() over the items in batches of `size`, which is halved whenever a batch does not fit into
    memory; the results are in the items' order.

    Args:
        done: called with the number of items after each batch, for a progress bar.
        memory_key: the model and the kind of work, for which the size that fits is remembered.
    """
    results: list[Made] = []
    size = room(*memory_key, size)
    while len(results) < len(items):
        batch = items[len(results) : len(results) + size]
        try:
            results += work(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise too_large("a sample", error) from error
            size = max(1, len(batch) // 2)
            remember(*memory_key, size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            done(len(batch))
    return results


# Logits at selected positions only.


def logits_at(model: "PreTrainedModel", ids: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Logits [N, V] at the given (row, column) positions of ids [B, T]; no other logits are computed.

    No attention mask is needed: with padding on the right and causal attention, no real position sees the
        padding.
    """
    head = model.get_output_embeddings()
    assert head is not None

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].view(*ids.shape, -1)
        index = tuple(torch.tensor(indices, device=hidden.device) for indices in (rows, columns))
        return hidden[index].unsqueeze(0), *args[1:]

    hook = head.register_forward_pre_hook(pick)
    try:
        return model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        hook.remove()
