"""The variants of a run: the original, the circuit, the other methods at each count, and the null."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from .. import __version__
from ..attribution import activations
from ..circuits.ablate import Damping, ablated, damp
from ..circuits.circuit import Circuit
from ..circuits.select import count_candidates, random_like, select
from ..scores import Scores
from ..storage import fingerprint
from .run_folder import Intervention, RunContext, load_or_make
from .score import ScoringSpec, SelectedCircuit, load_or_make_contrast
from .work_list import comparison_for

log = logging.getLogger("sparc3")


def apply_intervention(work: RunContext, change: Intervention) -> AbstractContextManager[object]:
    """Inside, the model is the variant."""
    return damp(work.model, change) if isinstance(change, Damping) else ablated(work.model, change)


def list_variants(
    work: RunContext, found: SelectedCircuit, how: ScoringSpec
) -> Iterator[tuple[str, list[Intervention]]]:
    """Every variant with the changes that make it: one, or several draws whose figures are pooled.

    Args:
        how: the contrast that found the circuit; the other methods are contrasted alike.
    """
    circuit, chosen = found.circuit, work.recipe.selection
    beside = comparison_for(work.recipe, len(circuit))
    sizes = {name: tensor.numel() for name, tensor in found.contrast.items()}
    yield "original", [Circuit(circuit.unit, {}, work.described)]
    yield "ablated", [circuit]
    own = {len(circuit): circuit}
    for count in beside.own:
        if count != len(circuit) or (chosen.count is None and not chosen.tune):
            if not _has_enough_candidates(work, found.contrast, count, how.method):
                continue
            own[count] = select(found.contrast, count=count, strength=how.strength)
        yield f"{how.method}@{count}", [own[count]]
    made = {
        f"{m}@{count}": change
        for m in beside.methods
        for count, change in select_by_method(work, how, m, beside.counts)
    }
    for name, change in {**made, **work.rivals}.items():
        if name != f"{how.method}@{len(circuit)}":
            yield name, [change]
    for count in beside.null if beside.draws else ():
        if count in own:
            yield f"random@{count}", [random_like(own[count], sizes, seed) for seed in range(beside.draws)]


def select_by_method(
    work: RunContext, how: ScoringSpec, method: str, counts: Sequence[int]
) -> Iterator[tuple[int, Intervention]]:
    """Another method's units at each count, contrasted and removed as `how` says.

    AurA damps by strengths of its own, and also every neuron that is an expert at all.
    """
    if method not in activations.METHODS:
        theirs = load_or_make_contrast(work, replace(how, method=method, place=""))
        yield from (
            (count, select(theirs, count=count, strength=how.strength))
            for count in counts
            if _has_enough_candidates(work, theirs, count, method)
        )
        return
    scores = _load_or_make_expertise(work)
    for count in (count for count in counts if _has_enough_candidates(work, scores, count, method)):
        if method == "det0":
            yield count, select(scores, count=count, order="highest", strength=how.strength)
        else:
            yield count, Damping(activations.strengths(scores, count))
    whole = Damping(activations.strengths(scores))
    if method == "aura" and len(whole) > max(counts, default=0):
        yield len(whole), whole


def _load_or_make_expertise(work: RunContext) -> Scores:
    """AUROC of undesired against matched samples, or against general ones where there are none."""
    undesired, benign = (
        work.references["undesired"],
        work.references.get("matched", work.references["general"]),
    )
    made_from = fingerprint(
        {
            "aura": [undesired.fingerprint, benign.fingerprint],
            "model": work.fingerprint,
            "version": __version__,
        }
    )

    def make() -> Scores:
        made = activations.expertise(work.model, undesired, benign, tokenizer=work.tokenizer)
        return Scores(dict(made), {**made.provenance, "made_from": made_from})

    return load_or_make(
        work, "scores/aura.safetensors", made_from, Scores.load, lambda s: s.provenance.get("made_from"), make
    )


def _has_enough_candidates(work: RunContext, scores: Scores, count: int, method: str) -> bool:
    there = count_candidates(scores)
    said = f"{method}@{count} was left out: the contrast has {there} candidates"
    if count > there and said not in work.warnings:
        work.warnings.append(said)
        log.warning(said)
    return count <= there
