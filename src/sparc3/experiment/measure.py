"""The evaluation stage: measure every variant on the same test samples, and describe the run in the
results."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import torch

from .. import __version__
from ..circuits.algebra import overlap
from ..circuits.circuit import Circuit
from ..circuits.mean_ablation import MeanAblation
from ..evaluation.evaluate import describe_samples, fingerprint_samples, make_results, measure
from ..evaluation.metrics import ToxicitySettings
from ..evaluation.scorers import lexicon_words
from ..evaluation.statistics import Evaluation, Observations, detectable_change, difference, measurement, pool
from ..evaluation.toxicity import agreement, side_by_side
from ..models.sites import sites_of
from ..results import (
    Check,
    Difference,
    Overlap,
    Power,
    Provenance,
    Results,
    ScorerMeans,
    Scorers,
    SeedFigures,
    Stage,
    Variant,
)
from ..verdict import is_way_of, judge
from .run_folder import Intervention, RunContext, load_or_make
from .score import Found
from .seeds import name_draw, set_at_seed
from .variants import apply_intervention, list_variants
from .work_list import units_in

log = logging.getLogger("sparc3")


def measure_variants(work: RunContext, circuits: Sequence[Found], seconds: Mapping[str, float]) -> Results:
    """The results of all variants, with the figures of several seeds pooled; two variants with the same
    circuit are measured once."""
    circuit, contrast = circuits[0][1].circuit, circuits[0][1].contrast
    sizes = {name: tensor.numel() for name, tensor in contrast.items()}
    evaluations_by_seed, overlaps = _measure_seeds(work, circuits, sizes)
    evaluations, by_seed = _pool_seeds(work, evaluations_by_seed, circuits)
    scorers = _measure_agreement(work, evaluations)
    provenance = describe_run(
        work,
        seconds,
        circuit=circuit.fingerprint,
        count=len(circuit),
        sizes=sizes,
        lexicon=_words_to_mask(work),
        checks=run_checks(work, circuits, evaluations),
        power=measure_power(evaluations),
        **({"scorers": scorers} if scorers else {}),
        **work.notes,
        overlaps=overlaps,
        **({"by_seed": by_seed} if by_seed else {}),
    )
    # Besides the original, "ablated" is compared with what an ablation might beat only by luck: random units
    # of the same number, and other methods' best under the same budget.
    null = [str(Variant("random", len(circuit)))] if len(circuit) else []
    results = make_results(evaluations, provenance.to_dict(), [*null, *work.rivals])
    results.provenance["warnings"] = [
        *work.warnings,
        *_warn_of_chosen_prompts(work),
        *_warn_of_better_rivals(work, results),
    ]
    add_verdict(results, circuit.unit)
    for metric in dict.fromkeys(d.metric for d in results.differences):
        d = results.difference(metric)
        change = f"{d.relative:+.1%}" if d.relative is not None else "-"
        before, after = results.find(metric).value, results.find(metric, "ablated").value
        log.info("%s: %.4g → %.4g (%s)", metric, before, after, change)
    return results


def _measure_seeds(
    work: RunContext, circuits: Sequence[Found], sizes: Mapping[str, int]
) -> tuple[list[list[Evaluation]], list[Overlap]]:
    """For each seed, every variant, with the figures of several random draws pooled; and the overlaps of the
    first seed's circuits."""
    evaluation_of: dict[str, Evaluation] = {}
    overlaps: list[Overlap] = []
    evaluations_by_seed: list[list[Evaluation]] = []
    for spec, selected in circuits:
        seed, evaluations = spec.seed if len(circuits) > 1 else None, list[Evaluation]()
        for variant, interventions in list_variants(work, selected, spec):
            parsed, draws = Variant.parse(variant), []
            for number, intervention in enumerate(interventions):
                name = name_draw(variant, seed, number if len(interventions) > 1 else None)
                if intervention.fingerprint not in evaluation_of:
                    name = variant if variant == "original" else name  # the same for all seeds
                    evaluation_of[intervention.fingerprint] = load_or_make_evaluation(
                        work, name, intervention
                    )
                draws.append(replace(evaluation_of[intervention.fingerprint], variant=variant))
            evaluations.append(draws[0] if len(draws) == 1 else pool_draws(variant, draws))
            is_same_size = parsed.count == len(selected.circuit)
            if not spec.seed and is_same_size and parsed.method != spec.options.method:
                overlaps += measure_overlaps(selected.circuit, {variant: interventions}, sizes)
        evaluations_by_seed.append(evaluations)
    return evaluations_by_seed, overlaps


