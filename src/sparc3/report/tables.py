"""Tables and comparisons: each metric before and after, methods side by side, all figures, and what is
needed to reproduce them."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from markupsafe import Markup

from ..results import Difference, Measurement, Variant
from .charts import Figure, Scale, drawing, line, mark, tag
from .read import RunFolder
from .words import (
    change,
    change_interval,
    explain,
    interval_of,
    is_share,
    method_title,
    percent,
    plain,
    relative,
    title,
    value_of,
)


class Change(NamedTuple):
    """One metric before and after: the change, also in words; the change net of random units; the smallest
    change that the test could detect; and a drawing of both figures with their intervals."""

    before: Measurement
    after: Measurement
    difference: Difference | None
    words: str
    net: Difference | None
    detects: str
    drawing: Markup


def changes(run: RunFolder) -> list[Change]:
    """The change of every metric measured on the original and on the circuit's model."""
    return [_describe_change(run, *pair) for metric in run.chart_metrics if (pair := run.find_pair(metric))]


def _describe_change(run: RunFolder, before: Measurement, after: Measurement) -> Change:
    d, null, unit = run.difference(after.metric), run.find_null(after.metric), before.unit
    words = ""
    if d is not None and d.is_nothing:
        words = "no change on any sample"
    elif d is not None:
        share = f" ({relative(d.relative)})" if d.relative is not None else ""
        zero = ", zero inside" if d.holds_zero else ""
        words = f"change {change(d, unit)}{share} {change_interval(d, unit)}{zero}".replace(" ,", ",")
    net = run.difference(after.metric, "ablated", null.variant) if null else None
    return Change(before, after, d, words, net, _write_power(run, after), _draw_strip(before, after))


def _draw_strip(before: Measurement, after: Measurement) -> Markup:
    ends = [end for m in (before, after) for end in (m.value, *(m.ci95 or ())) if end is not None]
    scale = Scale.fit(ends, 8, 252, anchor=before.value)
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
    before_text, after_text = (f"{value_of(m)} {interval_of(m)}" for m in (before, after))
    return drawing(260, 30, f"original {before_text}, ablated {after_text}", *rows, class_="pair")


def _draw_interval(m: Measurement, scale: Scale, y: float) -> Markup:
    return line(scale(m.ci95[0]), scale(m.ci95[1]), y, y, "interval") if m.ci95 else Markup("")


def describe_null(run: RunFolder) -> str:
    """The null of the effects, such as "100 random neurons"; "" without one."""
    return run.null_units if any(map(run.find_null, run.metrics)) else ""


def _write_power(run: RunFolder, m: Measurement) -> str:
    """The smallest change that the test detects with 80 % power; "" if unknown."""
    power = next((power for power in run.provenance.power if power.metric == m.metric), None)
    if power is None:
        return ""
    if power.relative:
        return relative(power.detects).lstrip("+")
    return f"{power.detects * 100:.1f} points" if is_share(m.metric, m.unit) else plain(power.detects)


def power_words(run: RunFolder) -> str:
    """ "100 prompts detect a change of mean toxicity of ≥ 3.1 points"; "" if unknown."""
    m = run.find(run.behaviour, "ablated") if run.behaviour else None
    size = _write_power(run, m) if m else ""
    return f"{m.n:,} prompts detect a change of {title(m.metric).lower()} of ≥ {size}" if m and size else ""


def compare_scorers(run: RunFolder) -> list[tuple[str, Measurement, Measurement, Difference]]:
    """(name, before, after, change) of each of two scorers; empty with one scorer."""
    scorers, metric = run.provenance.scorers, "toxicity.mean"
    if scorers is None or len(scorers.means) != 2:
        return []
    rows = []
    for name, mean in zip((scorers.first, scorers.second), scorers.means, strict=True):
        counts = (mean.n, mean.failures, "share", "lower")
        before = Measurement(metric, "original", "test", mean.before, mean.before_ci95, *counts)
        after = Measurement(metric, "ablated", "test", mean.after, mean.after_ci95, *counts)
        change = Difference(metric, "original", "ablated", mean.change or 0.0, None, mean.change_ci95, mean.p)
        rows.append((name, before, after, change))
    return rows


