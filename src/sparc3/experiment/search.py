"""The search: candidates tried on validation samples under a damage budget.

Attribution is done once for each target and kind of neuron score, and again for each further round of a
candidate.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .. import __version__, distributed
from ..circuits.circuit import Circuit
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
from ..storage import fingerprint, read_json, write_json
from . import work_list
from .run_folder import Intervention, RunContext
from .score import (
    ScoringSpec,
    SelectedCircuit,
    contrast_parts,
    load_or_make_parts,
    save_circuit,
    select_in_rounds,
)
from .sizes import counts_tried, rival_methods, rival_sizes, selection_sizes
from .validation import prepare_validation
from .variants import apply_intervention, select_by_method

if TYPE_CHECKING:
    pass


log = logging.getLogger("sparc3")
FORMAT = "sparc3.tune/1"
HOPELESS = 5
"""A candidate that costs so many times the budget (and over 5 %) is not asked what it would have gained."""

Figures = dict[str, Number]


@dataclass
class Trials:
    """Circuits tried on the validation samples, each once, whatever run of this folder tried it; tune.json
    keeps them.

    Attributes:
        known: key of a circuit → its figures.
        aim: the figure to better, and which way is better.
    """

    work: RunContext
    tune: Tune
    budget: list[Prepared]
    asked: list[Prepared]
    known: dict[str, Figures] = field(default_factory=dict)
    done: int = 0

    @property
    def aim(self) -> tuple[str, str]:
        return (
            ("toxicity.mean", "lower") if self.asked[0].metric.name == "toxicity" else ("rur.mean", "higher")
        )

    @property
    def made_from(self) -> str:
        """Names what a trial depends on, apart from its circuit."""
        on = fingerprint_of([*self.budget, *self.asked])
        return fingerprint({"model": self.work.fingerprint, "on": on, "version": __version__})

    def of(self, change: Intervention, original: Figures | None = None) -> Figures:
        """The figures of a variant; without the aim where the damage is hopeless."""
        if change.fingerprint not in self.known:
            found = self._figures(change, self.budget)
            limit = max(HOPELESS * self.tune.max_perplexity_increase, 0.05)
            if "perplexity" in found and (
                original is None or found["perplexity"] / original["perplexity"] - 1 <= limit
            ):
                found |= self._figures(change, self.asked)
            self.known[change.fingerprint] = found
            self.done += 1
            self.save()
        return self.known[change.fingerprint]

    def within(self, figures: Figures, original: Figures) -> bool:
        """Whether a variant keeps to the budget, of which every window was measured."""
        if "perplexity" not in figures or (self.tune.max_kl is not None and "kl" not in figures):
            return False
        increase = figures["perplexity"] / original["perplexity"] - 1
        return increase <= self.tune.max_perplexity_increase and (
            self.tune.max_kl is None or figures["kl"] <= self.tune.max_kl
        )

    def badness(self, figures: Figures) -> float:
        """The aim, so that less is better; infinite where it was not measured."""
        name, direction = self.aim
        return (
            (figures[name] if direction == "lower" else -figures[name]) if name in figures else float("inf")
        )

    def _figures(self, change: Intervention, metrics: list[Prepared]) -> Figures:
        def again() -> Any:
            return apply_intervention(self.work, change)

        made = measure(
            self.work.model,
            self.work.tokenizer,
            metrics,
            "trial",
            progress=self.work.progress,
            changed=again if len(change) else None,
        )
        # A budget is kept on every window or not at all: without the windows it broke, a broken model would
        # look well.
        whole = [o for o in made.observations if not (o.failures and metrics is self.budget)]
        figures = {o.metric: measurement(o, "trial").value for o in whole}
        return {name: value for name, value in figures.items() if value is not None}

    def load(self) -> None:
        """Take over what an earlier process tried on the same samples."""
        where = self.work.claim("tune.json")
        found: dict[str, Any] = {}
        if where.is_file():
            try:
                found = read_json(where, FORMAT)
            except UserError as error:
                log.warning("%s; searching again", error)
        found = distributed.first(found)
        if found.get("made_from") == self.made_from:
            self.known = dict(found["trials"])
            log.info("tune.json exists, with %d trials", len(self.known))

    def save(self, found: Search | None = None) -> None:
        if distributed.is_main():
            write_json(
                self.work.folder / "tune.json",
                {
                    "format": FORMAT,
                    "made_from": self.made_from,
                    **(found.to_dict() if found else {}),
                    "trials": self.known,
                },
            )
        distributed.wait()


def search_circuit(work: RunContext) -> tuple[ScoringSpec, SelectedCircuit]:
    """The best candidate within the budget, and how it was found; ties go to fewer units, then to the earlier
    in the recipe's order.

    Raises:
        UserError: no candidate keeps to the budget (the message says what the cheapest costs).
    """
    tune = work.correct.selection.tune
    assert tune
    trials = Trials(work, tune, *prepare_validation(work))
    trials.load()
    original = trials.of(Circuit(work.recipe.attribution.unit, {}, work.described))
    if "perplexity" not in original:
        raise Sparc3Error(
            "the validation perplexity of the original is not finite; load the model in bfloat16 or float32"
        )
    parts = {
        (target, neuron): _score_parts(work, target, neuron)
        for target, neuron in work_list.attributions_tried(work.correct)
    }
    tried: list[Candidate] = []
    ways: list[tuple[ScoringSpec, Circuit, Scores, dict[str, Scores]]] = []
    shown = Progress(
        work_list.count_candidates_tried(work.correct), "search", "candidate", show=work.progress
    )
    for contrasted, sets in _iterate_contrasts(work, parts):
        scores = contrast_parts(work, contrasted, sets)
        for how, rounds, circuit in shown.each(_iterate_circuits(work, contrasted, scores)):
            figures = trials.of(circuit, original)
            if "perplexity" not in figures:
                work.warnings.append(
                    f"a candidate of {len(circuit)} units was left out: its perplexity is not finite"
                )
                log.warning(work.warnings[-1])
                continue
            candidate = replace(_judge(how, circuit, figures, original, trials), rounds=rounds)
            _log_candidate(candidate, trials.aim[0])
            tried.append(candidate)
            ways.append((how, circuit, scores, sets))
    shown.close()
    best = _choose_best(tried, trials, original)
    found = _summarize(tried, best, trials, original, _search_rivals(work, trials, ways[best][0], original))
    trials.save(found)
    undominated = [one for one in found.candidates if one.pareto]
    work.noted["tune"] = found.model_copy(update={"candidates": undominated, "tried": len(tried)})
    how, circuit, scores, sets = ways[best]
    for name, part in sets.items() if distributed.is_main() else ():
        part.save(work.claim(f"scores/{name}.safetensors"))
    log.info("best of %d candidates on validation: %s", len(tried), _describe(tried[best], trials.aim[0]))
    return how, save_circuit(work, SelectedCircuit(replace(circuit, model=work.described), scores, sets))


def _make_scoring(
    work: RunContext,
    target: str,
    neuron: str,
    names: Sequence[str],
    penalty: float = 1.0,
    normalize: str | None = None,
) -> ScoringSpec:
    targets = {
        name: work.recipe.references[name].target or _target_for_set(work, name, target) for name in names
    }
    return ScoringSpec(work.recipe.attribution.but(neuron=neuron), targets, penalty, normalize, place="tune.")


def _target_for_set(work: RunContext, name: str, target: str) -> str:
    """The candidate's target; `next` for a set whose samples have no completion where it means one."""
    lacks = any(sample.completion is None for sample in work.references[name])
    return "next" if target.startswith("completion") and lacks else target