def _pool_seeds(
    work: RunContext, evaluations_by_seed: Sequence[Sequence[Evaluation]], circuits: Sequence[Found]
) -> tuple[list[Evaluation], list[SeedFigures]]:
    """Every variant that all seeds have, pooled, and its figures by seed; for the circuits also their
    overlap. With a single seed, the variants as they are."""
    if len(evaluations_by_seed) == 1:
        return list(evaluations_by_seed[0]), []
    by_variant: dict[str, list[Evaluation]] = {}
    for evaluations in evaluations_by_seed:
        for evaluation in evaluations:
            by_variant.setdefault(evaluation.variant, []).append(evaluation)
    pooled_evaluations, by_seed = by_variant.pop("original")[:1], list[SeedFigures]()
    for variant, seeds in by_variant.items():
        if len(seeds) < len(evaluations_by_seed):
            work.warn(
                f"{variant} was left out: {len(seeds)} of {len(evaluations_by_seed)} seeds have a circuit of "
                "this size"
            )
            continue
        pooled = replace(pool_draws(variant, seeds), texts=_join_texts(seeds))
        by_seed += summarize_seeds(variant, seeds)
        if variant == "ablated":
            bare_circuits = [replace(selected.circuit, provenance={}) for _, selected in circuits]
            pairs = [overlap(first, second).jaccard for first, second in combinations(bare_circuits, 2)]
            stability = observe_stability(sum(pairs) / len(pairs))
            pooled = replace(pooled, observations=(*pooled.observations, stability))
            log.info("the circuits of two seeds share %.3g of the units of either", stability.sums[0])
        pooled_evaluations.append(pooled)
    return pooled_evaluations, by_seed


def _join_texts(seeds: Sequence[Evaluation]) -> dict[str, list[dict[str, Any]]]:
    """For each prompt, what the models of all seeds wrote."""
    texts = {}
    for metric in seeds[0].texts:
        rows = zip(*(evaluation.texts[metric] for evaluation in seeds), strict=True)
        texts[metric] = [
            {**row[0], "continuations": [text for part in row for text in part["continuations"]]}
            for row in rows
        ]
    return texts


def summarize_seeds(variant: str, seeds: Sequence[Evaluation]) -> list[SeedFigures]:
    """Each metric of a variant by each seed's reference sets, with mean and standard error, also logged;
    without the counts of zeros and metrics that failed for a seed."""
    rows = []
    for column in zip(*(evaluation.observations for evaluation in seeds), strict=True):
        figures = [measurement(o, variant).value for o in column]
        values = [value for value in figures if value is not None]
        if not column[0].metric.startswith("sparsity") and len(values) == len(figures):
            sem = stdev(values) / len(values) ** 0.5
            rows.append(SeedFigures(variant, column[0].metric, values, fmean(values), sem))
    summary = ", ".join(f"{row.metric} {row.mean:.4g} ± {row.sem:.2g}" for row in rows)
    log.info("%s, mean ± standard error of %d seeds: %s", variant, len(seeds), summary)
    return rows


def observe_stability(value: float) -> Observations:
    """One figure for all seeds, without an interval, because pairs of seeds are not independent."""
    unit = "shared units / units of either"
    return Observations("circuit.jaccard", "all seeds", unit, "higher", (value,), (1.0,))


def load_or_make_evaluation(work: RunContext, variant: str, intervention: Intervention) -> Evaluation:
    """All metrics on one variant, saved as evaluation/`variant`.json."""
    return measure_once(work, variant, {"without": intervention.fingerprint}, lambda: intervention)


def measure_once(
    work: RunContext, variant: str, inputs: Mapping[str, Any], change: Callable[[], Intervention]
) -> Evaluation:
    """As `load_or_make_evaluation`, but `change` makes the intervention only if no saved evaluation fits."""

    def make() -> Evaluation:
        intervention = change()
        apply = (lambda: apply_intervention(work, intervention)) if len(intervention) else None
        evaluation = measure(
            work.model, work.tokenizer, work.prepared, variant, progress=work.progress, changed=apply
        )
        log.info("evaluated %s in %.1f s", variant, evaluation.seconds)
        return evaluation

    inputs = {**inputs, "model": work.fingerprint, "on": fingerprint_samples(work.prepared)}
    return load_or_make(work, f"evaluation/{variant}.json", Evaluation, inputs, make)


def pool_draws(variant: str, draws: Sequence[Evaluation]) -> Evaluation:
    """Several draws of one variant as one evaluation, pooled unit by unit."""
    columns = zip(*(draw.observations for draw in draws), strict=True)
    return Evaluation(variant, tuple(pool(list(column)) for column in columns))


