"""The job `discover`: of each method, ranking and seed, keep the top units of a task, remove the rest, and
see how sparse it can get.

Faithfulness and its areas are those of the MIB benchmark (Mueller et al. 2025): with m the mean logit
difference and C_k the circuit of the share k of all units, f(k) = (m(C_k) − m(∅)) / (m(full) − m(∅)), CPR = ∫
f dk (higher is better), CMD = ∫ |1 − f| dk (lower is).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from .. import __version__, distributed
from ..circuits.algebra import difference, overlap
from ..circuits.circuit import Circuit
from ..circuits.select import select
from ..errors import Sparc3Error, UserError
from ..evaluation.evaluate import evaluated_on, to_results
from ..evaluation.metrics import IOISettings
from ..evaluation.statistics import Evaluation, Observations, pool
from ..evaluation.statistics import difference as paired
from ..models.sites import sites_of
from ..recipe.schema import DiscoverRecipe
from ..recipe.sections import Discover
from ..results import Difference, Provenance, Results, Stage, Variant, find_sparsest
from ..samples.reference_set import ReferenceSet
from ..samples.sources import is_path
from ..scores import Scores
from .measure import load_or_make_evaluation, measure_kept_overlaps
from .run_folder import RunContext
from .score import ScoringSpec, load_or_make_parts
from .sizes import Sizes, ranking_scope, rankings, removed_sizes

log = logging.getLogger("sparc3")
Ranked = dict[str, list[Scores]]
"""Method, with "-abs" or "-signed" for all but the first ranking → scores by which its units are kept,
highest first, one a seed."""


def settings(work: RunContext) -> Discover:
    assert work.recipe.job == "discover"
    return work.recipe.discover


def require_task(recipe: DiscoverRecipe) -> None:
    """Raise UserError where a file of the task lacks a target or a contrast; asked before any model is
    loaded."""
    task = recipe.references["task"]
    tests = [m for m in recipe.metrics().values() if isinstance(m, IOISettings)]
    read = [(task.source, task.column), *((settings.source, settings.column) for settings in tests)]
    for source, column in dict.fromkeys(place for place in read if is_path(place[0])):
        for number, sample in enumerate(ReferenceSet.load(source, column)):
            for key in ("target", "contrast"):
                if getattr(sample, key) is None:
                    raise UserError(
                        f'{source}: sample {number} has no "{key}"; the job discover needs text, target and '
                        "contrast in each"
                    )


def rank_units(work: RunContext) -> Ranked:
    """Scores of every method on the reference set of every seed, in each ranking; `random` draws anew for
    each."""
    made = {method: _load_or_make_ranking(work, method) for method in settings(work).methods}

    def signed(method: str) -> bool:
        return any(float(tensor.min()) < 0 for one in made[method] for tensor in one.values())

    return {
        name: [_kept_first(one, rank) for one in made[method]]
        for name, method, rank in rankings(settings(work), signed)
    }


def _load_or_make_ranking(work: RunContext, method: str) -> list[Scores]:
    asked, target = (
        work.recipe.attribution,
        work.recipe.references["task"].target or work.recipe.attribution.target,
    )
    names = [f"random:{number}" if method == "random" else method for number in range(len(work.references))]
    ways = (
        ScoringSpec(asked.but(method=name), {task: target})
        for name, task in zip(names, work.references, strict=True)
    )
    return [load_or_make_parts(work, how)[task] for how, task in zip(ways, work.references, strict=True)]


def _kept_first(scores: Scores, rank: str) -> Scores:
    return (
        Scores({name: tensor.abs() for name, tensor in scores.items()}, scores.provenance)
        if rank == "abs"
        else scores
    )


def measure_circuits(work: RunContext, ranked: Ranked, seconds: Mapping[str, float]) -> Results:
    """Every method at every sparsity, figures of the seeds pooled, with faithfulness, its areas, and the
    circuits' stability."""
    total = next(iter(ranked.values()))[0].units
    everything = select(next(iter(ranked.values()))[0], count=total)
    original = load_or_make_evaluation(
        work, "original", Circuit(work.recipe.attribution.unit, {}, work.described)
    )
    empty = load_or_make_evaluation(work, "empty", everything)
    full, nothing = (mean_of(one, "ioi.logit_difference") for one in (original, empty))
    if not full > nothing:
        raise UserError(
            f"the whole model's logit difference {full:.4g} is not above {nothing:.4g}, that without any of "
            "these units: they hold no circuit of "
            "this task; attribute at other sites, or choose a task that the model can do"
        )
    found, summaries = [original, empty], []
    for method, seeds in ranked.items():
        curve = []
        scope, removed = _removed_by(work, method)
        for count, size in removed.items():
            circuits = [select(scores, scope=scope, **size) for scores in seeds]
            curve.append(_measure_at(work, Variant(method, count), circuits, total, (nothing, full)))
            _save_circuit(work, method, count, everything, circuits)
        found += [one.together for one in curve]
        summaries.append(
            _summarize(method, [count / total for count in removed], curve, settings(work).enough)
        )
    sizes = {name: tensor.numel() for name, tensor in next(iter(ranked.values()))[0].items()}
    shared = measure_kept_overlaps(_removed_together(work, ranked), work.recipe.attribution.method, sizes)
    provenance = _provenance(work, sizes, seconds).model_copy(update={"overlaps": shared})
    results = to_results([*found, *summaries], provenance.to_dict())
    return replace(
        results,
        differences=(
            *results.differences,
            *_measure_rival_overlaps(summaries, work.recipe.attribution.method),
        ),
    )


