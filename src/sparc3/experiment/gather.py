"""The samples stage: reference sets and test samples, no prompt in both."""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__, distributed
from ..attribution.attribute import attribute
from ..circuits.circuit import Circuit
from ..circuits.select import select
from ..errors import DamagedFile, UserError
from ..evaluation.evaluate import fingerprint_of, measure, prepare
from ..evaluation.metrics import MetricSettings, Prepared, SampledSettings, ToxicitySettings, require_metric
from ..evaluation.statistics import Evaluation, measurement, pool
from ..evaluation.tasks import response_scores
from ..evaluation.toxicity import completion_scores
from ..models.sites import sites_of
from ..recipe.sections import Reference
from ..results import SampleRow, Variant
from ..samples.reference_set import ReferenceSet
from ..samples.sources import Request, gather, is_path, overlap
from ..scores import Scores
from ..storage import file_digest, fingerprint, read_json, write_json
from .run_folder import RunContext, load_or_make
from .sizes import count_selected
from .variants import apply_intervention
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


def request_for(spec: Reference, taken: frozenset[str] = frozenset()) -> Request:
    """What a reference set asks of its source; `taken` are prompts that it must not hold."""
    return Request(
        spec.source,
        spec.count,
        spec.split,
        spec.seq_len,
        spec.seeds,
        spec.choose_by,
        spec.min_toxicity,
        spec.max_toxicity,
        spec.max_rur,
        spec.column,
        taken,
    )


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
                    "effect must be shown on prompts "
                    "that were not used to find the circuit: give another file, or a split or choose_by that "
                    "keeps them apart"
                )


# How many reference samples a pruning needs: the job `compress` again, from the first n samples of each
# seed's set (the paper's Figures 8 to 10).

FORMAT = "sparc3.distribution/1"
DECADES, BINS = 6, 48
"""Scores are counted by their size as a share of the method's largest, from 10⁻⁶ to 1, in steps of an eighth
of a power of ten."""


def by_samples(
    work: RunContext, ways: Sequence[tuple[str, str, str]]
) -> tuple[list[Evaluation], dict[str, Any]]:
    """(evaluations, what the report draws): every way (name, method, reduce) at every number of samples, the
    seeds' figures pooled.

    At the largest number the variant is called METHOD@COUNT as in any compression, at the others "METHOD, n
    samples".
    """
    assert work.recipe.job == "compress"
    compress = work.recipe.compress
    fraction = compress.fractions[0] if compress.fractions else None
    removed = count_selected(
        compress.scope, "weight", sites_of(work.model, work.recipe.attribution.sites), fraction=fraction
    )
    rows: list[SampleRow] = []
    drawn: dict[str, Any] = {}
    evaluations = []
    for name, method, reduce in ways:
        for count in sorted(compress.samples):
            variant = (
                str(Variant(name, removed))
                if count == max(compress.samples)
                else f"{name}, {count} sample{'s' * (count > 1)}"
            )
            draws = []
            for seed, samples in enumerate(work.references.values()):
                first = ReferenceSet(samples.samples[:count], samples.source)
                scored = functools.cache(functools.partial(_scores, work, method, reduce, first))
                if count == max(compress.samples) and seed == 0:
                    drawn[name] = _distribution(work, name, first, method, reduce, scored)
                draws.append(_evaluate(work, f"{name}-{count}.seed{seed}", first, method, reduce, scored))
                rows += _rows(draws[-1], name, count, seed)
                scored.cache_clear()
            evaluations.append(
                Evaluation(
                    variant,
                    tuple(
                        pool(list(column)) for column in zip(*(d.observations for d in draws), strict=True)
                    ),
                )
            )
    return evaluations, {"by_samples": rows, "distributions": drawn}


def _rows(evaluation: Evaluation, method: str, count: int, seed: int) -> list[SampleRow]:
    return [
        SampleRow(method, count, seed, m.metric, m.value)
        for m in (measurement(o, "") for o in evaluation.observations)
        if not m.metric.startswith("sparsity")
    ]


