"""Removing a circuit from a model in memory: for a trial, or for good."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.fingerprint import model_id, require_present
from ..models.offloading import named_values, value_of
from ..models.sites import Site, down_sites, sites_of
from ..storage import digest, fingerprint
from .circuit import Circuit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Target = tuple[Tensor, Any]
"""A stored tensor, and the index or mask of the values in it that change."""


@contextmanager
def ablated(model: "PreTrainedModel", circuit: Circuit) -> Iterator["PreTrainedModel"]:
    """Inside, the circuit's units are zero, or weaker by its strength; after it every touched value is back,
    bit for bit.

    Raises:
        UserError: a unit that this model does not have; nothing has been touched then.
    """
    require_present(model)
    targets = _targets(model, circuit)
    with _restored(targets):
        _weaken_(targets, circuit.strength)
        yield model


def ablate_(model: "PreTrainedModel", circuit: Circuit) -> None:
    """Set the circuit's units to zero, or weaken them by its strength, for good (docs/method.md, 9). Raises
    UserError as `ablated` does."""
    require_present(model)
    _weaken_(_targets(model, circuit), circuit.strength)


@contextmanager
def _restored(targets: list[Target]) -> Iterator[None]:
    """After it, whatever happened inside, the values at the targets are as they were, bit for bit."""
    with torch.no_grad():
        kept = [_values(tensor, index) for tensor, index in targets]
    try:
        yield
    finally:
        with torch.no_grad():
            for (tensor, index), values in zip(targets, kept, strict=True):
                _put_(tensor, index, values)


def removed_units(model: "PreTrainedModel", circuit: Circuit) -> dict[str, Tensor]:
    """Parameter name → uint8 tensor of its shape: how many units an element is weakened for. Raises UserError
    as `ablated` does.

    More than one is possible below strength 1 alone: a neuron of mlp.down and one of mlp.up meet in an
    element of mlp.down.
    """
    require_present(model)
    found: dict[str, Tensor] = {}
    parameters = dict(named_values(model))
    for tensor, index in _targets(model, circuit):
        name, offset = _place_of(tensor, parameters)
        if name not in found:
            found[name] = torch.zeros_like(parameters[name], dtype=torch.uint8)
        view = found[name].as_strided(tensor.shape, tensor.stride(), offset)
        if _is_mask(index):
            view += index
        else:
            view[index] += 1
    return found


def weaken_values(values: Tensor, strength: float) -> Tensor:
    """What is left of the values, (1 − strength) of them, computed in float64 and rounded to their dtype: the
    same bits for any layout."""
    return (values.double() * (1 - strength)).to(values.dtype)


def _place_of(view: Tensor, parameters: dict[str, Tensor]) -> tuple[str, int]:
    """Which parameter a view looks into, and where in it the view begins, in elements."""
    for name, parameter in parameters.items():
        offset = (view.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if view.device == parameter.device and 0 <= offset < parameter.numel():
            return name, offset
    raise AssertionError("a site that is no parameter of its model")


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _values(tensor: Tensor, index: Any) -> Tensor:
    """A copy of the values at the index, and of no other. A mask needs no list of places, which would be
    larger than the matrix."""
    return tensor.masked_select(index) if _is_mask(index) else tensor[index].clone()


def _put_(tensor: Tensor, index: Any, values: Tensor) -> None:
    if _is_mask(index):
        tensor.masked_scatter_(index, values)
    else:
        tensor[index] = values


@torch.no_grad()
def _weaken_(targets: list[Target], strength: float) -> None:
    for tensor, index in targets:
        if strength != 1:
            _put_(tensor, index, weaken_values(_values(tensor, index), strength))
        elif _is_mask(index):
            tensor.masked_fill_(index, 0)
        else:
            tensor[index] = 0


def _targets(model: "PreTrainedModel", circuit: Circuit) -> list[Target]:
    """The (tensor, index) pairs to be zero: rows of mlp.up and its bias, columns of attn.o that read a head,
    or a mask of weights.

    Below strength 1 the columns of mlp.down that read a neuron of mlp.up, in every family: in a plain MLP a
    non-linearity stands between mlp.up and the neuron's output, with which a factor does not commute.
    """
    readers = down_sites(model) if circuit.unit == "neuron" and circuit.strength != 1 else {}
    targets: list[Target] = []
    for name, site in circuit.sites(model).items():
        units = circuit.members[name]
        reader = readers[site.mlp] if readers and site.role == "mlp.up" else None
        if (changed := reader or site).quantised:
            raise UserError(
                f"{changed.name} holds quantised weights, which cannot be changed in place; ablate the "
                "unquantised model"
            )
        weight = changed.stored
        if circuit.unit == "weight":
            targets.append((weight, _stored_mask(site, units)))
            continue
        indices = torch.tensor(list(units), dtype=torch.long, device=weight.device)
        if reader:
            targets.append((weight, (slice(None), indices)))
        elif circuit.unit == "head":
            width = site.inp // site.heads
            columns = indices[:, None] * width + torch.arange(width, device=weight.device)
            targets.append((weight, (slice(None), columns.reshape(-1))))
        else:
            rows = site.stored_rows(indices)
            targets.append((weight, rows))
            if getattr(site.module, "bias", None) is not None:
                targets.append((value_of(site.module, "bias"), rows))
    return targets


def _stored_mask(site: Site, mask: Tensor) -> Tensor:
    """The site's mask [out, in] as one of everything that its module stores."""
    mask = mask.to(site.stored.device)
    if site.rows is None:
        return mask
    whole = torch.zeros(site.stored.shape, dtype=torch.bool, device=mask.device)
    whole[site.stored_rows(torch.arange(site.out, device=mask.device))] = mask
    return whole


# Damping: neurons made quieter instead of silent, in the weights, for a trial.


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
def damp(model: "PreTrainedModel", damping: Damping) -> Iterator["PreTrainedModel"]:
    """Inside, each neuron's output is multiplied by its factor; after it every touched value is back, bit for
    bit, whatever happened inside.

    The factor goes into the neuron's column of mlp.down, where it is exact in every family: a non-linearity
    stands between mlp.up and the neuron's output, and in a plain MLP it does not commute with a factor.

    Raises:
        UserError: neurons that this model does not have, quantised weights, or weights on the disk; nothing
            has been touched then.
    """
    require_present(model)
    columns = _columns(model, damping)
    with _restored([(weight, (slice(None), index)) for weight, index, _ in columns]):
        with torch.no_grad():
            for weight, index, factor in columns:
                wide = torch.promote_types(weight.dtype, factor.dtype)
                weight[:, index] = (weight[:, index].to(wide) * factor).to(weight.dtype)
        yield model


def _columns(model: "PreTrainedModel", damping: Damping) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(weight of mlp.down [out, in], its columns to scale, their factors) of each site with any."""
    of_mlp = down_sites(model)
    downs = {site.name: of_mlp[site.mlp] for site in sites_of(model, ("mlp.up",))}
    found = []
    for name, factors in damping.factors.items():
        down = downs.get(name)
        if down is None or down.inp != len(factors):
            raise UserError(
                f"the damping names {len(factors)} neurons of {name}, which '{model_id(model)}' does not "
                "have; use the model it was made on"
            )
        if down.quantised:
            raise UserError(
                f"{down.name} holds quantised weights, which cannot be scaled in place; damp the unquantised "
                "model"
            )
        index = (factors != 1).nonzero()[:, 0]
        if len(index):
            device = down.stored.device
            found.append((down.stored, index.to(device), factors[index].float().to(device)))
    return found
