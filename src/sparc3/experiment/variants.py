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


def apply_intervention(work: RunContext, intervention: Intervention) -> AbstractContextManager[object]:
    """Inside, the model is the variant."""
    if isinstance(intervention, MeanAblation):
        return replace_by_means(work.model, intervention)
    if isinstance(intervention, Damping):
        return damp(work.model, intervention)
    return ablated(work.model, intervention)


def list_variants(
    work: RunContext, selected: SelectedCircuit, spec: ScoringSpec
) -> Iterator[tuple[str, list[Intervention]]]:
    """Every variant with its interventions: one, or several draws whose figures are pooled.

    Args:
        spec: the contrast that found the circuit; the other methods use the same kind of contrast.
    """
    circuit, scope = selected.circuit, work.correct.selection.scope
    spec = replace(spec, damage=None, repair=0.0)
    comparison = comparison_for(
        work.correct, sites_of(work.model, work.recipe.attribution.sites), len(circuit)
    )
    sizes = {name: tensor.numel() for name, tensor in selected.contrast.items()}
    yield "original", [Circuit(circuit.unit, {}, work.model_info)]
    yield "ablated", [circuit]
    # At the circuit's own size use the circuit itself, not a new selection.
    circuits = {len(circuit): circuit}
    for total, size in comparison.own.items():
        variant = Variant(spec.options.method, total)
        if total not in circuits:
            selection = _select_if_enough(work, selected.contrast, variant, spec.strength, scope, size)
            if selection is None:
                continue
            circuits[total] = selection
        yield str(variant), [circuits[total]]
    rivals = {
        str(Variant(method, total)): intervention
        for method, (rival_scope, counts) in comparison.rivals.items()
        for total, intervention in select_by_method(work, spec, method, rival_scope, counts)
    }
    for name, intervention in {**rivals, **work.rivals}.items():
        yield name, [intervention]
    for count in comparison.null if comparison.draws else ():
        if count in circuits:
            draws = [random_like(circuits[count], sizes, seed) for seed in range(comparison.draws)]
            yield str(Variant("random", count)), [*draws]


def select_by_method(
    work: RunContext, spec: ScoringSpec, method: str, scope: str, sizes: Sizes
) -> Iterator[tuple[int, Intervention]]:
    """(number of units, intervention) of another method at each size, with the contrast and strength of
    `spec`.

    Methods of expertise rank by the AUROC of undesired against matched samples, or against general ones if
    there are no matched ones. AurA damps by its own factors, and gets one more variant that damps every
    neuron with AUROC above 0.5, as its authors do.
    """
    order = "lowest"
    if method in activations.EXPERTISE_METHODS:
        names = expertise_sets(work.correct)
        pair = names[min(spec.seed, len(names) - 1)]
        undesired, benign = (work.references[name] for name in pair)
        inputs = {"aura": [undesired.fingerprint, benign.fingerprint], "model": work.fingerprint}
        order = "highest"
        scores = load_or_make(
            work,
            f"scores/aura{f'.{spec.seed}' if pair != names[0] else ''}.safetensors",
            Scores,
            inputs,
            lambda: activations.expertise(work.model, undesired, benign, tokenizer=work.tokenizer),
        )
    else:
        rival_spec = replace(spec, options=spec.options.copy_with(method=method), file_prefix="")
        scores = compute_contrast(work, rival_spec)
    for total, size in sizes.items():
        circuit = _select_if_enough(work, scores, Variant(method, total), spec.strength, scope, size, order)
        if circuit is not None and method == "aura":
            yield total, Damping(activations.aura_factors(scores, circuit.members))
        elif circuit is not None:
            yield total, circuit
    if method == "aura":
        full_damping = Damping(activations.aura_factors(scores))
        if len(full_damping) > max(sizes, default=0):
            yield len(full_damping), full_damping


def _select_if_enough(
    work: RunContext,
    scores: Scores,
    variant: Variant,
    strength: float,
    scope: str,
    size: Mapping[str, Any],
    order: str = "lowest",
) -> Circuit | None:
    """The units of a variant; None, with a warning, if there are too few candidates or the share is less than
    one unit."""
    reason = "the share is too small to select one unit in any row or site"
    try:
        circuit = select(scores, scope=scope, order=order, strength=strength, **size)
        if len(circuit) or size == {"count": 0}:
            return circuit
    except UserError as error:
        reason = str(error)
    work.warn(f"{variant} was left out: {reason}")
    return None
