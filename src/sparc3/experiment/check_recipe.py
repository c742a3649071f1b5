"""The check before any work: does the recipe fit the model's units and context, and do its samples? `plan`
uses it too."""

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
from ..evaluation.perplexity import make_windows
from ..models.sites import Site
from ..recipe.schema import CompressRecipe, CorrectRecipe, DiscoverRecipe, Recipe
from ..recipe.sections import SEQUENTIAL
from ..samples.batches import encode
from ..samples.reference_set import ReferenceSet
from ..samples.tokens import read_sample
from .work_list import removal_sizes, target_for_set, units_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Limits:
    """What samples must fit: the tokenizer, the model's context length, and its number of token ids."""

    tokenizer: "PreTrainedTokenizerBase"
    context: int
    vocabulary: int


def check_sizes(recipe: Recipe, sites: list[Site]) -> None:
    """Raise UserError if the recipe requests more units than exist, a scope does not fit, or the weights are
    quantised; the message names the key or the weight."""
    for site in sites:
        if site.is_quantised:
            raise UserError(
                f"{site.name} is quantised, and a run removes units from the weights it measures; run the "
                "recipe on the unquantised model (sparc3 attribute --neuron signed works on this one)"
            )
    unit = recipe.attribution.unit
    if isinstance(recipe, DiscoverRecipe):
        of_experts = [site.name for site in sites if site.expert is not None]
        if of_experts and recipe.discover.ablation == "mean":
            raise UserError(
                f"discover.ablation mean replaces outputs, but {of_experts[0]} belongs to an expert, and all "
                "experts are computed in one call; use zero"
            )
        for method in recipe.discover.methods:
            if not removal_sizes(recipe.discover, method, unit, sites):
                raise UserError(
                    f"discover.sparsities: each removes none or all of the {unit}s; choose others, or more "
                    "sites"
                )
    elif isinstance(recipe, CompressRecipe):
        _check_groups("compress.scope", recipe.compress.scope, unit, sites)
    elif isinstance(recipe, CorrectRecipe):
        _check_selection(recipe, sites)


def check_lengths(recipe: Recipe, context: int) -> None:
    """Raise UserError if a reference set is cut to more tokens than the model's context. Checked before any
    set is gathered, which can take long."""
    for name, spec in recipe.references.items():
        if spec.seq_len and spec.seq_len > context and not recipe.attribution.truncate:
            raise UserError(
                f"references.{name}.seq_len {spec.seq_len} is more than the model's context of {context} "
                f"tokens; give {context} or less, or attribution.truncate true"
            )


def _check_selection(recipe: CorrectRecipe, sites: list[Site]) -> None:
    options, selection = recipe.attribution, recipe.selection
    for method in _scoring_methods(recipe):
        settings_for(Settings.from_options(options.copy_with(method=method)), options.sites)
    _check_groups("selection.scope", selection.scope, options.unit, sites)
    if "matched" in recipe.references and selection.scope not in ("global", "site"):
        raise UserError(
            f"selection.scope {selection.scope} takes the same number from every row, and a contrast with "
            "references.matched has candidates only where it is below zero; use scope global or site"
        )
    units = [units_in(site, options.unit) for site in sites]
    limit, place = sum(units), "in all"
    if selection.scope == "site":
        limit, place = min(units), "in the smallest site"
    elif selection.scope == "row":
        limit, place = min(site.inp for site in sites), "in the shortest row"
    counts = {
        "selection.count": [selection.count or 0],
        "selection.tune.counts": selection.tune.counts if selection.tune else (),
        "compare.counts": recipe.compare.counts,
    }
    for key, values in counts.items():
        for count in values:
            if not 0 <= count <= limit:
                raise UserError(
                    f"{key} is {count}, but there are {limit} {options.unit}s {place}; choose a number up to "
                    "that"
                )


def _check_groups(key: str, scope: str, unit: str, sites: Iterable[Site]) -> None:
    groups = parse_scope(scope)
    if (groups or scope == "row") and unit != "weight":
        raise UserError(f"{key} {scope} is for weights, and attribution.unit is {unit}; use global or site")
    for site in sites:
        if groups and site.inp % groups[1]:
            raise UserError(
                f"{key} {scope} does not divide the rows of {site.name}, which have {site.inp} inputs; "
                "choose another scope, or other sites"
            )


