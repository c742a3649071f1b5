"""The evaluation stage: every variant on the same test samples, and what the results say of where they came from."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..evaluation.agreement import agreement, side_by_side
from ..evaluation.evaluate import evaluated_on, fingerprint_of, measure, to_results
from ..evaluation.metrics import ToxicitySettings
from ..evaluation.observations import Evaluation
from ..evaluation.scorers import lexicon_words
from ..evaluation.statistics import pooled
from ..files import fingerprint
from ..results import Results
from ..version import __version__
from .checks import checks
from .folder import kept
from .overlaps import overlaps
from .power import power
from .scoring import Found, How
from .variants import changed, variants
from .work import Change, Work

log = logging.getLogger("sparc3")


def measured(work: Work, found: Found, how: How, seconds: Mapping[str, float]) -> Results:
    """All variants measured; a circuit that is met twice is measured once."""
    known: dict[str, Evaluation] = {}
    shared: list[dict[str, Any]] = []
    sizes = {name: tensor.numel() for name, tensor in found.contrast.items()}
    evaluations = []
    for variant, changes in variants(work, found, how):
        draws = []
        for number, one in enumerate(changes):
            name = variant if len(changes) == 1 else f"{variant}.{number}"
            if one.fingerprint not in known:
                known[one.fingerprint] = evaluation(work, name, one)
            draws.append(replace(known[one.fingerprint], variant=variant))
        evaluations.append(draws[0] if len(draws) == 1 else _pooled(draws))
        if variant.endswith(f"@{len(found.circuit)}") and not variant.startswith(f"{how.method}@"):
            shared += overlaps(found.circuit, {variant: changes}, sizes)
    beside = [*([f"random@{len(found.circuit)}"] if len(found.circuit) else []), *work.rivals]
    results = to_results(evaluations, _provenance(work, found, evaluations, seconds), beside)
    results.provenance["warnings"] += _beaten(work, results)
    results.provenance["overlaps"] = shared
    for metric in dict.fromkeys(d.metric for d in results.differences):
        d = results.difference(metric)
        change = f"{d.relative:+.1%}" if d.relative is not None else "-"
        log.info("%s: %.4g → %.4g (%s)", metric, results.find(metric).value, results.find(metric, "ablated").value, change)
    return results


def evaluation(work: Work, variant: str, change: Change) -> Evaluation:
    """All metrics on one variant, kept as evaluation/`variant`.json."""
    made_from = fingerprint(
        {"model": work.described["fingerprint"], "without": change.fingerprint, "on": fingerprint_of(work.prepared), "version": __version__}
    )

    def make() -> Evaluation:
        again = (lambda: changed(work, change)) if len(change) else None
        made = measure(work.model, work.tokenizer, work.prepared, variant, made_from, work.progress, again)
        log.info("evaluated %s in %.1f s", variant, made.seconds)
        return made

    return kept(work.folder / f"evaluation/{variant}.json", made_from, Evaluation.load, lambda e: e.made_from, make)


def _pooled(draws: list[Evaluation]) -> Evaluation:
    columns = zip(*(draw.observations for draw in draws), strict=True)
    return Evaluation(draws[0].variant, tuple(pooled(list(column)) for column in columns))


def _provenance(work: Work, found: Found, evaluations: list[Evaluation], seconds: Mapping[str, float]) -> dict[str, Any]:
    return {
        "recipe": work.recipe.name,
        "made_from": work.recipe.fingerprint,
        "model": work.described,
        "circuit": found.circuit.fingerprint,
        "count": len(found.circuit),
        "sizes": {name: tensor.numel() for name, tensor in found.contrast.items()},
        **evaluated_on(work.prepared),
        "lexicon": lexicon(work),
        "checks": checks(work, found.contrast, found.parts, evaluations),
        "stages": [{"name": name, "seconds": took} for name, took in seconds.items()],
        "power": power(evaluations),
        **_agreement(work, evaluations),
        **work.noted,
        "warnings": work.warnings + _chosen_by_outcome(work),
        "version": __version__,
    }


def lexicon(work: Work) -> list[str]:
    words = [lexicon_words(p.settings.scorer) for p in work.prepared if isinstance(p.settings, ToxicitySettings)]
    return sorted({word for some in words for word in some})


def _agreement(work: Work, evaluations: list[Evaluation]) -> dict[str, Any]:
    """How far two scorers agree on the texts of the original and of the circuit's model."""
    asked = [p.settings for p in work.prepared if isinstance(p.settings, ToxicitySettings) and p.settings.also]
    before, after = (next((e.texts.get("toxicity", []) for e in evaluations if e.variant == name), []) for name in ("original", "ablated"))
    found = agreement([*before, *after]) if asked else None
    if not found:
        return {}
    return {"scorers": {"first": asked[0].scorer, "second": asked[0].also, **found, "means": side_by_side(before, after)}}


def _beaten(work: Work, results: Results) -> list[str]:
    """What must be said where another method, searched under the same budget, does better on the test."""
    aim = work.noted.get("tune", {}).get("aim", "")
    said = []
    for name in work.rivals:
        theirs, ours = results.find(aim, name), results.find(aim, "ablated")
        if theirs.value is None or ours.value is None:
            continue
        if theirs.value < ours.value if theirs.direction == "lower" else theirs.value > ours.value:
            said.append(f"under the same budget {name} does better: {aim} {theirs.value:.4g} on the test, against {ours.value:.4g} here")
    return said


def _chosen_by_outcome(work: Work) -> list[str]:
    return [
        f"the prompts of {p.metric.name} were chosen by this model's own completions: any change of the model moves them towards the mean; "
        "read the effect beside its null"
        for p in work.prepared if getattr(p.settings, "choose_by", None) in ("completion", "repetition")
    ]  # fmt: skip
