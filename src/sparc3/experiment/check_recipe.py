"""One check before any work: what a recipe asks for, against the model's units and context, and its samples
as tokens. `plan` makes it too."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..attribution.activations import EXPERTISE_METHODS
from ..attribution.methods import require_method, settings_for
from ..attribution.options import WordsBy
from ..attribution.sums import Settings
from ..circuits.select import parse_scope
from ..errors import UserError
from ..evaluation.metrics import IOISettings, MetricSettings, PerplexitySettings, PromptSettings
from ..evaluation.perplexity import windows_of
from ..models.sites import Site
from ..recipe.schema import CompressRecipe, CorrectRecipe, DiscoverRecipe, Recipe
from ..recipe.sections import SEQUENTIAL
from ..samples.batches import encode
from ..samples.reference_set import ReferenceSet
from ..samples.tokens import read_sample
from .work_list import removed_sizes, target_for_set, units_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Limits:
    """What reads the samples: the tokenizer, the model's longest context, and how many token ids it knows."""

    tokenizer: "PreTrainedTokenizerBase"
    context: int
    vocabulary: int


def check_sizes(recipe: Recipe, sites: list[Site]) -> None:
    """Raise UserError where more units are asked for than there are, a scope does not fit, or the weights are
    quantised; names the key, or the weight."""
    for site in sites:
        if site.quantised:
            raise UserError(
                f"{site.name} is quantised, and a run removes units from the weights it measures; run the "
                "recipe on the unquantised model (sparc3 attribute --neuron signed works on this one)"
            )
    unit = recipe.attribution.unit
    if isinstance(recipe, DiscoverRecipe):
        inside = [site.name for site in sites if site.expert is not None]
        if inside and recipe.discover.ablation == "mean":
            raise UserError(
                f"discover.ablation mean replaces outputs, and {inside[0]} is an expert's, which are "
                "computed in one call; use zero"
            )
        for method in recipe.discover.methods:
            if not removed_sizes(recipe.discover, method, unit, sites):
                raise UserError(
                    f"discover.sparsities: each takes none or all of the {unit}s; give others, or more sites"
                )
    elif isinstance(recipe, CompressRecipe):
        _check_groups("compress.scope", recipe.compress.scope, unit, sites)
    elif isinstance(recipe, CorrectRecipe):
        _check_selection(recipe, sites)


def check_lengths(recipe: Recipe, context: int) -> None:
    """Raise UserError where a reference set is cut to more tokens than the model reads; asked before any set
    is gathered, which can take long."""
    for name, spec in recipe.references.items():
        if spec.seq_len and spec.seq_len > context and not recipe.attribution.truncate:
            raise UserError(
                f"references.{name}.seq_len {spec.seq_len} is more than the model's context of {context} "
                f"tokens; give {context} or less, or attribution.truncate true"
            )


def _check_selection(recipe: CorrectRecipe, sites: list[Site]) -> None:
    asked, chosen = recipe.attribution, recipe.selection
    for method in _scoring_methods(recipe):
        settings_for(Settings.of(asked.but(method=method)), asked.sites)
    _check_groups("selection.scope", chosen.scope, asked.unit, sites)
    if "matched" in recipe.references and chosen.scope not in ("global", "site"):
        raise UserError(
            f"selection.scope {chosen.scope} takes the same number from every row, and a contrast with "
            "references.matched has candidates only where it is below zero; use scope global or site"
        )
    units = [units_in(site, asked.unit) for site in sites]
    most, where = sum(units), "in all"
    if chosen.scope == "site":
        most, where = min(units), "in the smallest site"
    elif chosen.scope == "row":
        most, where = min(site.inp for site in sites), "in the shortest row"
    counts = {
        "selection.count": [chosen.count or 0],
        "selection.tune.counts": chosen.tune.counts if chosen.tune else (),
        "compare.counts": recipe.compare.counts,
    }
    for key, some in counts.items():
        for count in some:
            if not 0 <= count <= most:
                raise UserError(
                    f"{key}: {count} was asked for, and there are {most} {asked.unit}s {where}; give a "
                    "number up to that"
                )


