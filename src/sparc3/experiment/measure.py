"""The evaluation stage: every variant on the same test samples, and what the results say of where they came
from."""

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
from ..evaluation.evaluate import evaluated_on, fingerprint_of, measure, to_results
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


def measure_variants(work: RunContext, found: Sequence[Found], seconds: Mapping[str, float]) -> Results:
    """All variants measured, of several seeds with their figures pooled; a circuit that is met twice is
    measured once."""
    circuit, contrast = found[0][1].circuit, found[0][1].contrast
    sizes = {name: tensor.numel() for name, tensor in contrast.items()}
    measured, shared = _measure_seeds(work, found, sizes)
    evaluations, by_seed = _pool_seeds(work, measured, found)
    scorers = _measure_agreement(work, evaluations)
    provenance = describe_run(
        work,
        seconds,
        circuit=circuit.fingerprint,
        count=len(circuit),
        sizes=sizes,
        lexicon=_words_to_mask(work),
        checks=run_checks(work, found, evaluations),
        power=measure_power(evaluations),
        **({"scorers": scorers} if scorers else {}),
        **work.noted,
        overlaps=shared,
        **({"by_seed": by_seed} if by_seed else {}),
    )
    null = [str(Variant("random", len(circuit)))] if len(circuit) else []
    results = to_results(evaluations, provenance.to_dict(), [*null, *work.rivals])
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
    work: RunContext, found: Sequence[Found], sizes: Mapping[str, int]
) -> tuple[list[list[Evaluation]], list[Overlap]]:
    """Every variant of every seed, the figures of several random draws pooled, and how far the first one's
    circuits overlap."""
    known: dict[str, Evaluation] = {}
    shared: list[Overlap] = []
    measured: list[list[Evaluation]] = []
    for how, one in found:
        seed = how.seed if len(found) > 1 else None
        measured.append([])
        for variant, changes in list_variants(work, one, how):
            named, draws = Variant.parse(variant), []
            for number, change in enumerate(changes):
                place = name_draw(variant, seed, number if len(changes) > 1 else None)
                if change.fingerprint not in known:
                    name = variant if variant == "original" else place
                    known[change.fingerprint] = load_or_make_evaluation(work, name, change)
                draws.append(replace(known[change.fingerprint], variant=variant))
            measured[-1].append(draws[0] if len(draws) == 1 else pool_draws(variant, draws))
            if not how.seed and named.count == len(one.circuit) and named.method != how.options.method:
                shared += measure_overlaps(one.circuit, {variant: changes}, sizes)
    return measured, shared


def _pool_seeds(
    work: RunContext, measured: Sequence[Sequence[Evaluation]], found: Sequence[Found]
) -> tuple[list[Evaluation], list[SeedFigures]]:
    """Every variant that all seeds have, pooled, and its figures by seed; of the circuits also how far they
    overlap. Without several seeds, the variants as they are."""
    if len(measured) == 1:
        return list(measured[0]), []
    by_name: dict[str, list[Evaluation]] = {}
    for one in (one for seed in measured for one in seed):
        by_name.setdefault(one.variant, []).append(one)
    evaluations, by_seed = by_name.pop("original")[:1], list[SeedFigures]()
    for variant, seeds in by_name.items():
        if len(seeds) < len(measured):
            work.warn(
                f"{variant} was left out: {len(seeds)} of {len(measured)} seeds have a circuit of this size"
            )
            continue
        pooled = replace(pool_draws(variant, seeds), texts=_join_texts(seeds))
        by_seed += tell_seeds(variant, seeds)
        if variant == "ablated":
            bare = [replace(one.circuit, provenance={}) for _, one in found]
            pairs = [overlap(one, other).jaccard for one, other in combinations(bare, 2)]
            stable = observe_stability(sum(pairs) / len(pairs))
            pooled = replace(pooled, observations=(*pooled.observations, stable))
            log.info("the circuits of two seeds share %.3g of the units of either", stable.sums[0])
        evaluations.append(pooled)
    return evaluations, by_seed


