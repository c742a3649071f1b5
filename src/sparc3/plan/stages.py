"""The stages of a recipe, each with its cost from the rehearsal of one batch."""

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
from .acceptance import TriedPrompts, prompts_read, sets_by_model
from .lengths import estimate_samples, estimate_tasks, estimate_text
from .rehearsal import Cost, Rehearsal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORWARD_TOKENS = 1024
"""Tokens in a batch of work that only needs activations: cards, protection and expertise."""


@dataclass(frozen=True)
class Stage:
    """One part of the work.

    Attributes:
        live: the largest number of bytes at any moment, without the weights.
        tokens, operations, seconds: on one device; tokens are real ones that the model reads or writes.
        scoring: whether it computes scores; in other stages all scores are in memory, and units are removed.
        more: the largest number of additional seconds, if the model decides how many prompts are read.
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
        tried: set that the model chooses → how many of a few prompts fit.
        notes: assumptions and omissions.
        sets: reference set, by its name in the run → the lengths of its samples.
        work: the attributions and evaluations.
        units: number of scored units.
    """

    def __init__(
        self,
        recipe: Recipe,
        rehearsal: Rehearsal,
        tokenizer: "PreTrainedTokenizerBase | None",
        tried: Mapping[str, TriedPrompts] | None = None,
    ) -> None:
        self.recipe, self.rehearsal, self.tokenizer, self.tried = recipe, rehearsal, tokenizer, tried or {}
        self.context = context_length(rehearsal.shaped.model)
        self.switches = rope_switches(rehearsal.shaped.model)
        self.sites = rehearsal.shaped.sites(recipe.attribution.sites)
        unit = recipe.attribution.unit
        self.units = sum(work_list.units_in(site, unit) for site in self.sites)
        self.specs = dict(seeds.reference_sets(recipe))
        self.sets = {name: estimate_samples(spec, tokenizer) for name, spec in self.specs.items()}
        self.notes = [
            f"samples of {name} taken to have {lengths.longest} tokens"
            for name, lengths in self.sets.items()
            if lengths.assumed
        ]
        self.work = work_list.list_work(recipe, self.sites, lambda name: self.sets[name].have_completions)
        if recipe.job == "correct" and recipe.tune:
            count = work_list.circuit_count(recipe, self.sites)
            self.notes.append(
                f"every candidate of the search taken to be measured whole, and its best to have {count} "
                "units"
            )

    def all(self) -> list[Stage]:
        """All stages in the run's order; work of one kind is merged into one stage."""
        merged: dict[str, Stage] = {}
        for stage in (
            *self._choose_prompts(),
            *self._protection(),
            *self._scores(),
            *self._search(),
            *self._evaluation(),
            *self._cards(),
            *self._token_maps(),
        ):
            merged[stage.name] = merged[stage.name] + stage if stage.name in merged else stage
        return list(merged.values())

    def count_scores_in_memory(self) -> int:
        """The number of scores per unit that are in memory at once while scores are contrasted and circuits
        selected."""
        if self.recipe.job == "compress":
            return 1 if self.recipe.compress.samples else 0
        if self.recipe.job == "discover":
            return len(self.sets) * len(self.recipe.discover.methods) * len(self.recipe.discover.ranks)
        attributions = len(work_list.attributions_tried(self.recipe)) if self.recipe.tune else 1
        return len(self.sets) * attributions + seeds.count_seeds(self.recipe)  # and their contrasts

    def largest_removed_share(self) -> float:
        """The largest share of the units that is removed at once, whose values are kept in the meantime."""
        recipe = self.recipe
        if recipe.job == "discover":
            return 1.0
        if recipe.job == "compress":
            groups = parse_scope(recipe.compress.scope)
            return groups[0] / groups[1] if groups else max(recipe.compress.fractions)
        comparison = work_list.comparison_for(recipe, self.sites, work_list.circuit_count(recipe, self.sites))
        return max(comparison.own) / self.units

    def _choose_prompts(self) -> Iterator[Stage]:
        """Choosing samples by what the model writes, at the minimum number of prompts."""
        for name, spec in sets_by_model(self.recipe):
            tried = self.tried.get(name)
            smallest, largest = prompts_read(spec, tried)
            if tried:
                self.notes.append(
                    f"choosing {name} taken to need {smallest:,} to {largest:,} prompts: {tried.description}"
                )
            else:
                self.notes.append(
                    f"choosing {name} taken to need {smallest:,} prompts"
                    + (f"; it may need up to {largest:,}" if largest > smallest else "")
                )
            prompt = estimate_samples(spec, self.tokenizer).longest
            stage = self._generate(f"choosing {name}", smallest, prompt, spec.max_new_tokens, 0.0)
            yield replace(stage, more=stage.seconds * (largest / smallest - 1))

    def _protection(self) -> Iterator[Stage]:
        if work_list.is_protected(self.recipe):
            texts = self.sets["general"].first(score.MAX_TEXTS)
            encoded = texts.join_completions(min(self.context, score.MAX_TOKENS))
            screen_lengths = [min(len(sample.ids), score.SCREEN_TOKENS) for sample in encoded]
            cost = self.rehearsal.windows("perplexity", max(screen_lengths), len(screen_lengths))
            screen = _stage("", cost, sum(screen_lengths), max(screen_lengths) * len(screen_lengths))
            # Only suspects of the first screen are measured on the whole samples, and most models have none.
            total = self._forward("protection", encoded) + screen * (1 + min(score.MAX_SUSPECTS, self.units))
            yield replace(total, scoring=True)

    def _scores(self) -> Iterator[Stage]:
        for attribution in self.work.attributions:
            yield from self._attribute(attribution)
        if self.recipe.job == "correct" and set(work_list.rival_methods(self.recipe)) & set(
            EXPERTISE_METHODS
        ):
            for name in chain.from_iterable(work_list.expertise_sets(self.recipe)):
                forward = self._forward("scores, expertise", self.sets[name].join_completions(self.context))
                yield replace(forward, scoring=True)

    def _attribute(self, attribution: work_list.Attribution) -> Iterator[Stage]:
        """The stage of one attribution; none for a method without samples."""
        options, name = attribution.options, f"scores, {attribution.options.method}"
        lengths = self.sets[attribution.set].first(attribution.first)
        if options.method == SEQUENTIAL:
            groups = group_by_length(lengths.encode("predicted", self.context), BATCH_TOKENS)
            cost = self.rehearsal.sequential(options.sites, groups)
        elif (method := require_method(options.method)).run is None:
            return
        else:
            encoded = lengths.encode(options.target if method.targeted else "predicted", self.context)
            budget = token_budget(options.batch_tokens, self.rehearsal.hardware.kind)
            groups = group_by_length(encoded, budget, self.switches)
            cost = self.rehearsal.attribution(Settings.from_options(options), options.sites, groups)
        yield replace(_sum_groups(name, cost, groups), scoring=True)

    def _forward(self, name: str, encoded: Sequence[Encoded]) -> Stage:
        """A forward pass that only observes activations."""
        groups = group_by_length(encoded, FORWARD_TOKENS, self.switches)
        settings = Settings("activation", "neuron", "predicted", "abs", "mean")
        return _sum_groups(name, self.rehearsal.attribution(settings, ("mlp.up",), groups), groups)

    def _search(self) -> Iterator[Stage]:
        """Measuring every circuit that a search may try on its validation samples."""
        if self.recipe.job == "correct" and self.recipe.tune:
            budget = gather.search_budget(self.recipe).items()
            for name, settings in (*budget, gather.search_aim(self.recipe)):
                for stage in self._metric(name, settings):
                    # The original's KL divergence from itself is known to be 0.
                    yield replace(stage * (self.work.trials - (name == "kl")), name=f"search, {name}")
            if gather.search_fluency(self.recipe):
                read = self._fluency("search, fluency", gather.search_aim(self.recipe)[1])
                yield read * self.work.trials

    def _evaluation(self) -> Iterator[Stage]:
        count = len(self.work.evaluations) + self.work.alone
        for name, settings in self.recipe.metrics().items():
            for stage in self._metric(name, settings):
                yield stage * (count - isinstance(settings, KLSettings))  # the original's is 0

    def _cards(self) -> Iterator[Stage]:
        if work_list.has_cards(self.recipe):
            yield self._forward("cards", self.sets["undesired"].join_completions(self.context))

    def _token_maps(self) -> Iterator[Stage]:
        if work_list.has_token_maps(self.recipe):
            method, target = self.recipe.attribution.method, self.recipe.attribution.target
            target = self.recipe.references["undesired"].target or target
            lengths = self.sets["undesired"].first(work_list.TOKEN_MAPS)
            groups = [[sample] for sample in lengths.encode(target, self.context)]
            settings = Settings(method, "neuron", target, "signed", "mean")
            yield _sum_groups("token maps", self.rehearsal.attribution(settings, ("mlp.up",), groups), groups)

    def _metric(self, name: str, settings: Any) -> Iterator[Stage]:
        """The stage of one metric on one variant."""
        if isinstance(settings, PerplexitySettings):
            yield self._windows(name, settings)
        elif isinstance(settings, IOISettings):
            groups = _rows(
                estimate_samples(settings, self.tokenizer).encode("contrast", self.context), tasks.ROWS
            )
            yield _sum_groups(name, self.rehearsal.contrasts(groups[0]), groups)
        elif isinstance(settings, PromptSettings):
            lengths = estimate_samples(settings, self.tokenizer)
            count = len(lengths.pairs) * getattr(settings, "generations", 1)
            yield self._generate(
                name, count, lengths.longest, settings.max_new_tokens, getattr(settings, "temperature", 0.0)
            )
        elif isinstance(settings, FluencySettings):
            source = self.recipe.metrics()[settings.of]
            assert isinstance(source, PromptSettings)
            yield self._fluency(name, source)
        elif isinstance(settings, HarnessSettings):
            yield self._questions(name, settings)

    def _fluency(self, name: str, source: PromptSettings) -> Stage:
        """The stage of the fluency of all texts that one variant writes for the metric `source`."""
        lengths = estimate_samples(source, self.tokenizer)
        count = len(lengths.pairs) * getattr(source, "generations", 1)
        length = lengths.longest + source.max_new_tokens
        return _stage(name, self.rehearsal.windows("perplexity", length, count), count * length)

    def _questions(self, name: str, settings: HarnessSettings) -> Stage:
        self._note(
            "the harness's tasks taken to have the sizes of plan.lengths.TASKS, and every answer to be read "
            "anew"
        )
        groups = _rows(estimate_tasks(settings).encode("predicted", self.context), settings.batch_size)
        return _sum_groups(name, self.rehearsal.every_logit(groups[0]), groups)

    def _windows(self, name: str, settings: PerplexitySettings) -> Stage:
        tokens, assumed = estimate_text(settings, self.tokenizer)
        if assumed:
            self._note(f"{name}'s text taken to have {tokens:,} tokens")
        lengths = [len(ids) for ids, _ in perplexity.cut_windows(range(tokens), settings, self.context)]
        cost = self.rehearsal.windows(
            "kl" if isinstance(settings, KLSettings) else "perplexity", max(lengths), len(lengths)
        )
        return _stage(name, cost, sum(lengths))

    def _generate(self, name: str, count: int, prompt: int, new: int, temperature: float) -> Stage:
        cost = self.rehearsal.generation(count, prompt, new, temperature)
        return _stage(name, cost, count * (prompt + new))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _rows(encoded: Sequence[Encoded], rows: int) -> list[Sequence[Encoded]]:
    return [encoded[start : start + rows] for start in range(0, len(encoded), rows)]


def _sum_groups(name: str, cost: Cost, groups: Iterable[Sequence[Encoded]]) -> Stage:
    """The stage for all batches, given the cost of one."""
    tokens = padded = 0
    for group in groups:
        tokens += sum(len(sample.ids) for sample in group)
        padded += len(group) * max(len(sample.ids) for sample in group)
    return _stage(name, cost, tokens, padded)


def _stage(name: str, cost: Cost, tokens: int, padded: int | None = None) -> Stage:
    """The stage for a whole set, given the cost of one batch."""
    share = (padded or tokens) / cost.tokens
    return Stage(name, cost.live, tokens, cost.operations * share, cost.seconds * share)