def _check_groups(key: str, scope: str, unit: str, sites: Iterable[Site]) -> None:
    groups = parse_scope(scope)
    if (groups or scope == "row") and unit != "weight":
        raise UserError(f"{key} {scope} is for weights, and attribution.unit is {unit}; use global or site")
    for site in sites:
        if groups and site.inp % groups[1]:
            raise UserError(
                f"{key} {scope} does not divide the rows of {site.name}, which have {site.inp} inputs; "
                "choose another, or other sites"
            )


def _scoring_methods(recipe: Recipe) -> list[str]:
    """The methods that `attribute` runs."""
    if isinstance(recipe, CorrectRecipe):
        named = (recipe.attribution.method, *recipe.compare.methods)
    elif isinstance(recipe, DiscoverRecipe):
        named = recipe.discover.methods
    else:
        named = recipe.compress.methods
    return [
        method for method in dict.fromkeys(named) if method not in EXPERTISE_METHODS and method != SEQUENTIAL
    ]


def check_samples(
    recipe: Recipe,
    references: Mapping[str, ReferenceSet],
    metrics: Iterable[tuple[str, MetricSettings, ReferenceSet]],
    limits: Limits,
) -> None:
    """Raise UserError where a sample lacks what its target needs, or does not fit the model; names set,
    sample and key.

    Args:
        references: as the run names them: general, or task.0.
        metrics: of each, what a message calls it, its settings and its samples.
    """
    for name, samples in references.items():
        for key, target in _targets(recipe, name, samples):
            with _naming(f"references.{name}, {key} {target}"):
                _check_reference(recipe, samples, target, limits)
    for name, settings, samples in metrics:
        with _naming(name):
            _check_metric(settings, samples, limits)


def _targets(recipe: Recipe, name: str, samples: ReferenceSet) -> Iterator[tuple[str, str]]:
    """Each target that a set is read with, and the key that says so."""
    spec, tune = recipe.references[name.partition(".")[0]], recipe.tune
    if not any(require_method(method).targeted for method in _scoring_methods(recipe)):
        yield "method's target", "predicted"  # a method that looks at activations has none
    elif spec.target:
        yield f"references.{name.partition('.')[0]}.target", spec.target
    elif tune and tune.targets:
        completed = all(sample.completion is not None for sample in samples)
        for target in tune.targets:
            yield "selection.tune.targets", target_for_set(target, completed)
    else:
        yield "attribution.target", recipe.attribution.target


def _check_reference(recipe: Recipe, samples: ReferenceSet, target: str, limits: Limits) -> None:
    asked = recipe.attribution
    encoded = encode(
        samples,
        limits.tokenizer,
        target,
        context=limits.context,
        vocabulary=limits.vocabulary,
        truncate=asked.truncate,
        # A plan does not find a scorer's words; any one stands for them.
        words=(0,) if isinstance(asked.words, WordsBy) else asked.words,
    )
    for one in encoded:
        if len(one.ids) <= asked.skip_positions:
            raise UserError(
                f"{samples.where(one.index)} has {len(one.ids)} tokens, and attribution.skip_positions "
                f"{asked.skip_positions} leaves none; skip fewer"
            )


def _check_metric(settings: Any, samples: ReferenceSet, limits: Limits) -> None:
    if isinstance(settings, IOISettings):
        encode(samples, limits.tokenizer, "contrast", context=limits.context, vocabulary=limits.vocabulary)
    elif isinstance(settings, PerplexitySettings):
        for ids, _ in windows_of(samples, limits.tokenizer, settings, limits.context):
            _check_known(ids, limits, "the text")
    elif isinstance(settings, PromptSettings):
        for index, sample in enumerate(samples):
            ids, where = read_sample(sample, limits.tokenizer).prompt, samples.where(index)
            if not ids:
                raise UserError(f"{where} has no token for this tokenizer; leave it out")
            _check_known(ids, limits, where)
            if len(ids) + settings.max_new_tokens > limits.context:
                raise UserError(
                    f"{where} has {len(ids)} tokens, which with max_new_tokens {settings.max_new_tokens} do "
                    f"not fit into the model's {limits.context}; shorten it, or lower max_new_tokens"
                )


def _check_known(ids: Iterable[int], limits: Limits, where: str) -> None:
    if (largest := max(ids)) >= limits.vocabulary:
        raise UserError(
            f"{where} has token id {largest}, but the model knows ids below {limits.vocabulary}; use its own "
            "tokenizer"
        )


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """A UserError inside names the place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
