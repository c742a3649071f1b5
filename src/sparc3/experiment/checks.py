"""The short list at the end of a run: what a careful reader would ask first."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.observations import Evaluation
from ..models import sites_of
from ..scores import Scores
from .power import power
from .work import Work

log = logging.getLogger("sparc3")


def checks(work: Work, contrast: Scores, parts: Mapping[str, Scores], evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """[{"name", "value", "ok"}]; ok is None where there is no judgement to make."""
    expected = [site.name for site in sites_of(work.model, work.recipe.attribution.sites)]
    files = sorted(p for p in work.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    skipped = sum(len(part.provenance["skipped"]) for part in parts.values())
    seconds = [f"{name} {part.provenance['seconds'] / max(1, part.provenance['samples']):.3f} s" for name, part in parts.items()]
    failures = {e.variant: max((o.failures for o in e.observations), default=0) for e in evaluations}
    worst = max(failures, key=lambda v: failures[v])
    found = [
        ("sites attributed", f"{len(contrast)} of {len(expected)}", set(contrast) == set(expected)),
        ("samples with a non-finite relevance", f"{skipped} left out", skipped == 0),
        ("share of |relevance| by layer, undesired set", _shares(parts["undesired"]), None),
        ("time per sample", ", ".join(seconds), None),
        ("failed measurements", f"{failures[worst]} at most ({worst})", failures[worst] == 0),
        *(("power", one["said"], None) for one in power(evaluations) if one["metric"] in ("toxicity.mean", "rur.mean", "ioi.accuracy")),
        ("files", f"{len(files)}, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB", None),
    ]
    for name, value, ok in found:
        log.info("check %s: %s%s", name, value, "" if ok is not False else "  ← look at this")
    return [{"name": name, "value": value, "ok": ok} for name, value, ok in found]


def _shares(scores: Scores) -> str:
    """Percent of Σ|relevance| in each site, sites in order."""
    sums = [float(tensor.abs().sum()) for tensor in scores.values()]
    total = sum(sums) or 1.0
    return " ".join(f"{100 * s / total:.0f}" for s in sums) + " %"
