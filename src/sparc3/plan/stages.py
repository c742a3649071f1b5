"""What a recipe will do, stage by stage, and what each costs by the rehearsal of one batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..attribution.expertise import METHODS as EXPERTISE
from ..attribution.methods import require_method
from ..attribution.sums import Settings
from ..batches import grouped, token_budget
from ..evaluation import ioi
from ..evaluation.metrics import FluencySettings, HarnessSettings, IOISettings, PerplexitySettings, PromptSettings
from ..jobs import SEQUENTIAL
from ..models import context_length
from ..recipe import Recipe, Reference
from ..selection import parse_scope
from .lengths import of_samples, of_text
from .rehearsal import Cost, Rehearsal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 256
"""Prompts that are completed at once where a set is chosen by its completions."""


@dataclass(frozen=True)
class Stage:
    """One part of the work.

    Attributes:
        live: most bytes beside the weights at any moment of it.
        tokens, operations, seconds: on one device.
    """

    name: str
    live: int
    tokens: int
    operations: float
    seconds: float

    def __mul__(self, times: float) -> "Stage":
        return replace(self, tokens=round(self.tokens * times), operations=self.operations * times, seconds=self.seconds * times)

    def __add__(self, other: "Stage") -> "Stage":
        return Stage(self.name, max(self.live, other.live), self.tokens + other.tokens, self.operations + other.operations,
                     self.seconds + other.seconds)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to score every set: a method with its settings, done so many times."""

    method: str
    neuron: str
    target: str | None = None
    times: float = 1


