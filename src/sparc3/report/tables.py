"""Figures side by side: tiles, how sure a change is, methods, all figures, what is needed to repeat them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..results import Difference, Measurement, ScorerMeans, Variant
from .charts import Figure, Scale, drawing, line, mark, tag
from .read import RunFolder
from .words import (
    change,
    change_interval,
    count_units,
    explained,
    interval_of,
    is_share,
    method_title,
    percent,
    plain,
    relative,
    title,
    value_of,
)

# The tiles under the headline: each metric before and after, with both intervals on one small axis.


@dataclass(frozen=True)
class Tile:
    """One metric: its two figures, the change in words, and a drawing."""

    before: Measurement
    after: Measurement
    change: str
    drawing: Markup


def tiles(run: RunFolder) -> list[Tile]:
    """A tile for every metric measured on the original and on the ablated model."""
    pairs = [pair for metric in run.drawn if (pair := run.find_pair(metric))]
    return [Tile(*pair, _describe_change(run, pair[0]), _draw_strip(*pair)) for pair in pairs]


def _describe_change(run: RunFolder, m: Measurement) -> str:
    d = run.difference(m.metric)
    if d is None or d.is_nothing:
        return "" if d is None else "no change on any sample"
    share = f" ({relative(d.relative)})" if d.relative is not None else ""
    zero = ", zero inside" if d.holds_zero else ""
    return f"change {change(d, m.unit)}{share} {change_interval(d, m.unit)}{zero}".replace(" ,", ",")


def _draw_strip(before: Measurement, after: Measurement) -> Markup:
    shown = [end for m in (before, after) for end in (m.value, *(m.ci95 or ())) if end is not None]
    low, high = min(shown), max(shown)
    room = max(high - low, 0.02 * abs(high), 1e-9)
    scale = Scale((low + high - room) / 2, (low + high + room) / 2, 8, 252)
    label = (
        f"original {value_of(before)} {interval_of(before)}, ablated {value_of(after)} {interval_of(after)}"
    )
    rows = [
        tag(
            "g",
            line(8, 252, y, y, "grid"),
            _draw_interval(m, scale, y),
            tag("circle", cx=scale(m.value or 0.0), cy=y, r=4.5, class_="dot"),
            class_=f"series {colour}",
        )
        for m, y, colour in ((before, 8.0, "m-original"), (after, 22.0, "m0"))
    ]
    return drawing(260, 30, label, *rows, class_="pair")


def _draw_interval(m: Measurement, scale: Scale, y: float) -> Markup:
    return line(scale(m.ci95[0]), scale(m.ci95[1]), y, y, "interval") if m.ci95 else Markup("")


# How sure it is: every change, net of random units, with what the samples could have shown; and two scorers.


@dataclass(frozen=True)
class Proof:
    """One metric: two figures, the change, that net of random units, and the smallest its samples show."""

    before: Measurement
    after: Measurement
    change: Difference | None
    net: Difference | None
    detects: str


def proofs(run: RunFolder) -> list[Proof]:
    """A row for every metric measured on the original and on the circuit's model."""
    pairs = [pair for metric in run.drawn if (pair := run.find_pair(metric))]
    return [
        Proof(
            *pair, run.difference(pair[1].metric), _find_net(run, pair[1].metric), _write_power(run, pair[1])
        )
        for pair in pairs
    ]


def _find_net(run: RunFolder, metric: str) -> Difference | None:
    null = run.find_null(metric)
    return run.difference(metric, "ablated", null.variant) if null else None


def describe_null(run: RunFolder) -> str:
    """The random units that effects are told net of: "100 random neurons"; "" without any."""
    null = next(filter(None, map(run.find_null, run.metrics)), None)
    return f"{null.count:,} random {count_units(null.count, run)}" if null else ""