def describe_agreement(run: RunFolder) -> str:
    """How far two scorers agree, in a sentence; "" with one scorer."""
    scorers = run.provenance.scorers
    if scorers is None:
        return ""
    kinds = {"Pearson": scorers.pearson, "Spearman": scorers.spearman}
    parts = [f"{name} correlation {plain(value)}" for name, value in kinds.items() if value is not None]
    if scorers.same_verdict is not None:
        parts.append(f"the same verdict (toxic from 0.5) on {percent(scorers.same_verdict)}")
    return f"On {scorers.n:,} continuations: {', '.join(parts)}."


# Methods side by side: one drawing per metric, with a dot and a 95 % interval for each method.


ROW, LEFT, RIGHT = 34.0, 112.0, 304.0
LONGEST = 22
"""Longer names are cut to this number of characters."""

Rows = list[tuple[str, str, Measurement]]
"""(name, class, figure) of each row; the first is the original."""


def comparisons(run: RunFolder) -> list[Figure]:
    """A drawing for every metric on which another method was measured at the same count, or, in a
    compression, for the largest count of each method."""
    figures = []
    for metric in run.chart_metrics:
        original, after = run.find(metric, "original"), run.find(metric, "ablated")
        if original is None:
            continue
        rows: Rows = [("original", "m-original", original)]
        if run.provenance.job == "compress":
            points = list(run.last_points(metric).values())
        elif run.circuit is not None and after is not None:
            rows.append(("this circuit", "m0", after))
            at_count = [point for point in run.points(metric) if point.count == run.count]
            # The run's own method at the circuit's count is usually the circuit itself, which has its row.
            points = [p for p in at_count if p.method != run.method or p.value != after.value]
            points.sort(key=lambda p: (p.method == "random", p.value))
        else:
            continue
        rows += [(method_title(p.method), run.colours[p.method], p.measurement) for p in points]
        if len(rows) > 2:
            figures.append(_draw_rows(metric, rows))
    return figures


def compare_under_budget(run: RunFolder) -> list[Figure]:
    """Drawings of behaviour and perplexity of every method at its best count within the search's budget."""
    figures = []
    for metric in dict.fromkeys(filter(None, (run.behaviour, "perplexity"))):
        pair = run.find_pair(metric)
        rivals = [(v, m) for v, m in run.rivals_under_budget(metric) if v.count is not None]
        if pair is None or not rivals:
            return []
        own = f"{method_title(run.method)}, {run.count:,}" if run.circuit else "this circuit"
        rows: Rows = [("original", "m-original", pair[0]), (own, "m0", pair[1])]
        for variant, m in rivals:
            name = f"{method_title(variant.method)}, {variant.count:,}"
            rows.append((name, run.colours.get(variant.method, "m6"), m))
        if null := run.find_null(metric):
            rows.append((f"random, {null.count:,}", "mr", null.measurement))
        figures.append(_draw_rows(metric, rows))
    return figures


def _draw_rows(metric: str, rows: Rows) -> Figure:
    left = max(LEFT, 26 + 7 * max(min(len(name), LONGEST) for name, *_ in rows))
    original = rows[0][2]
    ends = [end for *_, m in rows for end in (m.value, *(m.ci95 or ())) if end is not None]
    share = is_share(metric, original.unit)
    scale = Scale.fit(ends, left + 8, RIGHT - 8, share=share, anchor=original.value)
    height, x = ROW * len(rows) + 8, scale(original.value or 0.0)
    parts = [line(x, x, 4, height - 4, "reference")]
    for index, (name, colour, m) in enumerate(rows):
        y = ROW * (index + 0.5) + 4
        short_name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        interval = tag("tspan", f" {interval_of(m)}", class_="faint")
        shapes = [
            tag("text", short_name, x=left - 16, y=y + 4.5, class_="end label"),
            line(left, RIGHT, y, y, "grid"),
            _draw_interval(m, scale, y),
            mark(colour, scale(m.value or 0.0), y, 5.2),
            tag("text", value_of(m), interval, x=RIGHT + 14, y=y + 4.5, class_="label"),
        ]
        parts.append(tag("g", *shapes, class_=f"series {colour}"))
    words = "; ".join(f"{name} {value_of(m)} {interval_of(m)}" for name, _, m in rows)
    svg = drawing(480, height, f"{title(metric)}: {words}", *parts, class_="dots")
    return Figure(title(metric), explain(metric), svg)


