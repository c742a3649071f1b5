"""How many units one method's circuit shares with the others' circuits of the same size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..circuit import Circuit
from ..circuits import overlap
from ..damping import Damping
from .work import Change


def overlaps(own: Circuit, others: Mapping[str, Sequence[Change]], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """[{"variant", "size", "both", "expected"}]: units in the other circuit, in both, and in both by chance.

    Args:
        others: variant → its circuits; of several draws the mean is told.
        sizes: module → units in it.
    """
    found = []
    for variant, changes in others.items():
        seen = [overlap(_bare(own), _bare(_as_circuit(one)), sizes=sizes) for one in changes]
        if seen:
            both = sum(one.both for one in seen) / len(seen)
            found.append({"variant": variant, "size": seen[0].other, "both": both, "expected": seen[0].expected})
    return found


def of_kept(removed: Mapping[str, Circuit], method: str, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The same of what is left when circuits are removed: each method's beside that of `method` at the same count.

    Args:
        removed: "<method>@<count>" → the units that were removed.
    """
    total, found = sum(sizes.values()), []
    for variant, circuit in removed.items():
        own = removed.get(f"{method}@{variant.rpartition('@')[2]}")
        if own is None or own is circuit:
            continue
        seen = overlap(_bare(own), _bare(circuit), sizes=sizes)
        left = total - len(circuit)
        both = total - len(own) - len(circuit) + seen.both
        found.append({"variant": variant, "size": left, "both": both, "expected": left * (total - len(own)) / total})
    return found


def _as_circuit(change: Change) -> Circuit:
    """The neurons that a damping touches."""
    if isinstance(change, Circuit):
        return change
    assert isinstance(change, Damping)
    touched = {name: tuple((factor != 1).nonzero().flatten().tolist()) for name, factor in change.factors.items()}
    return Circuit("neuron", {name: indices for name, indices in touched.items() if indices})


def _bare(circuit: Circuit) -> Circuit:
    return replace(circuit, model={}, provenance={})
