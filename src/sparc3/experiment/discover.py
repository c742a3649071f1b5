"""The job `discover`: for each method, ranking and seed, keep the top units of a task, remove the rest, and
find how sparse the circuit can get.

Faithfulness and its areas follow the MIB benchmark (Mueller et al. 2025): with m the mean logit difference
and C_k the circuit with the share k of all units, f(k) = (m(C_k) − m(∅)) / (m(full) − m(∅)), CPR = ∫ f dk
(higher is better), CMD = ∫ |1 − f| dk (lower is better).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from torch import Tensor

from .. import distributed
from ..attribution.activations import mean_outputs
from ..circuits.algebra import difference, overlap
from ..circuits.circuit import Circuit
from ..circuits.mean_ablation import MeanAblation
from ..circuits.select import select
from ..errors import Sparc3Error, UserError
from ..evaluation.evaluate import make_results
from ..evaluation.metrics import IOISettings
from ..evaluation.statistics import Evaluation, Observations
from ..evaluation.statistics import difference as paired
from ..models.sites import sites_of
from ..recipe.schema import DiscoverRecipe
from ..recipe.sections import Discover
from ..results import Difference, Results, Variant, find_sparsest
from ..samples.reference_set import ReferenceSet
from ..samples.sources import is_path
from ..scores import Scores
from .measure import (
    add_verdict,
    describe_run,
    load_or_make_evaluation,
    measure_kept_overlaps,
    measure_once,
    observe_stability,
    pool_draws,
)
from .run_folder import RunContext
from .score import ScoringSpec, load_or_make_parts
from .work_list import Sizes, ranking_scope, rankings, removal_sizes

log = logging.getLogger("sparc3")
Ranked = dict[str, list[Scores]]
"""Method, with "-abs" or "-signed" for all but the first ranking → one set of scores per seed, by which its
units are kept, highest first."""


def settings(work: RunContext) -> Discover:
    assert work.recipe.job == "discover"
    return work.recipe.discover


def require_task(recipe: DiscoverRecipe) -> None:
    """Raise UserError if a file of the task lacks a target or a contrast, before any model is loaded."""
    task = recipe.references["task"]
    tests = [m for m in recipe.metrics().values() if isinstance(m, IOISettings)]
    sources = [(task.source, task.column), *((test.source, test.column) for test in tests)]
    for source, column in dict.fromkeys(pair for pair in sources if is_path(pair[0])):
        for number, sample in enumerate(ReferenceSet.load(source, column)):
            for key in ("target", "contrast"):
                if getattr(sample, key) is None:
                    raise UserError(
                        f'{source}: sample {number} has no "{key}"; the job discover needs text, target and '
                        "contrast in each"
                    )


def rank_units(work: RunContext) -> Ranked:
    """Scores of every method on the reference set of every seed, in each ranking. `random` has its own seed
    for each set."""
    options = work.recipe.attribution
    target = work.recipe.references["task"].target or options.target
    scores_by_method: dict[str, list[Scores]] = {}
    for method in settings(work).methods:
        scores_by_method[method] = []
        for number, task in enumerate(work.references):
            seeded_method = f"random:{number}" if method == "random" else method
            spec = ScoringSpec(options.copy_with(method=seeded_method), {task: target})
            scores_by_method[method].append(load_or_make_parts(work, spec)[task])

    def has_sign(method: str) -> bool:
        return any(
            float(tensor.min()) < 0 for scores in scores_by_method[method] for tensor in scores.values()
        )

    def rank_by_size(scores: Scores) -> Scores:
        return Scores({name: tensor.abs() for name, tensor in scores.items()}, scores.provenance)

    return {
        name: [rank_by_size(scores) if rank == "abs" else scores for scores in scores_by_method[method]]
        for name, method, rank in rankings(settings(work), has_sign)
    }


@dataclass
class _Remover:
    """Measures the model without some of its units: at zero, or at their means over all reference samples."""

    work: RunContext

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """The means for `MeanAblation`; computed when an evaluation first needs them."""
        samples = [sample for reference in self.work.references.values() for sample in reference]
        # Without completions, because the target contrast reads the prompts alone.
        prompts = ReferenceSet(tuple(replace(sample, completion=None) for sample in samples))
        roles = self.work.recipe.attribution.sites
        return mean_outputs(self.work.model, prompts, roles, tokenizer=self.work.tokenizer)

    def measure(self, name: str, removed: Circuit) -> Evaluation:
        if settings(self.work).ablation != "mean" or not len(removed):
            return load_or_make_evaluation(self.work, name, removed)
        references = [reference.fingerprint for reference in self.work.references.values()]
        inputs = {"without": removed.fingerprint, "means_of": references}
        return measure_once(self.work, name, inputs, lambda: MeanAblation(removed, self.means))


def measure_circuits(work: RunContext, ranked: Ranked, seconds: Mapping[str, float]) -> Results:
    """Results of every method at every sparsity, with the seeds' figures pooled, faithfulness and its areas,
    and the circuits' stability."""
    # All scores are of the same units, so any of them serves to list these.
    own, any_scores = work.recipe.attribution.method, next(iter(ranked.values()))[0]
    everything = select(any_scores, count=any_scores.units)
    nothing = Circuit(work.recipe.attribution.unit, {}, work.model_info)
    remover = _Remover(work)
    original, empty = remover.measure("original", nothing), remover.measure("empty", everything)
    full_difference = mean_metric(original, "ioi.logit_difference")
    empty_difference = mean_metric(empty, "ioi.logit_difference")
    if not full_difference > empty_difference:
        raise UserError(
            f"the whole model's logit difference, {full_difference:.4g}, is not above "
            f"{empty_difference:.4g}, the one without any of these units, so they hold no circuit of this "
            "task; attribute at other sites, or choose a task that the model can do"
        )
    ends = (empty_difference, full_difference)
    evaluations, summaries = [original, empty], []
    for method, seeds in ranked.items():
        curve = []
        scope, removed = _list_removal_sizes(work, method)
        for count, size in removed.items():
            # A Circuit is what is removed, so it has the units with the lowest scores; the rest is kept.
            circuits = [select(scores, scope=scope, **size) for scores in seeds]
            curve.append(_measure_at(remover, Variant(method, count), circuits, everything, ends))
            if method == own and distributed.is_main():  # what is kept at the first seed
                kept = difference(
                    replace(everything, model=work.model_info), replace(circuits[0], model=work.model_info)
                )
                if settings(work).ablation == "mean":
                    kept = replace(kept, provenance={**kept.provenance, "ablation": "mean"})
                kept.save(work.claim(f"circuits/{Variant(method, len(kept))}{kept.suffix}"))
        evaluations += [point.pooled for point in curve]
        shares = [count / len(everything) for count in removed]
        summaries.append(_summarize(method, shares, curve, settings(work).enough))
    sizes = {name: tensor.numel() for name, tensor in any_scores.items()}
    provenance = describe_run(
        work,
        seconds,
        job="discover",
        method=own,
        unit=work.recipe.attribution.unit,
        enough=settings(work).enough,
        ranks=settings(work).ranks,
        seeds=len(work.references),
        **({"ablation": "mean"} if settings(work).ablation == "mean" else {}),
        sizes=sizes,
        overlaps=measure_kept_overlaps(_iterate_removed(work, ranked), own, sizes),
    )
    results = make_results([*evaluations, *summaries], provenance.to_dict())
    leads = _compare_areas(summaries, own)
    results = replace(results, differences=(*results.differences, *leads))
    return add_verdict(results, work.recipe.attribution.unit)