def _score_parts(work: RunContext, target: str, neuron: str) -> dict[str, Scores]:
    """The scores of every reference set that some contrast reads."""
    kinds = [kind for kind, _, _ in work_list.contrasts_tried(work.correct)]
    return load_or_make_parts(
        work, _make_scoring(work, target, neuron, work_list.sets_read_by(work.correct, kinds))
    )


def _iterate_contrasts(
    work: RunContext, parts: dict[tuple[str, str], dict[str, Scores]]
) -> Iterator[tuple[ScoringSpec, dict[str, Scores]]]:
    """Each way to contrast, with the scores it contrasts."""
    for (target, neuron), scores in parts.items():
        for kind, penalty, normalize in work_list.contrasts_tried(work.correct):
            chosen = {name: scores[name] for name in work_list.sets_read_by(work.correct, [kind])}
            yield _make_scoring(work, target, neuron, list(chosen), penalty, normalize), chosen


def _iterate_circuits(
    work: RunContext, how: ScoringSpec, scores: Scores
) -> Iterator[tuple[ScoringSpec, int, Circuit]]:
    """(how, with its strength; rounds; circuit) of one way to contrast, as far as there are candidates in
    every round."""
    there = count_candidates(scores, work.correct.selection.scope)
    for count, rounds, strength in work_list.circuit_sizes_tried(work.correct):
        one = replace(how, strength=strength)
        if count <= there and (circuit := select_in_rounds(work, one, scores, count, rounds)) is not None:
            yield one, rounds, circuit


