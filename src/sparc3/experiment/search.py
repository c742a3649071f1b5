"""The search: candidates tried on validation samples under a damage budget.

Attribution is done once for each target and kind of neuron score, and again for each further round of a
candidate.
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
from ..evaluation.evaluate import fingerprint_of, measure
from ..evaluation.metrics import Prepared
from ..evaluation.statistics import measurement
from ..models.sites import sites_of
from ..progress import Progress
from ..recipe.sections import Tune
from ..results import Budget, Candidate, Number, Rival, Search, Trial, Variant, pareto_front
from ..scores import Scores
from ..storage import fingerprint, write_json
from . import gather, work_list
from .run_folder import Intervention, RunContext, read_made
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
"""A candidate that costs so many times the budget (and over 5 %) is not asked what it would have gained."""

Figures = dict[str, Number]
Way = tuple[ScoringSpec, Circuit, Scores, dict[str, Scores]]
"""How a candidate was found, its circuit, the contrast that chose it, and the scores of each set in it."""


@dataclass
class Trials:
    """Circuits tried on the validation samples, each once, whatever run of this folder tried it; tune.json
    keeps them.

    Attributes:
        known: key of a circuit → its figures.
        original: figures of the model as it is.
        max_fluency: the largest relative increase of fluency; None where it is not looked at.
    """

    work: RunContext
    tune: Tune
    budget: list[Prepared]
    asked: list[Prepared]
    known: dict[str, Figures] = field(default_factory=dict)
    original: Figures = field(default_factory=dict)
    max_fluency: float | None = None

    @property
    def aim(self) -> str:
        """The figure to better."""
        return "toxicity.mean" if self.asked[0].metric.name == "toxicity" else "rur.mean"

    @property
    def made_from(self) -> str:
        """Names what a trial depends on, apart from its circuit."""
        on = fingerprint_of([*self.budget, *self.asked])
        return fingerprint({"model": self.work.fingerprint, "on": on, "version": __version__})

    def try_once(self, change: Intervention) -> Figures:
        """The figures of a variant; without the aim where the damage is hopeless."""
        if change.fingerprint not in self.known:
            found = self._measure(change, self.budget)
            limit = max(HOPELESS * self.tune.max_perplexity_increase, 0.05)
            if "perplexity" in found and (not self.original or self.increase(found) <= limit):
                found |= self._measure(change, self.asked)
            self.known[change.fingerprint] = found
            self.save()
        return self.known[change.fingerprint]

    def increase(self, figures: Figures) -> float:
        """Of perplexity, relative to the original."""
        return figures["perplexity"] / self.original["perplexity"] - 1

    def within(self, figures: Figures) -> bool:
        """Whether a variant keeps to the budget, of which every window was measured."""
        if "perplexity" not in figures or (self.tune.max_kl is not None and "kl" not in figures):
            return False
        fits = self.tune.max_kl is None or figures["kl"] <= self.tune.max_kl
        fits = fits and self.increase(figures) <= self.tune.max_perplexity_increase
        return fits and self.writes_well(figures)

    def writes_well(self, figures: Figures) -> bool:
        """Whether what a variant writes is fluent enough; so it is not where it writes nothing."""
        if self.max_fluency is None:
            return True
        limit = self.original["fluency"] * (1 + self.max_fluency)
        return figures.get("fluency", math.inf) <= limit

    def badness(self, figures: Figures) -> float:
        """The aim, so that less is better; infinite where it was not measured."""
        if self.aim not in figures:
            return math.inf
        return figures[self.aim] if self.aim == "toxicity.mean" else -figures[self.aim]

    def _measure(self, change: Intervention, metrics: list[Prepared]) -> Figures:
        again = (lambda: apply_intervention(self.work, change)) if len(change) else None
        model, tokenizer, progress = self.work.model, self.work.tokenizer, self.work.progress
        made = measure(model, tokenizer, metrics, "trial", progress=progress, changed=again)
        # A budget is kept on every window or not at all: without the windows it broke, a broken model would
        # look well.
        whole = [o for o in made.observations if not (o.failures and metrics is self.budget)]
        figures = {o.metric: measurement(o, "trial").value for o in whole}
        return {name: value for name, value in figures.items() if value is not None}

    def load(self) -> None:
        """Take over what an earlier process tried on the same samples."""
        if found := read_made(self.work, "tune.json", FORMAT, self.made_from):
            self.known = dict(found["trials"])
            log.info("tune.json exists, with %d trials", len(self.known))

    def save(self, found: Search | None = None) -> None:
        if distributed.is_main():
            content = found.to_dict() if found else {}
            head = {"format": FORMAT, "made_from": self.made_from}
            write_json(self.work.folder / "tune.json", {**head, **content, "trials": self.known})
        distributed.wait()


def search_circuit(work: RunContext) -> tuple[ScoringSpec, SelectedCircuit]:
    """The best candidate within the budget, and how it was found; ties go to fewer units, then to the earlier
    in the recipe's order.

    Raises:
        UserError: no candidate keeps to the budget (the message says what the cheapest costs).
    """
    tune = work.correct.selection.tune
    assert tune
    fluency = gather.search_fluency(work.correct)
    trials = Trials(work, tune, work.budget, work.aim, max_fluency=fluency[1] if fluency else None)
    trials.load()
    trials.original = trials.try_once(Circuit(work.recipe.attribution.unit, {}, work.described))
    if "perplexity" not in trials.original:
        raise Sparc3Error(
            "the validation perplexity of the original is not finite; load the model in bfloat16 or float32"
        )
    if "fluency" not in trials.original and trials.max_fluency is not None:
        raise Sparc3Error(
            "the original writes nothing after the validation prompts, so that its fluency cannot be "
            "measured; leave evaluation.fluency out"
        )
    contrasts = work_list.contrasts_tried(work.correct)
    names = work_list.sets_read_by(work.correct, [kind for kind, _, _ in contrasts])
    parts = {
        one: load_or_make_parts(work, _make_scoring(work, *one, names))
        for one in work_list.attributions_tried(work.correct)
    }
    tried: list[Candidate] = []
    ways: list[Way] = []
    many = work_list.count_candidates_tried(work.correct)
    with Progress(many, "search", "candidate", show=work.progress) as shown:
        for rounds, way in shown.each(_iterate_ways(work, parts)):
            how, circuit, _, _ = way
            figures = trials.try_once(circuit)
            if "perplexity" not in figures:
                work.warn(f"a candidate of {len(circuit)} units was left out: its perplexity is not finite")
                continue
            matched = "matched" in how.targets
            candidate = Candidate(
                how.targets,
                how.options.neuron,
                "fitted" if how.damage is not None else "matched" if matched else "plain",
                how.penalty if matched else None,
                how.normalize,
                len(circuit),
                circuit.fingerprint,
                figures,
                trials.increase(figures),
                trials.within(figures),
                rounds=rounds,
                strength=how.strength,
                damage=how.damage,
            )
            over = "" if candidate.within else ", over the budget"
            log.info("tried %s%s", _describe(candidate, trials.aim), over)
            tried.append(candidate)
            ways.append(way)
    best = _choose_best(tried, trials)
    how, circuit, scores, sets = ways[best]
    points = [
        (one.perplexity_increase, trials.badness(one.figures)) if trials.aim in one.figures else None
        for one in tried
    ]
    undominated = pareto_front(points)
    rows = [replace(one, pareto=index in undominated) for index, one in enumerate(tried)]
    rivals, others = _search_rivals(work, trials, how)
    found = Search(
        aim=trials.aim,
        budget=Budget(tune.max_perplexity_increase, tune.max_kl, trials.max_fluency),
        split="validation",
        samples={p.metric.name: len(p.samples) for p in [*trials.budget, *trials.asked] if p.samples},
        original=trials.original,
        best=rows[best],
        candidates=rows,
        rivals=rivals,
        others=others,
    )
    trials.save(found)
    work.noted["tune"] = found.model_copy(
        update={"candidates": [one for one in rows if one.pareto], "tried": len(tried)}
    )
    for name, part in sets.items() if distributed.is_main() else ():
        part.save(work.claim(f"scores/{name}.safetensors"))
    log.info("best of %d candidates on validation: %s", len(tried), _describe(tried[best], trials.aim))
    return how, save_circuit(work, SelectedCircuit(replace(circuit, model=work.described), scores, sets))


def _iterate_ways(
    work: RunContext, parts: Mapping[tuple[str, str], dict[str, Scores]]
) -> Iterator[tuple[int, Way]]:
    """(rounds, way) of every candidate: the scores of each attribution, contrasted in each way, at each size
    of which there are enough candidates in every round."""
    recipe = work.correct
    for (target, neuron), scored in parts.items():
        for kind, penalty, normalize in work_list.contrasts_tried(recipe):
            sets = {name: scored[name] for name in work_list.sets_read_by(recipe, [kind])}
            how = replace(
                _make_scoring(work, target, neuron, list(sets)), penalty=penalty, normalize=normalize
            )
            scores = contrast_parts(work, how, sets)
            there = count_candidates(scores, recipe.selection.scope)
            for count, rounds, strength, damage in work_list.circuit_sizes_tried(recipe):
                one = replace(how, strength=strength, damage=damage)
                circuit = None
                if count <= there and damage is not None:
                    effect, sensitivity = sets["undesired"], sets["general"]
                    circuit = fit(effect, sensitivity, count=count, damage=damage, without=work.protected)
                elif count <= there:
                    circuit = select_in_rounds(work, one, scores, count, rounds)
                if circuit is not None:
                    yield rounds, (one, circuit, scores, sets)


def _make_scoring(work: RunContext, target: str, neuron: str, names: Sequence[str]) -> ScoringSpec:
    targets = {}
    for name in names:
        completed = all(sample.completion is not None for sample in work.references[name])
        own = work.recipe.references[name].target
        targets[name] = own or work_list.target_for_set(target, completed)
    options, damages = work.recipe.attribution.but(neuron=neuron), work_list.damages_tried(work.correct)
    return ScoringSpec(options, targets, file_prefix="tune.", damage=min(damages, default=None))


def _choose_best(tried: list[Candidate], trials: Trials) -> int:
    fit = [index for index, one in enumerate(tried) if one.within and trials.aim in one.figures]
    if not fit:
        costs = [one.perplexity_increase for one in tried]
        said = "there are too few units below zero"
        if costs:
            said = f"the cheapest of {len(tried)} costs {min(costs):+.2%} perplexity"
            if cheap := [
                one for one in tried if one.perplexity_increase <= trials.tune.max_perplexity_increase
            ]:
                many = sum(not trials.writes_well(one.figures) for one in cheap)
                said += (
                    f", and {many} of the {len(cheap)} within that budget write worse than the margin allows"
                )
        raise UserError(
            f"no candidate is within the budget of selection.tune: {said}; try smaller counts, or a larger "
            "budget"
        )
    best = min(fit, key=lambda index: (trials.badness(tried[index].figures), tried[index].count, index))
    counts = {one.count for one in tried}
    if trials.badness(tried[best].figures) >= trials.badness(trials.original):
        trials.work.warn(f"no candidate within the budget made {trials.aim} better on the validation prompts")
    elif tried[best].count == max(counts) and len(counts) > 1:
        trials.work.warn(
            f"the best number of units, {tried[best].count}, is the largest that was tried; a larger one may "
            "be better"
        )
    return best


def _search_rivals(
    work: RunContext, trials: Trials, how: ScoringSpec
) -> tuple[list[Rival], dict[str, list[Trial]]]:
    """What each other method reaches under the same budget, at the best of the same counts and contrasted
    alike; work.rivals holds them.

    Returns:
        the best of each method that keeps to the budget, and method → every count of it that was tried.
    """
    found, others = list[Rival](), dict[str, list[Trial]]()
    sites = sites_of(work.model, work.recipe.attribution.sites)
    sizes = work_list.selection_sizes(work.correct, sites, work_list.counts_tried(work.correct))
    for method in work_list.rival_methods(work.correct):
        scope, theirs = work_list.rival_sizes(work.correct, sites, method, sizes)
        changes = select_by_method(work, replace(how, damage=None), method, scope, theirs)
        tried = [(count, change, trials.try_once(change)) for count, change in changes]
        others[method] = [Trial(count, figures, trials.within(figures)) for count, _, figures in tried]
        fit = [one for one in tried if trials.within(one[2])]
        if not fit:
            continue
        count, change, figures = min(fit, key=lambda one: (trials.badness(one[2]), one[0]))
        variant, reached = str(Variant(method, count)), figures.get(trials.aim, math.nan)
        work.rivals[variant] = change
        found.append(Rival(variant, figures, len(tried)))
        log.info("under the same budget %s: %s %.4g", variant, trials.aim, reached)
    return found, others


def _describe(one: Candidate, aim: str) -> str:
    gained = f"{aim} {one.figures[aim]:.4g}" if aim in one.figures else f"{aim} not measured"
    gained += f", fluency {one.figures['fluency']:.4g}" if "fluency" in one.figures else ""
    way = [one.targets["undesired"], one.neuron, one.contrast]
    way += [f"penalty {one.penalty:g}"] if one.penalty is not None else []
    way += [one.normalize] if one.normalize else []
    way += [f"{one.rounds} rounds"] if one.rounds > 1 else []
    way += [f"strength {one.strength:g}"] if one.strength != 1 else []
    way += [f"damage {one.damage:g}"] if one.damage is not None else []
    return f"{one.count} by {', '.join(way)}: perplexity {one.perplexity_increase:+.2%}, {gained}"
