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
        parameter: as the model holds it.
        view: makes of it the matrix or vector that the index is of.
        index: indices, or a bool mask.
    """

    parameter: Tensor
    view: Callable[[Tensor], Tensor]
    index: Any

    def read(self, parameter: Tensor | None = None) -> Tensor:
        """A copy of the values, and of no other, of the parameter or of another of its shape. A mask needs no
        list of places, which would be larger than the matrix."""
        tensor, index = self._within(parameter)
        return tensor.masked_select(index) if _is_mask(index) else tensor[index].clone()

    def write_(self, values: Tensor | float, parameter: Tensor | None = None) -> None:
        """Set the values of the parameter, or of another of its shape."""
        tensor, index = self._within(parameter)
        if not _is_mask(index):
            tensor[index] = values
        elif isinstance(values, Tensor):
            tensor.masked_scatter_(index, values)
        else:
            tensor.masked_fill_(index, values)

    @torch.no_grad()
    def weaken_(self, strength: float, parameter: Tensor | None = None) -> None:
        """Leave (1 − strength) of the values, computed in float64 and rounded to their dtype: the same bits
        for any layout."""
        if strength == 1:
            self.write_(0, parameter)
        else:
            values = self.read(parameter)
            self.write_((values.double() * (1 - strength)).to(values.dtype), parameter)

    def _within(self, parameter: Tensor | None) -> tuple[Tensor, Any]:
        if parameter is None:
            return self.view(self.parameter), self.index
        there = tuple(part.to(parameter.device) if isinstance(part, Tensor) else part for part in self._parts)
        return self.view(parameter), there if isinstance(self.index, tuple) else there[0]

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.index if isinstance(self.index, tuple) else (self.index,)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


Target = tuple[Place, float]
"""What a circuit weakens, and the share of it that it takes away; below 0 it adds."""


@contextmanager
def ablated(model: "PreTrainedModel", circuit: Circuit) -> Iterator["PreTrainedModel"]:
    """Inside, the circuit's units are zero, or weaker or stronger by their strengths; after it every touched
    value is back, bit for bit.

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
    """After it, whatever happened inside, the values at the places are as they were, bit for bit."""
    with torch.no_grad():
        kept = [place.read() for place in places]
    try:
        yield
    finally:
        with torch.no_grad():
            for place, values in zip(places, kept, strict=True):
                place.write_(values)


def targets_by_name(model: "PreTrainedModel", circuit: Circuit) -> dict[str, list[Target]]:
    """Parameter name → what a circuit weakens in it, in order. Raises UserError as `ablated` does.

    The order matters where an element is weakened twice: a neuron of mlp.down and one of mlp.up that is not
    set to zero meet in an element of mlp.down.
    """
    targets, found = find_targets(model, circuit), dict[str, list[Target]]()
    names = {parameter.data_ptr(): name for name, parameter in reversed(list(named_values(model)))}
    for place, strength in targets:
        found.setdefault(names[place.parameter.data_ptr()], []).append((place, strength))
    return found


def find_targets(model: "PreTrainedModel", circuit: Circuit) -> list[Target]:
    """What a circuit weakens: rows of mlp.up and its bias, columns of attn.o that read a head, or a mask of
    weights. Raises UserError as `ablated` does.

    Where it does not set units to zero, the columns of mlp.down that read a neuron of mlp.up, in every
    family: in a plain MLP a non-linearity stands between mlp.up and the neuron's output, with which a factor
    does not commute.
    """
    require_present(model)
    readers = down_sites(model) if circuit.unit == "neuron" and not circuit.zeroes else {}
    targets: list[Target] = []
    for name, site in circuit.sites(model).items():
        reader = readers[site.mlp] if readers and site.role == "mlp.up" else None
        if (changed := reader or site).is_quantised:
            raise UserError(
                f"{changed.name} holds quantised weights, which cannot be changed in place; ablate the "
                "unquantised model"
            )
        for strength, units in circuit.by_strength(name):
            targets += [(place, strength) for place in _places(site, reader, circuit.unit, units)]
    return targets


def _places(site: Site, reader: Site | None, unit: str, units: Any) -> Iterator[Place]:
    """Where these units of a site are: in the columns of `reader`, where there is one."""
    changed = reader or site
    weight = value_of(changed.module, changed.parameter)
    if unit == "weight":
        yield Place(weight, changed.matrix_of, _expand_mask(site, units))
        return
    indices = torch.tensor(list(units), dtype=torch.long, device=weight.device)
    if reader:
        yield Place(weight, changed.matrix_of, (slice(None), indices))
    elif unit == "head":
        width = site.inp // site.heads
        columns = indices[:, None] * width + torch.arange(width, device=weight.device)
        yield Place(weight, changed.matrix_of, (slice(None), columns.reshape(-1)))
    else:
        rows = site.stored_rows(indices)
        yield Place(weight, changed.matrix_of, rows)
        if getattr(site.module, "bias", None) is not None:
            yield Place(value_of(site.module, "bias"), lambda bias: bias, rows)


def _expand_mask(site: Site, mask: Tensor) -> Tensor:
    """The site's mask [out, in] as one of everything that its module stores."""
    mask = mask.to(site.stored_weight.device)
    if site.rows is None:
        return mask
    whole = torch.zeros(site.stored_weight.shape, dtype=torch.bool, device=mask.device)
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
    with _restore_afterwards([place for place, _ in columns]):
        with torch.no_grad():
            for place, factor in columns:
                values = place.read()
                wide = torch.promote_types(values.dtype, factor.dtype)
                place.write_((values.to(wide) * factor).to(values.dtype))
        yield model


def _columns(model: "PreTrainedModel", damping: Damping) -> list[tuple[Place, Tensor]]:
    """The columns of mlp.down to scale, and their factors, of each site with any."""
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
        if down.is_quantised:
            raise UserError(
                f"{down.name} holds quantised weights, which cannot be scaled in place; damp the unquantised "
                "model"
            )
        index = (factors != 1).nonzero()[:, 0]
        if len(index):
            weight = value_of(down.module, down.parameter)
            place = Place(weight, down.matrix_of, (slice(None), index.to(weight.device)))
            found.append((place, factors[index].float().to(weight.device)))
    return found
