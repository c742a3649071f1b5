"""What a metric observed: one figure per unit (prompt, window), before any averaging, saved in one file per
variant; and the intervals and p-values computed from it."""

import math
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedFile, Sparc3Error
from ..results import Difference, Measurement
from ..settings import parse_typed
from ..storage import read_json, write_json

FORMAT = "sparc3.evaluation/1"


@dataclass(frozen=True)
class Observations:
    """One metric on one variant: its value is Σ sums / Σ weights over the units that were measured.

    Attributes:
        metric: "perplexity", "toxicity.mean", ...
        split: the split of the units.
        unit: the unit of the value.
        direction: which is better, "lower" or "higher".
        sums: numerator of each unit, in a fixed order; None if the unit could not be measured.
        weights: denominator of each unit.
        failures: number of single measurements that failed (a unit may have several); no sum includes them.
        exponential: whether the value is exp of the ratio, as for perplexity.
    """

    metric: str
    split: str
    unit: str
    direction: str
    sums: tuple[float | None, ...]
    weights: tuple[float, ...]
    failures: int = 0
    exponential: bool = False


def finite(value: float) -> float | None:
    """A measured number, or None for a NaN or Inf, which counts as a failure."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Evaluation:
    """Everything observed on one variant of the model, and the texts that it wrote.

    Attributes:
        made_from: fingerprint of the model variant, the samples and the settings.
        texts: metric → [{"prompt", "continuations": [{"text", "score"}]}].
    """

    variant: str
    observations: tuple[Observations, ...]
    texts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    made_from: str = ""
    seconds: float = 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        content = read_json(path, FORMAT)
        try:
            observations = tuple(Observations(**row) for row in content["observations"])
            evaluation = cls(**{key: value for key, value in content.items() if key != "format"})
            return parse_typed(cls, asdict(replace(evaluation, observations=observations)))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"{path} does not follow {FORMAT} ({error}); make it again") from None


# Intervals and p-values: bootstrap over units, paired if two variants were measured on the same units.


DRAWS = 2000
Array = NDArray[np.float64]


BETWEEN_0_AND_1 = (
    "score in [0, 1]",
    "share of prompts",
    "share of continuations",
    "share of texts",
    "share of questions",
    "share of 4-grams",
    "unique tokens / tokens",
)
"""Units of metrics whose figures are from 0 to 1 and come from a sample. Shares of weights count them all."""


def measurement(observations: Observations, variant: str) -> Measurement:
    """The figure of one variant, with a 95 % interval over its units: a percentile bootstrap.

    Where every unit has 0, or every unit has 1, each resample is the sample again, and the bootstrap would be
    certain of what a few prompts showed. Then it is Wilson's interval of a share.
    """
    sums, weights = _select_measured(observations)
    ci95 = None
    if len(sums) > 1:
        drawn_sums, drawn_weights = _resample(sums, weights)
        ci95 = _interval(_value(observations, drawn_sums, drawn_weights))
    if ci95 in ((0.0, 0.0), (1.0, 1.0)) and observations.unit in BETWEEN_0_AND_1:
        ci95 = share_interval(round(ci95[0]) * len(sums), len(sums))
    o, value = observations, float(_value(observations, sums.sum(), weights.sum())) if len(sums) else None
    return Measurement(o.metric, variant, o.split, value, ci95, len(sums), o.failures, o.unit, o.direction)


def difference(first: Observations, second: Observations, from_: str, to: str) -> Difference | None:
    """`second` − `first`, paired over the units measured in both; None if there is no such unit.

    The interval is a paired percentile bootstrap over units, the p-value a paired permutation test: in each
    draw, a fair coin decides for every unit whether its two figures are swapped.
    """
    if len(first.sums) != len(second.sums):
        raise Sparc3Error(
            f"{first.metric} was measured on {len(first.sums)} units of {from_} and {len(second.sums)} of "
            f"{to}; evaluate both again"
        )
    sums_a, weights_a, sums_b, weights_b = _select_measured(first, second)
    if not len(sums_a):
        return None
    before = float(_value(first, sums_a.sum(), weights_a.sum()))
    after = float(_value(second, sums_b.sum(), weights_b.sum()))
    ci95 = p = None
    if len(sums_a) > 1:
        draws_a, draw_weights_a, draws_b, draw_weights_b = _resample(sums_a, weights_a, sums_b, weights_b)
        ci95 = _interval(_value(second, draws_b, draw_weights_b) - _value(first, draws_a, draw_weights_a))
        p = _permutation_p(first, sums_a, weights_a, sums_b, weights_b, after - before)
    return Difference(
        first.metric, from_, to, after - before, (after - before) / before if before else None, ci95, p
    )


def share_interval(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, of which `count` of `n` were observed (Wilson 1927)."""
    z = 1.959964  # z₀.₉₇₅
    middle, spread = count + z * z / 2, z * math.sqrt(count * (n - count) / n + z * z / 4)
    low, high = (middle - spread) / (n + z * z), (middle + spread) / (n + z * z)
    # At the ends exactly 0 and 1: rounding would leave the observed share outside its interval.
    return (low if count else 0.0), (high if count < n else 1.0)


