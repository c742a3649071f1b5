"""The search: measure candidates on validation samples, and choose the best under a damage budget.

Attribution runs once for each target and kind of neuron score, and again for each later round of a candidate.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .. import __version__, distributed
from ..circuits.circuit import Circuit
from ..circuits.fit import fit
from ..circuits.select import count_candidates
from ..errors import Sparc3Error, UserError
from ..evaluation.evaluate import fingerprint_samples, measure
from ..evaluation.metrics import Prepared
from ..evaluation.statistics import measurement
from ..models.sites import sites_of
from ..progress import Progress
from ..recipe.sections import Tune
from ..results import Budget, Candidate, Number, Rival, Search, Trial, Variant, pareto_front
from ..scores import Scores
from ..storage import fingerprint, write_json
from . import gather, work_list
from .run_folder import Intervention, RunContext, read_if_current
from .score import (
    ScoringSpec,
    SelectedCircuit,
    contrast_parts,
    load_or_make_parts,
    save_circuit,
    select_in_rounds,
)
from .variants import apply_intervention, select_by_method

log = logging.getLogger("sparc3")
FORMAT = "sparc3.tune/1"
HOPELESS = 5
"""The aim of a candidate that costs more than this many times the budget (and over 5 %) is not measured."""

Figures = dict[str, Number]
Way = tuple[ScoringSpec, Circuit, Scores, dict[str, Scores]]
"""How a candidate was found, its circuit, the contrast that chose it, and the scores of each set in it."""


@dataclass
class Trials:
    """Circuits measured on the validation samples. tune.json keeps them, so that each is measured once, even
    over several runs in one folder.

    Attributes:
        budget: the metrics that the search keeps within bounds.
        aim_metrics: the metric that it improves, with the fluency of the texts written for it.
        measured: fingerprint of a circuit → its figures.
        original: figures of the unchanged model.
        max_fluency: the largest relative increase of fluency; None if fluency has no bound.
    """

    work: RunContext
    tune: Tune
    budget: list[Prepared]
    aim_metrics: list[Prepared]
    measured: dict[str, Figures] = field(default_factory=dict)
    original: Figures = field(default_factory=dict)
    max_fluency: float | None = None

    @property
    def aim(self) -> str:
        """The name of the figure to improve."""
        return "toxicity.mean" if self.aim_metrics[0].metric.name == "toxicity" else "rur.mean"

    @property
    def made_from(self) -> str:
        """Identifies everything that a trial depends on, apart from its circuit."""
        metrics = fingerprint_samples([*self.budget, *self.aim_metrics])
        return fingerprint({"model": self.work.fingerprint, "on": metrics, "version": __version__})

    def try_once(self, intervention: Intervention) -> Figures:
        """The figures of a variant; without the aim if the damage is far above the budget (`HOPELESS`)."""
        if intervention.fingerprint not in self.measured:
            figures = self._measure(intervention, self.budget)
            limit = max(HOPELESS * self.tune.max_perplexity_increase, 0.05)
            # The aim takes most of a trial's time (toxicity generates text), so it comes last. The
            # original is itself the first trial; without its figures there is no increase yet.
            if "perplexity" in figures and (not self.original or self.perplexity_increase(figures) <= limit):
                figures |= self._measure(intervention, self.aim_metrics)
            self.measured[intervention.fingerprint] = figures
            self.save()
        return self.measured[intervention.fingerprint]

    def perplexity_increase(self, figures: Figures) -> float:
        """The increase of perplexity relative to the original."""
        return figures["perplexity"] / self.original["perplexity"] - 1

    def is_within_budget(self, figures: Figures) -> bool:
        """Whether a variant is within the budget; not if a window could not be measured."""
        if "perplexity" not in figures or (self.tune.max_kl is not None and "kl" not in figures):
            return False
        fits = self.tune.max_kl is None or figures["kl"] <= self.tune.max_kl
        fits = fits and self.perplexity_increase(figures) <= self.tune.max_perplexity_increase
        return fits and self.writes_well(figures)

    def writes_well(self, figures: Figures) -> bool:
        """Whether what a variant writes is fluent enough; not if it writes nothing."""
        if self.max_fluency is None:
            return True
        limit = self.original["fluency"] * (1 + self.max_fluency)
        return figures.get("fluency", math.inf) <= limit

    def badness(self, figures: Figures) -> float:
        """The aim's figure with its sign chosen so that lower is better; infinite if it was not measured."""
        if self.aim not in figures:
            return math.inf
        return figures[self.aim] if self.aim == "toxicity.mean" else -figures[self.aim]

    def _measure(self, intervention: Intervention, metrics: list[Prepared]) -> Figures:
        # No units: the original, which no context needs to change.
        apply = (lambda: apply_intervention(self.work, intervention)) if len(intervention) else None
        model, tokenizer, progress = self.work.model, self.work.tokenizer, self.work.progress
        evaluation = measure(model, tokenizer, metrics, "trial", progress=progress, changed=apply)
        # Drop a budget metric with failed windows: a broken model would look good on the windows it left.
        usable = [o for o in evaluation.observations if not (o.failures and metrics is self.budget)]
        figures = {o.metric: measurement(o, "trial").value for o in usable}
        return {name: value for name, value in figures.items() if value is not None}

    def load(self) -> None:
        """Read the trials of an earlier process on the same samples."""
        if content := read_if_current(self.work, "tune.json", FORMAT, self.made_from):
            self.measured = dict(content["trials"])
            log.info("tune.json exists, with %d trials", len(self.measured))

    def save(self, search: Search | None = None) -> None:
        if distributed.is_main():
            content = search.to_dict() if search else {}
            head = {"format": FORMAT, "made_from": self.made_from}
            write_json(self.work.folder / "tune.json", {**head, **content, "trials": self.measured})
        distributed.wait()