def _list_removal_sizes(work: RunContext, ranking: str) -> tuple[str, Sizes]:
    """The scope of a ranking, and the numbers of units that its circuits lack."""
    options, scope = work.recipe.attribution, ranking_scope(settings(work), ranking)
    return scope, removal_sizes(settings(work), ranking, options.unit, sites_of(work.model, options.sites))


def _iterate_removed(work: RunContext, ranked: Ranked) -> Iterator[dict[str, Circuit]]:
    """For each sparsity, ranking → the units that it removes at the first seed."""
    removed = {ranking: _list_removal_sizes(work, ranking) for ranking in ranked}
    for sizes in zip(*(sizes.values() for _, sizes in removed.values()), strict=False):
        yield {
            ranking: select(ranked[ranking][0], scope=scope, **size)
            for (ranking, (scope, _)), size in zip(removed.items(), sizes, strict=True)
        }


@dataclass(frozen=True)
class _Point:
    """One method at one sparsity: the figures of its circuits, seed by seed and pooled."""

    accuracies: list[float]
    faithfulness: list[float]
    pooled: Evaluation


def _measure_at(
    remover: _Remover,
    variant: Variant,
    removed: list[Circuit],
    everything: Circuit,
    ends: tuple[float, float],
) -> _Point:
    """Measure the model without each of these circuits, one per seed; `ends` are the logit differences
    without any unit and of the whole model."""
    empty, full = ends
    draws = [
        remover.measure(str(replace(variant, draw=f"seed{seed}")), circuit)
        for seed, circuit in enumerate(removed)
    ]
    faithfulness = [(mean_metric(draw, "ioi.logit_difference") - empty) / (full - empty) for draw in draws]
    extra = [_observe_seeds("ioi.faithfulness", faithfulness, "share of the logit difference", "higher")]
    if len(removed) > 1:
        extra.append(observe_stability(measure_stability(removed, len(everything))))
    together = pool_draws(str(variant), draws)
    together = replace(together, observations=(*together.observations, *extra))
    return _Point([mean_metric(draw, "ioi.accuracy") for draw in draws], faithfulness, together)