def _scoring_methods(recipe: Recipe) -> list[str]:
    """The methods that `attribute` runs."""
    if isinstance(recipe, CorrectRecipe):
        methods = (recipe.attribution.method, *recipe.compare.methods)
    elif isinstance(recipe, DiscoverRecipe):
        methods = recipe.discover.methods
    else:
        methods = recipe.compress.methods
    return [
        method
        for method in dict.fromkeys(methods)
        if method not in EXPERTISE_METHODS and method != SEQUENTIAL
    ]


def check_samples(
    recipe: Recipe,
    references: Mapping[str, ReferenceSet],
    metrics: Iterable[tuple[str, MetricSettings, ReferenceSet]],
    limits: Limits,
) -> None:
    """Raise UserError if a sample lacks what its target needs, or does not fit the model; the message names
    set, sample and key.

    Args:
        references: by their names in the run: general, or task.0.
        metrics: (name for messages, settings, samples) of each.
    """
    for name, samples in references.items():
        for key, target in _targets(recipe, name, samples):
            with _name_place(f"references.{name}, {key} {target}"):
                _check_reference(recipe, samples, target, limits)
    for name, settings, samples in metrics:
        with _name_place(name):
            _check_metric(settings, samples, limits)


def _targets(recipe: Recipe, name: str, samples: ReferenceSet) -> Iterator[tuple[str, str]]:
    """(recipe key, target) for each target of a set."""
    spec, tune = recipe.references[name.partition(".")[0]], recipe.tune
    if not any(require_method(method).targeted for method in _scoring_methods(recipe)):
        yield "method's target", "predicted"  # methods that need only activations have no target
    elif spec.target:
        yield f"references.{name.partition('.')[0]}.target", spec.target
    elif tune and tune.targets:
        completed = all(sample.completion is not None for sample in samples)
        for target in tune.targets:
            yield "selection.tune.targets", target_for_set(target, completed)
    else:
        yield "attribution.target", recipe.attribution.target


def _check_reference(recipe: Recipe, samples: ReferenceSet, target: str, limits: Limits) -> None:
    options = recipe.attribution
    encoded = encode(
        samples,
        limits.tokenizer,
        target,
        context=limits.context,
        vocabulary=limits.vocabulary,
        truncate=options.truncate,
        # A plan does not find a scorer's words, so any token stands in for them.
        words=(0,) if isinstance(options.words, WordsBy) else options.words,
    )
    for sample in encoded:
        if len(sample.ids) <= options.skip_positions:
            raise UserError(
                f"{samples.where(sample.index)} has {len(sample.ids)} tokens, so attribution.skip_positions "
                f"{options.skip_positions} leaves none; skip fewer"
            )


def _check_metric(settings: Any, samples: ReferenceSet, limits: Limits) -> None:
    if isinstance(settings, IOISettings):
        encode(samples, limits.tokenizer, "contrast", context=limits.context, vocabulary=limits.vocabulary)
    elif isinstance(settings, PerplexitySettings):
        for ids, _ in make_windows(samples, limits.tokenizer, settings, limits.context):
            _check_vocabulary(ids, limits, "the text")
    elif isinstance(settings, PromptSettings):
        for index, sample in enumerate(samples):
            ids, name = read_sample(sample, limits.tokenizer).prompt, samples.where(index)
            if not ids:
                raise UserError(f"{name} has no tokens with this tokenizer; leave it out")
            _check_vocabulary(ids, limits, name)
            if len(ids) + settings.max_new_tokens > limits.context:
                raise UserError(
                    f"{name} has {len(ids)} tokens, which with max_new_tokens {settings.max_new_tokens} "
                    f"exceed the model's context of {limits.context}; shorten it, or lower max_new_tokens"
                )


def _check_vocabulary(ids: Iterable[int], limits: Limits, name: str) -> None:
    if (largest := max(ids)) >= limits.vocabulary:
        raise UserError(
            f"{name} has token id {largest}, but the model knows ids below {limits.vocabulary}; use its own "
            "tokenizer"
        )


@contextmanager
def _name_place(place: str) -> Iterator[None]:
    """Inside, the message of a UserError gets the place as its prefix."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
