"""Removing a circuit from a model in memory: for a trial, or for good."""

from collections.abc import Callable, Iterator, Mapping
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


@dataclass(frozen=True, eq=False)
class Place:
    """Some values of a parameter.

    Attributes:
        parameter: the model's own tensor.
        view: returns the matrix or vector, a view of the parameter, to which the index refers.
        index: indices, or a bool mask.
    """

    parameter: Tensor
    view: Callable[[Tensor], Tensor]
    index: Any

    def read(self, parameter: Tensor | None = None) -> Tensor:
        """A copy of these values only, from the parameter or from another tensor of its shape."""
        # For a mask, masked_select avoids the list of places that tensor[mask] makes, which would be larger
        # than the matrix.
        tensor, index = self._within(parameter)
        return tensor.masked_select(index) if _is_mask(index) else tensor[index].clone()

    def write_(self, values: Tensor | float, parameter: Tensor | None = None) -> None:
        """Set these values in the parameter, or in another tensor of its shape."""
        tensor, index = self._within(parameter)
        if not _is_mask(index):
            tensor[index] = values
        elif isinstance(values, Tensor):
            tensor.masked_scatter_(index, values)
        else:
            tensor.masked_fill_(index, values)

    @torch.no_grad()
    def weaken_(self, strength: float, parameter: Tensor | None = None) -> None:
        """Multiply the values by (1 − strength), in float64, and round them to their dtype, so that every
        memory layout gives the same bits."""
        if strength == 1:  # a product would leave −0.0, or NaN
            self.write_(0, parameter)
        else:
            values = self.read(parameter)
            self.write_((values.double() * (1 - strength)).to(values.dtype), parameter)

    def _within(self, parameter: Tensor | None) -> tuple[Tensor, Any]:
        if parameter is None:
            return self.view(self.parameter), self.index
        parts = tuple(part.to(parameter.device) if isinstance(part, Tensor) else part for part in self._parts)
        return self.view(parameter), parts if isinstance(self.index, tuple) else parts[0]

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.index if isinstance(self.index, tuple) else (self.index,)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


Target = tuple[Place, float]
"""Values that a circuit weakens, and the share of them that it removes; a negative share adds."""


@contextmanager
def ablated(model: "PreTrainedModel", circuit: Circuit) -> Iterator["PreTrainedModel"]:
    """Inside, the circuit's units are zero, or weaker or stronger by their strengths; afterwards every
    touched value is back, bit for bit.

    Raises:
        UserError: a unit that this model does not have; nothing has been touched then.
    """
    targets = find_targets(model, circuit)
    with _restore_afterwards([place for place, _ in targets]):
        for place, strength in targets:
            place.weaken_(strength)
        yield model


def ablate_(model: "PreTrainedModel", circuit: Circuit) -> None:
    """Set the circuit's units to zero, or weaken them by their strengths, for good (docs/method.md, 9).
    Raises UserError as `ablated` does."""
    for place, strength in find_targets(model, circuit):
        place.weaken_(strength)


@contextmanager
def _restore_afterwards(places: list[Place]) -> Iterator[None]:
    """Afterwards the values at the places are as they were, bit for bit, even after an exception."""
    with torch.no_grad():
        originals = [place.read() for place in places]
    try:
        yield
    finally:
        with torch.no_grad():
            for place, values in zip(places, originals, strict=True):
                place.write_(values)


def targets_by_name(model: "PreTrainedModel", circuit: Circuit) -> dict[str, list[Target]]:
    """Parameter name → what a circuit weakens in it, in order. Raises UserError as `ablated` does.

    The order matters if an element is weakened twice: a neuron of mlp.down and one of mlp.up that is not set
    to zero share an element of mlp.down.
    """
    targets, by_name = find_targets(model, circuit), dict[str, list[Target]]()
    names = {parameter.data_ptr(): name for name, parameter in reversed(list(named_values(model)))}
    for place, strength in targets:
        by_name.setdefault(names[place.parameter.data_ptr()], []).append((place, strength))
    return by_name