def _write_power(run: RunFolder, m: Measurement) -> str:
    """The smallest change that the samples show with 80 % power; "" where nothing says."""
    found = next((one for one in run.provenance.power if one.metric == m.metric), None)
    if found is None:
        return ""
    if found.relative:
        return relative(found.detects).lstrip("+")
    return f"{found.detects * 100:.1f} points" if is_share(m.metric, m.unit) else plain(found.detects)


def power_words(run: RunFolder) -> str:
    """ "100 prompts detect a change of mean toxicity of ≥ 3.1 points"; "" where nothing says."""
    m = run.find(run.behaviour, "ablated") if run.behaviour else None
    size = _write_power(run, m) if m else ""
    return f"{m.n:,} prompts detect a change of {title(m.metric).lower()} of ≥ {size}" if m and size else ""


def compare_scorers(run: RunFolder) -> list[tuple[str, Measurement, Measurement, Difference]]:
    """(name, before, after, change) of either scorer; none where one scorer judged."""
    found = run.provenance.scorers
    if found is None or len(found.means) != 2:
        return []
    return [
        (name, *_read_means(one)) for name, one in zip((found.first, found.second), found.means, strict=True)
    ]


def _read_means(row: ScorerMeans) -> tuple[Measurement, Measurement, Difference]:
    metric = "toxicity.mean"
    before, after = (
        Measurement(metric, variant, "test", mean, ci95, row.n, row.failures, "share", "lower")
        for variant, mean, ci95 in (
            ("original", row.before, row.before_ci95),
            ("ablated", row.after, row.after_ci95),
        )
    )
    change = Difference(metric, "original", "ablated", row.change or 0.0, None, row.change_ci95, row.p)
    return before, after, change


def describe_agreement(run: RunFolder) -> str:
    """How far two scorers agree, in a sentence; "" where one scorer judged."""
    found = run.provenance.scorers
    if found is None:
        return ""
    kinds = {"Pearson": found.pearson, "Spearman": found.spearman}
    parts = [f"{name} correlation {plain(value)}" for name, value in kinds.items() if value is not None]
    if found.same_verdict is not None:
        parts.append(f"the same verdict (toxic from 0.5) on {percent(found.same_verdict)}")
    return f"On {found.n:,} continuations: {', '.join(parts)}."


# Methods side by side at the circuit's own count: a dot and its 95 % interval each, one drawing a metric.


WIDTH, ROW = 480.0, 34.0
LEFT, RIGHT = 112.0, 304.0
LONGEST = 22
"""Characters of a name; a longer one is cut."""

Rows = list[tuple[str, str, Measurement]]
"""Name, class and figure of each line; the first is the original."""


def comparisons(run: RunFolder) -> list[Figure]:
    """One drawing for every metric that another method was measured on at the same count."""
    collect = _collect_last if run.job == "compress" else _collect_same_count
    return [_draw_rows(metric, rows) for metric in run.drawn if len(rows := collect(run, metric)) > 2]


def compare_under_budget(run: RunFolder) -> list[Figure]:
    """The behaviour and perplexity of every method at its best count in the search, within the budget."""
    made = []
    for metric in dict.fromkeys(filter(None, (run.behaviour, "perplexity"))):
        pair = run.find_pair(metric)
        found = [(v, m) for v, m in run.budgeted(metric) if v.count is not None]
        if pair is None or not found:
            return []
        own = f"{method_title(run.method)}, {run.count:,}" if run.circuit else "this circuit"
        rows: Rows = [("original", "m-original", pair[0]), (own, "m0", pair[1])]
        for variant, m in found:
            name = f"{method_title(variant.method)}, {variant.count:,}"
            rows.append((name, run.colours.get(variant.method, "m6"), m))
        if null := run.find_null(metric):
            rows.append((f"random, {null.count:,}", "mr", null.measurement))
        made.append(_draw_rows(metric, rows))
    return made


def _collect_last(run: RunFolder, metric: str) -> Rows:
    """The original, then every method at its largest count."""
    original = run.find(metric, "original")
    last = run.last_points(metric).items()
    rows = [(method_title(method), run.colours[method], point.measurement) for method, point in last]
    return [("original", "m-original", original), *rows] if original else []


