"""The job `compress`: remove the lowest-scored weights of every row, by each method; then count the zeros and
measure the model."""

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
from ..evaluation.evaluate import make_results
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
    summarize_seeds,
)
from .prune_sequentially import prune_sequentially
from .run_folder import RunContext, load_or_make, read_if_current
from .score import ScoringSpec, load_or_make_parts
from .work_list import count_selected, list_prunings, sets_pruned_by

log = logging.getLogger("sparc3")
Pruned = list[tuple[str, list[Path]]]
"""(variant, files of its circuits, one per seed if seeds are kept apart). Files, because circuits of a large
model must be read one at a time."""


def settings(work: RunContext) -> Compress:
    assert work.recipe.job == "compress"
    return work.recipe.compress


def prune_by_all_methods(work: RunContext) -> Pruned:
    """What each method removes at each fraction, saved as circuits/METHOD-FRACTION.safetensors for `sparc3
    ablate`, with .seed0, .seed1, … if seeds are kept apart."""
    assert work.recipe.job == "compress"
    pruned: Pruned = []
    for name, method, reduce in list_prunings(settings(work), sampled=False):
        for fraction in settings(work).fractions or (None,):
            label = settings(work).scope.replace(":", "of") if fraction is None else f"{fraction:g}"
            files: list[str] = []
            sets = sets_pruned_by(work.recipe, method)
            for seed, set_name in enumerate(sets):
                draw = f".seed{seed}" if len(sets) > 1 else ""
                files.append(f"circuits/{name}-{label}{draw}.safetensors")
                circuit = _load_or_make_circuit(work, files[-1], set_name, method, reduce, fraction)
                log.info("%s%s: %d weights in %d sites", name, draw, len(circuit), len(circuit.members))
            pruned.append((str(Variant(name, len(circuit))), [work.folder / file for file in files]))
    return pruned


def _load_or_make_circuit(
    work: RunContext, file: str, set_name: str, method: str, reduce: str, fraction: float | None
) -> Circuit:
    options, samples, scope = work.recipe.attribution, work.references[set_name], settings(work).scope
    inputs: dict[str, Any] = {"fraction": fraction, "scope": scope}
    if method == SEQUENTIAL:
        inputs |= {"sites": options.sites, "truncate": options.truncate}
        inputs |= {"model": work.fingerprint, "samples": samples.fingerprint}
    else:
        spec = ScoringSpec(options.copy_with(method=method, reduce=reduce), {set_name: _pruning_target(work)})
        prefix = f"{reduce}." if require_method(method).targeted else ""
        scores = load_or_make_parts(work, spec, prefix=prefix)[set_name]
        inputs |= {"scores": scores.fingerprint}

    def make() -> Circuit:
        if method != SEQUENTIAL:
            return replace(select(scores, fraction=fraction, scope=scope), model=work.model_info)
        circuit = prune_sequentially(
            work.model,
            samples,
            tokenizer=work.tokenizer,
            fraction=fraction,
            scope=scope,
            sites=options.sites,
            truncate=options.truncate,
            progress=work.progress,
        )
        return replace(circuit, model=work.model_info)

    return load_or_make(work, file, Circuit, inputs, make)


def _pruning_target(work: RunContext) -> str:
    return work.recipe.references["general"].target or work.recipe.attribution.target