def _made_from(work: RunContext, samples: ReferenceSet, method: str, reduce: str) -> dict[str, Any]:
    asked = work.recipe.attribution.model_dump(exclude={"method", "reduce", "batch_tokens"})
    how = [method, reduce, _target(work), asked]
    return {"samples": samples.fingerprint, "model": work.fingerprint, "how": how, "version": __version__}


def _target(work: RunContext) -> str:
    return work.recipe.references["general"].target or work.recipe.attribution.target


def _scores(work: RunContext, method: str, reduce: str, samples: ReferenceSet) -> Scores:
    options = work.recipe.attribution.but(method=method, target=_target(work), reduce=reduce)
    return attribute(
        work.model,
        samples,
        tokenizer=work.tokenizer,
        **options.model_dump(),
        progress=work.progress,
        partial=work.folder / "scores/samples.partial",
    )


def _evaluate(
    work: RunContext, place: str, samples: ReferenceSet, method: str, reduce: str, scored: Any
) -> Evaluation:
    """The model pruned by these scores, measured; the scores themselves, as large as the model, are not
    kept."""
    assert work.recipe.job == "compress"
    compress = work.recipe.compress
    fraction = compress.fractions[0] if compress.fractions else None
    made_from = fingerprint(
        {
            **_made_from(work, samples, method, reduce),
            "fraction": fraction,
            "scope": compress.scope,
            "on": fingerprint_of(work.prepared),
        }
    )

    def make() -> Evaluation:
        circuit: Circuit = select(scored(), fraction=fraction, scope=compress.scope)
        made = measure(
            work.model,
            work.tokenizer,
            work.prepared,
            place,
            made_from,
            work.progress,
            lambda: apply_intervention(work, circuit),
        )
        log.info("evaluated %s in %.1f s", place, made.seconds)
        return made

    return load_or_make(
        work, f"evaluation/{place}.json", made_from, Evaluation.load, lambda e: e.made_from, make
    )


def _distribution(
    work: RunContext, name: str, samples: ReferenceSet, method: str, reduce: str, scored: Any
) -> dict[str, Any]:
    """What the report draws of distributions/NAME.json, which is made unless it is there: role → how many
    scores are in each bin."""
    where, made_from = (
        work.claim(f"distributions/{name}.json"),
        fingerprint(_made_from(work, samples, method, reduce)),
    )
    found = _read(where, made_from)
    if distributed.first(found is None):
        found = {
            "format": FORMAT,
            "made_from": made_from,
            "method": name,
            "samples": len(samples),
            **distribution(scored()),
        }
        if distributed.is_main():
            write_json(where, found)
        distributed.wait()
    assert found is not None
    roles = {site.name: site.role for site in sites_of(work.model, work.recipe.attribution.sites)}
    counted: dict[str, list[int]] = {}
    for site, counts in found["sites"].items():
        held = counted.setdefault(roles[site], [0] * len(counts))
        counted[roles[site]] = [a + b for a, b in zip(held, counts, strict=True)]
    return {"samples": found["samples"], "exponents": found["exponents"], "roles": counted}


def _read(where: Path, made_from: str) -> dict[str, Any] | None:
    try:
        found = read_json(where, FORMAT) if where.is_file() else None
    except DamagedFile as error:
        log.warning("%s; making it again", error)
        return None
    return found if found and found.get("made_from") == made_from else None


def distribution(scores: Scores) -> dict[str, Any]:
    """{"largest", "exponents", "sites"}: of each site, how many |scores| are below 10⁻⁶ of the largest of
    all, and how many in each bin above.

    The bins lie between the exponents of ten: the first count of a site is of what is below the first
    exponent, zeros among it.
    """
    largest = max(float(tensor.abs().max()) for tensor in scores.values()) or 1.0
    sites = {}
    for name, tensor in scores.items():
        counts = torch.zeros(BINS, dtype=torch.float64)
        for piece in tensor.flatten().split(2**24):
            counts += torch.histc(
                (piece.abs() / largest).log10().clamp_(max=0.0), bins=BINS, min=-DECADES, max=0.0
            ).double()
        inside = [int(count) for count in counts]
        sites[name] = [tensor.numel() - sum(inside), *inside]
    exponents = [-DECADES + DECADES * edge / BINS for edge in range(BINS + 1)]
    return {"largest": largest, "exponents": exponents, "sites": sites}
