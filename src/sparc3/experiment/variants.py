"""The variants of a run: the original, the circuit, the other methods at each count, and the null."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from ..ablation import ablated
from ..attribution import expertise
from ..circuit import Circuit
from ..damping import Damping, damped
from ..files import fingerprint
from ..scores import Scores
from ..selection import candidates, random_like, select
from ..version import __version__
from .folder import kept
from .scoring import Found, How, contrasted
from .work import Work

log = logging.getLogger("sparc3")
Change = Circuit | Damping
"""What makes a variant: units that are removed, or damped."""


def changed(work: Work, change: Change) -> AbstractContextManager[object]:
    """Inside, the model is the variant."""
    return damped(work.model, change) if isinstance(change, Damping) else ablated(work.model, change)


def variants(work: Work, found: Found, how: How) -> Iterator[tuple[str, list[Change]]]:
    """Every variant with the changes that make it: one, or several draws whose figures are pooled.

    Args:
        how: the contrast that found the circuit; the other methods are contrasted alike.
    """
    compare, circuit = work.recipe.compare, found.circuit
    sizes = {name: tensor.numel() for name, tensor in found.contrast.items()}
    yield "original", [Circuit(circuit.unit, {}, work.described)]
    yield "ablated", [circuit]
    counts = {count: select(found.contrast, count=count) for count in compare.counts if _enough(work, found.contrast, count, how.method)}
    if work.recipe.selection.count is not None or work.recipe.selection.tune:
        counts[len(circuit)] = circuit
    for count, chosen in sorted(counts.items()):
        yield f"{how.method}@{count}", [chosen]
    yield from _experts(work, circuit)
    for other in (m for m in compare.methods if m not in ("random", how.method, *expertise.METHODS)):
        theirs = contrasted(work, replace(how, method=other, place=""))
        for count in compare.counts:
            if _enough(work, theirs, count, other):
                yield f"{other}@{count}", [select(theirs, count=count)]
    random_counts = counts if "random" in compare.methods else {len(circuit): circuit}
    for count, chosen in sorted(random_counts.items()):
        if compare.random_draws:
            yield f"random@{count}", [random_like(chosen, sizes, seed) for seed in range(compare.random_draws)]


def _experts(work: Work, circuit: Circuit) -> Iterator[tuple[str, list[Change]]]:
    """Det-0 and AurA at each count, and AurA as its authors have it, with every neuron that is an expert at all."""
    asked = [method for method in work.recipe.compare.methods if method in expertise.METHODS]
    if not asked:
        return
    scores = _expertise(work)
    counts = sorted({*work.recipe.compare.counts, *([len(circuit)] if len(circuit) else [])})
    for method in asked:
        for count in (count for count in counts if _enough(work, scores, count, method)):
            change = select(scores, count=count, order="highest") if method == "det0" else Damping(expertise.strengths(scores, count))
            yield f"{method}@{count}", [change]
        if method == "aura" and (whole := Damping(expertise.strengths(scores))) and len(whole) > max(counts, default=0):
            yield f"aura@{len(whole)}", [whole]


def _expertise(work: Work) -> Scores:
    """AUROC of undesired against matched samples, or against general ones where there are none."""
    undesired, benign = work.references["undesired"], work.references.get("matched", work.references["general"])
    made_from = fingerprint(
        {"aura": [undesired.fingerprint, benign.fingerprint], "model": work.described["fingerprint"], "version": __version__}
    )

    def make() -> Scores:
        made = expertise.expertise(work.model, undesired, benign, tokenizer=work.tokenizer)
        return Scores(dict(made), {**made.provenance, "made_from": made_from})

    return kept(work.folder / "scores/aura.safetensors", made_from, Scores.load, lambda s: s.provenance.get("made_from"), make)


def _enough(work: Work, scores: Scores, count: int, method: str) -> bool:
    there = candidates(scores)
    if count > there:
        work.warnings.append(f"{method}@{count} was left out: the contrast has {there} candidates")
        log.warning(work.warnings[-1])
    return count <= there