def _collect_same_count(run: RunFolder, metric: str) -> Rows:
    """The original, this circuit, then every method at its count that is not this circuit again."""
    pair = run.find_pair(metric)
    if run.circuit is None or pair is None:
        return []
    here = [
        p
        for p in run.points(metric)
        if p.count == run.count and not (p.method == run.method and p.value == pair[1].value)
    ]
    here.sort(key=lambda p: (p.method == "random", p.value))
    others = [(method_title(p.method), run.colours[p.method], p.measurement) for p in here]
    return [("original", "m-original", pair[0]), ("this circuit", "m0", pair[1]), *others]


def _draw_rows(metric: str, rows: Rows) -> Figure:
    left = max(LEFT, 26 + 7 * max(min(len(name), LONGEST) for name, *_ in rows))
    scale = _choose_scale([m for *_, m in rows], left)
    height = ROW * len(rows) + 8
    x = scale(rows[0][2].value or 0.0)
    lines = [
        _draw_row(name, colour, m, scale, ROW * (index + 0.5) + 4, left)
        for index, (name, colour, m) in enumerate(rows)
    ]
    words = "; ".join(f"{name} {value_of(m)} {interval_of(m)}" for name, _, m in rows)
    label = f"{title(metric)}: {words}"
    drawn = drawing(WIDTH, height, label, line(x, x, 4, height - 4, "reference"), *lines, class_="dots")
    return Figure(title(metric), explained(metric), drawn)


def _draw_row(name: str, colour: str, m: Measurement, scale: Scale, y: float, left: float) -> Markup:
    shown = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    interval = tag("tspan", f" {interval_of(m)}", class_="faint")
    return tag(
        "g",
        tag("text", shown, x=left - 16, y=y + 4.5, class_="end label"),
        line(left, RIGHT, y, y, "grid"),
        _draw_interval(m, scale, y),
        mark(colour, scale(m.value or 0.0), y, 5.2),
        tag("text", value_of(m), interval, x=RIGHT + 14, y=y + 4.5, class_="label"),
        class_=f"series {colour}",
    )


def _choose_scale(shown: list[Measurement], left: float) -> Scale:
    """Shares start at zero; anything else gets the room it needs, and a runaway a logarithm."""
    ends = [end for m in shown for end in (m.ci95 or ())] + [m.value for m in shown if m.value is not None]
    low, high = min(ends), max(ends)
    if is_share(shown[0].metric, shown[0].unit) and low >= 0:
        return Scale(0.0, max(high, 1e-9), left + 8, RIGHT - 8)
    anchor = abs(shown[0].value or 0.0)
    if low > 0 and high > 5 * anchor:
        return Scale(low, high, left + 8, RIGHT - 8, log=True)
    room = max(high - low, 0.05 * anchor, 1e-9)
    middle = (high + low) / 2
    return Scale(middle - room / 2, middle + room / 2, left + 8, RIGHT - 8)


# All figures.


@dataclass(frozen=True)
class Column:
    """One metric on one split; `note` says what holds for all of it."""

    metric: str
    split: str
    note: str


@dataclass(frozen=True)
class Row:
    """One variant; `group` changes with the method; a cell is a figure and what its column does not say."""

    variant: str
    group: str
    cells: list[tuple[Measurement, str] | None]


def columns(run: RunFolder) -> list[Column]:
    found: dict[tuple[str, str], list[Measurement]] = {}
    for m in run.results:
        found.setdefault((m.metric, m.split), []).append(m)
    several = len({split for _, split in found}) > 1
    ordered = sorted(found.items(), key=lambda item: run.metrics.index(item[0][0]))
    return [Column(*key, _describe_column(shown, several)) for key, shown in ordered]


def _describe_column(shown: list[Measurement], several_splits: bool) -> str:
    """What holds for a whole column: its split, which way is better, how many units each figure rests on."""
    m = shown[0]
    split = [m.split] if several_splits else []
    better = [f"{m.direction} is better"] if not m.metric.startswith(("ioi.", "sparsity")) else []
    same = [f"n = {m.n:,}"] if len({one.n for one in shown}) == 1 else []
    return ", ".join(split + better + same)


