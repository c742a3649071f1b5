"""Union, intersection and difference of circuits, and their overlap compared with chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..errors import UserError
from .circuit import Circuit


@dataclass(frozen=True)
class Overlap:
    """How many units two circuits share.

    Attributes:
        first, second, both, either: numbers of units.
        jaccard: both / either; 1 for two empty circuits.
        units: number of units that there were to choose from; None if the circuits do not record it.
        expected: mean overlap of two random sets of these sizes, first · second / units.
        enrichment: both / expected; None if expected is unknown or zero.
        enrichment_in_sites: the same, for random sets with as many units in each site as these circuits.
    """

    first: int
    second: int
    both: int
    either: int
    jaccard: float
    units: int | None
    expected: float | None
    enrichment: float | None
    enrichment_in_sites: float | None


def union(first: Circuit, second: Circuit) -> Circuit:
    """The units of either circuit, each at its own strength. Raises UserError where their models, units,
    shapes or strengths differ."""
    return _combine("union", first, second)


def intersection(first: Circuit, second: Circuit) -> Circuit:
    """The units of both circuits. Raises UserError where their models, units, shapes or strengths differ; for
    units with strengths of their own, if a shared unit has two."""
    return _combine("intersection", first, second)


def difference(first: Circuit, second: Circuit) -> Circuit:
    """The units of the first circuit that are not in the second. Raises UserError where their models, units,
    shapes or strengths differ."""
    return _combine("difference", first, second)


OPERATIONS = {"union": union, "intersection": intersection, "difference": difference}


def overlap(first: Circuit, second: Circuit, *, sizes: Mapping[str, int] | None = None) -> Overlap:
    """How many units two circuits share, whatever their strengths, and how many two random circuits of their
    sizes would share.

    Args:
        sizes: module name → number of units that there were to choose from; by default, as the circuits
            recorded it.

    Raises:
        UserError: their models, units or shapes differ, or they were chosen from different sites.
    """
    first, second = first.at_full_strength, second.at_full_strength
    both, either = len(intersection(first, second)), len(union(first, second))
    sizes_by_site = dict(sizes) if sizes is not None else _sizes(first, second)
    total = sum(sizes_by_site.values()) if sizes_by_site is not None else None
    expected = len(first) * len(second) / total if total else None
    # The hypergeometric mean, site by site: circuits that merely prefer the same layers are not enriched.
    in_sites = (
        sum(n * second.counts.get(name, 0) / sizes_by_site[name] for name, n in first.counts.items() if n)
        if sizes_by_site
        else None
    )
    return Overlap(
        first=len(first),
        second=len(second),
        both=both,
        either=either,
        jaccard=both / either if either else 1.0,
        units=total,
        expected=expected,
        enrichment=both / expected if expected else None,
        enrichment_in_sites=both / in_sites if in_sites else None,
    )


def _sizes(first: Circuit, second: Circuit) -> dict[str, int] | None:
    first_sizes, second_sizes = (circuit.provenance.get("sizes") for circuit in (first, second))
    if first_sizes is not None and second_sizes is not None and first_sizes != second_sizes:
        differing = sorted(
            name for name in {*first_sizes, *second_sizes} if first_sizes.get(name) != second_sizes.get(name)
        )[0]
        raise UserError(
            f"the circuits were selected from different sites or sizes (such as {differing}), so chance "
            "overlap is undefined; select both from the same sites"
        )
    return first_sizes if first_sizes is not None else second_sizes


def require_alike(first: Circuit, second: Circuit) -> None:
    """Raise UserError unless both circuits hold the same kind of units of the same model, removed at the same
    strength."""
    if first.unit != second.unit:
        raise UserError(
            f"a circuit of {first.unit}s cannot be combined with one of {second.unit}s; use circuits of the "
            "same unit"
        )
    if not (first.strengths or second.strengths) and first.strength != second.strength:
        raise UserError(
            f"circuits of strength {first.strength:g} and {second.strength:g} cannot be combined; use the "
            "same strength for both"
        )
    _require_same_strengths(first, second)
    first_fingerprint, second_fingerprint = first.model.get("fingerprint"), second.model.get("fingerprint")
    if first_fingerprint and second_fingerprint and first_fingerprint != second_fingerprint:
        raise UserError(
            f"the circuits were made on {first.model.get('id')} ({first_fingerprint}) and "
            f"{second.model.get('id')} ({second_fingerprint}); use circuits of the same model"
        )
    for name in first.members if first.unit == "weight" else ():
        if name in second.members and first.members[name].shape != second.members[name].shape:
            shapes = " and ".join(str(tuple(circuit.members[name].shape)) for circuit in (first, second))
            raise UserError(f"{name} has shapes {shapes} in the two circuits; use circuits of the same model")


def _require_same_strengths(first: Circuit, second: Circuit) -> None:
    """Raise UserError if a unit of both circuits has a different strength in each."""
    if not (first.strengths or second.strengths):
        return
    strengths, others = _strengths(first), _strengths(second)
    for name, unit in strengths.keys() & others.keys():
        if strengths[name, unit] != others[name, unit]:
            raise UserError(
                f"neuron {unit} of {name} has strength {strengths[name, unit]:g} in one circuit and "
                f"{others[name, unit]:g} in the other; use circuits in which it has the same strength"
            )


def _strengths(circuit: Circuit) -> dict[tuple[str, int], float]:
    """(module, index) of each unit → its strength; empty for weights."""
    if circuit.unit == "weight":
        return {}
    return {
        (name, unit): strength
        for name in circuit.members
        for strength, units in circuit.by_strength(name)
        for unit in units
    }


def _combine(operation: str, first: Circuit, second: Circuit) -> Circuit:
    require_alike(first, second)
    members = {}
    for name in {**first.members, **second.members}:
        units = (first.members.get(name), second.members.get(name))
        members[name] = _masks(operation, *units) if first.unit == "weight" else _indices(operation, *units)
    parents = [
        {"fingerprint": circuit.fingerprint, "provenance": circuit.provenance} for circuit in (first, second)
    ]
    provenance: dict[str, Any] = {"operation": operation, "of": parents, "version": __version__}
    if "mean" in (first.provenance.get("ablation"), second.provenance.get("ablation")):
        provenance["ablation"] = "mean"
    sizes = [circuit.provenance["sizes"] for circuit in (first, second) if "sizes" in circuit.provenance]
    if sizes:
        provenance["sizes"] = {name: size for sizes_of_one in sizes for name, size in sizes_of_one.items()}
    members = {name: units for name, units in members.items() if units is not None}
    model = first.model or second.model
    if first.strengths or second.strengths:
        strength_of = _strengths(first) | _strengths(second)
        strengths = {
            name: tuple(strength_of[name, unit] for unit in units or ()) for name, units in members.items()
        }
        return Circuit(first.unit, members, model, provenance, strengths=strengths)
    return Circuit(first.unit, members, model, provenance, first.strength)


def _indices(
    operation: str, first: Sequence[int] | None, second: Sequence[int] | None
) -> tuple[int, ...] | None:
    """The operation on a site's indices; None if no member is left."""
    method = getattr(frozenset(first or ()), operation)  # frozenset names its methods as OPERATIONS does
    return tuple(sorted(method(second or ()))) or None


def _masks(operation: str, first: Any, second: Any) -> Any:
    """The operation on a site's masks [out, in]; None if no member is left."""
    if first is None or second is None:
        absent = {"union": second if first is None else first, "intersection": None, "difference": first}
        return absent[operation]
    if operation == "union":
        mask = first | second
    else:
        mask = first & (second if operation == "intersection" else ~second)
    return mask if mask.any() else None
