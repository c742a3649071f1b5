"""How many units one method's circuit shares with the others' circuits of the same size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..circuit import Circuit
from ..circuits import overlap
from ..damping import Damping
from ..scores import Scores
from ..selection import select
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


def of_kept(ranked: Mapping[str, Scores], method: str, counts: Sequence[int]) -> list[dict[str, Any]]:
    """The same of what is left when so many units are removed: each method's beside that of `method`.

    Args:
        ranked: method → scores by which its units are kept, highest first.
    """
    found = []
    sizes = {name: tensor.numel() for name, tensor in ranked[method].items()} if method in ranked else {}
    total = sum(sizes.values())
    for count in counts if sizes else ():
        own = _bare(select(ranked[method], count=count))
        for other, scores in ranked.items():
            if other != method:
                both = overlap(own, _bare(select(scores, count=count)), sizes=sizes).both + total - 2 * count
                found.append({"variant": f"{other}@{count}", "size": total - count, "both": both, "expected": (total - count) ** 2 / total})
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
