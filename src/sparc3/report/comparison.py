"""Original, circuit and rival methods side by side: the tiles under the headline, and an interval for each
method."""

from dataclasses import dataclass

from markupsafe import Markup

from ..results import Measurement
from .charts import Figure, Scale, drawing, mark, tag
from .read import RunFolder
from .variant_names import (
    Point,
    curve_points,
    find_null,
    list_methods,
    method_colours,
    method_title,
    parse_variant,
)
from .words import change, change_interval, explained, interval_of, is_share, relative, title, value_of

# The tiles under the headline: each metric before and after, with both intervals on one small axis.


@dataclass(frozen=True)
class Tile:
    """One metric: two figures, their drawing, and the change."""

    title: str
    explained: str
    before: str
    after: str
    before_interval: str
    after_interval: str
    change: str
    drawing: Markup


def tiles(run: RunFolder) -> list[Tile]:
    """A tile for every metric that was measured on the original and on the ablated model, what the run is
    about first."""
    both = [
        (run.find_measurement(metric, "original"), run.find_measurement(metric, "ablated"))
        for metric in run.drawn()
    ]
    return [_make_tile(run, before, after) for before, after in both if before and after]


def _make_tile(run: RunFolder, before: Measurement, after: Measurement) -> Tile:
    return Tile(
        title(before.metric),
        explained(before.metric),
        value_of(before),
        value_of(after),
        interval_of(before),
        interval_of(after),
        _describe_change(run, before),
        _draw_strip(before, after),
    )


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
        _draw_strip_row(m, scale, y, colour)
        for m, y, colour in ((before, 8.0, "m-original"), (after, 22.0, "m0"))
    ]
    return drawing(260, 30, label, *rows, class_="pair")


def _draw_strip_row(m: Measurement, scale: Scale, y: float, colour: str) -> Markup:
    track = tag("line", x1=8, x2=252, y1=y, y2=y, class_="grid")
    ends = (
        [tag("line", x1=scale(m.ci95[0]), x2=scale(m.ci95[1]), y1=y, y2=y, class_="interval")]
        if m.ci95
        else []
    )
    return tag(
        "g",
        track,
        *ends,
        tag("circle", cx=scale(m.value or 0.0), cy=y, r=4.5, class_="dot"),
        class_=f"series {colour}",
    )


# Methods side by side at the circuit's own count: a dot and its 95 % interval each, one drawing a metric.


WIDTH, ROW = 480.0, 34.0
LEFT, RIGHT = 112.0, 304.0
LONGEST = 22
"""Characters of a name; a longer one is cut."""


def comparisons(run: RunFolder) -> list[Figure]:
    """One drawing for every metric that another method was measured on at the same count."""
    return [
        _draw_figure(run, metric, rows)
        for metric in run.drawn()
        if len(rows := _collect_rows(run, metric)) > 2
    ]


def under_budget(run: RunFolder) -> list[Figure]:
    """What the run is about, and its damage, of every method at the count that was its best within the budget
    on validation samples."""
    named_rivals = [str(one.get("variant")) for one in run.search.get("rivals") or []]
    made = []
    for metric in dict.fromkeys(filter(None, (run.behaviour, "perplexity"))):
        original, circuit = run.find_measurement(metric, "original"), run.find_measurement(metric, "ablated")
        found = [
            (name, m)
            for variant in named_rivals
            if (m := run.find_measurement(metric, variant)) and (name := parse_variant(variant))
        ]
        if original is None or circuit is None or not found:
            return []
        own = f"{method_title(run.method or '')}, {len(run.circuit):,}" if run.circuit else "this circuit"
        rows = [
            (f"{method_title(name[0])}, {name[1]:,}", method_colours(run).get(name[0], "m6"), m)
            for name, m in found
        ]
        random = find_null(run, metric)
        null = [(f"random, {random.count:,}", "mr", random.measurement)] if random else []
        made.append(
            _draw_figure(
                run, metric, [("original", "m-original", original), (own, "m0", circuit), *rows, *null]
            )
        )
    return made


def _collect_rows(run: RunFolder, metric: str) -> list[tuple[str, str, Measurement]]:
    """(name, class, measurement): the original, this circuit, then every method at its count that is not this
    circuit again."""
    original, circuit = run.find_measurement(metric, "original"), run.find_measurement(metric, "ablated")
    if original is not None and run.job == "compress":
        last = {point.method: point for point in curve_points(run, metric)}
        return [
            ("original", "m-original", original),
            *(
                (method_title(m), method_colours(run)[m], last[m].measurement)
                for m in list_methods(run)
                if m in last
            ),
        ]
    if run.circuit is None or original is None or circuit is None:
        return []
    count = len(run.circuit)
    here = [
        p for p in curve_points(run, metric) if p.count == count and not _is_circuit_again(p, run, circuit)
    ]
    here.sort(key=lambda p: (p.method == "random", p.measurement.value or 0.0))
    given = method_colours(run)
    others = [(method_title(p.method), given[p.method], p.measurement) for p in here]
    return [("original", "m-original", original), ("this circuit", "m0", circuit), *others]


def _is_circuit_again(point: Point, run: RunFolder, circuit: Measurement) -> bool:
    return point.method == run.method and point.measurement.value == circuit.value


def _draw_figure(run: RunFolder, metric: str, rows: list[tuple[str, str, Measurement]]) -> Figure:
    left = max(LEFT, 26 + 7 * max(min(len(name), LONGEST) for name, *_ in rows))
    scale = _choose_scale([m for *_, m in rows], left)
    height = ROW * len(rows) + 8
    x = scale(rows[0][2].value or 0.0)
    reference = tag("line", x1=x, x2=x, y1=4, y2=height - 4, class_="reference")
    lines = [
        _draw_row(name, colour, m, scale, ROW * (index + 0.5) + 4, left)
        for index, (name, colour, m) in enumerate(rows)
    ]
    words = "; ".join(f"{name} {value_of(m)} {interval_of(m)}" for name, _, m in rows)
    return Figure(
        title(metric),
        explained(metric),
        drawing(WIDTH, height, f"{title(metric)}: {words}", reference, *lines, class_="dots"),
    )


def _draw_row(name: str, colour: str, m: Measurement, scale: Scale, y: float, left: float) -> Markup:
    parts = [
        tag(
            "text",
            name if len(name) <= LONGEST else name[: LONGEST - 1] + "…",
            x=left - 16,
            y=y + 4.5,
            class_="end label",
        )
    ]
    parts.append(tag("line", x1=left, x2=RIGHT, y1=y, y2=y, class_="grid"))
    if m.ci95:
        parts.append(tag("line", x1=scale(m.ci95[0]), x2=scale(m.ci95[1]), y1=y, y2=y, class_="interval"))
    parts.append(mark(colour, scale(m.value or 0.0), y, 5.2))
    parts.append(
        tag(
            "text",
            value_of(m),
            tag("tspan", f" {interval_of(m)}", class_="faint"),
            x=RIGHT + 14,
            y=y + 4.5,
            class_="label",
        )
    )
    return tag("g", *parts, class_=f"series {colour}")


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