def _join_texts(seeds: Sequence[Evaluation]) -> dict[str, list[dict[str, Any]]]:
    """Of each prompt what the models of all seeds wrote."""
    found = {}
    for metric in seeds[0].texts:
        rows = zip(*(one.texts[metric] for one in seeds), strict=True)
        found[metric] = [
            {**row[0], "continuations": [text for one in row for text in one["continuations"]]}
            for row in rows
        ]
    return found


def tell_seeds(variant: str, seeds: Sequence[Evaluation]) -> list[SeedFigures]:
    """Each metric of a variant but the counts of zeros, by each seed's reference sets, as far as all of them
    could be measured, with mean and standard error; logged too."""
    found = []
    for column in zip(*(one.observations for one in seeds), strict=True):
        figures = [measurement(o, variant).value for o in column]
        values = [value for value in figures if value is not None]
        if not column[0].metric.startswith("sparsity") and len(values) == len(figures):
            sem = stdev(values) / len(values) ** 0.5
            found.append(SeedFigures(variant, column[0].metric, values, fmean(values), sem))
    said = ", ".join(f"{one.metric} {one.mean:.4g} ± {one.sem:.2g}" for one in found)
    log.info("%s, mean ± standard error of %d seeds: %s", variant, len(seeds), said)
    return found


def observe_stability(value: float) -> Observations:
    """A figure of all seeds together, which has no interval: pairs of seeds are not independent."""
    unit = "shared units / units of either"
    return Observations("circuit.jaccard", "all seeds", unit, "higher", (value,), (1.0,))


def load_or_make_evaluation(work: RunContext, variant: str, change: Intervention) -> Evaluation:
    """All metrics on one variant, kept as evaluation/`variant`.json."""
    return measure_once(work, variant, {"without": change.fingerprint}, lambda: change)


def measure_once(
    work: RunContext, variant: str, inputs: Mapping[str, Any], change: Callable[[], Intervention]
) -> Evaluation:
    """The same for a change that is made only where there is no evaluation of these inputs yet."""

    def make() -> Evaluation:
        it = change()
        again = (lambda: apply_intervention(work, it)) if len(it) else None
        made = measure(
            work.model, work.tokenizer, work.prepared, variant, progress=work.progress, changed=again
        )
        log.info("evaluated %s in %.1f s", variant, made.seconds)
        return made

    inputs = {**inputs, "model": work.fingerprint, "on": fingerprint_of(work.prepared)}
    return load_or_make(work, f"evaluation/{variant}.json", Evaluation, inputs, make)


def pool_draws(variant: str, draws: Sequence[Evaluation]) -> Evaluation:
    """Several draws of one variant as one, unit by unit."""
    columns = zip(*(draw.observations for draw in draws), strict=True)
    return Evaluation(variant, tuple(pool(list(column)) for column in columns))


def describe_run(work: RunContext, seconds: Mapping[str, float], **own: Any) -> Provenance:
    """What results say of where they came from; `own` is what only this job has to say."""
    margins = work.recipe.margins.model_dump(exclude_none=True) if work.recipe.margins else {}
    return Provenance(
        recipe=work.recipe.name,
        made_from=work.recipe.fingerprint,
        model=work.described,
        **evaluated_on(work.prepared),
        stages=[Stage(name, took) for name, took in seconds.items()],
        warnings=work.warnings,
        version=__version__,
        **({"margins": margins} if margins else {}),
        **own,
    )


def add_verdict(results: Results, unit: str) -> Results:
    """The results with the verdict on them, and its criteria before the other checks."""
    if verdict := judge(results, unit):
        said = asdict(verdict)
        checks = [*said["criteria"], *results.provenance.get("checks", [])]
        results.provenance.update(verdict=said, checks=checks)
    return results


