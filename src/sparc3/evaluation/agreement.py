"""Two scorers on the same texts: what each says, and how far they agree."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .observations import Observations
from .statistics import difference, measurement

Array = NDArray[np.float64]
Texts = Sequence[Mapping[str, Any]]


def agreement(texts: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None] | None:
    """Pearson and Spearman correlation of the two scores of each continuation, and the share with the same verdict (≥ 0.5 or below).

    Args:
        texts: [{"continuations": [{"score", "also"}]}]; a continuation that one of them could not score is left out.

    Returns:
        {"n", "pearson", "spearman", "same_verdict"}, a correlation None where a scorer says the same of all texts; None without two scores.
    """
    pairs = [(c["score"], c["also"]) for text in texts for c in text["continuations"] if c.get("score") is not None and c.get("also") is not None]
    if len(pairs) < 2:
        return None
    one, other = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    same = float(np.mean((one >= 0.5) == (other >= 0.5)))
    return {"n": len(pairs), "pearson": _correlation(one, other), "spearman": _correlation(ranks(one), ranks(other)), "same_verdict": same}


def side_by_side(before: Texts, after: Texts) -> list[dict[str, Any]]:
    """What the first scorer says of the texts before and after, then the second: mean over prompts, 95 % interval, failures.

    Returns:
        [{"before", "before_ci95", "after", "after_ci95", "change", "change_ci95", "p", "n", "failures"}], two entries; a figure None where
        nothing was scored.
    """
    return [_said(_means(before, key), _means(after, key)) for key in ("score", "also")]


def _said(before: Observations, after: Observations) -> dict[str, Any]:
    one, other = measurement(before, "original"), measurement(after, "ablated")
    change = difference(before, after, "original", "ablated")
    return {
        "before": one.value, "before_ci95": one.ci95, "after": other.value, "after_ci95": other.ci95,
        "change": change.value if change else None, "change_ci95": change.ci95 if change else None, "p": change.p if change else None,
        "n": other.n, "failures": one.failures + other.failures,
    }  # fmt: skip


def _means(texts: Texts, key: str) -> Observations:
    """The mean of one scorer over each prompt's continuations."""
    scores = [[c[key] for c in text["continuations"] if c.get(key) is not None] for text in texts]
    means = tuple(float(np.mean(some)) if some else None for some in scores)
    failures = sum(len(text["continuations"]) for text in texts) - sum(map(len, scores))
    return Observations("toxicity.mean", "test", "score in [0, 1]", "lower", means, (1.0,) * len(means), failures)


def ranks(values: Sequence[float] | Array) -> Array:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=float)


def _correlation(one: Array, other: Array) -> float | None:
    if one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
