"""How sure it is: every metric's change, net of random units, with what the samples could have shown; and two
scorers side by side."""

from dataclasses import dataclass
from typing import Any

from ..results import Difference
from .read import RunFolder
from .variant_names import count_units, find_null
from .words import (
    change,
    change_interval,
    explained,
    figure,
    format_p,
    interval,
    is_share,
    percent,
    plain,
    relative,
    title,
    value_of,
)


@dataclass(frozen=True)
class Moved:
    """A difference as it is write_mean; `sure` is None without an interval."""

    change: str
    interval: str
    p: str
    sure: bool | None


@dataclass(frozen=True)
class Proof:
    """One metric: what it was and is, its change, the change net of random units, and what its samples could
    have shown."""

    title: str
    explained: str
    before: str
    after: str
    moved: Moved | None
    net: Moved | None
    n: int
    detects: str
    failures: int


@dataclass(frozen=True)
class Scorer:
    """What one scorer says of the same texts."""

    name: str
    before: str
    after: str
    moved: Moved


@dataclass(frozen=True)
class Scorers:
    """Two of them, and how far they agree."""

    rows: list[Scorer]
    agreement: str


def proofs(run: RunFolder) -> list[Proof]:
    """A row for every metric measured on the original and on the circuit's model."""
    both = [
        metric
        for metric in run.drawn()
        if run.find_measurement(metric, "original") and run.find_measurement(metric, "ablated")
    ]
    return [_make_proof(run, metric) for metric in both]


def describe_null(run: RunFolder) -> str:
    """The random units that effects are told net of: "100 random neurons, the mean of 3 draws"; "" without
    any."""
    null = next(filter(None, (find_null(run, metric) for metric in run.metrics())), None)
    return f"{null.count:,} random {count_units(null.count, run)}" if null else ""


def _make_proof(run: RunFolder, metric: str) -> Proof:
    before, after = run.results.find(metric), run.results.find(metric, "ablated")
    null = find_null(run, metric)
    net = run.difference(metric, "ablated", null.variant) if null else None
    return Proof(
        title(metric),
        explained(metric),
        value_of(before),
        value_of(after),
        _write_move(run.difference(metric), after.unit),
        _write_move(net, after.unit),
        after.n,
        _write_detectable_change(run, metric, after.unit),
        before.failures + after.failures,
    )


def _write_move(d: Difference | None, unit: str) -> Moved | None:
    if d is None or d.is_nothing:
        return None if d is None else Moved("no change", "", "", None)
    return Moved(
        change(d, unit), change_interval(d, unit), format_p(d.p), None if d.ci95 is None else not d.holds_zero
    )


def _write_detectable_change(run: RunFolder, metric: str, unit: str) -> str:
    """The smallest change that the samples show with 80 % power."""
    found = next((one for one in run.provenance.get("power") or [] if one.get("metric") == metric), None)
    if found is None:
        return ""
    size = float(found["detects"])
    if found.get("relative"):
        return relative(size).lstrip("+")
    return f"{size * 100:.1f} points" if is_share(metric, unit) else plain(size)


def power_words(run: RunFolder) -> str:
    """ "100 prompts detect a change of mean toxicity of 3.1 points or more"; "" where nothing says."""
    metric = run.behaviour
    m = run.find_measurement(metric, "ablated") if metric else None
    size = _write_detectable_change(run, metric, m.unit) if metric and m else ""
    return (
        f"{m.n:,} prompts detect a change of {title(str(metric)).lower()} of ≥ {size}" if m and size else ""
    )


def scorers(run: RunFolder) -> Scorers | None:
    """None where one scorer judged."""
    found = run.provenance.get("scorers") or {}
    means = found.get("means") or []
    if len(means) != 2:
        return None
    rows = [
        _make_scorer(str(found.get(name)), row) for name, row in zip(("first", "second"), means, strict=True)
    ]
    kinds = [(name, found.get(name.lower())) for name in ("Pearson", "Spearman")]
    parts = [f"{name} correlation {plain(value)}" for name, value in kinds if value is not None]
    same = found.get("same_verdict")
    parts += [f"the same verdict (toxic from 0.5) on {percent(same)}"] if same is not None else []
    return Scorers(rows, f"On {int(found.get('n') or 0):,} continuations: {', '.join(parts)}.")


def _make_scorer(name: str, row: dict[str, Any]) -> Scorer:
    def write_mean(which: str) -> str:
        ends = row.get(f"{which}_ci95")
        value = figure(row.get(which), "toxicity.mean")
        return f"{value} {interval(tuple(ends) if ends else None, 'toxicity.mean')}".strip()

    ends = row.get("change_ci95")
    moved = Difference(
        "toxicity.mean",
        "original",
        "ablated",
        row.get("change") or 0.0,
        None,
        tuple(ends) if ends else None,
        row.get("p"),
    )
    change_written = _write_move(moved, "")
    assert change_written
    return Scorer(name, write_mean("before"), write_mean("after"), change_written)
