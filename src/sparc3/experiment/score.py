"""The scores stage: relevance on each reference set, their contrast, and the circuit it gives."""

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
from ..circuits.fit import SENSITIVITY, gain_by_damage
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
    """One way to contrast: all settings that distinguish two candidates of a search, except the number of
    units.

    Attributes:
        options: attribution options; the target comes from `targets`.
        targets: name of each reference set that takes part → its target.
        seed: the place of the seed by whose sets it scores, where they are kept apart.
        strength: strength of the circuits selected with it.
        file_prefix: of the names of its files in scores/.
        damage: strengths are fitted at this damage; None where units are selected.
    """

    options: AttributionOptions
    targets: dict[str, str]
    penalty: float = 1.0
    normalize: str | None = None
    file_prefix: str = ""
    strength: float = 1.0
    seed: int = 0
    damage: float | None = None

    def options_for(self, name: str) -> AttributionOptions:
        """The options that a reference set is scored with."""
        if self.damage is not None and name == "general":
            return self.options.but(**SENSITIVITY)
        return self.options.but(target=self.targets[name])


@dataclass(frozen=True)
class SelectedCircuit:
    """A circuit and what it came from: the contrast of the first round, and the scores of each set in it."""

    circuit: Circuit
    contrast: Scores
    parts: dict[str, Scores]


Found = tuple[ScoringSpec, SelectedCircuit]
"""A circuit and the contrast that found it."""


def scoring_of_recipe(work: RunContext, seed: int = 0) -> ScoringSpec:
    """The contrast that the recipe asks for, by the sets of the seed at this place."""
    asked, chosen = work.recipe.attribution, work.correct.selection
    targets = {name: spec.target or asked.target for name, spec in work.recipe.references.items()}
    return ScoringSpec(asked, targets, chosen.penalty, chosen.normalize, "", chosen.strength, seed)


def compute_contrast(
    work: RunContext, how: ScoringSpec, removed: Circuit | None = None, prefix: str = ""
) -> Scores:
    """The contrast on the model without the circuit `removed`, whose units are then ranked last."""
    return contrast_parts(work, how, load_or_make_parts(work, how, removed, prefix), removed)


def contrast_parts(
    work: RunContext, how: ScoringSpec, sets: Mapping[str, Scores], removed: Circuit | None = None
) -> Scores:
    """The contrast from scores already computed, or the order in which strengths are fitted; units of
    `removed` and protected units are ranked last."""
    if how.damage is not None:
        return gain_by_damage(sets["undesired"], sets["general"], without=work.protected)
    # Wanda's scores grow with the number of tokens, so that two sets compare only after scaling.
    normalize = "l1" if how.options.method == "wanda" else how.normalize
    made = contrast(
        sets["general"],
        sets["undesired"],
        matched=sets.get("matched"),
        penalty=how.penalty,
        normalize=normalize,
    )
    last = removed or work.protected
    if removed and work.protected:
        last = union(removed.at_full_strength, work.protected)
    return exclude(made, last) if last else made


def load_or_make_parts(
    work: RunContext, how: ScoringSpec, removed: Circuit | None = None, prefix: str = ""
) -> dict[str, Scores]:
    """The scores of each reference set in `how`, on the model without the circuit `removed`."""
    return {name: _load_or_make_scores(work, how, name, removed, prefix) for name in how.targets}


def _load_or_make_scores(
    work: RunContext, how: ScoringSpec, name: str, removed: Circuit | None, prefix: str
) -> Scores:
    options, name = how.options_for(name), set_at_seed(work.recipe, name, how.seed)
    samples = work.references[name]
    inputs = {
        **options.model_dump(exclude={"batch_tokens", "gradient_checkpointing"}),
        "samples": samples.fingerprint,
        "model": work.fingerprint,
        "without": removed.fingerprint if removed else None,
    }
    candidate = (
        f"{how.file_prefix}{options.target.replace(':', '')}.{options.neuron}." if how.file_prefix else ""
    )
    method = "" if options.method == work.recipe.attribution.method else f"{options.method}."
    path = f"scores/{prefix}{candidate}{method}{name}.safetensors"

    def make() -> Scores:
        began = time.perf_counter()
        with ablated(work.model, removed or Circuit(options.unit, {})):
            made = attribute(
                work.model,
                samples,
                tokenizer=work.tokenizer,
                **options.model_dump(),
                progress=work.progress,
                partial=work.folder / f"{path}.partial",
            )
        took = time.perf_counter() - began
        log.info(
            "scores %s, %s: %d samples, %d tokens, %.3f s a sample, %d skipped",
            options.method,
            name,
            made.provenance["samples"],
            made.provenance["tokens"],
            took / max(1, len(samples)),
            len(made.provenance["skipped"]),
        )
        return Scores(dict(made), {**made.provenance, "seconds": round(took, 3)})

    return load_or_make(work, path, Scores, inputs, make)


