"""Skip linear maps at positions that do not matter.

A linear map sees each position by itself. Padding does not matter, and after the attention of the last layer
only target positions are read: relevance everywhere else is zero. So a map gets only the rows that matter,
and the other rows of its output are zero.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.families import Family
from ..models.sites import family_of, layers_of, shadow
from ..samples.batches import Batch
from .patching import LINEAR

if TYPE_CHECKING:
    from transformers import PreTrainedModel


READ_ELSEWHERE = {"attn.k", "attn.v"}
"""Roles whose outputs later positions read, also in the last layer."""

WORTH = 0.9
"""Pack rows if at most this share of them matters; otherwise the copies cost more than they save."""


@contextmanager
def pack_positions(model: "PreTrainedModel", batch: Batch) -> Iterator[None]:
    """Inside, the layers' linear maps compute this batch's real tokens only, and after the last attention
    target positions only."""
    real, targets = (_rows(batch, last=last) for last in (False, True))
    layers, count = list(layers_of(model)), batch.ids.numel()
    with ExitStack() as stack:
        for layer in layers if len(real) <= WORTH * count else layers[-1:]:
            for module, can_cut in _maps(layer, family_of(model)):
                rows = targets if can_cut and layer is layers[-1] else real
                if len(rows) <= WORTH * count:
                    packed_forward = _pack_forward(module.forward, rows.to(batch.ids.device), count)
                    stack.enter_context(shadow(module, "forward", packed_forward))
        yield


def _rows(batch: Batch, *, last: bool) -> Tensor:
    """Row indices, in the flattened batch [B · T], of its real tokens, or of its target positions."""
    width = batch.ids.shape[1]
    positions_by_sample = (
        sorted(set(sample.positions)) if last else range(len(sample.ids)) for sample in batch.samples
    )
    return torch.tensor(
        [
            row * width + position
            for row, positions in enumerate(positions_by_sample)
            for position in positions
        ]
    )


def _maps(layer: nn.Module, family: Family) -> Iterator[tuple[nn.Module, bool]]:
    """The linear modules of a layer's sites, and whether only the same position reads their output."""
    modules = dict(layer.named_modules())
    read_later = {family.roles[role].partition("#")[0] for role in READ_ELSEWHERE if role in family.roles}
    for path in dict.fromkeys(path.partition("#")[0] for path in family.roles.values()):
        if path in modules and type(modules[path]).__name__ in LINEAR:
            yield modules[path], path not in read_later


def _pack_forward(
    original: Callable[[Tensor], Tensor], rows: Tensor, count: int
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        # The rows are those of [B · T] inputs; of any other input, nothing is known, so all of it matters.
        if len(flat) != count:
            return original(x)
        index = rows.to(x.device)
        packed = original(flat.index_select(0, index))
        return packed.new_zeros(count, packed.shape[-1]).index_add_(0, index, packed).view(*x.shape[:-1], -1)

    return forward
