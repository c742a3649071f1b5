"""The evaluation stage: every variant on the same test samples, and what the results say of where they came
from."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace

import torch

from .. import __version__
from ..circuits.ablate import Damping
from ..circuits.algebra import overlap
from ..circuits.circuit import Circuit
from ..evaluation.evaluate import evaluated_on, fingerprint_of, measure, to_results
from ..evaluation.metrics import ToxicitySettings
from ..evaluation.scorers import lexicon_words
from ..evaluation.statistics import Evaluation, detectable_change, pool
from ..evaluation.toxicity import agreement, side_by_side
from ..models.sites import sites_of
from ..results import Check, Overlap, Power, Provenance, Results, ScorerMeans, Scorers, Stage, Variant
from ..scores import Scores
from ..storage import fingerprint
from ..verdict import judge
from .run_folder import Intervention, RunContext, load_or_make
from .score import ScoringSpec, SelectedCircuit
from .sizes import units_in
from .variants import apply_intervention, list_variants

log = logging.getLogger("sparc3")


def measure_variants(
    work: RunContext, found: SelectedCircuit, how: ScoringSpec, seconds: Mapping[str, float]
) -> Results:
    """All variants measured; a circuit that is met twice is measured once."""
    known: dict[str, Evaluation] = {}
    shared: list[Overlap] = []
    sizes = {name: tensor.numel() for name, tensor in found.contrast.items()}
    evaluations = []
    for variant, changes in list_variants(work, found, how):
        draws = []
        for number, one in enumerate(changes):
            name = variant if len(changes) == 1 else str(replace(Variant.parse(variant), draw=str(number)))
            if one.fingerprint not in known:
                known[one.fingerprint] = load_or_make_evaluation(work, name, one)
            draws.append(replace(known[one.fingerprint], variant=variant))
        evaluations.append(draws[0] if len(draws) == 1 else _pool_draws(draws))
        named = Variant.parse(variant)
        if named.count == len(found.circuit) and named.method != how.options.method:
            shared += measure_overlaps(found.circuit, {variant: changes}, sizes)
    null = [str(Variant("random", len(found.circuit)))] if len(found.circuit) else []
    provenance = _provenance(work, found, evaluations, seconds, shared).to_dict()
    results = to_results(evaluations, provenance, [*null, *work.rivals])
    results.provenance["warnings"] += _warn_of_better_rivals(work, results)
    if verdict := judge(results, found.circuit.unit):
        results.provenance["verdict"] = asdict(verdict)
        results.provenance["checks"][:0] = results.provenance["verdict"]["criteria"]
    for metric in dict.fromkeys(d.metric for d in results.differences):
        d = results.difference(metric)
        change = f"{d.relative:+.1%}" if d.relative is not None else "-"
        log.info(
            "%s: %.4g → %.4g (%s)",
            metric,
            results.find(metric).value,
            results.find(metric, "ablated").value,
            change,
        )
    return results


def load_or_make_evaluation(work: RunContext, variant: str, change: Intervention) -> Evaluation:
    """All metrics on one variant, kept as evaluation/`variant`.json."""
    made_from = fingerprint(
        {
            "model": work.fingerprint,
            "without": change.fingerprint,
            "on": fingerprint_of(work.prepared),
            "version": __version__,
        }
    )

    def make() -> Evaluation:
        again = (lambda: apply_intervention(work, change)) if len(change) else None
        made = measure(work.model, work.tokenizer, work.prepared, variant, made_from, work.progress, again)
        log.info("evaluated %s in %.1f s", variant, made.seconds)
        return made

    return load_or_make(
        work, f"evaluation/{variant}.json", made_from, Evaluation.load, lambda e: e.made_from, make
    )


def _pool_draws(draws: list[Evaluation]) -> Evaluation:
    columns = zip(*(draw.observations for draw in draws), strict=True)
    return Evaluation(draws[0].variant, tuple(pool(list(column)) for column in columns))


def _provenance(
    work: RunContext,
    found: SelectedCircuit,
    evaluations: list[Evaluation],
    seconds: Mapping[str, float],
    shared: list[Overlap],
) -> Provenance:
    agreed = _measure_agreement(work, evaluations)
    return Provenance(
        recipe=work.recipe.name,
        made_from=work.recipe.fingerprint,
        model=work.described,
        circuit=found.circuit.fingerprint,
        count=len(found.circuit),
        sizes={name: tensor.numel() for name, tensor in found.contrast.items()},
        **evaluated_on(work.prepared),
        lexicon=lexicon(work),
        checks=run_checks(work, found.contrast, found.parts, evaluations),
        stages=[Stage(name, took) for name, took in seconds.items()],
        power=measure_power(evaluations),
        **({"scorers": agreed} if agreed else {}),
        **work.noted,
        warnings=work.warnings + _chosen_by_outcome(work),
        version=__version__,
        overlaps=shared,
    )


def lexicon(work: RunContext) -> list[str]:
    words = [
        lexicon_words(p.settings.scorer) for p in work.prepared if isinstance(p.settings, ToxicitySettings)
    ]
    return sorted({word for some in words for word in some})


def _measure_agreement(work: RunContext, evaluations: list[Evaluation]) -> Scorers | None:
    """How far two scorers agree on the texts before and after; None with one scorer."""
    asked = [
        p.settings for p in work.prepared if isinstance(p.settings, ToxicitySettings) and p.settings.also
    ]
    before, after = (
        next((e.texts.get("toxicity", []) for e in evaluations if e.variant == name), [])
        for name in ("original", "ablated")
    )
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


def _chosen_by_outcome(work: RunContext) -> list[str]:
    return [
        f"the prompts of {p.metric.name} were chosen by this model's own completions: any change of the "
        "model moves them towards the mean; read the effect beside its null"
        for p in work.prepared
        if getattr(p.settings, "choose_by", None) in ("completion", "repetition")
    ]


# The short list at the end of a run: what a careful reader would ask first.


def run_checks(
    work: RunContext, contrast: Scores, parts: Mapping[str, Scores], evaluations: Sequence[Evaluation]
) -> list[Check]:
    expected = [site.name for site in sites_of(work.model, work.recipe.attribution.sites)]
    files = sorted(p for p in work.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    skipped = sum(len(part.provenance["skipped"]) for part in parts.values())
    seconds = [
        f"{name} {part.provenance['seconds'] / max(1, part.provenance['samples']):.3f} s"
        for name, part in parts.items()
    ]
    failures = {e.variant: max((o.failures for o in e.observations), default=0) for e in evaluations}
    worst = max(failures, key=lambda v: failures[v])
    found = [
        ("sites attributed", f"{len(contrast)} of {len(expected)}", set(contrast) == set(expected)),
        ("shapes of the scores", *_compare_shapes(work, contrast)),
        ("total |relevance| of a site, undesired set", *_compare_totals(parts["undesired"])),
        ("layers of most |relevance|, undesired set", _find_top_layers(parts["undesired"]), None),
        ("samples with a non-finite relevance", f"{skipped} left out", skipped == 0),
        ("share of |relevance| by layer, undesired set", _relevance_by_layer(parts["undesired"]), None),
        ("time per sample", ", ".join(seconds), None),
        ("failed measurements", f"{failures[worst]} at most ({worst})", failures[worst] == 0),
        *(
            ("power", one.said, None)
            for one in measure_power(evaluations)
            if one.metric in ("toxicity.mean", "rur.mean", "ioi.accuracy")
        ),
        ("files", f"{len(files)}, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB", None),
    ]
    return [Check(*one) for one in found]


def _compare_shapes(work: RunContext, scores: Scores) -> tuple[str, bool]:
    """Whether each site has one score a unit."""
    sites = {site.name: site for site in sites_of(work.model, work.recipe.attribution.sites)}
    wrong = [
        name
        for name, tensor in scores.items()
        if name not in sites or tensor.numel() != units_in(sites[name], scores.unit)
    ]
    return (f"{wrong[0]} has another number of units" if wrong else f"{scores.units:,} units"), not wrong


def _compare_totals(scores: Scores) -> tuple[str, bool]:
    """Σ|relevance| of the least and of the most relevant site; none may be zero or without end."""
    sums = [float(tensor.abs().sum(dtype=torch.float64)) for tensor in scores.values()]
    return f"{min(sums):.3g} to {max(sums):.3g}", all(0 < total < math.inf for total in sums)


def _find_top_layers(scores: Scores, most: int = 3) -> str:
    """Sites with the largest Σ|relevance|, largest first, and their share of all."""
    sums = {name: float(tensor.abs().sum()) for name, tensor in scores.items()}
    top = sorted(sums, key=lambda name: -sums[name])[:most]
    share = sum(sums[name] for name in top) / (sum(sums.values()) or 1.0)
    return f"{', '.join(top)}: {share:.0%}"


def _relevance_by_layer(scores: Scores) -> str:
    """Percent of Σ|relevance| in each site, sites in order."""
    sums = [float(tensor.abs().sum()) for tensor in scores.values()]
    total = sum(sums) or 1.0
    return " ".join(f"{100 * s / total:.0f}" for s in sums) + " %"


# What the test samples could have shown: the smallest change that so many of them detect.


def measure_power(evaluations: Sequence[Evaluation]) -> list[Power]:
    """Of the circuit against the original, from the variance of their paired differences."""
    named = {e.variant: e for e in evaluations}
    if not {"original", "ablated"} <= named.keys():
        return []
    after = {o.metric: o for o in named["ablated"].observations}
    found = []
    for before in named["original"].observations:
        seen = detectable_change(before, after[before.metric]) if before.metric in after else None
        if seen is None:
            continue
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
        seen = [
            overlap(_without_provenance(own), _without_provenance(_touched_neurons(one)), sizes=sizes)
            for one in changes
        ]
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
        own = circuits.get(method)
        for other, circuit in circuits.items() if own is not None else ():
            if other == method or own is None:
                continue
            shared = overlap(_without_provenance(own), _without_provenance(circuit), sizes=sizes).both
            kept = (total - len(own), total - len(circuit))
            both, expected = shared + total - len(own) - len(circuit), kept[0] * kept[1] / total
            found.append(Overlap(str(Variant(other, len(circuit))), kept[1], both, expected))
    return found


def _touched_neurons(change: Intervention) -> Circuit:
    """The neurons that a damping touches."""
    if isinstance(change, Circuit):
        return change
    assert isinstance(change, Damping)
    touched = {
        name: tuple((factor != 1).nonzero().flatten().tolist()) for name, factor in change.factors.items()
    }
    return Circuit("neuron", {name: indices for name, indices in touched.items() if indices})


def _without_provenance(circuit: Circuit) -> Circuit:
    return replace(circuit, model={}, provenance={})