def _removed_by(work: RunContext, ranking: str) -> tuple[str, Sizes]:
    """The scope of a ranking, and how many units its circuits lack."""
    sites = sites_of(work.model, work.recipe.attribution.sites)
    scope = ranking_scope(settings(work), ranking)
    return scope, removed_sizes(settings(work), ranking, work.recipe.attribution.unit, sites)


def _removed_together(work: RunContext, ranked: Ranked) -> Iterator[dict[str, Circuit]]:
    """At each sparsity, what each ranking removes at the first seed."""
    removed = {ranking: _removed_by(work, ranking) for ranking in ranked}
    for sizes in zip(*(sizes.values() for _, sizes in removed.values()), strict=False):
        yield {
            ranking: select(ranked[ranking][0], scope=scope, **size)
            for (ranking, (scope, _)), size in zip(removed.items(), sizes, strict=True)
        }


@dataclass(frozen=True)
class _Point:
    """One method at one sparsity: what its circuits do, seed by seed and together."""

    accuracies: list[float]
    faithfulness: list[float]
    together: Evaluation


def _measure_at(
    work: RunContext, variant: Variant, removed: list[Circuit], total: int, ends: tuple[float, float]
) -> _Point:
    """What is left without each of these circuits, one a seed; `ends` are the logit differences of no unit
    and of the whole model."""
    nothing, full = ends
    draws = [
        load_or_make_evaluation(work, str(replace(variant, draw=f"seed{seed}")), one)
        for seed, one in enumerate(removed)
    ]
    faithfulness = [(mean_of(draw, "ioi.logit_difference") - nothing) / (full - nothing) for draw in draws]
    extra = [_seed_circuits("ioi.faithfulness", faithfulness, "share of the logit difference", "higher")]
    extra += (
        [
            _make_summary(
                "circuit.jaccard", measure_stability(removed, total), "shared units / units of either"
            )
        ]
        if len(removed) > 1
        else []
    )
    columns = zip(*(draw.observations for draw in draws), strict=True)
    together = Evaluation(str(variant), (*(pool(list(column)) for column in columns), *extra))
    return _Point([mean_of(draw, "ioi.accuracy") for draw in draws], faithfulness, together)


def _summarize(method: str, gone: list[float], curve: list[_Point], enough: float) -> Evaluation:
    """A method's whole curve as three figures, one unit a seed; `gone` are the shares removed, ascending."""
    accuracies = zip(*(point.accuracies for point in curve), strict=True)
    sparse = [find_sparsest(gone, column, enough) for column in accuracies]
    areas = [
        curve_areas([1 - removed for removed in gone], column)
        for column in zip(*(point.faithfulness for point in curve), strict=True)
    ]
    log.info(
        "%s: enough accuracy until %.1f%% are removed, CPR %.3f",
        method,
        100 * sum(sparse) / len(sparse),
        sum(cpr for cpr, _ in areas) / len(areas),
    )
    return Evaluation(
        method,
        (
            _seed_circuits("circuit.sparsest", sparse, "share of units removed", "higher"),
            _seed_circuits("circuit.cpr", [cpr for cpr, _ in areas], "area under faithfulness", "higher"),
            _seed_circuits(
                "circuit.cmd", [cmd for _, cmd in areas], "area between faithfulness and 1", "lower"
            ),
        ),
    )


