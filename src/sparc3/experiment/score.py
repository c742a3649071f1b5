"""The scores stage: relevance on each reference set, their contrast, and the circuit selected by it."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .. import distributed
from ..attribution.activations import largest_writes
from ..attribution.attribute import attribute
from ..attribution.options import AttributionOptions
from ..circuits.ablate import ablated
from ..circuits.algebra import union
from ..circuits.circuit import Circuit
from ..circuits.fit import SENSITIVITY, SLOPE, gain_by_damage
from ..circuits.select import contrast, count_candidates, exclude, select
from ..errors import NonFinite, UserError
from ..evaluation.perplexity import Window, negative_log_likelihoods
from ..evaluation.statistics import finite
from ..progress import Progress
from ..samples.batches import join_completions
from ..samples.reference_set import ReferenceSet, Sample
from ..scores import Scores
from ..storage import fingerprint
from .run_folder import RunContext, load_or_make
from .seeds import set_at_seed
from .work_list import is_protected

log = logging.getLogger("sparc3")


@dataclass(frozen=True)
class ScoringSpec:
    """How to compute a contrast: all settings that distinguish two candidates of a search, except the number
    of units.

    Attributes:
        options: attribution options; the target comes from `targets`.
        targets: name of each reference set in the contrast → its target.
        seed: the index of the seed whose sets it uses, if seeds are kept apart.
        strength: strength of the circuits selected with it.
        file_prefix: prefix of its files in scores/.
        damage: the damage at which strengths are fitted; None if units are selected.
        repair: the repair with which strengths are fitted; above 0, the slope of general text is scored too.
    """

    options: AttributionOptions
    targets: dict[str, str]
    penalty: float = 1.0
    normalize: str | None = None
    file_prefix: str = ""
    strength: float = 1.0
    seed: int = 0
    damage: float | None = None
    repair: float = 0.0

    @property
    def parts(self) -> list[str]:
        """The names of its scores: of the reference sets, and the slope."""
        return [*self.targets, *(["slope"] if self.repair else [])]

    def options_for(self, name: str) -> AttributionOptions:
        """The options of these scores."""
        if self.damage is not None and name in ("general", "slope"):
            return self.options.copy_with(**(SENSITIVITY if name == "general" else SLOPE))
        return self.options.copy_with(target=self.targets[name])


@dataclass(frozen=True)
class SelectedCircuit:
    """A circuit with the contrast of the first round, and the scores of each reference set in it."""

    circuit: Circuit
    contrast: Scores
    parts: dict[str, Scores]


Found = tuple[ScoringSpec, SelectedCircuit]
"""A circuit, and the specification of the contrast that found it."""


def scoring_of_recipe(work: RunContext, seed: int = 0) -> ScoringSpec:
    """The contrast that the recipe specifies, with the sets of the seed at this index."""
    options, selection = work.recipe.attribution, work.correct.selection
    targets = {name: reference.target or options.target for name, reference in work.recipe.references.items()}
    return ScoringSpec(
        options, targets, selection.penalty, selection.normalize, strength=selection.strength, seed=seed
    )


def compute_contrast(
    work: RunContext, spec: ScoringSpec, removed: Circuit | None = None, prefix: str = ""
) -> Scores:
    """The contrast on the model without the circuit `removed`, whose units are then ranked last."""
    return contrast_parts(work, spec, load_or_make_parts(work, spec, removed, prefix), removed)


def contrast_parts(
    work: RunContext, spec: ScoringSpec, sets: Mapping[str, Scores], removed: Circuit | None = None
) -> Scores:
    """The contrast from scores already computed, or the order in which strengths are fitted; units of
    `removed` and protected units are ranked last."""
    if spec.damage is not None:
        return gain_by_damage(sets["undesired"], sets["general"], without=work.protected)
    # Wanda's ‖a_j‖₂ grows with the number of tokens, so two sets are comparable only after scaling.
    normalize = "l1" if spec.options.method == "wanda" else spec.normalize
    scores = contrast(
        sets["general"],
        sets["undesired"],
        matched=sets.get("matched"),
        penalty=spec.penalty,
        normalize=normalize,
    )
    ranked_last = removed or work.protected
    # Protected units always have strength 1, and only circuits of one strength can be united.
    if removed and work.protected:
        ranked_last = union(removed.at_full_strength, work.protected)
    return exclude(scores, ranked_last) if ranked_last else scores


def load_or_make_parts(
    work: RunContext, spec: ScoringSpec, removed: Circuit | None = None, prefix: str = ""
) -> dict[str, Scores]:
    """The scores that `spec` needs, on the model without the circuit `removed`."""
    return {name: _load_or_make_scores(work, spec, name, removed, prefix) for name in spec.parts}


def _load_or_make_scores(
    work: RunContext, spec: ScoringSpec, name: str, removed: Circuit | None, prefix: str
) -> Scores:
    options, slope = spec.options_for(name), name == "slope"
    set_name = set_at_seed(work.recipe, "general" if slope else name, spec.seed)
    samples, name = work.references[set_name], name if slope else set_name
    inputs = {
        # These two change the memory that it takes, not the scores.
        **options.model_dump(exclude={"batch_tokens", "gradient_checkpointing"}),
        "samples": samples.fingerprint,
        "model": work.fingerprint,
        "without": removed.fingerprint if removed else None,
    }
    candidate = (
        f"{spec.file_prefix}{options.target.replace(':', '')}.{options.neuron}." if spec.file_prefix else ""
    )
    method = "" if options.method == work.recipe.attribution.method else f"{options.method}."
    path = f"scores/{prefix}{candidate}{method}{name}.safetensors"

    def make() -> Scores:
        start = time.perf_counter()
        with ablated(work.model, removed or Circuit(options.unit, {})):
            scores = attribute(
                work.model,
                samples,
                tokenizer=work.tokenizer,
                **options.model_dump(),
                progress=work.progress,
                partial=work.folder / f"{path}.partial",
            )
        seconds = time.perf_counter() - start
        log.info(
            "scores %s, %s: %d samples, %d tokens, %.3f s a sample, %d skipped",
            options.method,
            name,
            scores.provenance["samples"],
            scores.provenance["tokens"],
            seconds / max(1, len(samples)),
            len(scores.provenance["skipped"]),
        )
        return Scores(dict(scores), {**scores.provenance, "seconds": round(seconds, 3)})

    return load_or_make(work, path, Scores, inputs, make)


def find_circuit(work: RunContext, seed: int = 0) -> SelectedCircuit:
    """The circuit to remove, selected in as many rounds as the recipe says, with the sets of the seed at this
    index."""
    selection, spec = work.correct.selection, scoring_of_recipe(work, seed)
    parts = load_or_make_parts(work, spec)
    first = contrast_parts(work, spec, parts)
    if selection.count is None:
        share = select(first, fraction=selection.fraction, scope=selection.scope, strength=spec.strength)
        return save_circuit(work, SelectedCircuit(share, first, parts), seed)
    circuit = select_in_rounds(work, spec, first, selection.count, selection.rounds)
    if circuit is None:
        raise UserError(
            f"{selection.count} {first.unit}s were requested in {selection.rounds} rounds, but in a later "
            "round the matched contrast has too few candidates below zero; ask for fewer, or lower the "
            "penalty"
        )
    return save_circuit(work, SelectedCircuit(circuit, first, parts), seed)


def select_in_rounds(
    work: RunContext, spec: ScoringSpec, first: Scores, count: int, rounds: int
) -> Circuit | None:
    """`count` units, selected in equal shares: the first by the contrast `first`, each later one by a
    contrast on the model without the units selected so far.

    None if a matched contrast has too few candidates below zero in a later round.
    """
    scores = first
    circuit = Circuit(work.recipe.attribution.unit, {}, work.model_info, strength=spec.strength)
    for round_index in range(rounds):
        if round_index:
            # A search builds several circuits, so the scores of each have its fingerprint in the file name.
            suffix = f"{circuit.fingerprint[:12]}." if spec.file_prefix else ""
            prefix = f"seed{spec.seed}." if spec.seed else ""
            scores = compute_contrast(work, spec, circuit, f"{prefix}round{round_index + 1}.{suffix}")
        # Differences of rounded multiples, so that the rounds add up to exactly `count`.
        size = count * (round_index + 1) // rounds - count * round_index // rounds
        if round_index and size > count_candidates(scores):
            return None
        part = select(scores, count=size, scope=work.correct.selection.scope, strength=spec.strength)
        # A later round's scores are of the ablated model, but the circuit belongs to the original one.
        circuit = replace(union(circuit, replace(part, model=work.model_info)), provenance=part.provenance)
    return circuit


def save_circuit(work: RunContext, selected: SelectedCircuit, seed: int = 0) -> SelectedCircuit:
    """Write the circuit and its contrast into the run folder under their standard names. Returns the circuit
    with `model` and `made_from` filled in.

    If seeds are kept apart, each one's circuit is circuits/seedN, and the first one's is circuit.json too.
    """
    made_from = fingerprint(
        {
            "selection": work.correct.selection.model_dump(exclude={"seeds"}),
            "scores": selected.contrast.fingerprint,
            "units": selected.circuit.fingerprint,
        }
    )
    provenance = {**selected.circuit.provenance, "made_from": made_from}
    circuit = replace(selected.circuit, model=work.model_info, provenance=provenance)
    if distributed.is_main():
        selected.contrast.save(work.claim(f"scores/contrast{f'.{seed}' if seed else ''}.safetensors"))
        if seed == 0:
            circuit.save(work.claim(f"circuit{circuit.suffix}"))
        if work.correct.selection.seeds:
            circuit.save(work.claim(f"circuits/seed{seed}{circuit.suffix}"))
    log.info(
        "circuit: %d of %d %ss%s in %d sites",
        len(circuit),
        selected.contrast.units,
        circuit.unit,
        circuit.at_strength,
        sum(1 for n in circuit.counts.values() if n),
    )
    return replace(selected, circuit=circuit)


# Protected units, such as super weights (Yu et al. 2024): removing a single one multiplies perplexity by
# PROTECTION_RATIO or more. No selection takes them.

MAX_SUSPECTS = 12
"""Number of neurons to remove, each alone."""
MAX_TEXTS = 6
"""Number of general samples to measure them on."""
MAX_TOKENS = 256
"""Number of tokens from each sample."""
SCREEN_TOKENS = 32
"""Number of tokens in the first screen, which clears most neurons."""
PROTECTION_RATIO = 1.5
"""Protect a neuron if the perplexity without it is at least this many times as large."""
Unit = tuple[str, int]


def protect_units(work: RunContext) -> None:
    """Fill work.protected, and list it in the results' provenance. Does nothing for heads, weights and sites
    other than mlp.up, or without `selection.protect`; raises UserError if mlp.down is quantised.

    A screen, not an exhaustive search: only the neurons with the largest contributions to the residual stream
    are removed, each alone, on the beginnings of a few general samples. Those that raise perplexity there
    √PROTECTION_RATIO times or more are measured again on the whole samples.
    """
    if not is_protected(work.recipe):
        return
    joined = join_completions(ReferenceSet(work.references["general"].samples[:MAX_TEXTS]), work.tokenizer)
    texts = [ids[:MAX_TOKENS] for sample in joined if len(ids := sample.input_ids or ()) > 1]
    if not texts:
        return
    ratios = _measure_ratios(work, _select_suspects(work, texts), [ids[:SCREEN_TOKENS] for ids in texts])
    likely = [unit for unit, ratio in ratios.items() if ratio >= math.sqrt(PROTECTION_RATIO)]
    if likely and max(map(len, texts)) > SCREEN_TOKENS:
        ratios |= _measure_ratios(work, likely, texts)
    protected = {unit: ratio for unit, ratio in ratios.items() if ratio >= PROTECTION_RATIO}
    members = {
        name: tuple(sorted(index for module, index in protected if module == name))
        for name in dict.fromkeys(name for name, _ in protected)
    }
    work.protected = Circuit("neuron", members, work.model_info) if members else None
    work.notes["protected"] = [
        {"module": name, "index": index, "perplexity_ratio": finite(ratio)}
        for (name, index), ratio in protected.items()
    ]
    log.info(
        "protected: %d of %d suspects multiply perplexity by %.3g or more (at most %.3g)",
        len(protected),
        len(ratios),
        PROTECTION_RATIO,
        max(ratios.values()),
    )


def _select_suspects(work: RunContext, texts: list[tuple[int, ...]]) -> list[Unit]:
    samples = ReferenceSet(tuple(Sample(input_ids=ids) for ids in texts))
    writes = distributed.first(largest_writes(work.model, samples))
    units = [(name, index) for name, values in writes.items() for index in range(len(values))]
    order = torch.cat(list(writes.values())).argsort(descending=True, stable=True)
    return [units[i] for i in order[:MAX_SUSPECTS].tolist()]


def _measure_ratios(work: RunContext, units: list[Unit], texts: list[tuple[int, ...]]) -> dict[Unit, float]:
    """Perplexity of the texts without each unit alone, divided by that of the whole model."""
    windows = [(ids, len(ids) - 1) for ids in texts]
    before, ratios = _measure_perplexity(work, windows), {}
    if not math.isfinite(before):
        raise NonFinite(
            "the model's perplexity on general samples is not finite; load it in bfloat16 or float32"
        )
    with Progress(len(units), "protection", "neuron", show=work.progress) as progress:
        for name, index in progress.each(units):
            with ablated(work.model, Circuit("neuron", {name: (index,)})):
                ratios[name, index] = _measure_perplexity(work, windows) / before
    return ratios


def _measure_perplexity(work: RunContext, windows: list[Window]) -> float:
    """Infinite if any loss is NaN or Inf, so that a broken model counts as infinitely worse."""
    nll = negative_log_likelihoods(work.model, windows, progress=False)
    total = sum(math.inf if value is None else value for value in nll)
    return float(torch.tensor(total / sum(predicted for _, predicted in windows)).exp())