def rows(run: RunFolder) -> list[Row]:
    """A row a variant: the original, the circuit, then each method by count."""
    found: dict[str, dict[tuple[str, str], Measurement]] = {}
    for m in run.results:
        found.setdefault(m.variant, {})[m.metric, m.split] = m
    named = {name: Variant.parse(name) for name in found}
    methods = list(dict.fromkeys(v.method for v in named.values()))

    def place(name: str) -> tuple[int, int, int]:
        variant = named[name]
        if variant.count is None:
            return {"original": 0, "ablated": 1}.get(name, 2), methods.index(name), 0
        later = (variant.method != run.method) + (variant.method == "random")
        return 3 + later, methods.index(variant.method), variant.count

    keys = [(column.metric, column.split) for column in columns(run)]
    mixed = {key for key in keys if len({of[key].n for of in found.values() if key in of}) > 1}
    return [
        Row(name, named[name].method, [_make_cell(found[name].get(key), key in mixed) for key in keys])
        for name in sorted(found, key=place)
    ]


def _make_cell(m: Measurement | None, with_n: bool) -> tuple[Measurement, str] | None:
    if m is None:
        return None
    counts = ([f"n = {m.n:,}"] if with_n else []) + ([f"{m.failures:,} failed"] if m.failures else [])
    return m, ", ".join(counts)


# What is needed to make them again.


def time_stages(run: RunFolder) -> list[tuple[str, float, float]]:
    """(name, seconds, width of its bar in percent)."""
    longest = max((one.seconds for one in run.provenance.stages), default=0.0) or 1.0
    return [(one.name, one.seconds, one.seconds / longest * 100) for one in run.provenance.stages]


def checks(run: RunFolder) -> list[tuple[str, str, bool | None]]:
    """(name, value, passed) of each check; None is a check that passes no judgement."""
    return [(one.name, _write_value(one.value), one.ok) for one in run.provenance.checks]


def warnings(run: RunFolder) -> list[str]:
    """The run's own warnings, and what does not fit together in its folder."""
    circuit, named = run.circuit, run.provenance.circuit
    if circuit is None or named in (None, circuit.fingerprint):
        return run.provenance.warnings
    here = f"circuit{circuit.suffix} ({circuit.fingerprint})"
    said = f"{here} is not the circuit that results.json measured ({named})"
    return [*run.provenance.warnings, said]


def fingerprints(run: RunFolder) -> dict[str, str]:
    """Everything that names what this run was made of, circuit first."""
    circuit = run.circuit.fingerprint if run.circuit else run.provenance.circuit
    found: dict[str, Any] = {"model": run.model["fingerprint"], "circuit": circuit}
    if run.scores is not None:
        sources = run.scores.provenance.get("sources") or {}
        found["contrast scores"] = run.scores.fingerprint
        found |= {f"{name} scores": value for name, value in sources.items()}
    found |= {f"{name} test samples": value for name, value in run.provenance.samples.items()}
    return {name: str(value) for name, value in found.items() if value}


def seeds(run: RunFolder) -> dict[str, str]:
    """What made the evaluation's dice fall as they did: metric → its seed, and how it wrote."""
    found = {}
    keys = ("seed", "generations", "temperature", "max_new_tokens", "scorer", "also")
    for name, settings in run.provenance.metrics.items():
        told = {key: settings[key] for key in keys if settings.get(key) is not None}
        found[name] = ", ".join(
            f"{key.replace('_', ' ')} {_write_value(value)}" for key, value in told.items()
        )
    return {name: words for name, words in found.items() if words}


def environment(run: RunFolder) -> dict[str, str]:
    return dict(_flatten(run.environment))


def _flatten(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", _write_value(value)


def _write_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return plain(value)
    return str(value) if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)
