"""The samples stage: reference sets and test samples, no prompt in both."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..evaluation.evaluate import prepare
from ..evaluation.metrics import MetricSettings, Prepared, SampledSettings, ToxicitySettings, require_metric
from ..evaluation.tasks import response_scores
from ..evaluation.toxicity import completion_scores
from ..recipe.sections import Reference
from ..samples.reference_set import ReferenceSet
from ..samples.sources import gather, is_path, overlap, request_for
from ..storage import file_digest, fingerprint
from .run_folder import RunContext, load_or_make
from .work_list import reference_sets

log = logging.getLogger("sparc3")


def gather_all(work: RunContext) -> None:
    """Fill work.references and work.prepared. Raises UserError where they share a prompt."""
    for name, spec in reference_sets(work.recipe):
        work.references[name] = _load_or_make_reference(work, name, spec)
    for name, settings in work.recipe.metrics().items():
        held = (
            work.held(work.references, settings.source)
            if isinstance(settings, SampledSettings)
            else frozenset()
        )
        work.prepared.append(prepare_metric(work, f"evaluation-{name}", name, settings, held))
    _refuse_overlap(work)


def _load_or_make_reference(work: RunContext, name: str, spec: Reference) -> ReferenceSet:
    # Of two sets of one source, the later gets what is left.
    taken = work.held(work.references, spec.source) if work.recipe.job == "correct" else frozenset()
    request = request_for(spec, taken)
    settings = ToxicitySettings(scorer=spec.scorer, max_new_tokens=spec.max_new_tokens, source=spec.source)
    asked = {"spec": spec.model_dump(exclude={"target"}), "taken": sorted(request.taken)}
    if spec.choose_by == "repetition":
        score = response_scores(work.model, work.tokenizer, spec.max_new_tokens, work.progress)
    else:
        score = completion_scores(work.model, work.tokenizer, settings, work.progress)
    return _samples(work, name, asked, spec.source, lambda: gather(request, work.tokenizer, score))


def prepare_metric(
    work: RunContext, file: str, name: str, settings: MetricSettings, held: Iterable[str]
) -> Prepared:
    """A metric with its samples, kept as samples/`file`.jsonl; of its source, the prompts in `held` are left
    out."""
    if not isinstance(settings, SampledSettings):
        return prepare(name, settings, work.model, work.tokenizer)
    taken = {settings.source: frozenset(held)}
    asked = {"metric": name, "settings": settings.model_dump(), "taken": sorted(taken[settings.source])}
    samples = _samples(
        work,
        file,
        asked,
        settings.source,
        lambda: prepare(name, settings, work.model, work.tokenizer, taken).samples,
    )
    return Prepared(require_metric(name), settings, samples)


def _samples(
    work: RunContext, name: str, asked: dict[str, Any], source: str, make: Callable[[], ReferenceSet]
) -> ReferenceSet:
    digest = file_digest(source) if is_path(source) else None
    made_from = fingerprint({**asked, "file": digest, "model": work.fingerprint, "version": __version__})
    found = load_or_make(
        work,
        f"samples/{name}.jsonl",
        made_from,
        ReferenceSet.load,
        lambda s: s.source.get("made_from"),
        lambda: mark_targets(make(), made_from),
    )
    log.info("samples %s: %d from %s", name, len(found), Path(source).name)
    if found.repeated:
        work.warnings.append(
            f"{found.repeated} of the {len(found)} samples of {name} are the same as an earlier one, and "
            "count again"
        )
        log.warning(work.warnings[-1])
    return found


def mark_targets(samples: ReferenceSet, made_from: str) -> ReferenceSet:
    return replace(samples, source={**samples.source, "made_from": made_from})


def _refuse_overlap(work: RunContext) -> None:
    for one in (p for p in work.prepared if p.metric.prompts):
        for name, reference in work.references.items():
            if same := overlap(reference, one.samples):
                raise UserError(
                    f"{len(same)} prompts of evaluation.{one.metric.name} are also in references.{name}; an "
                    "effect must be shown on prompts that were not used to find the circuit: give another "
                    "file, or a split or choose_by that keeps them apart"
                )
