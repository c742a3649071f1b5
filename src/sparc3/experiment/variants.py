"""The variants of a run: the original, the circuit, the other methods at each count, and the null."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..attribution import activations
from ..circuits.ablate import Damping, ablated, damp
from ..circuits.circuit import Circuit
from ..circuits.mean_ablation import MeanAblation, replace_by_means
from ..circuits.select import random_like, select
from ..errors import UserError
from ..models.sites import sites_of
from ..results import Variant
from ..scores import Scores
from .run_folder import Intervention, RunContext, load_or_make
from .score import ScoringSpec, SelectedCircuit, compute_contrast
from .work_list import Sizes, comparison_for, expertise_sets


def apply_intervention(work: RunContext, change: Intervention) -> AbstractContextManager[object]:
    """Inside, the model is the variant."""
    if isinstance(change, MeanAblation):
        return replace_by_means(work.model, change)
    return damp(work.model, change) if isinstance(change, Damping) else ablated(work.model, change)


def list_variants(
    work: RunContext, found: SelectedCircuit, how: ScoringSpec
) -> Iterator[tuple[str, list[Intervention]]]:
    """Every variant with the changes that make it: one, or several draws whose figures are pooled.

    Args:
        how: the contrast that found the circuit; the other methods are contrasted alike.
    """
    circuit, scope = found.circuit, work.correct.selection.scope
    how = replace(how, damage=None)
    comparison = comparison_for(
        work.correct, sites_of(work.model, work.recipe.attribution.sites), len(circuit)
    )
    sizes = {name: tensor.numel() for name, tensor in found.contrast.items()}
    yield "original", [Circuit(circuit.unit, {}, work.described)]
    yield "ablated", [circuit]
    # At the circuit's own size use the circuit itself, not a new selection.
    own = {len(circuit): circuit}
    for total, size in comparison.own.items():
        variant = Variant(how.options.method, total)
        if total not in own:
            made = _select_if_enough(work, found.contrast, variant, how.strength, scope, size)
            if made is None:
                continue
            own[total] = made
        yield str(variant), [own[total]]
    rivals = {
        str(Variant(method, total)): change
        for method, (theirs, counts) in comparison.rivals.items()
        for total, change in select_by_method(work, how, method, theirs, counts)
    }
    for name, change in {**rivals, **work.rivals}.items():
        yield name, [change]
    for count in comparison.null if comparison.draws else ():
        if count in own:
            draws = [random_like(own[count], sizes, seed) for seed in range(comparison.draws)]
            yield str(Variant("random", count)), [*draws]


def select_by_method(
    work: RunContext, how: ScoringSpec, method: str, scope: str, sizes: Sizes
) -> Iterator[tuple[int, Intervention]]:
    """Another method's units at each size, by its number of units, contrasted and removed as `how` says.

    Methods of expertise rank by the AUROC of undesired against matched samples, or against general ones where
    there are none. AurA damps by its own factors, and gets one more variant that damps every neuron with
    AUROC above 0.5.
    """
    order = "lowest"
    if method in activations.EXPERTISE_METHODS:
        names = expertise_sets(work.correct)
        pair = names[min(how.seed, len(names) - 1)]
        undesired, benign = (work.references[name] for name in pair)
        inputs = {"aura": [undesired.fingerprint, benign.fingerprint], "model": work.fingerprint}
        order = "highest"
        scores = load_or_make(
            work,
            f"scores/aura{f'.{how.seed}' if pair != names[0] else ''}.safetensors",
            Scores,
            inputs,
            lambda: activations.expertise(work.model, undesired, benign, tokenizer=work.tokenizer),
        )
    else:
        theirs = replace(how, options=how.options.but(method=method), file_prefix="")
        scores = compute_contrast(work, theirs)
    for total, size in sizes.items():
        chosen = _select_if_enough(work, scores, Variant(method, total), how.strength, scope, size, order)
        if chosen is not None and method == "aura":
            yield total, Damping(activations.aura_factors(scores, chosen.members))
        elif chosen is not None:
            yield total, chosen
    if method == "aura":
        whole = Damping(activations.aura_factors(scores))
        if len(whole) > max(sizes, default=0):
            yield len(whole), whole


def _select_if_enough(
    work: RunContext,
    scores: Scores,
    variant: Variant,
    strength: float,
    scope: str,
    size: Mapping[str, Any],
    order: str = "lowest",
) -> Circuit | None:
    """The units of a variant; None, with a warning, where a site, a row or the whole has too few candidates,
    or a share is no unit."""
    why = "the share is too small to select one unit in any row or site"
    try:
        found = select(scores, scope=scope, order=order, strength=strength, **size)
        if len(found) or size == {"count": 0}:
            return found
    except UserError as error:
        why = str(error)
    work.warn(f"{variant} was left out: {why}")
    return None
