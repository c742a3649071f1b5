"""Looking at what flows back through a tensor, and computing layers a second time in the backward pass instead of keeping what they computed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..offloading import device_of, is_offloaded
from ..sites import layers_of, shadowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arrived = Callable[[Tensor, Tensor], None]
"""Called in the backward pass with (gradient, what was kept)."""


class _Watch(torch.autograd.Function):
    """The tensor itself. What is kept is kept as autograd keeps its own, so that a checkpointed layer keeps it neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, arrived: Arrived, lowest: bool, copied: bool) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.arrived, ctx.lowest = arrived, lowest
        return x.clone() if copied else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        ctx.arrived(grads[0], *ctx.saved_tensors)
        return None if ctx.lowest else grads[0], None, None, None, None


def watched(x: Tensor, kept: Tensor, arrived: Arrived, *, copied: bool = False) -> Tensor:
    """x, of whose gradient `arrived` will be told; `copied` where what comes next changes it in place.

    Where x asks for no gradient, nothing below it does: the graph begins, and the backward pass ends, there.
    """
    lowest = not x.requires_grad
    z = x.detach().requires_grad_() if lowest else x
    return _Watch.apply(z, kept.detach(), arrived, lowest, copied)  # type: ignore[no-untyped-call, no-any-return]


@contextmanager
def checkpointed(
    model: "PreTrainedModel", within: Callable[[], AbstractContextManager[object]] = nullcontext, *, offload: bool = False
) -> Iterator[None]:
    """Inside, a decoder layer keeps its input alone, and is computed again when the backward pass comes to it.

    transformers' own gradient checkpointing is for training: it needs train mode, in which dropout is on.

    Args:
        within: makes the context that a layer is computed in again.
        offload: keep the inputs on the CPU, pinned beside a GPU, and bring each back when its layer is computed again.
    """
    pinned = device_of(model).type == "cuda"
    with ExitStack() as stack:
        # Where torch stops in the middle of a layer, accelerate's hook does not get to take the weights back.
        stack.enter_context(set_checkpoint_early_stop(not is_offloaded(model)))
        for layer in layers_of(model):
            again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), within()))
            stack.enter_context(shadowed(layer, "forward", partial(_away, again, pinned) if offload else again))
        if offload and pinned:
            stack.callback(torch.accelerator.empty_host_cache)  # which keeps what was pinned
        yield


def _away(again: Callable[..., Any], pinned: bool, *args: Any, **kwargs: Any) -> Any:
    """A checkpointed layer, whose input, all that it keeps, is kept on the CPU."""
    with save_on_cpu(pin_memory=pinned):
        return again(*args, **kwargs)
