"""The job `compress`: the least weights of every row go, by each method; what is left is counted in the
matrices and measured."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from .. import __version__, distributed
from ..attribution.attribute import attribute
from ..attribution.methods import require_method
from ..attribution.options import AttributionOptions
from ..circuits.circuit import Circuit
from ..circuits.select import parse_scope, select, share_of
from ..errors import Sparc3Error
from ..evaluation.evaluate import to_results
from ..evaluation.metrics import SparsitySettings
from ..evaluation.statistics import Evaluation, measurement
from ..models.sites import Site, sites_of
from ..recipe.sections import SEQUENTIAL, Compress
from ..results import Check, Results, SampleRow, SeedFigures, Variant
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from ..storage import fingerprint, write_json
from .discover import measure_stability
from .measure import (
    add_verdict,
    compare_methods,
    describe_run,
    load_or_make_evaluation,
    measure_once,
    observe_stability,
    pool_draws,
    tell_seeds,
)
from .prune_sequentially import prune_sequentially
from .run_folder import RunContext, load_or_make, read_made
from .score import ScoringSpec, load_or_make_parts
from .work_list import count_selected, prunings_of, sets_pruned_by

log = logging.getLogger("sparc3")
Pruned = list[tuple[str, list[Path]]]
"""Variant → where its circuits are, one a seed where seeds are kept apart: those of a large model are read
one at a time."""


def settings(work: RunContext) -> Compress:
    assert work.recipe.job == "compress"
    return work.recipe.compress


def prune_by_all_methods(work: RunContext) -> Pruned:
    """What each method removes at each fraction, saved as circuits/METHOD-FRACTION.safetensors for `sparc3
    ablate`, with .seed0, .seed1, … where seeds are kept apart."""
    assert work.recipe.job == "compress"
    found: Pruned = []
    for name, method, reduce in prunings_of(settings(work), sampled=False):
        for fraction in settings(work).fractions or (None,):
            end, files = settings(work).scope.replace(":", "of") if fraction is None else f"{fraction:g}", []
            sets = sets_pruned_by(work.recipe, method)
            for seed, one in enumerate(sets):
                draw = f".seed{seed}" if len(sets) > 1 else ""
                files.append(f"circuits/{name}-{end}{draw}.safetensors")
                circuit = _load_or_make_circuit(work, files[-1], one, method, reduce, fraction)
                log.info("%s%s: %d weights in %d sites", name, draw, len(circuit), len(circuit.members))
            found.append((str(Variant(name, len(circuit))), [work.folder / file for file in files]))
    return found


def _load_or_make_circuit(
    work: RunContext, file: str, name: str, method: str, reduce: str, fraction: float | None
) -> Circuit:
    asked, samples, scope = work.recipe.attribution, work.references[name], settings(work).scope
    inputs: dict[str, Any] = {"fraction": fraction, "scope": scope}
    if method == SEQUENTIAL:
        inputs |= {"sites": asked.sites, "truncate": asked.truncate}
        inputs |= {"model": work.fingerprint, "samples": samples.fingerprint}
    else:
        how = ScoringSpec(asked.but(method=method, reduce=reduce), {name: _target(work)})
        prefix = f"{reduce}." if require_method(method).targeted else ""
        scores = load_or_make_parts(work, how, prefix=prefix)[name]
        inputs |= {"scores": scores.fingerprint}

    def make() -> Circuit:
        if method != SEQUENTIAL:
            return replace(select(scores, fraction=fraction, scope=scope), model=work.described)
        made = prune_sequentially(
            work.model,
            samples,
            tokenizer=work.tokenizer,
            fraction=fraction,
            scope=scope,
            sites=asked.sites,
            truncate=asked.truncate,
            progress=work.progress,
        )
        return replace(made, model=work.described)

    return load_or_make(work, file, Circuit, inputs, make)


def _target(work: RunContext) -> str:
    return work.recipe.references["general"].target or work.recipe.attribution.target


def measure_pruned(work: RunContext, pruned: Pruned, seconds: Mapping[str, float]) -> Results:
    """Every pruned model on the same test samples, and those of the comparison of numbers of samples."""
    found = [load_or_make_evaluation(work, "original", Circuit("weight", {}, work.described))]
    checks, by_seed = [], list[SeedFigures]()
    sites = sites_of(work.model, work.recipe.attribution.sites)
    for variant, files in pruned:
        draws = []
        for seed, file in enumerate(files):
            circuit, draw = Circuit.load(file), f".seed{seed}" if len(files) > 1 else ""
            draws.append(load_or_make_evaluation(work, f"{variant}{draw}", circuit))
            checks.append(_check_rows(work, draws[-1], circuit))
        if len(draws) == 1:
            found += draws
        else:
            pooled, total = pool_draws(variant, draws), sum(site.out * site.inp for site in sites)
            pairs = [measure_stability([*map(Circuit.load, pair)], total) for pair in combinations(files, 2)]
            stable = observe_stability(sum(pairs) / len(pairs))
            found.append(replace(pooled, observations=(*pooled.observations, stable)))
            by_seed += tell_seeds(variant, draws)
    by_number, drawn = compare_sample_counts(work)
    provenance = describe_run(
        work,
        seconds,
        job="compress",
        method=work.recipe.attribution.method,
        unit="weight",
        scope=settings(work).scope,
        sizes={site.name: site.out * site.inp for site in sites},
        checks=checks,
        **({"by_seed": by_seed} if by_seed else {}),
        **drawn,
    )
    results = to_results([*found, *by_number], provenance.to_dict())
    beside = compare_methods([*found, *by_number], work.recipe.attribution.method)
    return add_verdict(replace(results, differences=(*results.differences, *beside)), "weight")


def _check_rows(work: RunContext, evaluation: Evaluation, circuit: Circuit) -> Check:
    """A check: the least and the most zeros of any row are what was asked for. Other scopes are told, not
    judged.

    Raises:
        Sparc3Error: a row has fewer zeros than it should, so the figures would be of another model than they
            say.
    """
    figures = {o.metric: float(o.sums[0] or 0.0) for o in evaluation.observations if o.sums}
    least, most = figures["sparsity.row_min"], figures["sparsity.row_max"]
    name, value = f"zeros in a row, {evaluation.variant}", f"{least:.4%} to {most:.4%}"
    groups, fraction = parse_scope(settings(work).scope), circuit.provenance["selection"].get("fraction")
    counted = work.recipe.metrics()["sparsity"]
    elsewhere = isinstance(counted, SparsitySettings) and set(counted.sites) != set(
        work.recipe.attribution.sites
    )
    if elsewhere or (groups is None and settings(work).scope != "row"):
        return Check(name, value, None)
    columns = {mask.shape[1] for mask in circuit.members.values()}
    asked = {(groups[0] / groups[1]) if groups else share_of(fraction, width) / width for width in columns}
    if least < min(asked) - 1e-9:
        raise Sparc3Error(
            f"{evaluation.variant} has a row with {least:.4%} zeros where {min(asked):.4%} were to be "
            "removed; report this"
        )
    return Check(name, value, most <= max(asked) + 1e-9)


# How many reference samples a pruning needs: the same from the first n samples of each seed's set (the
# paper's Figures 8 to 10).

DISTRIBUTION = "sparc3.distribution/1"
DECADES, BINS = 6, 48
"""Scores are counted by their size as a share of the method's largest, from 10⁻⁶ to 1, in steps of an eighth
of a power of ten."""


def compare_sample_counts(work: RunContext) -> tuple[list[Evaluation], dict[str, Any]]:
    """(evaluations, what the report draws): every method at every number of samples, the seeds' figures
    pooled.

    At the largest number the variant is called METHOD@COUNT as in any compression, at the others "METHOD, n
    samples".
    """
    compress, asked = settings(work), work.recipe.attribution
    fraction, sites = next(iter(compress.fractions), None), sites_of(work.model, asked.sites)
    removed = count_selected(compress.scope, "weight", sites, fraction=fraction)
    rows: list[SampleRow] = []
    distributions: dict[str, Any] = {}
    evaluations = []
    for name, method, reduce in prunings_of(compress, sampled=True):
        options = asked.but(method=method, target=_target(work), reduce=reduce)
        for count in sorted(compress.samples):
            largest, draws = count == max(compress.samples), []
            for seed, samples in enumerate(work.references.values()):
                first = ReferenceSet(samples.samples[:count], samples.source)
                drawn = name if largest and seed == 0 else None
                draw, found = _measure_first(work, f"{name}-{count}.seed{seed}", first, options, drawn)
                draws.append(draw)
                rows += [
                    SampleRow(name, count, seed, o.metric, measurement(o, "").value)
                    for o in draw.observations
                    if not o.metric.startswith("sparsity")
                ]
                distributions |= {name: _add_up_roles(found, sites)} if found else {}
            variant = f"{name}, {count} sample{'s' * (count > 1)}"
            evaluations.append(pool_draws(str(Variant(name, removed)) if largest else variant, draws))
    return evaluations, ({"by_samples": rows, "distributions": distributions} if evaluations else {})


def _measure_first(
    work: RunContext, place: str, samples: ReferenceSet, options: AttributionOptions, drawn: str | None
) -> tuple[Evaluation, dict[str, Any]]:
    """(evaluation, distribution) of the model pruned by the scores of these samples; the distribution where
    it is `drawn`, by this name. The scores, as large as the model, are made once, where one of the two is not
    there yet, and are not kept."""

    @functools.cache
    def score() -> Scores:
        return attribute(
            work.model,
            samples,
            tokenizer=work.tokenizer,
            **options.model_dump(),
            progress=work.progress,
            partial=work.folder / "scores/samples.partial",
        )

    asked = work.recipe.attribution.model_dump(exclude={"method", "reduce", "batch_tokens"})
    how = [options.method, options.reduce, options.target, asked]
    inputs = {"samples": samples.fingerprint, "model": work.fingerprint, "how": how}
    found = _load_or_make_distribution(work, drawn, len(samples), inputs, score) if drawn else {}
    fraction, scope = next(iter(settings(work).fractions), None), settings(work).scope
    more = {"fraction": fraction, "scope": scope}
    made = measure_once(
        work, place, {**inputs, **more}, lambda: select(score(), fraction=fraction, scope=scope)
    )
    return made, found


def _load_or_make_distribution(
    work: RunContext, name: str, samples: int, inputs: Mapping[str, Any], score: Callable[[], Scores]
) -> dict[str, Any]:
    """distributions/NAME.json, which is made unless it is there."""
    file, made_from = f"distributions/{name}.json", fingerprint({**inputs, "version": __version__})
    found = read_made(work, file, DISTRIBUTION, made_from)
    if not found:
        head = {"format": DISTRIBUTION, "made_from": made_from, "method": name, "samples": samples}
        found = {**head, **distribution(score())}
        if distributed.is_main():
            write_json(work.folder / file, found)
        distributed.wait()
    return found


def _add_up_roles(found: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """What the report draws of a distribution: role → how many scores are in each bin."""
    roles, counted = {site.name: site.role for site in sites}, dict[str, list[int]]()
    for name, counts in found["sites"].items():
        held = counted.get(roles[name], [0] * len(counts))
        counted[roles[name]] = [a + b for a, b in zip(held, counts, strict=True)]
    return {"samples": found["samples"], "exponents": found["exponents"], "roles": counted}


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
