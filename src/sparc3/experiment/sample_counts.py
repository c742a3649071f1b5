"""How many reference samples a pruning needs: the job `compress` again, from the first n samples of each
seed's set (the paper's Figures 8 to 10)."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, distributed
from ..attribution.attribute import attribute
from ..circuits.circuit import Circuit
from ..circuits.select import select
from ..errors import DamagedFile
from ..evaluation.evaluate import fingerprint_of, measure
from ..evaluation.statistics import Evaluation, measurement, pool
from ..models.sites import sites_of
from ..results import SampleRow, Variant
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from ..storage import fingerprint, read_json, write_json
from .run_folder import RunContext, load_or_make
from .sizes import count_selected
from .variants import apply_intervention

log = logging.getLogger("sparc3")
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