def find_circuit(work: RunContext, seed: int = 0) -> SelectedCircuit:
    """The circuit to remove, found in as many rounds as the recipe says, by the sets of the seed at this
    place."""
    chosen, how = work.correct.selection, scoring_of_recipe(work, seed)
    parts = load_or_make_parts(work, how)
    first = contrast_parts(work, how, parts)
    if chosen.count is None:
        circuit = select(first, fraction=chosen.fraction, scope=chosen.scope, strength=how.strength)
        return save_circuit(work, SelectedCircuit(circuit, first, parts), seed)
    found = select_in_rounds(work, how, first, chosen.count, chosen.rounds)
    if found is None:
        raise UserError(
            f"{chosen.count} {first.unit}s were requested in {chosen.rounds} rounds, but in a later round "
            "the matched contrast has too few candidates below zero; ask for fewer, or lower the penalty"
        )
    return save_circuit(work, SelectedCircuit(found, first, parts), seed)


def select_in_rounds(
    work: RunContext, how: ScoringSpec, first: Scores, count: int, rounds: int
) -> Circuit | None:
    """`count` units, a share of them by the contrast `first`, each further share by the contrast on the model
    without those before.

    None where a matched contrast has too few candidates below zero in a later round.
    """
    now, circuit = first, Circuit(work.recipe.attribution.unit, {}, work.described, strength=how.strength)
    for round_index in range(rounds):
        if round_index:
            # A search builds several circuits, so the scores of each have its fingerprint in the file name.
            own = f"{circuit.fingerprint[:12]}." if how.file_prefix else ""
            whose = f"seed{how.seed}." if how.seed else ""
            now = compute_contrast(work, how, circuit, f"{whose}round{round_index + 1}.{own}")
        wanted = count * (round_index + 1) // rounds - count * round_index // rounds
        if round_index and wanted > count_candidates(now):
            return None
        part = select(now, count=wanted, scope=work.correct.selection.scope, strength=how.strength)
        # Later rounds see the model without the earlier units, but the whole belongs to the model as it was.
        circuit = replace(union(circuit, replace(part, model=work.described)), provenance=part.provenance)
    return circuit


def save_circuit(work: RunContext, found: SelectedCircuit, seed: int = 0) -> SelectedCircuit:
    """Write the circuit and its contrast into the run folder, under their standard names; returns
    the circuit with `model` and `made_from` filled in. Where seeds are kept apart, each one's circuit is
    circuits/seedN, and the first one's is circuit.json too."""
    made_from = fingerprint(
        {
            "selection": work.correct.selection.model_dump(exclude={"seeds"}),
            "scores": found.contrast.fingerprint,
            "units": found.circuit.fingerprint,
        }
    )
    provenance = {**found.circuit.provenance, "made_from": made_from}
    circuit = replace(found.circuit, model=work.described, provenance=provenance)
    if distributed.is_main():
        found.contrast.save(work.claim(f"scores/contrast{f'.{seed}' if seed else ''}.safetensors"))
        if seed == 0:
            circuit.save(work.claim(f"circuit{circuit.suffix}"))
        if work.correct.selection.seeds:
            circuit.save(work.claim(f"circuits/seed{seed}{circuit.suffix}"))
    log.info(
        "circuit: %d of %d %ss%s in %d sites",
        len(circuit),
        found.contrast.units,
        circuit.unit,
        circuit.at_strength,
        sum(1 for n in circuit.counts.values() if n),
    )
    return replace(found, circuit=circuit)


