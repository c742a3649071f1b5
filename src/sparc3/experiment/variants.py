"""The variants of a run: the original, the circuit, the other methods at each count, and the null."""

import logging
from collections.abc import Iterator
from dataclasses import replace

from ..circuit import Circuit
from ..scores import Scores
from ..selection import candidates, random_like, select
from .scoring import Found, How, contrasted
from .work import Work

log = logging.getLogger("sparc3")


def variants(work: Work, found: Found, how: How) -> Iterator[tuple[str, list[Circuit]]]:
    """Every variant with the circuits that make it: one, or several draws whose figures are pooled.

    Args:
        how: the contrast that found the circuit; the other methods are contrasted alike.
    """
    compare, circuit = work.recipe.compare, found.circuit
    sizes = {name: tensor.numel() for name, tensor in found.contrast.items()}
    yield "original", [Circuit(circuit.unit, {}, work.described)]
    yield "ablated", [circuit]
    counts = {count: select(found.contrast, count=count) for count in compare.counts if _enough(work, found.contrast, count, how.method)}
    if work.recipe.selection.fraction is None:
        counts[len(circuit)] = circuit
    for count, chosen in sorted(counts.items()):
        yield f"{how.method}@{count}", [chosen]
    for other in (m for m in compare.methods if m not in ("random", how.method)):
        theirs = contrasted(work, replace(how, method=other, place=""))
        for count in compare.counts:
            if _enough(work, theirs, count, other):
                yield f"{other}@{count}", [select(theirs, count=count)]
    random_counts = counts if "random" in compare.methods else {len(circuit): circuit}
    for count, chosen in sorted(random_counts.items()):
        if compare.random_draws:
            yield f"random@{count}", [random_like(chosen, sizes, seed) for seed in range(compare.random_draws)]


def _enough(work: Work, scores: Scores, count: int, method: str) -> bool:
    there = candidates(scores)
    if count > there:
        work.warnings.append(f"{method}@{count} was left out: the contrast has {there} candidates")
        log.warning(work.warnings[-1])
    return count <= there