def measure_pruned(work: RunContext, pruned: Pruned, seconds: Mapping[str, float]) -> Results:
    """Results of every pruned model on the same test samples, including the comparison of sample numbers."""
    evaluations = [load_or_make_evaluation(work, "original", Circuit("weight", {}, work.model_info))]
    checks, by_seed = [], list[SeedFigures]()
    sites = sites_of(work.model, work.recipe.attribution.sites)
    for variant, files in pruned:
        draws = []
        for seed, file in enumerate(files):
            circuit, draw = Circuit.load(file), f".seed{seed}" if len(files) > 1 else ""
            draws.append(load_or_make_evaluation(work, f"{variant}{draw}", circuit))
            checks.append(_check_rows(work, draws[-1], circuit))
        if len(draws) == 1:
            evaluations += draws
        else:
            pooled, total = pool_draws(variant, draws), sum(site.out * site.inp for site in sites)
            pairs = [measure_stability([*map(Circuit.load, pair)], total) for pair in combinations(files, 2)]
            stability = observe_stability(sum(pairs) / len(pairs))
            evaluations.append(replace(pooled, observations=(*pooled.observations, stability)))
            by_seed += summarize_seeds(variant, draws)
    by_number, drawings = compare_sample_counts(work)
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
        **drawings,
    )
    results = make_results([*evaluations, *by_number], provenance.to_dict())
    comparisons = compare_methods([*evaluations, *by_number], work.recipe.attribution.method)
    return add_verdict(replace(results, differences=(*results.differences, *comparisons)), "weight")


def _check_rows(work: RunContext, evaluation: Evaluation, circuit: Circuit) -> Check:
    """Check that the fewest and the most zeros of any row are what the recipe requests. Scopes that are
    not by row give the figures without a judgement.

    Raises:
        Sparc3Error: a row has fewer zeros than it should, so the figures would describe another model.
    """
    figures = {o.metric: float(o.sums[0] or 0.0) for o in evaluation.observations if o.sums}
    fewest, most = figures["sparsity.row_min"], figures["sparsity.row_max"]
    name, value = f"zeros in a row, {evaluation.variant}", f"{fewest:.4%} to {most:.4%}"
    groups, fraction = parse_scope(settings(work).scope), circuit.provenance["selection"].get("fraction")
    metric = work.recipe.metrics()["sparsity"]
    pruned_sites = set(work.recipe.attribution.sites)
    counts_other_sites = isinstance(metric, SparsitySettings) and set(metric.sites) != pruned_sites
    if counts_other_sites or (groups is None and settings(work).scope != "row"):
        return Check(name, value, None)
    columns = {mask.shape[1] for mask in circuit.members.values()}
    expected = {(groups[0] / groups[1]) if groups else share_of(fraction, width) / width for width in columns}
    # More zeros than expected are possible: weights that were zero before.
    if fewest < min(expected) - 1e-9:
        raise Sparc3Error(
            f"{evaluation.variant} has a row with {fewest:.4%} zeros where {min(expected):.4%} were to be "
            "removed; report this"
        )
    return Check(name, value, most <= max(expected) + 1e-9)


# How many reference samples a pruning needs: prune by the first n samples of each seed's set (the paper's
# Figures 8 to 10).

DISTRIBUTION = "sparc3.distribution/1"
DECADES, BINS = 6, 48
"""The histogram of |score| / largest |score| goes from 10⁻⁶ to 1, with eight bins per power of ten."""


def compare_sample_counts(work: RunContext) -> tuple[list[Evaluation], dict[str, Any]]:
    """(evaluations, provenance sections for the report's charts) of every method at every number of samples,
    with the seeds' figures pooled.

    The variant of the largest number is called METHOD@COUNT as in any compression, the others "METHOD, n
    samples".
    """
    compress, base_options = settings(work), work.recipe.attribution
    fraction, sites = next(iter(compress.fractions), None), sites_of(work.model, base_options.sites)
    # With `samples`, a recipe has one fraction, or none under a scope n:m.
    removed = count_selected(compress.scope, "weight", sites, fraction=fraction)
    rows: list[SampleRow] = []
    distributions: dict[str, Any] = {}
    evaluations = []
    for name, method, reduce in list_prunings(compress, sampled=True):
        options = base_options.copy_with(method=method, target=_pruning_target(work), reduce=reduce)
        for count in sorted(compress.samples):
            largest, draws = count == max(compress.samples), []
            for seed, samples in enumerate(work.references.values()):
                first = ReferenceSet(samples.samples[:count], samples.source)
                distribution_name = name if largest and seed == 0 else None
                draw, counts = _measure_first(
                    work, f"{name}-{count}.seed{seed}", first, options, distribution_name
                )
                draws.append(draw)
                rows += [
                    SampleRow(name, count, seed, o.metric, measurement(o, "").value)
                    for o in draw.observations
                    if not o.metric.startswith("sparsity")
                ]
                distributions |= {name: _add_up_roles(counts, sites)} if counts else {}
            variant = f"{name}, {count} sample{'s' * (count > 1)}"
            evaluations.append(pool_draws(str(Variant(name, removed)) if largest else variant, draws))
    return evaluations, ({"by_samples": rows, "distributions": distributions} if evaluations else {})


