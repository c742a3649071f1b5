"""The job `compress`: the least weights of every row go, by each method; what is left is counted in the matrices and measured."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attribution.methods import require_method
from ..circuit import Circuit
from ..compression import prune_sequentially
from ..errors import Sparc3Error
from ..evaluation.evaluate import evaluated_on, to_results
from ..evaluation.observations import Evaluation
from ..files import fingerprint
from ..jobs import SEQUENTIAL, Compress
from ..models import sites_of
from ..results import Results
from ..scores import Scores
from ..selection import parse_scope, select, share
from ..version import __version__
from .folder import kept
from .measuring import evaluation
from .sampling import by_samples
from .scoring import How, parts_of
from .steps import prunings
from .work import Work

log = logging.getLogger("sparc3")
Pruned = list[tuple[str, Path]]
"""Variant → where its circuit is: those of a large model are read one at a time."""


def settings(work: Work) -> Compress:
    assert work.recipe.compress is not None
    return work.recipe.compress


def pruned(work: Work) -> Pruned:
    """What each method removes at each fraction, saved as circuits/METHOD@COUNT.safetensors for `sparc3 ablate`."""
    found: Pruned = []
    for name, method, reduce in prunings(settings(work), sampled=False):
        for fraction in settings(work).fractions or (None,):
            where, circuit = _sequential(work, fraction) if method == SEQUENTIAL else _at_once(work, name, method, reduce, fraction)
            log.info("%s: %d weights in %d sites", name, len(circuit), len(circuit.members))
            found.append((f"{name}@{len(circuit)}", where))
    return found


def _at_once(work: Work, name: str, method: str, reduce: str, fraction: float | None) -> tuple[Path, Circuit]:
    scores = _scores(work, method, reduce)
    scope = settings(work).scope
    made_from = fingerprint({"scores": scores.fingerprint, "fraction": fraction, "scope": scope, "version": __version__})
    return _kept(work, name, fraction, made_from, lambda: select(scores, fraction=fraction, scope=scope))


def _scores(work: Work, method: str, reduce: str) -> Scores:
    asked = work.recipe.attribution.model_copy(update={"reduce": reduce})
    alike = replace(work, recipe=work.recipe.model_copy(update={"attribution": asked}))
    target = work.recipe.references["general"].target or asked.target
    place = f"{reduce}." if require_method(method).targeted else ""
    return parts_of(alike, How(method, asked.neuron, {"general": target}, 1.0, None), place=place)["general"]


def _sequential(work: Work, fraction: float | None) -> tuple[Path, Circuit]:
    asked, scope = work.recipe.attribution, settings(work).scope
    made_from = fingerprint(
        {"model": work.described["fingerprint"], "samples": work.references["general"].fingerprint, "sites": asked.sites, "fraction": fraction,
         "scope": scope, "truncate": asked.truncate, "version": __version__}
    )  # fmt: skip
    return _kept(work, SEQUENTIAL, fraction, made_from, lambda: prune_sequentially(
        work.model, work.references["general"], tokenizer=work.tokenizer, fraction=fraction, scope=scope, sites=asked.sites,
        truncate=asked.truncate, progress=work.progress,
    ))  # fmt: skip


def _kept(work: Work, name: str, fraction: float | None, made_from: str, make: Any) -> tuple[Path, Circuit]:
    size = settings(work).scope.replace(":", "of") if fraction is None else f"{fraction:g}"
    where = work.folder / f"circuits/{name}-{size}.safetensors"

    def marked() -> Circuit:
        made: Circuit = make()
        return replace(made, model=work.described, provenance={**made.provenance, "made_from": made_from})

    return where, kept(where, made_from, Circuit.load, lambda c: c.provenance.get("made_from"), marked)


def measured(work: Work, pruned: Pruned, seconds: Mapping[str, float]) -> Results:
    found = [evaluation(work, "original", Circuit("weight", {}, work.described))]
    checks = []
    sizes: dict[str, int] = {}
    for variant, where in pruned:
        circuit = Circuit.load(where)
        sizes = sizes or dict(circuit.provenance["sizes"])
        found.append(evaluation(work, variant, circuit))
        checks.append(_every_row(work, found[-1], circuit))
    by_number, drawn = by_samples(work, prunings(settings(work), sampled=True))
    sizes = sizes or {site.name: site.out * site.inp for site in sites_of(work.model, work.recipe.attribution.sites)}
    return to_results([*found, *by_number], {**_provenance(work, sizes, checks, seconds), **(drawn if by_number else {})})


def _every_row(work: Work, evaluation: Evaluation, circuit: Circuit) -> dict[str, Any]:
    """A check: the least and the most zeros of any row are what was asked for. Other scopes are told, not judged.

    Raises:
        Sparc3Error: a row has fewer zeros than it should, so the figures would be of another model than they say.
    """
    least, most = (_figure(evaluation, f"sparsity.row_{end}") for end in ("min", "max"))
    name, value = f"zeros in a row, {evaluation.variant}", f"{least:.4%} to {most:.4%}"
    groups, fraction = parse_scope(settings(work).scope), circuit.provenance["selection"].get("fraction")
    elsewhere = set(evaluated_on(work.prepared)["metrics"]["sparsity"]["sites"]) != set(work.recipe.attribution.sites)
    if elsewhere or (groups is None and settings(work).scope != "row"):
        return {"name": name, "value": value, "ok": None}
    columns = {mask.shape[1] for mask in circuit.members.values()}
    asked = {(groups[0] / groups[1]) if groups else share(fraction, width) / width for width in columns}
    if least < min(asked) - 1e-9:
        raise Sparc3Error(f"{evaluation.variant} has a row with {least:.4%} zeros where {min(asked):.4%} were to be removed; report this")
    return {"name": name, "value": value, "ok": most <= max(asked) + 1e-9}


def _figure(evaluation: Evaluation, metric: str) -> float:
    return float(next(o.sums[0] or 0.0 for o in evaluation.observations if o.metric == metric))


def _provenance(work: Work, sizes: dict[str, int], checks: list[dict[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    return {
        "recipe": work.recipe.name,
        "job": "compress",
        "made_from": work.recipe.fingerprint,
        "model": work.described,
        "method": work.recipe.attribution.method,
        "unit": "weight",
        "scope": settings(work).scope,
        "sizes": sizes,
        **evaluated_on(work.prepared),
        "checks": checks,
        "stages": [{"name": name, "seconds": took} for name, took in seconds.items()],
        "warnings": work.warnings,
        "version": __version__,
    }
