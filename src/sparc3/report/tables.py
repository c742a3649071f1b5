"""Figures side by side: each metric before and after, methods, all figures, what is needed to repeat them."""

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


class Change(NamedTuple):
    """One metric before and after: the change, in words too; that net of random units; the smallest change
    that its samples show; and both figures with their intervals on one small axis."""

    before: Measurement
    after: Measurement
    difference: Difference | None
    words: str
    net: Difference | None
    detects: str
    drawing: Markup


def changes(run: RunFolder) -> list[Change]:
    """Of every metric measured on the original and on the circuit's model."""
    return [_describe_change(run, *pair) for metric in run.drawn if (pair := run.find_pair(metric))]


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
    shown = [end for m in (before, after) for end in (m.value, *(m.ci95 or ())) if end is not None]
    scale = Scale.fit(shown, 8, 252, anchor=before.value)
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
    was, now = (f"{value_of(m)} {interval_of(m)}" for m in (before, after))
    return drawing(260, 30, f"original {was}, ablated {now}", *rows, class_="pair")


def _draw_interval(m: Measurement, scale: Scale, y: float) -> Markup:
    return line(scale(m.ci95[0]), scale(m.ci95[1]), y, y, "interval") if m.ci95 else Markup("")


def describe_null(run: RunFolder) -> str:
    """The random units that effects are told net of: "100 random neurons"; "" without any."""
    return run.null_units if any(map(run.find_null, run.metrics)) else ""


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
    found, metric = run.provenance.scorers, "toxicity.mean"
    if found is None or len(found.means) != 2:
        return []
    rows = []
    for name, one in zip((found.first, found.second), found.means, strict=True):
        rest = (one.n, one.failures, "share", "lower")
        before = Measurement(metric, "original", "test", one.before, one.before_ci95, *rest)
        after = Measurement(metric, "ablated", "test", one.after, one.after_ci95, *rest)
        moved = Difference(metric, "original", "ablated", one.change or 0.0, None, one.change_ci95, one.p)
        rows.append((name, before, after, moved))
    return rows


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


# Methods side by side: a dot and its 95 % interval each, one drawing a metric.


ROW, LEFT, RIGHT = 34.0, 112.0, 304.0
LONGEST = 22
"""Characters of a name; a longer one is cut."""

Rows = list[tuple[str, str, Measurement]]
"""Name, class and figure of each line; the first is the original."""


def comparisons(run: RunFolder) -> list[Figure]:
    """One drawing for every metric that another method was measured on at the same count, or, where weights
    were pruned, at its largest count."""
    made = []
    for metric in run.drawn:
        original, after = run.find(metric, "original"), run.find(metric, "ablated")
        if original is None:
            continue
        rows: Rows = [("original", "m-original", original)]
        if run.provenance.job == "compress":
            points = list(run.last_points(metric).values())
        elif run.circuit is not None and after is not None:
            rows.append(("this circuit", "m0", after))
            here = [point for point in run.points(metric) if point.count == run.count]
            points = [p for p in here if p.method != run.method or p.value != after.value]
            points.sort(key=lambda p: (p.method == "random", p.value))
        else:
            continue
        rows += [(method_title(p.method), run.colours[p.method], p.measurement) for p in points]
        if len(rows) > 2:
            made.append(_draw_rows(metric, rows))
    return made


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
        shown = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        interval = tag("tspan", f" {interval_of(m)}", class_="faint")
        shapes = [
            tag("text", shown, x=left - 16, y=y + 4.5, class_="end label"),
            line(left, RIGHT, y, y, "grid"),
            _draw_interval(m, scale, y),
            mark(colour, scale(m.value or 0.0), y, 5.2),
            tag("text", value_of(m), interval, x=RIGHT + 14, y=y + 4.5, class_="label"),
        ]
        parts.append(tag("g", *shapes, class_=f"series {colour}"))
    words = "; ".join(f"{name} {value_of(m)} {interval_of(m)}" for name, _, m in rows)
    drawn = drawing(480, height, f"{title(metric)}: {words}", *parts, class_="dots")
    return Figure(title(metric), explained(metric), drawn)


# All figures.


class Table(NamedTuple):
    """Columns are (metric, what holds for all of it); rows are (variant, method, cells), a cell a figure and
    what its column does not say, or None."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, str, list[tuple[Measurement, str] | None]]]


def make_table(run: RunFolder) -> Table:
    """A column a metric and split; a row a variant: the original, the circuit, then each method by count."""
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for m in run.results:
        found.setdefault((m.metric, m.split), {})[m.variant] = m
    keys = sorted(found, key=lambda key: run.metrics.index(key[0]))
    several = len({split for _, split in found}) > 1
    mixed = {key for key in keys if len({m.n for m in found[key].values()}) > 1}
    columns = []
    for key in keys:
        m = next(iter(found[key].values()))
        told = (
            m.split if several else "",
            "" if m.metric.startswith(("ioi.", "sparsity")) else f"{m.direction} is better",
            "" if key in mixed else f"n = {m.n:,}",
        )
        columns.append((m.metric, ", ".join(filter(None, told))))
    named = {m.variant: Variant.parse(m.variant) for m in run.results}
    methods = list(dict.fromkeys(v.method for v in named.values()))

    def place(name: str) -> tuple[int, int, int]:
        variant = named[name]
        if variant.count is None:
            return {"original": 0, "ablated": 1}.get(name, 2), methods.index(name), 0
        later = (variant.method != run.method) + (variant.method == "random")
        return 3 + later, methods.index(variant.method), variant.count

    def cell(name: str, key: tuple[str, str]) -> tuple[Measurement, str] | None:
        if (m := found[key].get(name)) is None:
            return None
        told = (f"n = {m.n:,}" if key in mixed else "", f"{m.failures:,} failed" if m.failures else "")
        return m, ", ".join(filter(None, told))

    ordered = sorted(named, key=place)
    return Table(columns, [(name, named[name].method, [cell(name, key) for key in keys]) for name in ordered])


# What is needed to make them again.


def warnings(run: RunFolder) -> list[str]:
    """The run's own warnings, and what does not fit together in its folder."""
    circuit, named = run.circuit, run.provenance.circuit
    if circuit is None or named in (None, circuit.fingerprint):
        return run.provenance.warnings
    here = f"circuit{circuit.suffix} ({circuit.fingerprint})"
    return [*run.provenance.warnings, f"{here} is not the circuit that results.json measured ({named})"]


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
    keys = ("seed", "generations", "temperature", "max_new_tokens", "scorer", "also")
    found = {}
    for name, settings in run.provenance.metrics.items():
        told = [(key.replace("_", " "), settings[key]) for key in keys if settings.get(key) is not None]
        found[name] = ", ".join(f"{key} {write_value(value)}" for key, value in told)
    return {name: words for name, words in found.items() if words}


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
