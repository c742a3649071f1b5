"""Linear maps at the positions that count, and at no other.

A linear map sees each position by itself. Padding needs none, and after the attention of the last layer only
target positions are read: relevance everywhere else is zero. So a map gets the rows that count, and zeros
stand where the others were.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.families import Family
from ..models.sites import family_of, layers_of, shadowed
from ..samples.batches import Batch
from .patching import LINEAR

if TYPE_CHECKING:
    from transformers import PreTrainedModel


READ_ELSEWHERE = {"attn.k", "attn.v"}
"""Roles whose outputs later positions read, in the last layer too."""

WORTH = 0.9
"""Rows are picked where at most this share of them counts; else the copies cost more than they save."""


@contextmanager
def pack_positions(model: "PreTrainedModel", batch: Batch) -> Iterator[None]:
    """Inside, the linear maps of the layers work on this batch's real tokens only, and behind the last
    attention on target positions only."""
    real, targets = (_rows(batch, last=last) for last in (False, True))
    layers, count = list(layers_of(model)), batch.ids.numel()
    with ExitStack() as stack:
        for layer in layers if len(real) <= WORTH * count else layers[-1:]:
            for module, cut in _maps(layer, family_of(model)):
                rows = targets if cut and layer is layers[-1] else real
                if len(rows) <= WORTH * count:
                    picking = _picking(module.forward, rows.to(batch.ids.device), count)
                    stack.enter_context(shadowed(module, "forward", picking))
        yield


def _rows(batch: Batch, *, last: bool) -> Tensor:
    """Places in the flattened batch [B · T] of its real tokens, or of its target positions."""
    width = batch.ids.shape[1]
    places = (sorted(set(sample.positions)) if last else range(len(sample.ids)) for sample in batch.samples)
    return torch.tensor([row * width + place for row, some in enumerate(places) for place in some])


def _maps(layer: nn.Module, family: Family) -> Iterator[tuple[nn.Module, bool]]:
    """The linear modules of a layer's sites, and whether nothing but the position itself reads what they
    give."""
    modules = dict(layer.named_modules())
    read = {family.roles[role].partition("#")[0] for role in READ_ELSEWHERE if role in family.roles}
    for path in dict.fromkeys(path.partition("#")[0] for path in family.roles.values()):
        if path in modules and type(modules[path]).__name__ in LINEAR:
            yield modules[path], path not in read


def _picking(plain: Callable[[Tensor], Tensor], rows: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != count:
            return plain(x)
        here = rows.to(x.device)
        made = plain(flat.index_select(0, here))
        return made.new_zeros(count, made.shape[-1]).index_add_(0, here, made).view(*x.shape[:-1], -1)

    return forward
