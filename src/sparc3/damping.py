"""Damping: neurons made quieter instead of silent, in the weights, for a trial."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import UserError
from .files import fingerprint
from .models import down_sites, model_id, require_present, sites_of
from .tensors import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Damping:
    """A factor for each neuron.

    Attributes:
        factors: name of each mlp.up → [out], 1 where a neuron stays as it is, 0 where it is removed.
    """

    factors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """How many neurons it changes."""
        return sum(int((factor != 1).sum()) for factor in self.factors.values())

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({"factors": digest(dict(self.factors))})


@contextmanager
def damped(model: "PreTrainedModel", damping: Damping) -> Iterator["PreTrainedModel"]:
    """Inside, each neuron's output is multiplied by its factor; after it every touched value is back, bit for bit, whatever happened inside.

    The factor goes into the neuron's column of mlp.down, where it is exact in every family: a non-linearity stands between mlp.up and
    the neuron's output, and in a plain MLP it does not commute with a factor.

    Raises:
        UserError: neurons that this model does not have, quantised weights, or weights on the disk; nothing has been touched then.
    """
    require_present(model)
    columns = _columns(model, damping)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for weight, index, factor in columns:
                kept.append((weight, index, weight[:, index].clone()))
                wide = torch.promote_types(weight.dtype, factor.dtype)
                weight[:, index] = (weight[:, index].to(wide) * factor).to(weight.dtype)
        yield model
    finally:
        with torch.no_grad():
            for weight, index, values in reversed(kept):
                weight[:, index] = values


def _columns(model: "PreTrainedModel", damping: Damping) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(weight of mlp.down [out, in], its columns to scale, their factors) of each site with any."""
    of_mlp = down_sites(model)
    downs = {site.name: of_mlp[site.mlp] for site in sites_of(model, ("mlp.up",))}
    found = []
    for name, factors in damping.factors.items():
        if name not in downs or downs[name].inp != len(factors):
            there = f"{name}, which '{model_id(model)}' does not have"
            raise UserError(f"the damping names {len(factors)} neurons of {there}; use the model it was made on")
        down = downs[name]
        if down.quantised:
            raise UserError(f"{down.name} holds quantised weights, which cannot be scaled in place; damp the unquantised model")
        index = (factors != 1).nonzero()[:, 0]
        if len(index):
            device = down.stored.device
            found.append((down.stored, index.to(device), factors[index].float().to(device)))
    return found
