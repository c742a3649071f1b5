"""Two scorers on the same texts: how far they agree."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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


def ranks(values: Sequence[float] | Array) -> Array:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=float)


def _correlation(one: Array, other: Array) -> float | None:
    if one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
