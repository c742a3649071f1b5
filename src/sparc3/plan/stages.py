"""What a recipe will do, stage by stage, and what each costs by the rehearsal of one batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..attribution.activations import EXPERTISE_METHODS
from ..attribution.methods import require_method
from ..attribution.sums import Settings
from ..circuits.select import parse_scope
from ..evaluation import perplexity, tasks
from ..evaluation.metrics import (
    FluencySettings,
    HarnessSettings,
    IOISettings,
    KLSettings,
    PerplexitySettings,
    PromptSettings,
)
from ..experiment import gather, score, seeds, work_list
from ..experiment.prune_sequentially import BATCH_TOKENS
from ..models.load import context_length, rope_switches
from ..recipe.schema import Recipe
from ..recipe.sections import SEQUENTIAL
from ..samples.batches import Encoded, group_by_length, token_budget
from .acceptance import Tried, prompts_read, sets_by_model
from .lengths import of_samples, of_tasks, of_text
from .rehearsal import Cost, Rehearsal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORWARD_TOKENS = 1024
"""Tokens of a batch where activations alone are looked at, for cards, protection and expertise."""


@dataclass(frozen=True)
class Stage:
    """One part of the work.

    Attributes:
        live: most bytes beside the weights at any moment of it.
        tokens: real ones that the model reads or writes, and operations and seconds, on one device.
        scoring: whether it fills scores; other stages have them all, and look at models that lack units.
        more: seconds on top that it takes at most, where the model decides how many prompts are read.
    """

    name: str
    live: int
    tokens: int
    operations: float
    seconds: float
    scoring: bool = False
    more: float = 0.0

    def __mul__(self, times: float) -> "Stage":
        return replace(
            self,
            tokens=round(self.tokens * times),
            operations=self.operations * times,
            seconds=self.seconds * times,
            more=self.more * times,
        )

    def __add__(self, other: "Stage") -> "Stage":
        return replace(
            self,
            live=max(self.live, other.live),
            tokens=self.tokens + other.tokens,
            operations=self.operations + other.operations,
            seconds=self.seconds + other.seconds,
            more=self.more + other.more,
        )


class Stages:
    """The stages of a recipe.

    Attributes:
        tried: of the sets that the model chooses, how many of a few prompts fit.
        notes: what had to be assumed, or is left out.
        sets: reference set, as the run names it → the lengths of its samples.
        work: what is scored and measured.
        units: number of units that are scored.
    """

    def __init__(
        self,
        recipe: Recipe,
        rehearsal: Rehearsal,
        tokenizer: "PreTrainedTokenizerBase | None",
        tried: Mapping[str, Tried] | None = None,
    ) -> None:
        self.recipe, self.rehearsal, self.tokenizer, self.tried = recipe, rehearsal, tokenizer, tried or {}
        self.context = context_length(rehearsal.shaped.model)
        self.switches = rope_switches(rehearsal.shaped.model)
        self.sites = rehearsal.shaped.sites(recipe.attribution.sites)
        unit = recipe.attribution.unit
        self.units = sum(work_list.units_in(site, unit) for site in self.sites)
        self.specs = dict(seeds.reference_sets(recipe))
        self.sets = {name: of_samples(spec, tokenizer) for name, spec in self.specs.items()}
        self.notes = [
            f"samples of {name} taken to have {found.longest} tokens"
            for name, found in self.sets.items()
            if found.assumed
        ]
        self.work = work_list.list_work(recipe, self.sites, lambda name: self.sets[name].completed)
        if recipe.job == "correct" and recipe.tune:
            count = work_list.circuit_count(recipe, self.sites)
            self.notes.append(
                f"every candidate of the search taken to be measured whole, and its best to have {count} "
                "units"
            )

    def all(self) -> list[Stage]:
        """In the run's order; work of one kind is one stage."""
        made: dict[str, Stage] = {}
        for stage in (
            *self._choose_prompts(),
            *self._protection(),
            *self._scores(),
            *self._search(),
            *self._evaluation(),
            *self._cards(),
            *self._token_maps(),
        ):
            made[stage.name] = made[stage.name] + stage if stage.name in made else stage
        return list(made.values())

    def held(self) -> int:
        """How many numbers a unit are in memory at once while scores are contrasted and circuits chosen."""
        if self.recipe.job == "compress":
            return 1 if self.recipe.compress.samples else 0
        if self.recipe.job == "discover":
            return len(self.sets) * len(self.recipe.discover.methods) * len(self.recipe.discover.ranks)
        tried = len(work_list.attributions_tried(self.recipe)) if self.recipe.tune else 1
        return len(self.sets) * tried + seeds.count_seeds(self.recipe)

    def removed(self) -> float:
        """The largest share of the units that is set to zero at once, and whose values are kept meanwhile."""
        recipe = self.recipe
        if recipe.job == "discover":
            return 1.0
        if recipe.job == "compress":
            groups = parse_scope(recipe.compress.scope)
            return groups[0] / groups[1] if groups else max(recipe.compress.fractions)
        beside = work_list.comparison_for(recipe, self.sites, work_list.circuit_count(recipe, self.sites))
        return max(beside.own) / self.units

    def _choose_prompts(self) -> Iterator[Stage]:
        """Samples that are chosen by what the model writes: the least that it takes."""
        for name, spec in sets_by_model(self.recipe):
            tried = self.tried.get(name)
            least, most = prompts_read(spec, tried)
            if tried:
                self.notes.append(
                    f"choosing {name} taken to need {least:,} to {most:,} prompts: {tried.said}"
                )
            else:
                self.notes.append(
                    f"choosing {name} taken to need {least:,} prompts"
                    + (f"; it may need up to {most:,}" if most > least else "")
                )
            prompt = of_samples(spec, self.tokenizer).longest
            stage = self._generate(f"choosing {name}", least, prompt, spec.max_new_tokens, 0.0)
            yield replace(stage, more=stage.seconds * (most / least - 1))

    def _protection(self) -> Iterator[Stage]:
        if work_list.is_protected(self.recipe):
            some = self.sets["general"].first(score.MAX_TEXTS).joined(min(self.context, score.MAX_TOKENS))
            first = [min(len(one.ids), score.SCREEN_TOKENS) for one in some]
            cost = self.rehearsal.windows("perplexity", max(first), len(first))
            look = _stage("", cost, sum(first), max(first) * len(first))
            # A second look at the whole is for neurons that the first one finds, and most models have none.
            tried = self._forward("protection", some) + look * (1 + min(score.MAX_SUSPECTS, self.units))
            yield replace(tried, scoring=True)

    def _scores(self) -> Iterator[Stage]:
        for one in self.work.attributions:
            yield from self._attribute(one)
        if self.recipe.job == "correct" and set(work_list.rival_methods(self.recipe)) & set(
            EXPERTISE_METHODS
        ):
            for name in chain.from_iterable(work_list.expertise_sets(self.recipe)):
                read = self._forward("scores, expertise", self.sets[name].joined(self.context))
                yield replace(read, scoring=True)

    def _attribute(self, one: work_list.Attribution) -> Iterator[Stage]:
        """Nothing for a method that looks at no sample."""
        options, name = one.options, f"scores, {one.options.method}"
        found = self.sets[one.set].first(one.first)
        if options.method == SEQUENTIAL:
            groups = group_by_length(found.encoded("predicted", self.context), BATCH_TOKENS)
            cost = self.rehearsal.sequential(options.sites, groups)
        elif (method := require_method(options.method)).run is None:
            return
        else:
            encoded = found.encoded(options.target if method.targeted else "predicted", self.context)
            budget = token_budget(options.batch_tokens, self.rehearsal.hardware.kind)
            groups = group_by_length(encoded, budget, self.switches)
            cost = self.rehearsal.attribution(Settings.of(options), options.sites, groups)
        yield replace(_sum_groups(name, cost, groups), scoring=True)

    def _forward(self, name: str, encoded: Sequence[Encoded]) -> Stage:
        """Activations looked at, and nothing else."""
        groups = group_by_length(encoded, FORWARD_TOKENS, self.switches)
        settings = Settings("activation", "neuron", "predicted", "abs", "mean")
        return _sum_groups(name, self.rehearsal.attribution(settings, ("mlp.up",), groups), groups)

    def _search(self) -> Iterator[Stage]:
        """Each circuit that a search may look at, on its validation samples."""
        if self.recipe.job == "correct" and self.recipe.tune:
            budget = gather.search_budget(self.recipe).items()
            for name, settings in (*budget, gather.search_aim(self.recipe)):
                for stage in self._metric(name, settings):
                    yield replace(stage * (self.work.trials - (name == "kl")), name=f"search, {name}")
            if gather.search_fluency(self.recipe):
                read = self._fluency("search, fluency", gather.search_aim(self.recipe)[1])
                yield read * self.work.trials

    def _evaluation(self) -> Iterator[Stage]:
        many = len(self.work.evaluations) + self.work.alone
        for name, settings in self.recipe.metrics().items():
            for stage in self._metric(name, settings):
                yield stage * (many - isinstance(settings, KLSettings))  # the original's is known

    def _cards(self) -> Iterator[Stage]:
        if work_list.has_cards(self.recipe):
            yield self._forward("cards", self.sets["undesired"].joined(self.context))

    def _token_maps(self) -> Iterator[Stage]:
        if work_list.has_token_maps(self.recipe):
            method, target = self.recipe.attribution.method, self.recipe.attribution.target
            target = self.recipe.references["undesired"].target or target
            found = self.sets["undesired"].first(work_list.TOKEN_MAPS)
            groups = [[one] for one in found.encoded(target, self.context)]
            settings = Settings(method, "neuron", target, "signed", "mean")
            yield _sum_groups("token maps", self.rehearsal.attribution(settings, ("mlp.up",), groups), groups)

    def _metric(self, name: str, settings: Any) -> Iterator[Stage]:
        """One metric on one variant."""
        if isinstance(settings, PerplexitySettings):
            yield self._windows(name, settings)
        elif isinstance(settings, IOISettings):
            groups = _rows(of_samples(settings, self.tokenizer).encoded("contrast", self.context), tasks.ROWS)
            yield _sum_groups(name, self.rehearsal.contrasts(groups[0]), groups)
        elif isinstance(settings, PromptSettings):
            found = of_samples(settings, self.tokenizer)
            many = len(found.pairs) * getattr(settings, "generations", 1)
            yield self._generate(
                name, many, found.longest, settings.max_new_tokens, getattr(settings, "temperature", 0.0)
            )
        elif isinstance(settings, FluencySettings):
            read = self.recipe.metrics()[settings.of]
            assert isinstance(read, PromptSettings)
            yield self._fluency(name, read)
        elif isinstance(settings, HarnessSettings):
            yield self._questions(name, settings)

    def _fluency(self, name: str, read: PromptSettings) -> Stage:
        """Of all that one variant writes for the metric whose settings these are."""
        found = of_samples(read, self.tokenizer)
        many = len(found.pairs) * getattr(read, "generations", 1)
        length = found.longest + read.max_new_tokens
        return _stage(name, self.rehearsal.windows("perplexity", length, many), many * length)

    def _questions(self, name: str, settings: HarnessSettings) -> Stage:
        self._note(
            "the harness's tasks taken to have the sizes of plan.lengths.TASKS, and every answer to be read "
            "anew"
        )
        groups = _rows(of_tasks(settings).encoded("predicted", self.context), settings.batch_size)
        return _sum_groups(name, self.rehearsal.every_logit(groups[0]), groups)

    def _windows(self, name: str, settings: PerplexitySettings) -> Stage:
        whole, assumed = of_text(settings, self.tokenizer)
        if assumed:
            self._note(f"{name}'s text taken to have {whole:,} tokens")
        lengths = [len(ids) for ids, _ in perplexity.cut_windows(range(whole), settings, self.context)]
        cost = self.rehearsal.windows(
            "kl" if isinstance(settings, KLSettings) else "perplexity", max(lengths), len(lengths)
        )
        return _stage(name, cost, sum(lengths))

    def _generate(self, name: str, many: int, prompt: int, new: int, temperature: float) -> Stage:
        cost = self.rehearsal.generation(many, prompt, new, temperature)
        return _stage(name, cost, many * (prompt + new))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _rows(encoded: Sequence[Encoded], rows: int) -> list[Sequence[Encoded]]:
    return [encoded[start : start + rows] for start in range(0, len(encoded), rows)]


def _sum_groups(name: str, cost: Cost, groups: Iterable[Sequence[Encoded]]) -> Stage:
    """Batches, the longest sample of each first."""
    tokens = padded = 0
    for group in groups:
        tokens += sum(len(one.ids) for one in group)
        padded += len(group) * max(len(one.ids) for one in group)
    return _stage(name, cost, tokens, padded)


def _stage(name: str, cost: Cost, tokens: int, padded: int | None = None) -> Stage:
    """The whole of a piece of work, of which one batch was rehearsed."""
    share = (padded or tokens) / cost.tokens
    return Stage(name, cost.live, tokens, cost.operations * share, cost.seconds * share)
