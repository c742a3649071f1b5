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
"""Returns a context manager inside which the model is a variant."""


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
        variants: name → a context manager inside which the model is that variant: {"ablated": ablated(model,
            circuit)}. Metrics that compare with the original (kl, fluency) enter it several times, and need a
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
        changed = _require_factory(variant, name, prepared)
        evaluations.append(measure(model, tokenizer, prepared, name, progress=progress, changed=changed))
    return make_results(evaluations, {"model": before, **describe_samples(prepared), "version": __version__})


def check_metrics(metrics: Mapping[str, MetricSettings]) -> None:
    """Raise UserError if a metric's scorer or package is missing."""
    for name, settings in metrics.items():
        if check := require_metric(name).ready:
            check(settings)


def _require_factory(
    variant: "AbstractContextManager[Any] | Changed", name: str, prepared: list[Prepared]
) -> Changed:
    """The variant as a function that returns its context manager. Raises UserError if a metric enters it
    several times, but it can be entered only once."""
    if not isinstance(variant, AbstractContextManager):
        return variant
    if comparing := [p.metric.name for p in prepared if p.metric.compares]:
        raise UserError(
            f"metric {comparing[0]} enters a variant more than once; pass variant '{name}' as a function "
            "that returns its context"
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
        taken: source → its prompts in this run's reference sets, which are left out.
    """
    metric = require_metric(name)
    if not isinstance(settings, SampledSettings):
        return Prepared(metric, settings, ReferenceSet(()))
    if not metric.prompts:
        texts = corpus(settings.source, settings.split, settings.count, settings.column)
        samples = ReferenceSet(tuple(Sample(text=text) for text in texts), {"source": settings.source})
        return Prepared(metric, settings, samples)
    taken_prompts = (taken or {}).get(settings.source, frozenset())
    seeds = (getattr(settings, "seed", 0),)
    request = request_for(settings, taken_prompts, count=settings.count or 100, seeds=seeds)
    score = None
    if isinstance(settings, ToxicitySettings):
        score = completion_scores(model, tokenizer, settings)
    elif isinstance(settings, RepetitionSettings):
        score = response_scores(model, tokenizer, settings.max_new_tokens)
    samples = gather(request, tokenizer, score)
    trailing_spaces = sum(sample.turns is None and (sample.text or "").endswith(" ") for sample in samples)
    if trailing_spaces and isinstance(settings, PromptSettings) and distributed.is_main():
        log.warning(
            "%d of the %d prompts of %s end with a space. Most tokenizers put it into the next token, so the "
            "model continues such prompts badly; remove it",
            trailing_spaces,
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
    """All metrics on one variant of the model, in the given order.

    Args:
        variant: its name.
        changed: returns the context manager inside which the model is the variant; None for the unchanged
            model.
    """
    start = time.perf_counter()
    by_metric: dict[str, tuple[Observations, ...]] = {}
    texts: dict[str, list[dict[str, Any]]] = {}
    with changed() if changed else nullcontext():
        for item in (p for p in prepared if not p.metric.compares):
            measured = item.measure(model, tokenizer, progress)
            by_metric[item.metric.name] = measured.observations
            texts |= {item.metric.name: measured.texts} if measured.texts else {}
    # The comparing metrics run outside of the variant, because they need the original too; they enter the
    # variant through the context.
    splits = {p.metric.name: getattr(p.settings, "split", "test") for p in prepared}
    context = MetricContext(changed, texts, splits, {p.metric.name: p.samples for p in prepared})
    for item in (p for p in prepared if p.metric.compares):
        by_metric[item.metric.name] = item.measure(model, tokenizer, progress, context).observations
    observations = tuple(o for item in prepared for o in by_metric[item.metric.name])
    for o in observations:
        if o.failures and distributed.is_main():
            n = len(o.sums) - o.sums.count(None)
            message = "%s of %s: %d failures, excluded from the mean (n = %d)"
            log.warning(message, o.metric, variant, o.failures, n)
    return Evaluation(variant, observations, texts, made_from, time.perf_counter() - start)


def describe_samples(prepared: list[Prepared]) -> dict[str, Any]:
    """Settings and sample fingerprints of the metrics, for the provenance."""
    return {
        "metrics": {p.metric.name: p.settings.describe() for p in prepared},
        "samples": {p.metric.name: p.samples.fingerprint for p in prepared},
    }


def fingerprint_samples(prepared: list[Prepared]) -> str:
    """Identifies what would be measured: metrics, settings, samples."""
    return fingerprint(describe_samples(prepared))


def make_results(
    evaluations: list[Evaluation], provenance: dict[str, Any], baselines: Iterable[str] = ()
) -> Results:
    """Figures with intervals of every variant, and the difference of each from the first.

    Args:
        baselines: further variants to compare "ablated" with; with random units, the difference is the effect
            net of the null.
    """
    first, *others = evaluations
    measurements = tuple(measurement(o, e.variant) for e in evaluations for o in e.observations)
    by_variant = {e.variant: e for e in evaluations}
    pairs = [(first, second_evaluation) for second_evaluation in others]
    if ablated := by_variant.get("ablated"):
        pairs += [(by_variant[name], ablated) for name in dict.fromkeys(baselines) if name in by_variant]
    differences = (
        difference(a, b, first_evaluation.variant, second_evaluation.variant)
        for first_evaluation, second_evaluation in pairs
        for a in first_evaluation.observations
        for b in second_evaluation.observations
        if a.metric == b.metric
    )
    return Results(measurements, tuple(d for d in differences if d is not None), provenance)