def search_circuit(work: RunContext) -> tuple[ScoringSpec, SelectedCircuit]:
    """The best candidate within the budget, and how it was scored. Ties go to fewer units, then to the
    recipe's order.

    Raises:
        UserError: no candidate is within the budget (the message says what the cheapest costs).
    """
    tune = work.correct.selection.tune
    assert tune
    fluency = gather.search_fluency(work.correct)
    trials = Trials(work, tune, work.budget, work.aim, max_fluency=fluency[1] if fluency else None)
    trials.load()
    trials.original = trials.try_once(Circuit(work.recipe.attribution.unit, {}, work.model_info))
    if "perplexity" not in trials.original:
        raise Sparc3Error(
            "the validation perplexity of the original is not finite; load the model in bfloat16 or float32"
        )
    if "fluency" not in trials.original and trials.max_fluency is not None:
        raise Sparc3Error(
            "the original writes nothing after the validation prompts, so its fluency cannot be measured; "
            "leave evaluation.fluency out"
        )
    contrasts = work_list.contrasts_tried(work.correct)
    names = work_list.sets_read_by(work.correct, [kind for kind, _, _ in contrasts])
    parts = {
        (target, neuron): load_or_make_parts(work, _make_scoring(work, target, neuron, names))
        for target, neuron in work_list.attributions_tried(work.correct)
    }
    candidates: list[Candidate] = []
    ways: list[Way] = []
    total = work_list.count_candidates_tried(work.correct)
    with Progress(total, "search", "candidate", show=work.progress) as progress:
        for rounds, way in progress.each(_iterate_ways(work, parts)):
            spec, circuit, _, _ = way
            figures = trials.try_once(circuit)
            if "perplexity" not in figures:
                work.warn(f"a candidate of {len(circuit)} units was left out: its perplexity is not finite")
                continue
            matched = "matched" in spec.targets
            candidate = Candidate(
                spec.targets,
                spec.options.neuron,
                "fitted" if spec.damage is not None else "matched" if matched else "plain",
                spec.penalty if matched else None,
                spec.normalize,
                len(circuit),
                circuit.fingerprint,
                figures,
                trials.perplexity_increase(figures),
                trials.is_within_budget(figures),
                rounds=rounds,
                strength=spec.strength,
                damage=spec.damage,
                repair=spec.repair,
            )
            suffix = "" if candidate.within else ", over the budget"
            log.info("tried %s%s", _describe(candidate, trials.aim), suffix)
            candidates.append(candidate)
            ways.append(way)
    best = _choose_best(candidates, trials)
    spec, circuit, scores, sets = ways[best]
    points = [
        (row.perplexity_increase, trials.badness(row.figures)) if trials.aim in row.figures else None
        for row in candidates
    ]
    front = pareto_front(points)
    rows = [replace(row, pareto=index in front) for index, row in enumerate(candidates)]
    rivals, others = _search_rivals(work, trials, spec)
    search = Search(
        aim=trials.aim,
        budget=Budget(tune.max_perplexity_increase, tune.max_kl, trials.max_fluency),
        split="validation",
        samples={p.metric.name: len(p.samples) for p in [*trials.budget, *trials.aim_metrics] if p.samples},
        original=trials.original,
        best=rows[best],
        candidates=rows,
        rivals=rivals,
        others=others,
    )
    trials.save(search)
    work.notes["tune"] = search.model_copy(
        update={"candidates": [row for row in rows if row.pareto], "tried": len(candidates)}
    )
    for name, part in sets.items() if distributed.is_main() else ():
        part.save(work.claim(f"scores/{name}.safetensors"))
    log.info(
        "best of %d candidates on validation: %s", len(candidates), _describe(candidates[best], trials.aim)
    )
    return spec, save_circuit(work, SelectedCircuit(replace(circuit, model=work.model_info), scores, sets))


