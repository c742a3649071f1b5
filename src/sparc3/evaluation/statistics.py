"""What a metric observed: one figure per unit (prompt, window), before any average. Kept on disk, one file a
variant."""

import math
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedFile, Sparc3Error
from ..results import Difference, Measurement
from ..settings import typed
from ..storage import read_json, write_json

FORMAT = "sparc3.evaluation/1"


@dataclass(frozen=True)
class Observations:
    """One metric on one variant: its value is Σ sums / Σ weights over the units that were measured.

    Attributes:
        metric: "perplexity", "toxicity.mean", ...
        split: which split the units are of.
        unit: what the value is in.
        direction: which way is better, "lower" or "higher".
        sums: numerator of each unit, in a fixed order; None where the unit could not be measured.
        weights: denominator of each unit.
        failures: how many single measurements failed (a unit may hold several); they are in no sum.
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
    """A measured number, or None for a NaN or Inf, which is a failure and no number."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Evaluation:
    """Everything observed on one variant of the model, and the texts it wrote on the way.

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
            made = cls(**{key: value for key, value in content.items() if key != "format"})
            return typed(cls, asdict(replace(made, observations=observations)))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"{path} does not follow {FORMAT} ({error}); make it again") from None


# Intervals and p-values: the bootstrap over units, paired where two variants saw the same units.


DRAWS = 2000
Array = NDArray[np.float64]


def measurement(observed: Observations, variant: str) -> Measurement:
    """The figure of one variant, with a 95 % percentile bootstrap interval over its units."""
    sums, weights = _measured_units(observed)
    ci95 = None
    if len(sums) > 1:
        drawn, drawn_weights = _resample(sums, weights)
        ci95 = _interval(_value(observed, drawn, drawn_weights))
    o, value = observed, float(_value(observed, sums.sum(), weights.sum())) if len(sums) else None
    return Measurement(o.metric, variant, o.split, value, ci95, len(sums), o.failures, o.unit, o.direction)


def difference(one: Observations, other: Observations, from_: str, to: str) -> Difference | None:
    """`other` − `one`, paired over the units measured in both; None where there is no such unit.

    The interval is a paired percentile bootstrap over units, the p-value a paired permutation test: in each
    draw every unit's two figures are swapped by a fair coin.
    """
    if len(one.sums) != len(other.sums):
        raise Sparc3Error(
            f"{one.metric} was measured on {len(one.sums)} units of {from_} and {len(other.sums)} of {to}; "
            "evaluate both again"
        )
    a, wa, b, wb = _measured_units(one, other)
    if not len(a):
        return None
    before, after = float(_value(one, a.sum(), wa.sum())), float(_value(other, b.sum(), wb.sum()))
    ci95 = p = None
    if len(a) > 1:
        da, dwa, db, dwb = _resample(a, wa, b, wb)
        ci95 = _interval(_value(other, db, dwb) - _value(one, da, dwa))
        p = _permutation_p(one, a, wa, b, wb, after - before)
    return Difference(
        one.metric, from_, to, after - before, (after - before) / before if before else None, ci95, p
    )


def share_interval(seen: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of which `seen` of `n` were seen (Wilson 1927)."""
    z = 1.959964
    middle, spread = seen + z * z / 2, z * math.sqrt(seen * (n - seen) / n + z * z / 4)
    return max(0.0, (middle - spread) / (n + z * z)), min(1.0, (middle + spread) / (n + z * z))


def detectable_change(one: Observations, other: Observations) -> tuple[int, float] | None:
    """(n, x): so many paired units find a change of ≥ x with 80 % power, two-sided at 5 %; None with fewer
    than two pairs, or where all changes are the same.

    From the observed standard deviation of the paired changes: x = (z₀.₉₇₅ + z₀.₈) s / √n (Cohen 1988). For a
    metric that is exp of a ratio, x is a relative change of it.
    """
    a, wa, b, wb = _measured_units(one, other)
    if len(a) < 2 or (spread := float(np.std(b / wb - a / wa, ddof=1))) == 0:
        return None
    smallest = (1.959964 + 0.841621) * spread / len(a) ** 0.5
    return len(a), float(np.expm1(smallest)) if one.exponential else smallest


def pool(draws: list[Observations]) -> Observations:
    """Several draws of one variant (random units, say) as one: each unit's figure is its mean over the draws
    that measured it."""
    first = draws[0]
    sums: list[float | None] = []
    weights = []
    for unit in range(len(first.sums)):
        seen = [(d.sums[unit], d.weights[unit]) for d in draws if d.sums[unit] is not None]
        sums.append(float(np.mean([s for s, _ in seen if s is not None])) if seen else None)
        weights.append(float(np.mean([w for _, w in seen])) if seen else first.weights[unit])
    failures = sum(d.failures for d in draws)
    return replace(first, sums=tuple(sums), weights=tuple(weights), failures=failures)


def _measured_units(*observed: Observations) -> list[Array]:
    """Sums and weights of each, of the units that were measured in all of them."""
    columns = [np.array(values, dtype=float) for o in observed for values in (o.sums, o.weights)]  # NaN: None
    there = ~np.isnan(sum(columns[::2], np.zeros(len(columns[0]))))
    return [column[there] for column in columns]


def _value(observed: Observations, sums: Array | float, weights: Array | float) -> Array:
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
    """DRAWS in pieces whose [draws, units] matrix takes a few megabytes at most, so that memory does not grow
    with the units."""
    rows = max(1, min(DRAWS, 2**18 // units))
    return [min(rows, DRAWS - start) for start in range(0, DRAWS, rows)]


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _permutation_p(kind: Observations, a: Array, wa: Array, b: Array, wb: Array, seen: float) -> float:
    random = np.random.default_rng(1)
    extreme = 0
    for rows in _pieces(len(a)):
        swap = random.random((rows, len(a))) < 0.5
        one = _value(kind, a.sum() + swap @ (b - a), wa.sum() + swap @ (wb - wa))
        other = _value(kind, b.sum() + swap @ (a - b), wb.sum() + swap @ (wa - wb))
        extreme += int((np.abs(other - one) >= abs(seen) - 1e-12).sum())
    return (1 + extreme) / (DRAWS + 1)