# Units the model cannot do without: removing one alone multiplies perplexity by PROTECTION_RATIO or more.
# They are left out of every selection.

MAX_SUSPECTS = 12
"""How many neurons are tried, each alone."""
MAX_TEXTS = 6
"""On how many general samples."""
MAX_TOKENS = 256
"""Of how many tokens each."""
SCREEN_TOKENS = 32
"""How many of these tokens the first look takes; most neurons need no second."""
PROTECTION_RATIO = 1.5
"""A neuron without which perplexity is at least this many times as large is protected."""
Unit = tuple[str, int]


def protect_units(work: RunContext) -> None:
    """Fill work.protected, and list it in the results' provenance. Does nothing for heads, weights and sites
    other than mlp.up, or without `selection.protect`; raises UserError where mlp.down is quantised.

    A screen, not a search: only the neurons that write hardest into the residual stream are tried, each
    alone, on a few general samples. Their first tokens come first: only a neuron without which these are
    √PROTECTION_RATIO times as perplexing is tried on the whole.
    """
    if not is_protected(work.recipe):
        return
    joined = join_completions(ReferenceSet(work.references["general"].samples[:MAX_TEXTS]), work.tokenizer)
    texts = [ids[:MAX_TOKENS] for sample in joined if len(ids := sample.input_ids or ()) > 1]
    if not texts:
        return
    found = _measure_ratios(work, _select_suspects(work, texts), [ids[:SCREEN_TOKENS] for ids in texts])
    likely = [unit for unit, ratio in found.items() if ratio >= math.sqrt(PROTECTION_RATIO)]
    if likely and max(map(len, texts)) > SCREEN_TOKENS:
        found |= _measure_ratios(work, likely, texts)
    kept = {unit: ratio for unit, ratio in found.items() if ratio >= PROTECTION_RATIO}
    members = {
        name: tuple(sorted(index for other, index in kept if other == name))
        for name in dict.fromkeys(name for name, _ in kept)
    }
    work.protected = Circuit("neuron", members, work.described) if members else None
    work.noted["protected"] = [
        {"module": name, "index": index, "perplexity_ratio": finite(ratio)}
        for (name, index), ratio in kept.items()
    ]
    log.info(
        "protected: %d of %d suspects multiply perplexity by %.3g or more (at most %.3g)",
        len(kept),
        len(found),
        PROTECTION_RATIO,
        max(found.values()),
    )


def _select_suspects(work: RunContext, texts: list[tuple[int, ...]]) -> list[Unit]:
    samples = ReferenceSet(tuple(Sample(input_ids=ids) for ids in texts))
    writes = distributed.first(largest_writes(work.model, samples))
    places = [(name, index) for name, values in writes.items() for index in range(len(values))]
    hardest = torch.cat(list(writes.values())).argsort(descending=True, stable=True)
    return [places[i] for i in hardest[:MAX_SUSPECTS].tolist()]


def _measure_ratios(work: RunContext, units: list[Unit], texts: list[tuple[int, ...]]) -> dict[Unit, float]:
    """How many times as perplexing the texts are without each unit alone."""
    windows = [(ids, len(ids) - 1) for ids in texts]
    before, found = _measure_perplexity(work, windows), {}
    if not math.isfinite(before):
        raise NonFinite(
            "the model's perplexity on general samples is not finite; load it in bfloat16 or float32"
        )
    with Progress(len(units), "protection", "neuron", show=work.progress) as shown:
        for name, index in shown.each(units):
            with ablated(work.model, Circuit("neuron", {name: (index,)})):
                found[name, index] = _measure_perplexity(work, windows) / before
    return found


def _measure_perplexity(work: RunContext, windows: list[Window]) -> float:
    """Infinite if any loss is NaN or Inf, so that a broken model counts as infinitely worse."""
    nll = negative_log_likelihoods(work.model, windows, progress=False)
    whole = sum(math.inf if value is None else value for value in nll)
    return float(torch.tensor(whole / sum(predicted for _, predicted in windows)).exp())