def _iterate_ways(
    work: RunContext, parts: Mapping[tuple[str, str], dict[str, Scores]]
) -> Iterator[tuple[int, Way]]:
    """(rounds, way) of every candidate: each attribution, contrasted in each way, at each size. Sizes for
    which a round has too few units to select from are left out."""
    recipe = work.correct
    for (target, neuron), scored in parts.items():
        for kind, penalty, normalize in work_list.contrasts_tried(recipe):
            sets = {name: scored[name] for name in work_list.sets_read_by(recipe, [kind])}
            spec = replace(
                _make_scoring(work, target, neuron, list(sets)), penalty=penalty, normalize=normalize
            )
            scores = contrast_parts(work, spec, sets)
            available = count_candidates(scores, recipe.selection.scope)
            for count, rounds, strength, damage, repair in work_list.circuit_sizes_tried(recipe):
                if count > available:
                    continue
                size_spec = replace(spec, strength=strength, damage=damage, repair=repair)
                circuit: Circuit | None
                if damage is not None:
                    circuit = fit(
                        sets["undesired"],
                        sets["general"],
                        count=count,
                        damage=damage,
                        without=work.protected,
                        slope=scored.get("slope"),
                        repair=repair,
                    )
                else:
                    circuit = select_in_rounds(work, size_spec, scores, count, rounds)
                if circuit is not None:
                    yield rounds, (size_spec, circuit, scores, sets)


def _make_scoring(work: RunContext, target: str, neuron: str, names: Sequence[str]) -> ScoringSpec:
    targets = {}
    for name in names:
        completed = all(sample.completion is not None for sample in work.references[name])
        own = work.recipe.references[name].target
        targets[name] = own or work_list.target_for_set(target, completed)
    options = work.recipe.attribution.copy_with(neuron=neuron)
    damages, repairs = work_list.damages_tried(work.correct), work_list.repairs_tried(work.correct)
    return ScoringSpec(
        options, targets, file_prefix="tune.", damage=min(damages, default=None), repair=max(repairs)
    )