def describe_run(work: RunContext, seconds: Mapping[str, float], **sections: Any) -> Provenance:
    """The results' provenance; `sections` are those that only this job has."""
    margins = work.recipe.margins.model_dump(exclude_none=True) if work.recipe.margins else {}
    return Provenance(
        recipe=work.recipe.name,
        made_from=work.recipe.fingerprint,
        model=work.model_info,
        **describe_samples(work.prepared),
        stages=[Stage(name, seconds_taken) for name, seconds_taken in seconds.items()],
        warnings=work.warnings,
        version=__version__,
        **({"margins": margins} if margins else {}),
        **sections,
    )


def add_verdict(results: Results, unit: str) -> Results:
    """The results with their verdict added, and its criteria before the other checks."""
    if verdict := judge(results, unit):
        content = asdict(verdict)
        checks = [*content["criteria"], *results.provenance.get("checks", [])]
        results.provenance.update(verdict=content, checks=checks)
    return results


def compare_methods(evaluations: Sequence[Evaluation], own: str) -> list[Difference]:
    """The differences of the method `own` from each other one that changes as many units, paired by test
    unit; without the counts of zeros."""
    groups: dict[int | None, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(Variant.parse(evaluation.variant).count, []).append(evaluation)
    groups.pop(None, None)
    differences = []
    for group in groups.values():
        own_evaluation = next((e for e in group if is_way_of(Variant.parse(e.variant).method, own)), None)
        if own_evaluation is None:
            continue
        for other in (e for e in group if e is not own_evaluation):
            observed = {o.metric: o for o in other.observations if not o.metric.startswith("sparsity")}
            differences += [
                difference(observed[o.metric], o, other.variant, own_evaluation.variant)
                for o in own_evaluation.observations
                if o.metric in observed
            ]
    return [d for d in differences if d is not None]


def _words_to_mask(work: RunContext) -> list[str]:
    toxicity = [p.settings for p in work.prepared if isinstance(p.settings, ToxicitySettings)]
    return sorted({word for settings in toxicity for word in lexicon_words(settings.scorer)})


def _measure_agreement(work: RunContext, evaluations: list[Evaluation]) -> Scorers | None:
    """How far two toxicity scorers agree on the texts before and after; None with one scorer."""
    toxicity = [p.settings for p in work.prepared if isinstance(p.settings, ToxicitySettings)]
    doubly_scored = [settings for settings in toxicity if settings.also]
    # Only texts carry the second scorer's figures, next to the first one's.
    texts = {e.variant: e.texts.get("toxicity", []) for e in evaluations}
    before, after = texts.get("original", []), texts.get("ablated", [])
    correlations = agreement([*before, *after]) if doubly_scored else None
    if not correlations:
        return None
    means = [ScorerMeans(**row) for row in side_by_side(before, after)]
    return Scorers(first=doubly_scored[0].scorer, second=doubly_scored[0].also, **correlations, means=means)


def _warn_of_better_rivals(work: RunContext, results: Results) -> list[str]:
    """A warning for each other method that, searched under the same budget, does better on the test."""
    messages = []
    for name in work.rivals:
        aim = work.notes["tune"].aim
        rival, own = results.find(aim, name), results.find(aim, "ablated")
        if rival.value is None or own.value is None:
            continue
        if rival.value < own.value if rival.direction == "lower" else rival.value > own.value:
            messages.append(
                f"under the same budget {name} does better: {aim} {rival.value:.4g} on the test, against "
                f"{own.value:.4g} here"
            )
    return messages


def _warn_of_chosen_prompts(work: RunContext) -> list[str]:
    return [
        f"the prompts of {p.metric.name} were chosen by this model's own completions: any change of the "
        "model moves them towards the mean; read the effect beside its null"
        for p in work.prepared
        if getattr(p.settings, "choose_by", None) in ("completion", "repetition")
    ]


def run_checks(
    work: RunContext, circuits: Sequence[Found], evaluations: Sequence[Evaluation], top_layers: int = 3
) -> list[Check]:
    """The short list at the end of a run: what a careful reader would ask first.

    Args:
        top_layers: number of layers with the most relevance to name.
    """
    sites = {site.name: site for site in sites_of(work.model, work.recipe.attribution.sites)}
    contrast = circuits[0][1].contrast
    parts = {
        set_at_seed(work.recipe, name, spec.seed): part
        for spec, selected in circuits
        for name, part in selected.parts.items()
    }
    wrong = [
        name
        for name, tensor in contrast.items()
        if name not in sites or tensor.numel() != units_in(sites[name], contrast.unit)
    ]
    shapes = f"{wrong[0]} has another number of units" if wrong else f"{contrast.units:,} units"
    # Σ|relevance| of each site; zero or infinity anywhere means a broken attribution.
    undesired = parts["undesired"].items()
    sums = {name: float(tensor.abs().sum(dtype=torch.float64)) for name, tensor in undesired}
    smallest, largest, total = min(sums.values()), max(sums.values()), sum(sums.values()) or 1.0
    top = sorted(sums, key=lambda name: -sums[name])[:top_layers]
    provenances = {name: part.provenance for name, part in parts.items()}
    skipped = sum(len(provenance["skipped"]) for provenance in provenances.values())
    times = [f"{name} {p['seconds'] / max(1, p['samples']):.3f} s" for name, p in provenances.items()]
    failures = {e.variant: max((o.failures for o in e.observations), default=0) for e in evaluations}
    worst = max(failures, key=lambda variant: failures[variant])
    files = [p for p in work.folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return [
        Check("sites attributed", f"{len(contrast)} of {len(sites)}", set(contrast) == set(sites)),
        Check("shapes of the scores", shapes, not wrong),
        Check(
            "total |relevance| of a site, undesired set",
            f"{smallest:.3g} to {largest:.3g}",
            all(0 < value < math.inf for value in sums.values()),
        ),
        Check(
            "layers of most |relevance|, undesired set",
            f"{', '.join(top)}: {sum(sums[name] for name in top) / total:.0%}",
        ),
        Check("samples with a non-finite relevance", f"{skipped} left out", skipped == 0),
        Check(
            "share of |relevance| by layer, undesired set",
            " ".join(f"{100 * value / total:.0f}" for value in sums.values()) + " %",
        ),
        Check("time per sample", ", ".join(times)),
        Check("failed measurements", f"{failures[worst]} at most ({worst})", failures[worst] == 0),
        *(
            Check("power", power.said)
            for power in measure_power(evaluations)
            if power.metric in ("toxicity.mean", "rur.mean", "ioi.accuracy")
        ),
        Check("files", f"{len(files)}, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB"),
    ]


def measure_power(evaluations: Sequence[Evaluation]) -> list[Power]:
    """The smallest change of each metric that the test could have detected, from the variance of the paired
    differences between the original and the circuit."""
    by_variant = {e.variant: e for e in evaluations}
    if not {"original", "ablated"} <= by_variant.keys():
        return []
    after = {o.metric: o for o in by_variant["ablated"].observations}
    powers = []
    for before in by_variant["original"].observations:
        detectable = detectable_change(before, after[before.metric]) if before.metric in after else None
        if detectable is not None:
            n, x = detectable
            size = f"{x:.2g} relative" if before.exponential else f"{x:.2g}"
            sentence = f"{before.metric}: {n} units detect a change of ≥ {size} with 80 % power"
            powers.append(Power(before.metric, n, x, before.exponential, sentence))
    return powers


# How many units one method's circuit shares with other methods' circuits of the same size.


def measure_overlaps(
    own: Circuit, others: Mapping[str, Sequence[Intervention]], sizes: Mapping[str, int]
) -> list[Overlap]:
    """For each other variant: units in its circuit, in both, and in both by chance.

    Args:
        others: variant → its circuits; several draws give their mean.
        sizes: module → number of its units.
    """
    overlaps = []
    for variant, changes in others.items():
        shared = [overlap(_bare_circuit(own), _bare_circuit(change), sizes=sizes) for change in changes]
        if shared:
            both = sum(change.both for change in shared) / len(shared)
            overlaps.append(Overlap(variant, shared[0].second, both, shared[0].expected))
    return overlaps


def measure_kept_overlaps(
    removed: Iterable[Mapping[str, Circuit]], method: str, sizes: Mapping[str, int]
) -> list[Overlap]:
    """As `measure_overlaps`, but of the units that stay: each method's compared with those of `method`.

    Args:
        removed: at each sparsity, method → the removed units.
        sizes: module → number of its units.
    """
    overlaps = []
    total = sum(sizes.values())
    for circuits in removed:
        if method not in circuits:
            continue
        own = _bare_circuit(circuits[method])
        for other, circuit in circuits.items():
            if other != method:
                shared = overlap(own, _bare_circuit(circuit), sizes=sizes).both
                # Inclusion and exclusion: |A ∩ B| of the kept sets from the removed ones' sizes and overlap.
                kept = (total - len(own), total - len(circuit))
                both, expected = shared + total - len(own) - len(circuit), kept[0] * kept[1] / total
                overlaps.append(Overlap(str(Variant(other, len(circuit))), kept[1], both, expected))
    return overlaps


def _bare_circuit(change: Intervention) -> Circuit:
    """The units without model and provenance, so that any two can be compared; for a damping, the neurons
    that it changes."""
    if isinstance(change, MeanAblation):
        change = change.circuit
    if isinstance(change, Circuit):
        return replace(change, model={}, provenance={})
    members = {
        name: tuple((factor != 1).nonzero().flatten().tolist()) for name, factor in change.factors.items()
    }
    return Circuit("neuron", {name: indices for name, indices in members.items() if indices})