def _measure_rival_overlaps(summaries: list[Evaluation], own: str) -> list[Difference]:
    """What the report's own method is ahead of each other one, paired by seed."""
    mine = next(one for one in summaries if one.variant == own)
    others = [one for one in summaries if one is not mine]
    found = [
        paired(o, m, other.variant, own)
        for other in others
        for o, m in zip(other.observations, mine.observations, strict=True)
    ]
    return [one for one in found if one is not None]


def mean_of(evaluation: Evaluation, metric: str) -> float:
    """The mean of a metric over the prompts that could be measured; a failed prompt is in neither sum nor
    count.

    Raises:
        Sparc3Error: every prompt failed.
    """
    observed = next(o for o in evaluation.observations if o.metric == metric)
    measured = [value for value in observed.sums if value is not None]
    if not measured:
        raise Sparc3Error(
            f"{metric} failed on every prompt of {evaluation.variant}; load the model in bfloat16 or float32"
        )
    return sum(measured) / len(measured)


def curve_areas(kept: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """(CPR, CMD) of a curve by the trapezoidal rule, the empty circuit (0, 0) and the whole model (1, 1)
    added.

    Args:
        kept: shares of the units in each circuit, in any order.
        faithfulness: f of each.
    """
    points = sorted([(0.0, 0.0), *zip(kept, faithfulness, strict=True), (1.0, 1.0)])
    steps = [(b[0] - a[0], a[1], b[1]) for a, b in zip(points, points[1:], strict=False)]
    return sum(w * (f + g) / 2 for w, f, g in steps), sum(
        w * (abs(1 - f) + abs(1 - g)) / 2 for w, f, g in steps
    )


def measure_stability(removed: Sequence[Circuit], total: int) -> float:
    """Mean Jaccard overlap of what is kept, over all pairs of circuits of `total` units, of which these are
    removed."""
    pairs = [
        overlap(replace(one, provenance={}), replace(other, provenance={}))
        for one, other in combinations(removed, 2)
    ]
    return sum((total - pair.either) / (total - pair.both) for pair in pairs) / len(pairs)


def _seed_circuits(metric: str, values: list[float], unit: str, direction: str) -> Observations:
    return Observations(metric, "test", unit, direction, tuple(values), (1.0,) * len(values))


def _make_summary(metric: str, value: float, unit: str) -> Observations:
    """A figure of all seeds together, which has no interval: pairs of seeds are not independent."""
    return Observations(metric, "all seeds", unit, "higher", (value,), (1.0,))


def _save_circuit(
    work: RunContext, method: str, count: int, everything: Circuit, removed: list[Circuit]
) -> None:
    """What is kept at the first seed, as circuits/METHOD@KEPT; of the report's own method only."""
    if method != work.recipe.attribution.method or not distributed.is_main():
        return
    kept = difference(replace(everything, model=work.described), replace(removed[0], model=work.described))
    kept.save(work.claim(f"circuits/{Variant(method, len(kept))}{kept.suffix}"))


def _provenance(work: RunContext, sizes: dict[str, int], seconds: Mapping[str, float]) -> Provenance:
    return Provenance(
        recipe=work.recipe.name,
        job="discover",
        made_from=work.recipe.fingerprint,
        model=work.described,
        method=work.recipe.attribution.method,
        unit=work.recipe.attribution.unit,
        enough=settings(work).enough,
        ranks=settings(work).ranks,
        seeds=len(work.references),
        sizes=sizes,
        **evaluated_on(work.prepared),
        stages=[Stage(name, took) for name, took in seconds.items()],
        warnings=work.warnings,
        version=__version__,
    )