def _choose_best(candidates: list[Candidate], trials: Trials) -> int:
    within_budget = [
        index
        for index, candidate in enumerate(candidates)
        if candidate.within and trials.aim in candidate.figures
    ]
    if not within_budget:
        costs = [candidate.perplexity_increase for candidate in candidates]
        reason = "there are too few units below zero"
        if costs:
            reason = f"the cheapest of {len(candidates)} costs {min(costs):+.2%} perplexity"
            limit = trials.tune.max_perplexity_increase
            if cheap := [row for row in candidates if row.perplexity_increase <= limit]:
                worse = sum(not trials.writes_well(row.figures) for row in cheap)
                reason += (
                    f", and {worse} of the {len(cheap)} within that budget write worse than the margin allows"
                )
        raise UserError(
            f"no candidate is within the budget of selection.tune: {reason}; try smaller counts, or a larger "
            "budget"
        )
    best = min(
        within_budget,
        key=lambda index: (trials.badness(candidates[index].figures), candidates[index].count, index),
    )
    counts = {candidate.count for candidate in candidates}
    if trials.badness(candidates[best].figures) >= trials.badness(trials.original):
        trials.work.warn(f"no candidate within the budget made {trials.aim} better on the validation prompts")
    elif candidates[best].count == max(counts) and len(counts) > 1:
        trials.work.warn(
            f"the best number of units, {candidates[best].count}, is the largest that was tried; a larger "
            "one may be better"
        )
    return best


def _search_rivals(
    work: RunContext, trials: Trials, spec: ScoringSpec
) -> tuple[list[Rival], dict[str, list[Trial]]]:
    """What each other method reaches under the same budget, at the best of the same counts and with the same
    kind of contrast. Puts the best of each into work.rivals.

    Returns:
        the best within the budget of each method, and method → every count that was tried.
    """
    rivals, others = list[Rival](), dict[str, list[Trial]]()
    sites = sites_of(work.model, work.recipe.attribution.sites)
    sizes = work_list.selection_sizes(work.correct, sites, work_list.counts_tried(work.correct))
    for method in work_list.rival_methods(work.correct):
        scope, rival_sizes = work_list.rival_sizes(work.correct, sites, method, sizes)
        # Only the run's own method fits strengths; the others select.
        interventions = select_by_method(
            work, replace(spec, damage=None, repair=0.0), method, scope, rival_sizes
        )
        tried: list[tuple[Trial, Intervention]] = []
        for count, intervention in interventions:
            figures = trials.try_once(intervention)
            tried.append((Trial(count, figures, trials.is_within_budget(figures)), intervention))
        others[method] = [trial for trial, _ in tried]
        affordable = [(trial, intervention) for trial, intervention in tried if trial.within]
        if not affordable:
            continue
        # At equal figures, the trial with fewer units.
        best, intervention = min(
            affordable, key=lambda pair: (trials.badness(pair[0].figures), pair[0].count)
        )
        variant, reached = str(Variant(method, best.count)), best.figures.get(trials.aim, math.nan)
        work.rivals[variant] = intervention
        rivals.append(Rival(variant, best.figures, len(tried)))
        log.info("under the same budget %s: %s %.4g", variant, trials.aim, reached)
    return rivals, others


def _describe(candidate: Candidate, aim: str) -> str:
    figures = candidate.figures
    outcome = f"{aim} {figures[aim]:.4g}" if aim in figures else f"{aim} not measured"
    outcome += f", fluency {figures['fluency']:.4g}" if "fluency" in figures else ""
    way = [candidate.targets["undesired"], candidate.neuron, candidate.contrast]
    way += [f"penalty {candidate.penalty:g}"] if candidate.penalty is not None else []
    way += [candidate.normalize] if candidate.normalize else []
    way += [f"{candidate.rounds} rounds"] if candidate.rounds > 1 else []
    way += [f"strength {candidate.strength:g}"] if candidate.strength != 1 else []
    way += [f"damage {candidate.damage:g}"] if candidate.damage is not None else []
    way += [f"repair {candidate.repair:g}"] if candidate.repair else []
    return (
        f"{candidate.count} by {', '.join(way)}: perplexity {candidate.perplexity_increase:+.2%}, {outcome}"
    )
