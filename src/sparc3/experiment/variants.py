"""The variants of a run: the original, the circuit, the other methods at each count, and the null."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from .. import __version__
from ..attribution import activations as expertise
from ..circuits.ablate import Damping, ablated, damped
from ..circuits.circuit import Circuit
from ..circuits.select import candidates, random_like, select
from ..scores import Scores
from ..storage import fingerprint
from .run_folder import Change, Work, kept
from .score import Found, How, contrasted
from .work_list import compared

log = logging.getLogger("sparc3")


def changed(work: Work, change: Change) -> AbstractContextManager[object]:
    """Inside, the model is the variant."""
    return damped(work.model, change) if isinstance(change, Damping) else ablated(work.model, change)


def variants(work: Work, found: Found, how: How) -> Iterator[tuple[str, list[Change]]]:
    """Every variant with the changes that make it: one, or several draws whose figures are pooled.

    Args:
        how: the contrast that found the circuit; the other methods are contrasted alike.
    """
    circuit, chosen = found.circuit, work.recipe.selection
    beside = compared(work.recipe, len(circuit))
    sizes = {name: tensor.numel() for name, tensor in found.contrast.items()}
    yield "original", [Circuit(circuit.unit, {}, work.described)]
    yield "ablated", [circuit]
    own = {len(circuit): circuit}
    for count in beside.own:
        if count != len(circuit) or (chosen.count is None and not chosen.tune):
            if not _enough(work, found.contrast, count, how.method):
                continue
            own[count] = select(found.contrast, count=count, strength=how.strength)
        yield f"{how.method}@{count}", [own[count]]
    made = {
        f"{m}@{count}": change
        for m in beside.methods
        for count, change in by_method(work, how, m, beside.counts)
    }
    for name, change in {**made, **work.rivals}.items():
        if name != f"{how.method}@{len(circuit)}":
            yield name, [change]
    for count in beside.null if beside.draws else ():
        if count in own:
            yield f"random@{count}", [random_like(own[count], sizes, seed) for seed in range(beside.draws)]


def by_method(work: Work, how: How, method: str, counts: Sequence[int]) -> Iterator[tuple[int, Change]]:
    """Another method's units at each count, contrasted and removed as `how` says.

    AurA damps by strengths of its own, and also every neuron that is an expert at all.
    """
    if method not in expertise.METHODS:
        theirs = contrasted(work, replace(how, method=method, place=""))
        yield from (
            (count, select(theirs, count=count, strength=how.strength))
            for count in counts
            if _enough(work, theirs, count, method)
        )
        return
    scores = _expertise(work)
    for count in (count for count in counts if _enough(work, scores, count, method)):
        if method == "det0":
            yield count, select(scores, count=count, order="highest", strength=how.strength)
        else:
            yield count, Damping(expertise.strengths(scores, count))
    whole = Damping(expertise.strengths(scores))
    if method == "aura" and len(whole) > max(counts, default=0):
        yield len(whole), whole


def _expertise(work: Work) -> Scores:
    """AUROC of undesired against matched samples, or against general ones where there are none."""
    undesired, benign = (
        work.references["undesired"],
        work.references.get("matched", work.references["general"]),
    )
    made_from = fingerprint(
        {
            "aura": [undesired.fingerprint, benign.fingerprint],
            "model": work.described["fingerprint"],
            "version": __version__,
        }
    )

    def make() -> Scores:
        made = expertise.expertise(work.model, undesired, benign, tokenizer=work.tokenizer)
        return Scores(dict(made), {**made.provenance, "made_from": made_from})

    return kept(
        work.folder / "scores/aura.safetensors",
        made_from,
        Scores.load,
        lambda s: s.provenance.get("made_from"),
        make,
    )


def _enough(work: Work, scores: Scores, count: int, method: str) -> bool:
    there = candidates(scores)
    said = f"{method}@{count} was left out: the contrast has {there} candidates"
    if count > there and said not in work.warnings:
        work.warnings.append(said)
        log.warning(said)
    return count <= there
