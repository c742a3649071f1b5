"""The job `discover`: of each method, ranking and seed, keep the top units of a task, remove the rest, and
see how sparse it can get.

Faithfulness and its areas are those of the MIB benchmark (Mueller et al. 2025): with m the mean logit
difference and C_k the circuit of the share k of all units, f(k) = (m(C_k) − m(∅)) / (m(full) − m(∅)), CPR = ∫
f dk (higher is better), CMD = ∫ |1 − f| dk (lower is).
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
from ..evaluation.evaluate import to_results
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
from .work_list import Sizes, ranking_scope, rankings, removed_sizes

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
    read = [(task.source, task.column), *((test.source, test.column) for test in tests)]
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
    asked = work.recipe.attribution
    target = work.recipe.references["task"].target or asked.target
    made: dict[str, list[Scores]] = {}
    for method in settings(work).methods:
        made[method] = []
        for number, task in enumerate(work.references):
            drawn = f"random:{number}" if method == "random" else method
            how = ScoringSpec(asked.but(method=drawn), {task: target})
            made[method].append(load_or_make_parts(work, how)[task])

    def signed(method: str) -> bool:
        return any(float(tensor.min()) < 0 for one in made[method] for tensor in one.values())

    def rank_by_size(scores: Scores) -> Scores:
        return Scores({name: tensor.abs() for name, tensor in scores.items()}, scores.provenance)

    return {
        name: [rank_by_size(one) if rank == "abs" else one for one in made[method]]
        for name, method, rank in rankings(settings(work), signed)
    }


@dataclass
class _Remover:
    """Measures the model without some of its units: at zero, or at their means over all reference samples."""

    work: RunContext

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """As `MeanAblation` has them; computed where an evaluation needs them."""
        samples = [one for part in self.work.references.values() for one in part]
        together = ReferenceSet(tuple(replace(one, completion=None) for one in samples))  # as target contrast
        roles = self.work.recipe.attribution.sites
        return mean_outputs(self.work.model, together, roles, tokenizer=self.work.tokenizer)

    def measure(self, name: str, removed: Circuit) -> Evaluation:
        if settings(self.work).ablation != "mean" or not len(removed):
            return load_or_make_evaluation(self.work, name, removed)
        references = [part.fingerprint for part in self.work.references.values()]
        inputs = {"without": removed.fingerprint, "means_of": references}
        return measure_once(self.work, name, inputs, lambda: MeanAblation(removed, self.means))


def measure_circuits(work: RunContext, ranked: Ranked, seconds: Mapping[str, float]) -> Results:
    """Every method at every sparsity, figures of the seeds pooled, with faithfulness, its areas, and the
    circuits' stability."""
    own, any_scores = work.recipe.attribution.method, next(iter(ranked.values()))[0]
    everything = select(any_scores, count=any_scores.units)
    nothing = Circuit(work.recipe.attribution.unit, {}, work.described)
    remover = _Remover(work)
    original, empty = remover.measure("original", nothing), remover.measure("empty", everything)
    full, left = (mean_of(one, "ioi.logit_difference") for one in (original, empty))
    if not full > left:
        raise UserError(
            f"the whole model's logit difference {full:.4g} is not above {left:.4g}, that without any of "
            "these units: they hold no circuit of this task; attribute at other sites, or choose a task that "
            "the model can do"
        )
    found, summaries = [original, empty], []
    for method, seeds in ranked.items():
        curve = []
        scope, removed = _removed_by(work, method)
        for count, size in removed.items():
            circuits = [select(scores, scope=scope, **size) for scores in seeds]
            curve.append(_measure_at(remover, Variant(method, count), circuits, everything, (left, full)))
            if method == own and distributed.is_main():  # what is kept at the first seed
                kept = difference(
                    replace(everything, model=work.described), replace(circuits[0], model=work.described)
                )
                if settings(work).ablation == "mean":
                    kept = replace(kept, provenance={**kept.provenance, "ablation": "mean"})
                kept.save(work.claim(f"circuits/{Variant(method, len(kept))}{kept.suffix}"))
        found += [one.together for one in curve]
        gone = [count / len(everything) for count in removed]
        summaries.append(_summarize(method, gone, curve, settings(work).enough))
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
        overlaps=measure_kept_overlaps(_removed_together(work, ranked), own, sizes),
    )
    results = to_results([*found, *summaries], provenance.to_dict())
    ahead = _compare_areas(summaries, own)
    results = replace(results, differences=(*results.differences, *ahead))
    return add_verdict(results, work.recipe.attribution.unit)