def compare_methods(evaluations: Sequence[Evaluation], own: str) -> list[Difference]:
    """What the method `own` differs from each other one that changes as many units, paired by unit of the
    test, but for the counts of zeros."""
    groups: dict[int | None, list[Evaluation]] = {}
    for one in evaluations:
        groups.setdefault(Variant.parse(one.variant).count, []).append(one)
    groups.pop(None, None)
    found = []
    for group in groups.values():
        mine = next((e for e in group if is_way_of(Variant.parse(e.variant).method, own)), None)
        for other in group if mine is not None else ():
            if mine is None or other is mine:
                continue
            known = {o.metric: o for o in other.observations if not o.metric.startswith("sparsity")}
            for o in mine.observations:
                if o.metric in known:
                    found.append(difference(known[o.metric], o, other.variant, mine.variant))
    return [one for one in found if one is not None]


def _words_to_mask(work: RunContext) -> list[str]:
    asked = [p.settings for p in work.prepared if isinstance(p.settings, ToxicitySettings)]
    return sorted({word for settings in asked for word in lexicon_words(settings.scorer)})


def _measure_agreement(work: RunContext, evaluations: list[Evaluation]) -> Scorers | None:
    """How far two scorers agree on the texts before and after; None with one scorer."""
    toxicity = [p.settings for p in work.prepared if isinstance(p.settings, ToxicitySettings)]
    asked = [settings for settings in toxicity if settings.also]
    texts = {e.variant: e.texts.get("toxicity", []) for e in evaluations}
    before, after = texts.get("original", []), texts.get("ablated", [])
    found = agreement([*before, *after]) if asked else None
    if not found:
        return None
    means = [ScorerMeans(**row) for row in side_by_side(before, after)]
    return Scorers(first=asked[0].scorer, second=asked[0].also, **found, means=means)


def _warn_of_better_rivals(work: RunContext, results: Results) -> list[str]:
    """What must be said where another method, searched under the same budget, does better on the test."""
    said = []
    for name in work.rivals:
        aim = work.noted["tune"].aim
        theirs, ours = results.find(aim, name), results.find(aim, "ablated")
        if theirs.value is None or ours.value is None:
            continue
        if theirs.value < ours.value if theirs.direction == "lower" else theirs.value > ours.value:
            said.append(
                f"under the same budget {name} does better: {aim} {theirs.value:.4g} on the test, against "
                f"{ours.value:.4g} here"
            )
    return said


def _warn_of_chosen_prompts(work: RunContext) -> list[str]:
    return [
        f"the prompts of {p.metric.name} were chosen by this model's own completions: any change of the "
        "model moves them towards the mean; read the effect beside its null"
        for p in work.prepared
        if getattr(p.settings, "choose_by", None) in ("completion", "repetition")
    ]


