"""What the test samples could have shown: the smallest change that so many of them detect."""

from collections.abc import Sequence
from typing import Any

from ..evaluation.observations import Evaluation
from ..evaluation.statistics import detectable


def power(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """[{"metric", "n", "detects", "relative", "said"}] of the circuit against the original, from the variance of their paired differences.

    `relative`: whether `detects` is a share of the original's figure.
    """
    named = {e.variant: e for e in evaluations}
    if not {"original", "ablated"} <= named.keys():
        return []
    after = {o.metric: o for o in named["ablated"].observations}
    found = []
    for before in named["original"].observations:
        seen = detectable(before, after[before.metric]) if before.metric in after else None
        if seen is None:
            continue
        n, x = seen
        size = f"{x:.2g} relative" if before.exponential else f"{x:.2g}"
        said = f"{before.metric}: {n} units detect a change of ≥ {size} with 80 % power"
        found.append({"metric": before.metric, "n": n, "detects": x, "relative": before.exponential, "said": said})
    return found
