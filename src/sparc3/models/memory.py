"""What to do when an allocation fails: halve the batch and go on. And how to need less."""

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
    """Whether an allocation failed: on a GPU, the CPU, or of the CPU's memory pinned for a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return "can't allocate memory" in said or "CUDA error: out of memory" in said


def too_large(what: str, error: BaseException) -> Sparc3Error:
    """The error for one sample alone that does not fit."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Sparc3Error(
        f"{what} alone does not fit into memory; shorten it, load the model in bfloat16, or use a device "
        f"with more ({said})"
    )


def available(device: torch.device) -> int | None:
    """Bytes left on a device; of a CPU what its machine or control group has, None if untold."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        left = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        return min(left, most - used)
    except (OSError, ValueError):
        return left


def give_back() -> None:
    """Hand freed memory back to the system; glibc keeps it in pieces too small for what comes next."""
    if trim := _trim():
        trim(0)


class _Growth:
    """How large this process may become before its holes are handed back, in bytes; 0 before the first."""

    FIRST = 64 * 2**20
    began = limit = 0

    @classmethod
    def look(cls, *_: Any) -> None:
        held = resident()
        if not cls.limit:
            cls.began, cls.limit = held, cls.FIRST
        if held - cls.began > cls.limit:
            give_back()
            cls.limit = max(cls.limit * 3 // 2, resident() - cls.began)


@contextmanager
def few_holes(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, each time the process has grown by half again, after a layer, `give_back`.

    What autograd keeps lies among what was freed, and glibc puts no aligned block into a hole of its own
    size, so that holes come to take as much as what is kept. To hand them back costs page faults later: so it
    is done while the process grows, and no more when it has grown.
    """
    with ExitStack() as stack:
        if _trim() and resident():
            _Growth.look()
            for layer in layers:
                stack.callback(layer.register_forward_hook(_Growth.look).remove)
        yield


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell as Linux does."""
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


def room(model: Any, work: str, most: int) -> int:
    """How much of this work to do at once: `most`, or less where memory has been too small before."""
    return min(most, _ROOM.get(model, {}).get(work, most))


def remember(model: Any, work: str, fits: int) -> None:
    """Let later work of this kind on this model begin with what fits."""
    _ROOM.setdefault(model, {})[work] = fits


def in_batches(
    items: Sequence[Item],
    size: int,
    work: Callable[[Sequence[Item]], list[Made]],
    done: Callable[[int], object] = int,
    *,
    of: tuple[Any, str],
) -> list[Made]:
    """work() over the items in batches of `size`, halved whenever one does not fit into memory; results in
    the items' order.

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
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise too_large("a sample", error) from error
            size = max(1, len(batch) // 2)
            remember(*of, size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            done(len(batch))
    return made


# Logits where they are wanted and nowhere else.


def logits_at(model: "PreTrainedModel", ids: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Logits [N, V] at the given (row, column) positions of ids [B, T], without a logit anywhere else.

    No attention mask is given: with padding on the right and causal attention no real position sees a padded
    one.
    """
    head = model.get_output_embeddings()
    assert head is not None

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].view(*ids.shape, -1)
        at = tuple(torch.tensor(where, device=hidden.device) for where in (rows, columns))
        return hidden[at].unsqueeze(0), *args[1:]

    hook = head.register_forward_pre_hook(pick)
    try:
        return model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        hook.remove()