def _judge(
    how: ScoringSpec, circuit: Circuit, figures: Figures, original: Figures, trials: Trials
) -> Candidate:
    increase = figures["perplexity"] / original["perplexity"] - 1
    matched = "matched" in how.targets
    return Candidate(
        how.targets,
        how.options.neuron,
        "matched" if matched else "plain",
        how.penalty if matched else None,
        how.normalize,
        len(circuit),
        circuit.fingerprint,
        figures,
        increase,
        trials.within(figures, original),
        strength=how.strength,
    )


def _choose_best(tried: list[Candidate], trials: Trials, original: Figures) -> int:
    name = trials.aim[0]
    fit = [index for index, one in enumerate(tried) if one.within and name in one.figures]
    if not fit:
        cheapest = min((one.perplexity_increase for one in tried), default=None)
        said = (
            f"the cheapest of {len(tried)} costs {cheapest:+.2%} perplexity"
            if cheapest is not None
            else "there are too few units below zero"
        )
        raise UserError(
            f"no candidate is within the budget of selection.tune: {said}; try smaller counts, or a larger "
            "budget"
        )
    best = min(fit, key=lambda index: (trials.badness(tried[index].figures), tried[index].count, index))
    if trials.badness(tried[best].figures) >= trials.badness(original):
        trials.work.warnings.append(
            f"no candidate within the budget made {name} better on the validation prompts"
        )
        log.warning(trials.work.warnings[-1])
    elif tried[best].count == max(one.count for one in tried) and len({one.count for one in tried}) > 1:
        trials.work.warnings.append(
            f"the best number of units, {tried[best].count}, is the largest that was tried; a larger one may "
            "be better"
        )
        log.warning(trials.work.warnings[-1])
    return best


def _search_rivals(
    work: RunContext, trials: Trials, how: ScoringSpec, original: Figures
) -> tuple[list[Rival], dict[str, list[Trial]]]:
    """What each other method reaches under the same budget, at the best of the same counts and contrasted
    alike; work.rivals holds them.

    Returns:
        the best of each method that keeps to the budget, and method → every count of it that was tried.
    """
    found, others = list[Rival](), dict[str, list[Trial]]()
    sites = sites_of(work.model, work.recipe.attribution.sites)
    sizes = selection_sizes(work.correct, sites, counts_tried(work.correct))
    for method in rival_methods(work.correct):
        scope, theirs = rival_sizes(work.correct, sites, method, sizes)
        tried = [
            (count, change, trials.of(change, original))
            for count, change in select_by_method(work, how, method, scope, theirs)
        ]
        others[method] = [
            Trial(count, figures, trials.within(figures, original)) for count, _, figures in tried
        ]
        fit = [one for one in tried if trials.within(one[2], original)]
        if not fit:
            continue
        count, change, figures = min(fit, key=lambda one: (trials.badness(one[2]), one[0]))
        variant = str(Variant(method, count))
        work.rivals[variant] = change
        found.append(Rival(variant, figures, len(tried)))
        log.info(
            "under the same budget %s@%d: %s %.4g",
            method,
            count,
            trials.aim[0],
            figures.get(trials.aim[0], float("nan")),
        )
    return found, others


def _summarize(
    tried: list[Candidate],
    best: int,
    trials: Trials,
    original: Figures,
    beside: tuple[list[Rival], dict[str, list[Trial]]],
) -> Search:
    name = trials.aim[0]
    points = [
        (one.perplexity_increase, trials.badness(one.figures)) if name in one.figures else None
        for one in tried
    ]
    undominated = pareto_front(points)
    rows = [replace(one, pareto=index in undominated) for index, one in enumerate(tried)]
    return Search(
        aim=name,
        budget=Budget(trials.tune.max_perplexity_increase, trials.tune.max_kl),
        split="validation",
        samples={p.metric.name: len(p.samples) for p in [*trials.budget, *trials.asked]},
        original=original,
        best=rows[best],
        candidates=rows,
        rivals=beside[0],
        others=beside[1],
    )


def _describe(one: Candidate, aim: str) -> str:
    gained = f"{aim} {one.figures[aim]:.4g}" if aim in one.figures else f"{aim} not measured"
    penalty = f"penalty {one.penalty:g}" if one.penalty is not None else None
    rounds = f"{one.rounds} rounds" if one.rounds > 1 else None
    strength = f"strength {one.strength:g}" if one.strength != 1 else None
    way = ", ".join(
        filter(
            None,
            [one.targets["undesired"], one.neuron, one.contrast, penalty, one.normalize, rounds, strength],
        )
    )
    return f"{one.count} by {way}: perplexity {one.perplexity_increase:+.2%}, {gained}"


def _log_candidate(one: Candidate, aim: str) -> None:
    log.info("tried %s%s", _describe(one, aim), "" if one.within else ", over the budget")
