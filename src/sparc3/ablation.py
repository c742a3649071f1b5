"""Removing a circuit from a model in memory: for a trial, or for good."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .circuit import Circuit
from .errors import UserError
from .models import ROLES, Site, down_sites, family_of, model_id, require_present, sites_of
from .offloading import named_values, value_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def ablated(model: "PreTrainedModel", circuit: Circuit) -> Iterator["PreTrainedModel"]:
    """Inside, the circuit's units are zero, or weaker by its strength; after it every touched value is back, bit for bit.

    Raises:
        UserError: a unit that this model does not have; nothing has been touched then.
    """
    require_present(model)
    targets = _targets(model, circuit)
    kept: list[tuple[Tensor, Any, Tensor]] = []
    try:
        with torch.no_grad():
            for tensor, index in targets:
                kept.append((tensor, index, _values(tensor, index)))
                _weaken_(tensor, index, circuit.strength)
        yield model
    finally:
        with torch.no_grad():
            for tensor, index, values in reversed(kept):
                _put_(tensor, index, values)


def ablate_(model: "PreTrainedModel", circuit: Circuit) -> None:
    """Set the circuit's units to zero, or weaken them by its strength, for good (docs/method.md, 9). Raises UserError as `ablated` does."""
    require_present(model)
    with torch.no_grad():
        for tensor, index in _targets(model, circuit):
            _weaken_(tensor, index, circuit.strength)


def touched(model: "PreTrainedModel", circuit: Circuit) -> dict[str, Tensor]:
    """Parameter name → uint8 tensor of its shape: how many units an element is weakened for. Raises UserError as `ablated` does.

    More than one is possible below strength 1 alone: a neuron of mlp.down and one of mlp.up meet in an element of mlp.down.
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


def weakened(values: Tensor, strength: float) -> Tensor:
    """What is left of the values, (1 − strength) of them, computed in float64 and rounded to their dtype: the same bits for any layout."""
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
    """A copy of the values at the index, and of no other. A mask needs no list of places, which would be larger than the matrix."""
    return tensor.masked_select(index) if _is_mask(index) else tensor[index].clone()


def _put_(tensor: Tensor, index: Any, values: Tensor) -> None:
    if _is_mask(index):
        tensor.masked_scatter_(index, values)
    else:
        tensor[index] = values


def _weaken_(tensor: Tensor, index: Any, strength: float) -> None:
    if strength != 1:
        _put_(tensor, index, weakened(_values(tensor, index), strength))
    elif _is_mask(index):
        tensor.masked_fill_(index, 0)
    else:
        tensor[index] = 0


def _targets(model: "PreTrainedModel", circuit: Circuit) -> list[tuple[Tensor, Any]]:
    """The (tensor, index) pairs to be zero: rows of mlp.up and its bias, columns of attn.o that read a head, or a mask of weights.

    Below strength 1 the columns of mlp.down that read a neuron of mlp.up, in every family: in a plain MLP a non-linearity stands between
    mlp.up and the neuron's output, with which a factor does not commute.
    """
    known = {site.name: site for site in sites_of(model, [role for role in ROLES if role in family_of(model).roles])}
    readers = down_sites(model) if circuit.unit == "neuron" and circuit.strength != 1 else {}
    targets: list[tuple[Tensor, Any]] = []
    for name, units in circuit.members.items():
        if name not in known:
            raise UserError(f"the circuit names {name}, which '{model_id(model)}' does not have; use the model it was made on")
        site = known[name]
        _require_fit(site, circuit.unit, units)
        reader = readers[site.mlp] if readers and site.role == "mlp.up" else None
        if (reader or site).quantised:
            raise UserError(f"{(reader or site).name} holds quantised weights, which cannot be changed in place; ablate the unquantised model")
        if reader:
            targets.append((reader.stored, (slice(None), torch.tensor(list(units), dtype=torch.long, device=reader.stored.device))))
        else:
            targets += [(site.stored, _stored_mask(site, units))] if circuit.unit == "weight" else _of_site(site, circuit.unit, list(units))
    return targets


def _require_fit(site: Site, unit: str, units: Any) -> None:
    if unit == "weight":
        if tuple(units.shape) != (site.out, site.inp):
            raise UserError(
                f"the circuit has shape {tuple(units.shape)} at {site.name}, which has {(site.out, site.inp)}; use the model it was made on"
            )
        return
    there = site.out if unit == "neuron" else site.heads
    if units and max(units) >= there:
        raise UserError(f"the circuit names {unit} {max(units)} of {site.name}, which has {there}; use the model it was made on")


def _stored_mask(site: Site, mask: Tensor) -> Tensor:
    """The site's mask [out, in] as one of everything that its module stores."""
    mask = mask.to(site.stored.device)
    if site.rows is None:
        return mask
    whole = torch.zeros(site.stored.shape, dtype=torch.bool, device=mask.device)
    whole[site.stored_rows(torch.arange(site.out, device=mask.device))] = mask
    return whole


def _of_site(site: Site, unit: str, indices: list[int]) -> list[tuple[Tensor, Any]]:
    weight = site.stored
    rows = torch.tensor(indices, device=weight.device)
    if unit == "head":
        width = site.inp // site.heads
        columns = (rows[:, None] * width + torch.arange(width, device=rows.device)).reshape(-1)
        return [(weight, (slice(None), columns))]
    rows, biased = site.stored_rows(rows), getattr(site.module, "bias", None) is not None
    return [(weight, rows), *([(value_of(site.module, "bias"), rows)] if biased else [])]
