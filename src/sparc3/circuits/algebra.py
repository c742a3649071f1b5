"""Union, intersection and difference of circuits, and their overlap compared with chance."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """The units of either circuit. Raises UserError where their models, units, shapes or strengths differ."""
    return _combine("union", one, other)


def intersection(one: Circuit, other: Circuit) -> Circuit:
    """The units of both circuits. Raises UserError where their models, units, shapes or strengths differ."""
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
    one, other = replace(one, strength=1.0), replace(other, strength=1.0)
    both, either = intersection(one, other), len(union(one, other))
    known = dict(sizes) if sizes is not None else _sizes(one, other)
    total = sum(known.values()) if known is not None else None
    expected = len(one) * len(other) / total if total else None
    in_sites = (
        sum(n * other.counts.get(name, 0) / known[name] for name, n in one.counts.items() if n)
        if known is not None
        else None
    )
    return Overlap(
        len(one),
        len(other),
        len(both),
        either,
        len(both) / either if either else 1.0,
        total,
        expected,
        len(both) / expected if expected else None,
        len(both) / in_sites if in_sites else None,
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
    if one.strength != other.strength:
        raise UserError(
            f"circuits of strength {one.strength:g} and {other.strength:g} do not go together; use the same "
            "strength for both"
        )
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


def _combine(operation: str, one: Circuit, other: Circuit) -> Circuit:
    require_alike(one, other)
    combine = _masks if one.unit == "weight" else _indices
    names = {**one.members, **other.members}
    members = {name: combine(operation, one.members.get(name), other.members.get(name)) for name in names}
    members = {name: units for name, units in members.items() if _any(units)}
    parts = [
        {"fingerprint": circuit.fingerprint, "provenance": circuit.provenance} for circuit in (one, other)
    ]
    provenance: dict[str, Any] = {"operation": operation, "of": parts, "version": __version__}
    sizes = [circuit.provenance["sizes"] for circuit in (one, other) if "sizes" in circuit.provenance]
    if sizes:
        provenance["sizes"] = {name: size for part in sizes for name, size in part.items()}
    return Circuit(one.unit, members, one.model or other.model, provenance, one.strength)


def _indices(operation: str, one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> tuple[int, ...]:
    first, second = set(one or ()), set(other or ())
    return tuple(
        sorted(
            first | second
            if operation == "union"
            else first & second
            if operation == "intersection"
            else first - second
        )
    )


def _masks(operation: str, one: Any, other: Any) -> Any:
    """Tensors [out, in], or None for a site without a member."""
    if operation == "union":
        return one | other if one is not None and other is not None else one if one is not None else other
    if operation == "intersection":
        return one & other if one is not None and other is not None else None
    return one & ~other if one is not None and other is not None else one


def _any(units: Any) -> bool:
    return units is not None and (bool(units.any()) if hasattr(units, "any") else bool(units))