def _measure_first(
    work: RunContext,
    file: str,
    samples: ReferenceSet,
    options: AttributionOptions,
    distribution_name: str | None,
) -> tuple[Evaluation, dict[str, Any]]:
    """(evaluation, distribution of the scores) of the model pruned by the scores of these samples. The
    distribution is empty without a name. The scores are as large as the model: they are computed at most
    once, if one of the two is missing, and not saved."""

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

    common = work.recipe.attribution.model_dump(exclude={"method", "reduce", "batch_tokens"})
    attribution_key = [options.method, options.reduce, options.target, common]
    inputs = {"samples": samples.fingerprint, "model": work.fingerprint, "how": attribution_key}
    counts: dict[str, Any] = {}
    if distribution_name:
        counts = _load_or_make_distribution(work, distribution_name, len(samples), inputs, score)
    fraction, scope = next(iter(settings(work).fractions), None), settings(work).scope
    selection = {"fraction": fraction, "scope": scope}
    evaluation = measure_once(
        work, file, {**inputs, **selection}, lambda: select(score(), fraction=fraction, scope=scope)
    )
    return evaluation, counts


def _load_or_make_distribution(
    work: RunContext, name: str, samples: int, inputs: Mapping[str, Any], score: Callable[[], Scores]
) -> dict[str, Any]:
    """The content of distributions/NAME.json, which is made unless it exists and fits."""
    file, made_from = f"distributions/{name}.json", fingerprint({**inputs, "version": __version__})
    content = read_if_current(work, file, DISTRIBUTION, made_from)
    if not content:
        head = {"format": DISTRIBUTION, "made_from": made_from, "method": name, "samples": samples}
        content = {**head, **distribution(score())}
        if distributed.is_main():
            write_json(work.folder / file, content)
        distributed.wait()
    return content


def _add_up_roles(content: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """A distribution for the report's chart, with the sites of each role added up."""
    roles, by_role = {site.name: site.role for site in sites}, dict[str, list[int]]()
    for name, counts in content["sites"].items():
        total = by_role.get(roles[name], [0] * len(counts))
        by_role[roles[name]] = [a + b for a, b in zip(total, counts, strict=True)]
    return {"samples": content["samples"], "exponents": content["exponents"], "roles": by_role}


def distribution(scores: Scores) -> dict[str, Any]:
    """{"largest", "exponents", "sites"}: for each site, the number of |scores| below 10⁻⁶ of the overall
    largest, and the number in each bin above.

    Bins lie between consecutive exponents of ten; a site's first count is of scores below the first exponent,
    including zeros.
    """
    largest = max(float(tensor.abs().max()) for tensor in scores.values()) or 1.0
    sites = {}
    for name, tensor in scores.items():
        counts = torch.zeros(BINS, dtype=torch.float64)
        # In pieces: the logarithm needs a copy, and histc counts in float32, which is exact up to 2²⁴.
        for piece in tensor.flatten().split(2**24):
            counts += torch.histc(
                (piece.abs() / largest).log10().clamp_(max=0.0), bins=BINS, min=-DECADES, max=0.0
            ).double()
        inside = [int(count) for count in counts]
        sites[name] = [tensor.numel() - sum(inside), *inside]
    exponents = [-DECADES + DECADES * edge / BINS for edge in range(BINS + 1)]
    return {"largest": largest, "exponents": exponents, "sites": sites}