def _summarize(method: str, removed_shares: list[float], curve: list[_Point], enough: float) -> Evaluation:
    """A method's whole curve as three figures, each with one unit per seed; `removed_shares` is ascending."""
    accuracies = zip(*(point.accuracies for point in curve), strict=True)
    sparsest = [float(find_sparsest(removed_shares, column, enough)) for column in accuracies]
    kept = [1 - share for share in removed_shares]
    columns = zip(*(point.faithfulness for point in curve), strict=True)
    cpr, cmd = map(list, zip(*(curve_areas(kept, column) for column in columns), strict=True))
    log.info(
        "%s: enough accuracy until %.1f%% are removed, CPR %.3f",
        method,
        100 * sum(sparsest) / len(sparsest),
        sum(cpr) / len(cpr),
    )
    return Evaluation(
        method,
        (
            _observe_seeds("circuit.sparsest", sparsest, "share of units removed", "higher"),
            _observe_seeds("circuit.cpr", cpr, "area under faithfulness", "higher"),
            _observe_seeds("circuit.cmd", cmd, "area between faithfulness and 1", "lower"),
        ),
    )


def _compare_areas(summaries: list[Evaluation], own: str) -> list[Difference]:
    """The differences of the run's own method from each other one, paired by seed."""
    own_summary = next(summary for summary in summaries if summary.variant == own)
    differences = [
        paired(o, m, other.variant, own)
        for other in summaries
        if other is not own_summary
        for o, m in zip(other.observations, own_summary.observations, strict=True)
    ]
    return [d for d in differences if d is not None]


def _observe_seeds(metric: str, values: list[float], unit: str, direction: str) -> Observations:
    return Observations(metric, "test", unit, direction, tuple(values), (1.0,) * len(values))


def mean_metric(evaluation: Evaluation, metric: str) -> float:
    """The mean of a metric over the prompts that could be measured; failed prompts count neither in the
    sum nor in the divisor.

    Raises:
        Sparc3Error: every prompt failed.
    """
    observations = next(o for o in evaluation.observations if o.metric == metric)
    measured = [value for value in observations.sums if value is not None]
    if not measured:
        raise Sparc3Error(
            f"{metric} failed on every prompt of {evaluation.variant}; load the model in bfloat16 or float32"
        )
    return sum(measured) / len(measured)


def curve_areas(kept: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """(CPR, CMD) of a curve by the trapezoidal rule, with the empty circuit (0, 0) and the whole model (1, 1)
    added.

    Args:
        kept: shares of the units in each circuit, in any order.
        faithfulness: f of each.
    """
    points = sorted([(0.0, 0.0), *zip(kept, faithfulness, strict=True), (1.0, 1.0)])
    cpr = cmd = 0.0
    for (a, f), (b, g) in zip(points, points[1:], strict=False):
        cpr += (b - a) * (f + g) / 2
        cmd += (b - a) * (abs(1 - f) + abs(1 - g)) / 2
    return cpr, cmd


def measure_stability(removed: Sequence[Circuit], total: int) -> float:
    """Mean Jaccard overlap of the kept units over all pairs, given the removed units and the total number of
    units."""
    circuits = [replace(circuit, provenance={}) for circuit in removed]
    pairs = [overlap(first, second) for first, second in combinations(circuits, 2)]
    # Kept by both: total − removed by either. Kept by either: total − removed by both.
    return sum((total - pair.either) / (total - pair.both) for pair in pairs) / len(pairs)