class Stages:
    """The stages of a recipe.

    Attributes:
        notes: what had to be assumed, or is left out.
        sets: reference set → the lengths of its samples.
        units: number of units that are scored.
    """

    def __init__(self, recipe: Recipe, rehearsal: Rehearsal, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.recipe, self.rehearsal, self.tokenizer = recipe, rehearsal, tokenizer
        self.context = context_length(rehearsal.shaped.model)
        self.sites = rehearsal.shaped.sites(recipe.attribution.sites)
        unit = recipe.attribution.unit
        self.units = sum(site.out * site.inp if unit == "weight" else site.heads if unit == "head" else site.out for site in self.sites)
        self.sets = {name: of_samples(self._each(spec), tokenizer) for name, spec in recipe.references.items()}
        self.notes = [f"samples of {name} taken to have {found.longest} tokens" for name, found in self.sets.items() if found.assumed]

    def all(self) -> list[Stage]:
        return [*self._chosen(), *self._scores(), *self._evaluation()]

    def ways(self) -> list[Way]:
        """What is scored, each on every reference set."""
        recipe, asked = self.recipe, self.recipe.attribution
        if recipe.discover:
            return [Way(method, asked.neuron) for method in recipe.discover.methods]
        if recipe.compress:
            return [Way(m, asked.neuron, None, 2 if m == SEQUENTIAL else self._reduces(m) * self._draws(m)) for m in recipe.compress.methods]
        others = [Way(method, asked.neuron) for method in dict.fromkeys(recipe.compare.methods) if method not in ("random", asked.method)]
        tune = recipe.selection.tune
        if not tune:
            return [Way(asked.method, asked.neuron, None, recipe.selection.rounds), *others]
        # The first round is shared by all; in each later one every candidate attributes again, on a model of its own.
        times = 1 + self._candidates() * sum(rounds - 1 for rounds in set(tune.rounds))
        searched = [Way(asked.method, neuron, target, times) for target in tune.targets or (None,) for neuron in tune.neurons or (asked.neuron,)]
        return [*searched, *others]

    def _reduces(self, method: str) -> int:
        assert self.recipe.compress
        return len(self.recipe.compress.reduces) if require_method(method).targeted else 1

    def _each(self, spec: Reference) -> Reference:
        """One seed's set, where the run draws one for each seed."""
        apart = self.recipe.discover or (self.recipe.compress and self.recipe.compress.samples)
        return spec.model_copy(update={"seeds": spec.seeds[:1]}) if apart else spec

    def _draws(self, method: str) -> float:
        """How many whole sets a method goes through where numbers of samples are compared."""
        compress, general = self.recipe.compress, self.recipe.references["general"]
        if not compress or not self._sampled(method):
            return 1
        return sum(compress.samples) * len(general.seeds) / general.count

    def _sampled(self, method: str) -> bool:
        return bool(self.recipe.compress and self.recipe.compress.samples and require_method(method).run)

    def score_files(self) -> int:
        """How many files of scores the run leaves."""
        one = sum(way.times for way in self.ways() if way.method != SEQUENTIAL and not self._sampled(way.method))
        return round(one) * sum(self.repeats(spec) for spec in self.recipe.references.values()) + (self.recipe.job == "correct")

    def variants(self) -> int:
        """How many models are evaluated on the test samples, the original among them."""
        recipe = self.recipe
        if recipe.discover:
            rankings = sum(len(recipe.discover.ranks) if require_method(method).targeted else 1 for method in recipe.discover.methods)
            return 2 + rankings * len(recipe.discover.sparsities) * len(recipe.references["task"].seeds)
        if recipe.compress:
            again = len(recipe.compress.samples) * len(recipe.references["general"].seeds)
            ways = [1 if m == SEQUENTIAL else self._reduces(m) * (again if self._sampled(m) else 1) for m in recipe.compress.methods]
            return 1 + sum(ways) * max(1, len(recipe.compress.fractions))
        counts = len({*recipe.compare.counts, recipe.selection.count or -1})
        others = [m for m in dict.fromkeys(recipe.compare.methods) if m not in ("random", recipe.attribution.method)]
        draws = recipe.compare.random_draws * (counts if "random" in recipe.compare.methods else 1)
        return 1 + counts + len(others) * len(recipe.compare.counts) + draws

    def removed(self) -> float:
        """The largest share of the units that is set to zero at once, and whose values are kept meanwhile."""
        recipe, selection = self.recipe, self.recipe.selection
        if recipe.discover:
            return 1.0
        if recipe.compress:
            return _share(recipe.compress.scope) or max(recipe.compress.fractions)
        counts = max([selection.count or 0, *recipe.compare.counts, *(selection.tune.counts if selection.tune else ())])
        return max(counts / self.units, selection.fraction or 0.0, _share(selection.scope))

    def repeats(self, spec: Reference) -> int:
        """How many sets a section stands for: in the job discover one a seed."""
        return len(spec.seeds) if self.recipe.discover else 1

    def _chosen(self) -> Iterator[Stage]:
        """Reference sets that are chosen by what the model writes: the least that it takes."""
        for name, spec in self.recipe.references.items():
            if spec.choose_by in ("completion", "repetition"):
                many = spec.count * 4 if spec.choose_by == "repetition" else math.ceil(spec.count / LOOKED_AT) * LOOKED_AT
                self.notes.append(f"choosing {name} taken to need {many} prompts; it may need many more")
                yield self._generated(f"choosing {name}", many, self.sets[name].longest, spec.max_new_tokens, 0.0)

    def _scores(self) -> Iterator[Stage]:
        made: dict[str, Stage] = {}
        for way in self.ways():
            for name, spec in self.recipe.references.items():
                for stage in self._attributed(way, name, spec):
                    made[way.method] = made[way.method] + stage if way.method in made else stage
        yield from made.values()

    def _attributed(self, way: Way, name: str, spec: Reference) -> Iterator[Stage]:
        """One method on one set; nothing for a method that looks at no sample."""
        asked = self.recipe.attribution
        method = "wanda" if way.method == SEQUENTIAL else "activation" if way.method in EXPERTISE else way.method
        if require_method(method).run is None:
            return
        target = way.target or spec.target or asked.target
        if way.target and target.startswith("completion") and not self.sets[name].completed:
            target = "next"
        encoded = self.sets[name].encoded(target if require_method(method).targeted else "predicted", self.context)
        groups = grouped(encoded, token_budget(asked.batch_tokens, self.rehearsal.hardware.kind))
        settings = Settings(method, asked.unit, target, way.neuron, asked.reduce, 0, asked.non_finite, asked.sums_dtype, asked.sums_device,
                            gradient_checkpointing=asked.gradient_checkpointing)  # fmt: skip
        cost = self.rehearsal.attribution(settings, asked.sites, groups)
        tokens = round(sum(len(group) * len(group[0].ids) for group in groups) * way.times) * self.repeats(spec)
        yield _stage(f"scores, {way.method}", cost, tokens)

    def _evaluation(self) -> Iterator[Stage]:
        times = self.variants()
        for name, settings in self.recipe.metrics().items():
            for stage in self._metric(name, settings):
                yield stage * times
                yield from self._searched(name, stage)

    def _metric(self, name: str, settings: Any) -> Iterator[Stage]:
        """One metric on one variant."""
        if isinstance(settings, PerplexitySettings):
            yield self._windows(name, settings)
        elif isinstance(settings, IOISettings):
            group = of_samples(settings, self.tokenizer).encoded("contrast", self.context)
            tokens = sum(len(part) * len(part[0].ids) for part in (group[i : i + ioi.ROWS] for i in range(0, len(group), ioi.ROWS)))
            yield _stage(name, self.rehearsal.contrasts(group[: ioi.ROWS]), tokens)
        elif isinstance(settings, PromptSettings):
            found = of_samples(settings, self.tokenizer)
            many = len(found.pairs) * getattr(settings, "generations", 1)
            yield self._generated(name, many, found.longest, settings.max_new_tokens, getattr(settings, "temperature", 0.0))
        elif isinstance(settings, FluencySettings):
            read = self.recipe.metrics()[settings.of]
            assert isinstance(read, PromptSettings)
            found = of_samples(read, self.tokenizer)
            many, length = len(found.pairs) * getattr(read, "generations", 1), found.longest + read.max_new_tokens
            yield _stage(name, self.rehearsal.windows("perplexity", length, many), many * length)
        elif isinstance(settings, HarnessSettings):
            self.notes.append("the harness's tasks are not counted")

    def _candidates(self) -> int:
        """How many circuits the search may find, for one target and kind of neuron score, in any one number of rounds."""
        tune = self.recipe.selection.tune
        assert tune
        plain = "plain" in tune.contrasts or not tune.contrasts
        matched = "matched" in self.recipe.references and ("matched" in tune.contrasts or not tune.contrasts)
        contrasts = (plain + matched * len(tune.penalties)) * len(tune.normalize)
        return contrasts * len(set(tune.counts) or (1,)) * len(set(tune.strengths))

    def _searched(self, name: str, stage: Stage) -> Iterator[Stage]:
        """The same metric on the search's validation samples, of as many candidates as it may look at."""
        tune = self.recipe.selection.tune
        if not tune or name not in ("perplexity", "toxicity", "repetition", *(("kl",) if tune.max_kl is not None else ())):
            return
        circuits = len([way for way in self.ways() if way.method == self.recipe.attribution.method]) * self._candidates()
        settings = self.recipe.metrics()[name]
        asked, here = (tune.texts if isinstance(settings, PerplexitySettings) else tune.prompts), getattr(settings, "count", None)
        yield replace(stage * (circuits * len(set(tune.rounds)) * (asked / here if asked and here else 1.0)), name=f"search, {name}")

    def _windows(self, name: str, settings: PerplexitySettings) -> Stage:
        whole, assumed = of_text(settings, self.tokenizer)
        if assumed:
            self.notes.append(f"{name}'s text taken to have {whole:,} tokens")
        if settings.protocol == "blocks":
            length = min(settings.seq_len, self.context, whole)
            many = max(1, whole // length)
        else:
            length = min(settings.max_length, self.context, whole)
            stride = max(1, settings.stride * length // settings.max_length)
            many = 1 + math.ceil((whole - length) / stride)
        return _stage(name, self.rehearsal.windows(name, length, many), many * length)

    def _generated(self, name: str, many: int, prompt: int, new: int, temperature: float) -> Stage:
        cost = self.rehearsal.generation(many, prompt, new, temperature)
        return _stage(name, cost, many * (prompt + new))


def _stage(name: str, cost: Cost, tokens: int) -> Stage:
    """The whole of a piece of work, of which one batch was rehearsed."""
    share = tokens / cost.tokens
    return Stage(name, cost.live, tokens, cost.operations * share, cost.seconds * share)


def _share(scope: str) -> float:
    groups = parse_scope(scope)
    return groups[0] / groups[1] if groups else 0.0