def run_checks(
    work: RunContext, found: Sequence[Found], evaluations: Sequence[Evaluation], most: int = 3
) -> list[Check]:
    """The short list at the end of a run: what a careful reader would ask first.

    Args:
        most: how many of the layers with most relevance are named.
    """
    sites = {site.name: site for site in sites_of(work.model, work.recipe.attribution.sites)}
    contrast = found[0][1].contrast
    parts = {
        set_at_seed(work.recipe, name, how.seed): part
        for how, one in found
        for name, part in one.parts.items()
    }
    odd = [
        name
        for name, tensor in contrast.items()
        if name not in sites or tensor.numel() != units_in(sites[name], contrast.unit)
    ]
    shapes = f"{odd[0]} has another number of units" if odd else f"{contrast.units:,} units"
    # Σ|relevance| of each site; none may be zero or without end.
    undesired = parts["undesired"].items()
    sums = {name: float(tensor.abs().sum(dtype=torch.float64)) for name, tensor in undesired}
    least, largest, total = min(sums.values()), max(sums.values()), sum(sums.values()) or 1.0
    top = sorted(sums, key=lambda name: -sums[name])[:most]
    said_of = {name: part.provenance for name, part in parts.items()}
    skipped = sum(len(said["skipped"]) for said in said_of.values())
    times = [f"{name} {p['seconds'] / max(1, p['samples']):.3f} s" for name, p in said_of.items()]
    failures = {e.variant: max((o.failures for o in e.observations), default=0) for e in evaluations}
    worst = max(failures, key=lambda variant: failures[variant])
    files = [p for p in work.folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return [
        Check("sites attributed", f"{len(contrast)} of {len(sites)}", set(contrast) == set(sites)),
        Check("shapes of the scores", shapes, not odd),
        Check(
            "total |relevance| of a site, undesired set",
            f"{least:.3g} to {largest:.3g}",
            all(0 < one < math.inf for one in sums.values()),
        ),
        Check(
            "layers of most |relevance|, undesired set",
            f"{', '.join(top)}: {sum(sums[name] for name in top) / total:.0%}",
        ),
        Check("samples with a non-finite relevance", f"{skipped} left out", skipped == 0),
        Check(
            "share of |relevance| by layer, undesired set",
            " ".join(f"{100 * one / total:.0f}" for one in sums.values()) + " %",
        ),
        Check("time per sample", ", ".join(times)),
        Check("failed measurements", f"{failures[worst]} at most ({worst})", failures[worst] == 0),
        *(
            Check("power", one.said)
            for one in measure_power(evaluations)
            if one.metric in ("toxicity.mean", "rur.mean", "ioi.accuracy")
        ),
        Check("files", f"{len(files)}, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB"),
    ]


def measure_power(evaluations: Sequence[Evaluation]) -> list[Power]:
    """The smallest change that so many test samples could have shown: of the circuit against the original,
    from the variance of their paired differences."""
    named = {e.variant: e for e in evaluations}
    if not {"original", "ablated"} <= named.keys():
        return []
    after = {o.metric: o for o in named["ablated"].observations}
    found = []
    for before in named["original"].observations:
        seen = detectable_change(before, after[before.metric]) if before.metric in after else None
        if seen is not None:
            n, x = seen
            size = f"{x:.2g} relative" if before.exponential else f"{x:.2g}"
            said = f"{before.metric}: {n} units detect a change of ≥ {size} with 80 % power"
            found.append(Power(before.metric, n, x, before.exponential, said))
    return found


# How many units one method's circuit shares with the others' circuits of the same size.


def measure_overlaps(
    own: Circuit, others: Mapping[str, Sequence[Intervention]], sizes: Mapping[str, int]
) -> list[Overlap]:
    """Units in the other circuit, in both, and in both by chance.

    Args:
        others: variant → its circuits; of several draws the mean is told.
        sizes: module → units in it.
    """
    found = []
    for variant, changes in others.items():
        seen = [overlap(_touched_units(own), _touched_units(one), sizes=sizes) for one in changes]
        if seen:
            both = sum(one.both for one in seen) / len(seen)
            found.append(Overlap(variant, seen[0].other, both, seen[0].expected))
    return found


def measure_kept_overlaps(
    removed: Iterable[Mapping[str, Circuit]], method: str, sizes: Mapping[str, int]
) -> list[Overlap]:
    """The same of what is left when units are removed: each method's beside that of `method`.

    Args:
        removed: at each sparsity, method → the units that go.
        sizes: module → units in it.
    """
    found = []
    total = sum(sizes.values())
    for circuits in removed:
        if method not in circuits:
            continue
        own = _touched_units(circuits[method])
        for other, circuit in circuits.items():
            if other != method:
                shared = overlap(own, _touched_units(circuit), sizes=sizes).both
                kept = (total - len(own), total - len(circuit))
                both, expected = shared + total - len(own) - len(circuit), kept[0] * kept[1] / total
                found.append(Overlap(str(Variant(other, len(circuit))), kept[1], both, expected))
    return found


def _touched_units(change: Intervention) -> Circuit:
    """The units alone, whatever model and scores they are of; of a damping, the neurons that it touches."""
    if isinstance(change, MeanAblation):
        change = change.circuit
    if isinstance(change, Circuit):
        return replace(change, model={}, provenance={})
    touched = {
        name: tuple((factor != 1).nonzero().flatten().tolist()) for name, factor in change.factors.items()
    }
    return Circuit("neuron", {name: indices for name, indices in touched.items() if indices})
