"""`evaluate`: metrics on a model, and on variants of it, over the same samples."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import __version__, distributed
from ..errors import UserError
from ..models.fingerprint import describe
from ..results import Results
from ..samples.reference_set import ReferenceSet, Sample
from ..samples.sources import corpus, gather, request_for
from ..storage import fingerprint
from .metrics import (
    MetricContext,
    MetricSettings,
    Prepared,
    PromptSettings,
    RepetitionSettings,
    SampledSettings,
    ToxicitySettings,
    parse_metrics,
    require_metric,
)
from .statistics import Evaluation, Observations, difference, measurement
from .tasks import response_scores
from .toxicity import completion_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")
Changed = Callable[[], AbstractContextManager[Any]]
"""Gives a context inside which the model is a variant of itself."""


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    metrics: "Mapping[str, Any] | Iterable[str]",
    *,
    variants: "Mapping[str, AbstractContextManager[Any] | Changed] | None" = None,
    progress: bool = False,
) -> Results:
    """Measure the model, and each variant of it, on the same samples.

    Args:
        metrics: metric → settings as in a recipe's `evaluation` section ({"perplexity": {"source":
            "wiki.txt"}}), or names, for the settings' defaults.
        variants: name → the context inside which the model is that variant: {"ablated": ablated(model,
            circuit)}. Metrics that compare with the original (kl, fluency) go in and out of it, and need a
            function: {"ablated": lambda: ablated(model, circuit)}.

    Returns:
        Results of "original" and of each variant, with the paired differences of each variant from
        "original".

    Raises:
        UserError: an unknown metric, key or source, or samples that do not fit.
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    settings_by_name = parse_metrics(dict(names) if isinstance(names, Mapping) else dict.fromkeys(names))
    check_metrics(settings_by_name)
    prepared = [prepare(name, settings, model, tokenizer) for name, settings in settings_by_name.items()]
    before = describe(model)
    evaluations = [measure(model, tokenizer, prepared, "original", progress=progress)]
    for name, variant in (variants or {}).items():
        changed = _again(variant, name, prepared)
        evaluations.append(measure(model, tokenizer, prepared, name, progress=progress, changed=changed))
    return to_results(evaluations, {"model": before, **evaluated_on(prepared), "version": __version__})


def check_metrics(metrics: Mapping[str, MetricSettings]) -> None:
    """Raise UserError if a metric's scorer or package is missing."""
    for name, settings in metrics.items():
        if check := require_metric(name).ready:
            check(settings)


def _again(variant: "AbstractContextManager[Any] | Changed", name: str, prepared: list[Prepared]) -> Changed:
    """The variant as a function that gives its context. Raises UserError where a metric needs it twice and it
    can be entered once."""
    if not isinstance(variant, AbstractContextManager):
        return variant
    if again := [p.metric.name for p in prepared if p.metric.compares]:
        raise UserError(
            f"metric {again[0]} enters a variant more than once; pass variant '{name}' as a function that "
            "returns its context"
        )
    return lambda: variant


def prepare(
    name: str,
    settings: MetricSettings,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    taken: Mapping[str, frozenset[str]] | None = None,
) -> Prepared:
    """Gather a metric's samples once, for all variants.

    Args:
        taken: source → prompts that the reference sets of this run hold from it.
    """
    metric = require_metric(name)
    if not isinstance(settings, SampledSettings):
        return Prepared(metric, settings, ReferenceSet(()))
    if not metric.prompts:
        texts = corpus(settings.source, settings.split, settings.count, settings.column)
        samples = ReferenceSet(tuple(Sample(text=text) for text in texts), {"source": settings.source})
        return Prepared(metric, settings, samples)
    held = (taken or {}).get(settings.source, frozenset())
    seeds = (getattr(settings, "seed", 0),)
    request = request_for(settings, held, count=settings.count or 100, seeds=seeds)
    score = None
    if isinstance(settings, ToxicitySettings):
        score = completion_scores(model, tokenizer, settings)
    elif isinstance(settings, RepetitionSettings):
        score = response_scores(model, tokenizer, settings.max_new_tokens)
    samples = gather(request, tokenizer, score)
    ends = sum(sample.turns is None and (sample.text or "").endswith(" ") for sample in samples)
    if ends and isinstance(settings, PromptSettings) and distributed.is_main():
        log.warning(
            "%d of the %d prompts of %s end with a space, which most tokenizers have in the next token, "
            "so that the model goes on oddly; leave it out",
            ends,
            len(samples),
            name,
        )
    return Prepared(metric, settings, samples)


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prepared: list[Prepared],
    variant: str,
    made_from: str = "",
    progress: bool = False,
    changed: Changed | None = None,
) -> Evaluation:
    """All metrics on one variant of the model, in the order they are given.

    Args:
        variant: its name.
        changed: gives the context inside which the model is the variant; None where the variant is the model
            as it is.
    """
    began = time.perf_counter()
    observed: dict[str, tuple[Observations, ...]] = {}
    texts: dict[str, list[dict[str, Any]]] = {}
    with changed() if changed else nullcontext():
        for one in (p for p in prepared if not p.metric.compares):
            measured = one.measure(model, tokenizer, progress)
            observed[one.metric.name] = measured.observations
            texts |= {one.metric.name: measured.texts} if measured.texts else {}
    splits = {p.metric.name: getattr(p.settings, "split", "test") for p in prepared}
    beside = MetricContext(changed, texts, splits, {p.metric.name: p.samples for p in prepared})
    for one in (p for p in prepared if p.metric.compares):
        observed[one.metric.name] = one.measure(model, tokenizer, progress, beside).observations
    observations = tuple(o for one in prepared for o in observed[one.metric.name])
    for o in observations:
        if o.failures and distributed.is_main():
            n = len(o.sums) - o.sums.count(None)
            said = "%s of %s: %d failures, excluded from the mean (n = %d)"
            log.warning(said, o.metric, variant, o.failures, n)
    return Evaluation(variant, observations, texts, made_from, time.perf_counter() - began)


def evaluated_on(prepared: list[Prepared]) -> dict[str, Any]:
    """Settings and sample fingerprints of the metrics, for a provenance."""
    return {
        "metrics": {p.metric.name: p.settings.described() for p in prepared},
        "samples": {p.metric.name: p.samples.fingerprint for p in prepared},
    }


def fingerprint_of(prepared: list[Prepared]) -> str:
    """Names what would be measured: metrics, settings, samples."""
    return fingerprint(evaluated_on(prepared))


def to_results(
    evaluations: list[Evaluation], provenance: dict[str, Any], beside: Iterable[str] = ()
) -> Results:
    """Figures with intervals of every variant, and each one's difference from the first.

    Args:
        beside: variants from which the difference of "ablated" is taken too: from random units, it is the
            effect net of the null.
    """
    first, *others = evaluations
    measurements = tuple(measurement(o, e.variant) for e in evaluations for o in e.observations)
    named = {e.variant: e for e in evaluations}
    pairs = [(first, other) for other in others]
    if ablated := named.get("ablated"):
        pairs += [(named[name], ablated) for name in dict.fromkeys(beside) if name in named]
    differences = (
        difference(a, b, one.variant, other.variant)
        for one, other in pairs
        for a in one.observations
        for b in other.observations
        if a.metric == b.metric
    )
    return Results(measurements, tuple(d for d in differences if d is not None), provenance)
