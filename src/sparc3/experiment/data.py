"""The samples stage: reference sets and test samples, no prompt in both."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.evaluate import prepare
from ..evaluation.metrics import MetricSettings, Prepared, SampledSettings, ToxicitySettings, require_metric
from ..evaluation.repetition import response_scores
from ..evaluation.toxicity import completion_scores
from ..files import file_digest, fingerprint
from ..recipe import Reference
from ..samples import ReferenceSet
from ..sources import Request, gather, is_path, overlap
from ..version import __version__
from .folder import kept
from .steps import sets
from .work import Work

log = logging.getLogger("sparc3")


def gather_all(work: Work) -> None:
    """Fill work.references and work.prepared. Raises UserError where they share a prompt."""
    for name, spec in sets(work.recipe):
        work.references[name] = _reference(work, name, spec)
    for name, settings in work.recipe.metrics().items():
        held = work.held(work.references, settings.source) if isinstance(settings, SampledSettings) else frozenset()
        work.prepared.append(prepared(work, f"evaluation-{name}", name, settings, held))
    _refuse_overlap(work)


def _reference(work: Work, name: str, spec: Reference) -> ReferenceSet:
    # Of two sets of one source, the later gets what is left.
    taken = work.held(work.references, spec.source) if work.recipe.job == "correct" else frozenset()
    request = Request(
        spec.source, spec.count, spec.split, spec.seq_len, spec.seeds, spec.choose_by, spec.min_toxicity, spec.max_toxicity,
        spec.max_rur, taken,
    )
    settings = ToxicitySettings(scorer=spec.scorer, max_new_tokens=spec.max_new_tokens, source=spec.source)
    asked = {"spec": spec.model_dump(), "taken": sorted(request.taken)}
    if spec.choose_by == "repetition":
        score = response_scores(work.model, work.tokenizer, spec.max_new_tokens)
    else:
        score = completion_scores(work.model, work.tokenizer, settings)
    return _samples(work, name, asked, spec.source, lambda: gather(request, work.tokenizer, score))


def prepared(work: Work, file: str, name: str, settings: MetricSettings, held: Iterable[str]) -> Prepared:
    """A metric with its samples, kept as samples/`file`.jsonl; of its source, the prompts in `held` are left out."""
    if not isinstance(settings, SampledSettings):
        return prepare(name, settings, work.model, work.tokenizer)
    taken = {settings.source: frozenset(held)}
    asked = {"metric": name, "settings": settings.model_dump(), "taken": sorted(taken[settings.source])}
    samples = _samples(work, file, asked, settings.source, lambda: prepare(name, settings, work.model, work.tokenizer, taken).samples)
    return Prepared(require_metric(name), settings, samples)


def _samples(work: Work, name: str, asked: dict[str, Any], source: str, make: Callable[[], ReferenceSet]) -> ReferenceSet:
    digest = file_digest(source) if is_path(source) else None
    made_from = fingerprint({**asked, "file": digest, "model": work.described["fingerprint"], "version": __version__})
    where = work.folder / f"samples/{name}.jsonl"
    found = kept(where, made_from, ReferenceSet.load, lambda s: s.source.get("made_from"), lambda: marked(make(), made_from))
    log.info("samples %s: %d from %s", name, len(found), Path(source).name)
    if found.repeated:
        work.warnings.append(f"{found.repeated} of the {len(found)} samples of {name} are the same as an earlier one, and count again")
        log.warning(work.warnings[-1])
    return found


def marked(samples: ReferenceSet, made_from: str) -> ReferenceSet:
    return ReferenceSet(samples.samples, {**samples.source, "made_from": made_from})


def _refuse_overlap(work: Work) -> None:
    for one in (p for p in work.prepared if p.metric.prompts):
        for name, reference in work.references.items():
            if same := overlap(reference, one.samples):
                raise UserError(
                    f"{len(same)} prompts of evaluation.{one.metric.name} are also in references.{name}; an effect must be shown on prompts "
                    "that were not used to find the circuit: give another file, or a split or choose_by that keeps them apart"
                )