def find_targets(model: "PreTrainedModel", circuit: Circuit) -> list[Target]:
    """What a circuit weakens: rows of mlp.up and its bias, columns of attn.o that read a head, or a mask of
    weights. Raises UserError as `ablated` does.

    If it does not set units to zero, they are the columns of mlp.down that read a neuron of mlp.up
    instead, in every family: in a plain MLP a non-linearity follows mlp.up, with which a factor does not
        commute.
    """
    require_present(model)
    readers = down_sites(model) if circuit.unit == "neuron" and not circuit.zeroes else {}
    targets: list[Target] = []
    for name, site in circuit.sites(model).items():
        reader = readers[site.mlp] if readers and site.role == "mlp.up" else None
        if (edited := reader or site).is_quantised:
            raise UserError(
                f"{edited.name} holds quantised weights, which cannot be changed in place; ablate the "
                "unquantised model"
            )
        for strength, units in circuit.by_strength(name):
            targets += [(place, strength) for place in _places(site, reader, circuit.unit, units)]
    return targets


def _places(site: Site, reader: Site | None, unit: str, units: Any) -> Iterator[Place]:
    """The places of these units of a site: in the columns of `reader`, if there is one."""
    edited = reader or site
    weight = value_of(edited.module, edited.parameter)
    if unit == "weight":
        yield Place(weight, edited.matrix_of, _expand_mask(site, units))
        return
    indices = torch.tensor(list(units), dtype=torch.long, device=weight.device)
    if reader:
        yield Place(weight, edited.matrix_of, (slice(None), indices))
    elif unit == "head":
        width = site.inp // site.heads
        columns = indices[:, None] * width + torch.arange(width, device=weight.device)
        yield Place(weight, edited.matrix_of, (slice(None), columns.reshape(-1)))
    else:
        # A zero row and bias remove a neuron in a plain MLP too: ReLU, GELU and their kin map 0 to 0.
        rows = site.stored_rows(indices)
        yield Place(weight, edited.matrix_of, rows)
        if getattr(site.module, "bias", None) is not None:
            yield Place(value_of(site.module, "bias"), lambda bias: bias, rows)


def _expand_mask(site: Site, mask: Tensor) -> Tensor:
    """The site's mask [out, in], expanded to the shape of all that its module stores."""
    mask = mask.to(site.stored_weight.device)
    if site.rows is None:
        return mask
    stored_mask = torch.zeros(site.stored_weight.shape, dtype=torch.bool, device=mask.device)
    stored_mask[site.stored_rows(torch.arange(site.out, device=mask.device))] = mask
    return stored_mask


# Damping weakens neurons by a factor each instead of removing them (AurA's intervention), for a trial.


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
    """Inside, each neuron's output is multiplied by its factor; afterwards every touched value is back, bit
    for bit, even after an exception.

    The factor goes into the neuron's column of mlp.down, where it is exact in every family: in a plain MLP a
    non-linearity follows mlp.up, with which a factor does not commute.

    Raises:
        UserError: neurons that this model does not have, quantised weights, or weights on the disk; nothing
            has been touched then.
    """
    require_present(model)
    columns = _columns(model, damping)
    with _restore_afterwards([place for place, _ in columns]):
        with torch.no_grad():
            for place, factor in columns:
                # bfloat16 weights are multiplied in float32 and rounded once.
                values = place.read()
                dtype = torch.promote_types(values.dtype, factor.dtype)
                place.write_((values.to(dtype) * factor).to(values.dtype))
        yield model


def _columns(model: "PreTrainedModel", damping: Damping) -> list[tuple[Place, Tensor]]:
    """The columns of mlp.down to scale, and their factors, of each site with any."""
    down_by_mlp = down_sites(model)
    downs = {site.name: down_by_mlp[site.mlp] for site in sites_of(model, ("mlp.up",))}
    columns = []
    for name, factors in damping.factors.items():
        down = downs.get(name)
        if down is None or down.inp != len(factors):
            raise UserError(
                f"the damping names {len(factors)} neurons of {name}, which '{model_id(model)}' does not "
                "have; use the model it was made on"
            )
        if down.is_quantised:
            raise UserError(
                f"{down.name} holds quantised weights, which cannot be scaled in place; damp the unquantised "
                "model"
            )
        index = (factors != 1).nonzero()[:, 0]
        if len(index):
            weight = value_of(down.module, down.parameter)
            place = Place(weight, down.matrix_of, (slice(None), index.to(weight.device)))
            columns.append((place, factors[index].float().to(weight.device)))
    return columns