def detectable_change(first: Observations, second: Observations) -> tuple[int, float] | None:
    """(n, x): n paired units detect a change of ≥ x with 80 % power, two-sided at 5 %; None with fewer
    than two pairs, or if all changes are equal.

    From the observed standard deviation of the paired changes: x = (z₀.₉₇₅ + z₀.₈) s / √n (Cohen 1988). For a
    metric that is exp of a ratio, x is a relative change of it.
    """
    a, wa, b, wb = _select_measured(first, second)
    if len(a) < 2 or (spread := float(np.std(b / wb - a / wa, ddof=1))) == 0:
        return None
    smallest = (1.959964 + 0.841621) * spread / len(a) ** 0.5  # z₀.₉₇₅ + z₀.₈
    return len(a), float(np.expm1(smallest)) if first.exponential else smallest


def pool(draws: list[Observations]) -> Observations:
    """Several draws of one variant (such as random units) as one: each unit's figure is its mean over the
    draws that measured it."""
    first = draws[0]
    sums: list[float | None] = []
    weights = []
    for unit in range(len(first.sums)):
        figures = [(d.sums[unit], d.weights[unit]) for d in draws if d.sums[unit] is not None]
        sums.append(float(np.mean([s for s, _ in figures if s is not None])) if figures else None)
        weights.append(float(np.mean([w for _, w in figures])) if figures else first.weights[unit])
    failures = sum(d.failures for d in draws)
    return replace(first, sums=tuple(sums), weights=tuple(weights), failures=failures)


def _select_measured(*observed: Observations) -> list[Array]:
    """Sums and weights of each, of the units that were measured in all of them."""
    columns = [np.array(values, dtype=float) for o in observed for values in (o.sums, o.weights)]  # NaN: None
    is_measured = ~np.isnan(sum(columns[::2], np.zeros(len(columns[0]))))
    return [column[is_measured] for column in columns]


def _value(observed: Observations, sums: Array | float, weights: Array | float) -> Array:
    # A resample may consist of units without weight only (texts without a token); its ratio is 0, not 0/0.
    ratio = np.asarray(sums) / np.maximum(weights, 1e-300)
    return np.exp(ratio) if observed.exponential else ratio


def _resample(*columns: Array) -> list[Array]:
    """[DRAWS] for each column over the units: its sum over each bootstrap sample. The same draws for the same
    number of units."""
    units, random = len(columns[0]), np.random.default_rng(0)
    pieces = []
    for rows in _pieces(units):
        draws = random.multinomial(units, np.full(units, 1 / units), size=rows).astype(float)
        pieces.append([draws @ column for column in columns])
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def _pieces(units: int) -> list[int]:
    """DRAWS split into pieces whose [draws, units] matrix takes a few megabytes, so that memory does not grow
    with the number of units."""
    rows = max(1, min(DRAWS, 2**18 // units))
    return [min(rows, DRAWS - start) for start in range(0, DRAWS, rows)]


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _permutation_p(
    observations: Observations, a: Array, wa: Array, b: Array, wb: Array, observed: float
) -> float:
    random = np.random.default_rng(1)
    extreme = 0
    for rows in _pieces(len(a)):
        swap = random.random((rows, len(a))) < 0.5
        first = _value(observations, a.sum() + swap @ (b - a), wa.sum() + swap @ (wb - wa))
        second = _value(observations, b.sum() + swap @ (a - b), wb.sum() + swap @ (wa - wb))
        # A permutation with the same difference counts, although rounding may make it a little smaller.
        extreme += int((np.abs(second - first) >= abs(observed) - 1e-12).sum())
    # The observed assignment is one of the permutations, so that p is never 0 (Phipson and Smyth 2010).
    return (1 + extreme) / (DRAWS + 1)
