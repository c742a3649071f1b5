"""`evaluate`: metrics on a model, and on variants of it, over the same samples."""

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..files import fingerprint
from ..models import describe
from ..results import Difference, Results
from ..samples import ReferenceSet, Request, Sample, corpus, gather
from ..version import __version__
from .metrics import IOISettings, MetricSettings, Prepared, PromptSettings, SampledSettings, ToxicitySettings, parse_metrics, require_metric
from .observations import Evaluation, Observations
from .statistics import difference, measurement
from .toxicity import completion_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    metrics: "Mapping[str, Any] | Iterable[str]",
    *,
    variants: Mapping[str, AbstractContextManager[Any]] | None = None,
    progress: bool = False,
) -> Results:
    """Measure the model, and each variant of it, on the same samples.

    Args:
        metrics: metric → settings as in a recipe's `evaluation` section ({"perplexity": {"source": "wiki.txt"}}), or names, for
            the settings' defaults.
        variants: name → the context inside which the model is that variant: {"ablated": ablated(model, circuit)}.

    Returns:
        Results of "original" and of each variant, with the paired differences of each variant from "original".

    Raises:
        UserError: an unknown metric, key or source, or samples that do not fit.
    """
    asked = {metrics: None} if isinstance(metrics, str) else dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics)
    prepared = [prepare(name, settings, model, tokenizer) for name, settings in parse_metrics(asked).items()]
    before = describe(model)
    evaluations = [measure(model, tokenizer, prepared, "original", progress=progress)]
    for name, variant in (variants or {}).items():
        with variant:
            evaluations.append(measure(model, tokenizer, prepared, name, progress=progress))
    return to_results(evaluations, {"model": before, **evaluated_on(prepared), "version": __version__})


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
    if metric.ready:
        metric.ready(settings)
    if not isinstance(settings, SampledSettings):
        return Prepared(metric, settings, ReferenceSet(()))
    if not metric.prompts:
        texts = corpus(settings.source, settings.split, settings.count)
        return Prepared(metric, settings, ReferenceSet(tuple(Sample(text=text) for text in texts), {"source": settings.source}))
    seed = settings.seed if isinstance(settings, PromptSettings | IOISettings) else 0
    held = (taken or {}).get(settings.source, frozenset())
    request = Request(settings.source, settings.count or 100, settings.split, seeds=(seed,), taken=held)
    if isinstance(settings, PromptSettings):
        request = replace(request, choose_by=settings.choose_by, min_toxicity=settings.min_toxicity, max_toxicity=settings.max_toxicity)
    score = completion_scores(model, tokenizer, settings) if isinstance(settings, ToxicitySettings) else None
    return Prepared(metric, settings, gather(request, tokenizer, score))


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prepared: list[Prepared],
    variant: str,
    made_from: str = "",
    progress: bool = False,
) -> Evaluation:
    """All metrics on the model as it is now, under the name `variant`."""
    began = time.perf_counter()
    observations: list[Observations] = []
    texts = {}
    for metric in prepared:
        measured = metric.measure(model, tokenizer, progress)
        observations += measured.observations
        if measured.texts:
            texts[metric.metric.name] = measured.texts
    return Evaluation(variant, tuple(observations), texts, made_from, time.perf_counter() - began)


def evaluated_on(prepared: list[Prepared]) -> dict[str, Any]:
    """Settings and sample fingerprints of the metrics, for a provenance."""
    return {
        "metrics": {p.metric.name: p.settings.model_dump() for p in prepared},
        "samples": {p.metric.name: p.samples.fingerprint for p in prepared},
    }


def fingerprint_of(prepared: list[Prepared]) -> str:
    """Names what would be measured: metrics, settings, samples."""
    return fingerprint(evaluated_on(prepared))


def to_results(evaluations: list[Evaluation], provenance: dict[str, Any]) -> Results:
    """Figures with intervals of every variant, and each one's difference from the first."""
    first, *others = evaluations
    measurements = [measurement(o, e.variant) for e in evaluations for o in e.observations]
    differences: list[Difference] = []
    for evaluation in others:
        known = {o.metric: o for o in evaluation.observations}
        pairs = [(o, known[o.metric]) for o in first.observations if o.metric in known]
        found = [difference(one, other, first.variant, evaluation.variant) for one, other in pairs]
        differences += [d for d in found if d is not None]
    return Results(tuple(measurements), tuple(differences), provenance)