# All figures.


class Table(NamedTuple):
    """All figures. Columns are (metric, note on the whole column); rows are (variant, method, cells); a
    cell is (figure, note on this figure), or None."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, str, list[tuple[Measurement, str] | None]]]


def make_table(run: RunFolder) -> Table:
    """A column per metric and split, and a row per variant: the original, the circuit, then each method by
    count."""
    by_column: dict[tuple[str, str], dict[str, Measurement]] = {}
    for m in run.results:
        by_column.setdefault((m.metric, m.split), {})[m.variant] = m
    keys = sorted(by_column, key=lambda key: run.metrics.index(key[0]))
    several_splits = len({split for _, split in by_column}) > 1
    # If all variants have the same n, it is noted once for the column, otherwise at each figure.
    mixed = {key for key in keys if len({m.n for m in by_column[key].values()}) > 1}
    columns = []
    for key in keys:
        m = next(iter(by_column[key].values()))
        notes = (
            m.split if several_splits else "",
            "" if m.metric.startswith(("ioi.", "sparsity")) else f"{m.direction} is better",
            "" if key in mixed else f"n = {m.n:,}",
        )
        columns.append((m.metric, ", ".join(filter(None, notes))))
    variants = {m.variant: Variant.parse(m.variant) for m in run.results}
    methods = list(dict.fromkeys(v.method for v in variants.values()))

    def place(name: str) -> tuple[int, int, int]:
        variant = variants[name]
        if variant.count is None:
            return {"original": 0, "ablated": 1}.get(name, 2), methods.index(name), 0
        rank = (variant.method != run.method) + (variant.method == "random")
        return 3 + rank, methods.index(variant.method), variant.count

    def cell(name: str, key: tuple[str, str]) -> tuple[Measurement, str] | None:
        if (m := by_column[key].get(name)) is None:
            return None
        notes = (f"n = {m.n:,}" if key in mixed else "", f"{m.failures:,} failed" if m.failures else "")
        return m, ", ".join(filter(None, notes))

    ordered = sorted(variants, key=place)
    return Table(
        columns, [(name, variants[name].method, [cell(name, key) for key in keys]) for name in ordered]
    )


# What is needed to reproduce the figures.


def warnings(run: RunFolder) -> list[str]:
    """The run's own warnings, and one for a circuit that is not the one in the results."""
    circuit, measured = run.circuit, run.provenance.circuit
    if circuit is None or measured in (None, circuit.fingerprint):
        return run.provenance.warnings
    description = f"circuit{circuit.suffix} ({circuit.fingerprint})"
    return [
        *run.provenance.warnings,
        f"{description} is not the circuit that results.json measured ({measured})",
    ]


def fingerprints(run: RunFolder) -> dict[str, str]:
    """Name → fingerprint of the model, circuit, scores and samples of the run."""
    circuit = run.circuit.fingerprint if run.circuit else run.provenance.circuit
    names: dict[str, Any] = {"model": run.model["fingerprint"], "circuit": circuit}
    if run.scores is not None:
        sources = run.scores.provenance.get("sources") or {}
        names["contrast scores"] = run.scores.fingerprint
        names |= {f"{name} scores": value for name, value in sources.items()}
    names |= {f"{name} test samples": value for name, value in run.provenance.samples.items()}
    return {name: str(value) for name, value in names.items() if value}


def seeds(run: RunFolder) -> dict[str, str]:
    """Metric → its random seed and sampling settings, in words."""
    keys = ("seed", "generations", "temperature", "max_new_tokens", "scorer", "also")
    descriptions = {}
    for name, settings in run.provenance.metrics.items():
        settings_text = [
            (key.replace("_", " "), settings[key]) for key in keys if settings.get(key) is not None
        ]
        descriptions[name] = ", ".join(f"{key} {write_value(value)}" for key, value in settings_text)
    return {name: words for name, words in descriptions.items() if words}


def flatten(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value in words) of nested settings."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", write_value(value)


def write_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return plain(value)
    return str(value) if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)
