"""Union, intersection and difference of circuits, and their overlap compared with chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..errors import UserError
from .circuit import Circuit


@dataclass(frozen=True)
class Overlap:
    """How far two circuits share their units.

    Attributes:
        one, other, both, either: numbers of units.
        jaccard: both / either; 1 for two empty circuits.
        units: how many units there were to choose from; None where the circuits do not say.
        expected: how many two random sets of these sizes would share, one · other / units.
        enrichment: both / expected; None where expected is unknown or zero.
        enrichment_in_sites: the same against random sets that have, in each site, as many units as these.
    """

    one: int
    other: int
    both: int
    either: int
    jaccard: float
    units: int | None
    expected: float | None
    enrichment: float | None
    enrichment_in_sites: float | None


def union(one: Circuit, other: Circuit) -> Circuit:
    """The units of either circuit, each at its own strength. Raises UserError where their models, units,
    shapes or strengths differ."""
    return _combine("union", one, other)


def intersection(one: Circuit, other: Circuit) -> Circuit:
    """The units of both circuits. Raises UserError where their models, units, shapes or strengths differ; of
    units with strengths of their own, where a unit of both has two."""
    return _combine("intersection", one, other)


def difference(one: Circuit, other: Circuit) -> Circuit:
    """The units of the first circuit that are not in the second. Raises UserError where their models, units,
    shapes or strengths differ."""
    return _combine("difference", one, other)


OPERATIONS = {"union": union, "intersection": intersection, "difference": difference}


def overlap(one: Circuit, other: Circuit, *, sizes: Mapping[str, int] | None = None) -> Overlap:
    """How many units two circuits share, whatever their strengths, and how many two random ones of their
    sizes would.

    Args:
        sizes: module name → number of units there were to choose from; as the circuits recorded it where not
            given.

    Raises:
        UserError: their models, units or shapes differ, or they were chosen from different sites.
    """
    one, other = one.at_full_strength, other.at_full_strength
    both, either = len(intersection(one, other)), len(union(one, other))
    known = dict(sizes) if sizes is not None else _sizes(one, other)
    total = sum(known.values()) if known is not None else None
    expected = len(one) * len(other) / total if total else None
    in_sites = (
        sum(n * other.counts.get(name, 0) / known[name] for name, n in one.counts.items() if n)
        if known
        else None
    )
    return Overlap(
        one=len(one),
        other=len(other),
        both=both,
        either=either,
        jaccard=both / either if either else 1.0,
        units=total,
        expected=expected,
        enrichment=both / expected if expected else None,
        enrichment_in_sites=both / in_sites if in_sites else None,
    )


def _sizes(one: Circuit, other: Circuit) -> dict[str, int] | None:
    first, second = (circuit.provenance.get("sizes") for circuit in (one, other))
    if first is not None and second is not None and first != second:
        odd = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))[0]
        raise UserError(
            f"the circuits were selected from different sites or sizes (such as {odd}), so chance overlap is "
            "undefined; select both from the same sites"
        )
    return first if first is not None else second


def require_alike(one: Circuit, other: Circuit) -> None:
    """Raise UserError unless both circuits hold the same kind of units of the same model, removed at the same
    strength."""
    if one.unit != other.unit:
        raise UserError(
            f"a circuit of {one.unit}s cannot be combined with one of {other.unit}s; use circuits of the "
            "same unit"
        )
    if not (one.strengths or other.strengths) and one.strength != other.strength:
        raise UserError(
            f"circuits of strength {one.strength:g} and {other.strength:g} do not go together; use the same "
            "strength for both"
        )
    _require_same_strengths(one, other)
    first, second = one.model.get("fingerprint"), other.model.get("fingerprint")
    if first and second and first != second:
        raise UserError(
            f"the circuits were made on {one.model.get('id')} ({first}) and {other.model.get('id')} "
            f"({second}); use circuits of the same model"
        )
    for name in one.members if one.unit == "weight" else ():
        if name in other.members and one.members[name].shape != other.members[name].shape:
            shapes = " and ".join(str(tuple(circuit.members[name].shape)) for circuit in (one, other))
            raise UserError(f"{name} has shapes {shapes} in the two circuits; use circuits of the same model")


def _require_same_strengths(one: Circuit, other: Circuit) -> None:
    """Raise UserError where a unit of both circuits has another strength in each."""
    first, second = _strengths(one), _strengths(other)
    for unit in first.keys() & second.keys() if one.strengths or other.strengths else ():
        if first[unit] != second[unit]:
            raise UserError(
                f"neuron {unit[1]} of {unit[0]} has strength {first[unit]:g} in one circuit and "
                f"{second[unit]:g} in the other; use circuits in which it has the same strength"
            )


def _strengths(circuit: Circuit) -> dict[tuple[str, int], float]:
    """Module and index of each unit → its strength; nothing of weights."""
    if circuit.unit == "weight":
        return {}
    return {
        (name, unit): strength
        for name in circuit.members
        for strength, units in circuit.by_strength(name)
        for unit in units
    }


def _combine(operation: str, one: Circuit, other: Circuit) -> Circuit:
    require_alike(one, other)
    members = {}
    for name in {**one.members, **other.members}:
        units = (one.members.get(name), other.members.get(name))
        members[name] = _masks(operation, *units) if one.unit == "weight" else _indices(operation, *units)
    parts = [
        {"fingerprint": circuit.fingerprint, "provenance": circuit.provenance} for circuit in (one, other)
    ]
    provenance: dict[str, Any] = {"operation": operation, "of": parts, "version": __version__}
    if "mean" in (one.provenance.get("ablation"), other.provenance.get("ablation")):
        provenance["ablation"] = "mean"
    sizes = [circuit.provenance["sizes"] for circuit in (one, other) if "sizes" in circuit.provenance]
    if sizes:
        provenance["sizes"] = {name: size for part in sizes for name, size in part.items()}
    members = {name: units for name, units in members.items() if units is not None}
    if one.strengths or other.strengths:
        known = _strengths(one) | _strengths(other)
        own = {name: tuple(known[name, unit] for unit in units or ()) for name, units in members.items()}
        return Circuit(one.unit, members, one.model or other.model, provenance, strengths=own)
    return Circuit(one.unit, members, one.model or other.model, provenance, one.strength)


def _indices(
    operation: str, one: Sequence[int] | None, other: Sequence[int] | None
) -> tuple[int, ...] | None:
    """Of a site's indices, or None for a site without a member."""
    method = getattr(frozenset(one or ()), operation)
    return tuple(sorted(method(other or ()))) or None


def _masks(operation: str, one: Any, other: Any) -> Any:
    """Of a site's masks [out, in], or None for a site without a member."""
    if one is None or other is None:
        alone = {"union": other if one is None else one, "intersection": None, "difference": one}
        return alone[operation]
    both = one | other if operation == "union" else one & (other if operation == "intersection" else ~other)
    return both if both.any() else None