def _removed_by(work: RunContext, ranking: str) -> tuple[str, Sizes]:
    """The scope of a ranking, and how many units its circuits lack."""
    asked, scope = work.recipe.attribution, ranking_scope(settings(work), ranking)
    return scope, removed_sizes(settings(work), ranking, asked.unit, sites_of(work.model, asked.sites))


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
    remover: _Remover,
    variant: Variant,
    removed: list[Circuit],
    everything: Circuit,
    ends: tuple[float, float],
) -> _Point:
    """What is left without each of these circuits, one a seed; `ends` are the logit differences of no unit
    and of the whole model."""
    nothing, full = ends
    draws = [
        remover.measure(str(replace(variant, draw=f"seed{seed}")), one) for seed, one in enumerate(removed)
    ]
    faithfulness = [(mean_of(draw, "ioi.logit_difference") - nothing) / (full - nothing) for draw in draws]
    extra = [_observe_seeds("ioi.faithfulness", faithfulness, "share of the logit difference", "higher")]
    if len(removed) > 1:
        extra.append(observe_stability(measure_stability(removed, len(everything))))
    together = pool_draws(str(variant), draws)
    together = replace(together, observations=(*together.observations, *extra))
    return _Point([mean_of(draw, "ioi.accuracy") for draw in draws], faithfulness, together)


def _summarize(method: str, gone: list[float], curve: list[_Point], enough: float) -> Evaluation:
    """A method's whole curve as three figures, one unit a seed; `gone` are the shares removed, ascending."""
    accuracies = zip(*(point.accuracies for point in curve), strict=True)
    sparse = [float(find_sparsest(gone, column, enough)) for column in accuracies]
    kept = [1 - removed for removed in gone]
    columns = zip(*(point.faithfulness for point in curve), strict=True)
    cpr, cmd = map(list, zip(*(curve_areas(kept, column) for column in columns), strict=True))
    log.info(
        "%s: enough accuracy until %.1f%% are removed, CPR %.3f",
        method,
        100 * sum(sparse) / len(sparse),
        sum(cpr) / len(cpr),
    )
    return Evaluation(
        method,
        (
            _observe_seeds("circuit.sparsest", sparse, "share of units removed", "higher"),
            _observe_seeds("circuit.cpr", cpr, "area under faithfulness", "higher"),
            _observe_seeds("circuit.cmd", cmd, "area between faithfulness and 1", "lower"),
        ),
    )


def _compare_areas(summaries: list[Evaluation], own: str) -> list[Difference]:
    """What the report's own method is ahead of each other one, paired by seed."""
    mine = next(one for one in summaries if one.variant == own)
    found = [
        paired(o, m, other.variant, own)
        for other in summaries
        if other is not mine
        for o, m in zip(other.observations, mine.observations, strict=True)
    ]
    return [one for one in found if one is not None]


def _observe_seeds(metric: str, values: list[float], unit: str, direction: str) -> Observations:
    return Observations(metric, "test", unit, direction, tuple(values), (1.0,) * len(values))


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
    cpr = cmd = 0.0
    for (a, f), (b, g) in zip(points, points[1:], strict=False):
        cpr += (b - a) * (f + g) / 2
        cmd += (b - a) * (abs(1 - f) + abs(1 - g)) / 2
    return cpr, cmd


def measure_stability(removed: Sequence[Circuit], total: int) -> float:
    """Mean Jaccard overlap of what is kept, over all pairs of circuits of `total` units, of which these are
    removed."""
    bare = [replace(one, provenance={}) for one in removed]
    pairs = [overlap(one, other) for one, other in combinations(bare, 2)]
    return sum((total - pair.either) / (total - pair.both) for pair in pairs) / len(pairs)
