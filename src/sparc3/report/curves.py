"""Curves: a metric against the number of removed units, a line a method, its 95 % interval as a band."""

from dataclasses import dataclass

from markupsafe import Markup

from ..results import Measurement
from .charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Figure,
    Scale,
    drawing,
    mark,
    number,
    polyline,
    tag,
)
from .read import RunFolder
from .variant_names import Point, count_units, curve_points, list_methods, method_colours, method_title
from .words import PERCENT, explained, is_share, percent, title, value_of, with_interval


@dataclass(frozen=True)
class Plot:
    """What the parts of one figure share."""

    run: RunFolder
    metric: str
    lines: dict[str, list[Point]]
    original: Measurement | None
    circuit: Measurement | None
    chart: Chart

    @property
    def counts(self) -> list[int]:
        return sorted({point.count for line in self.lines.values() for point in line})

    @property
    def unit(self) -> str:
        return next((point.measurement.unit for line in self.lines.values() for point in line), "")


def curves(run: RunFolder) -> list[Figure]:
    """A figure for every metric that was measured at two counts or more; sparsity follows from the count and
    gets none."""
    return [_draw_figure(plot) for metric in run.drawn() if (plot := _make_plot(run, metric))]


def _make_plot(run: RunFolder, metric: str) -> Plot | None:
    found = curve_points(run, metric)
    counts = {point.count for point in found}
    if len(counts) < 2:
        return None
    lines = {
        method: line
        for method in list_methods(run)
        if (line := [point for point in found if point.method == method])
    }
    original, circuit = run.find_measurement(metric, "original"), run.find_measurement(metric, "ablated")
    low, high = min(counts), max(counts)
    # Where most units go, what counts is how few are left: even steps there, a logarithm where few go.
    few = high <= 0.5 * sum(run.sizes.values()) or not run.sizes
    x = Scale(low, high, LEFT + 14, RIGHT - 10, log=few and low > 0 and high / low > 5)
    shown = [*(point.measurement for point in found), *(m for m in (original, circuit) if m)]
    ends = [end for m in shown for end in ends_of(run, m) or ()]
    return Plot(run, metric, lines, original, circuit, Chart(x, _scale_values(shown, ends, original)))


def ends_of(run: RunFolder, m: Measurement) -> tuple[float, float] | None:
    """The interval that is drawn: of the figure; of perplexity, whose texts differ far more than variants do,
    of its paired change."""
    before, d = run.find_measurement(m.metric, "original"), run.difference(m.metric, m.variant)
    if m.metric != "perplexity" or before is None or before.value is None:
        return m.ci95
    return (
        (before.value + d.ci95[0], before.value + d.ci95[1])
        if d and d.ci95
        else None
        if m.variant == "original"
        else m.ci95
    )


def _scale_values(shown: list[Measurement], ends: list[float], original: Measurement | None) -> Scale:
    """From the lowest to the highest end of an interval; logarithmic where one method runs away, from zero
    for shares."""
    values = [m.value for m in shown if m.value is not None]
    low, high = min(values + ends), max(values + ends)
    first = shown[0]
    if is_share(first.metric, first.unit) and low >= 0:
        return Scale(0.0, min(1.0, high * 1.06) if high > 0 else 1.0, BOTTOM, TOP)
    anchor = original.value if original and original.value else values[0]
    if min(values) > 0 and max(values) > 8 * abs(anchor) and low > 0:
        return Scale(low * 0.9, high * 1.1, BOTTOM, TOP, log=True)
    room = max(high - low, 0.01 * abs(anchor), 1e-9)
    middle = (high + low) / 2
    return Scale(middle - 0.56 * room, middle + 0.56 * room, BOTTOM, TOP)


def _draw_figure(plot: Plot) -> Figure:
    units = count_units(None, plot.run)
    label = f"{title(plot.metric)} against the number of removed {units}; arrow keys step through the counts"
    tips = {f"{plot.metric}@{count}": _make_tip(plot, count) for count in plot.counts}
    value = plot.original.value if plot.original else None
    parts = [
        _draw_axes(plot),
        *([] if value is None else [plot.chart.draw_reference(value)]),
        *(_draw_band(plot, method) for method in plot.lines),
        *(_draw_line(plot, method) for method in plot.lines),
        _ring_circuit(plot),
        _label_lines(plot),
        *_draw_columns(plot),
    ]
    return Figure(
        title(plot.metric), _write_note(plot), drawing(WIDTH, HEIGHT, label, *parts, class_="curve"), tips
    )


def _write_note(plot: Plot) -> str:
    """What the metric is and which way is better; of a task, whose circuit is found by what its removal
    breaks, only the first."""
    direction = next(point.measurement.direction for line in plot.lines.values() for point in line)
    better = "" if plot.metric.startswith("ioi.") else f"{direction} is better"
    measured_in = plot.unit if plot.unit.startswith("nats") else ""
    shaded = (
        "shaded, the paired change from the original"
        if plot.metric == "perplexity" and plot.run.difference(plot.metric)
        else ""
    )
    return "; ".join(part for part in (explained(plot.metric), measured_in, better, shaded) if part)


def _draw_axes(plot: Plot) -> Markup:
    y = plot.chart.y
    heights = [(y(tick), _write_tick(tick, plot)) for tick in y.ticks(5)]
    label = f"{'share of ' if _shows_shares(plot) else ''}{count_units(None, plot.run)} removed"
    return plot.chart.draw_axes(_choose_ticks(plot), heights, label)


def _shows_shares(plot: Plot) -> bool:
    total = sum(plot.run.sizes.values())
    return bool(total) and max(plot.counts) > 0.5 * total


def _choose_ticks(plot: Plot) -> list[tuple[float, str]]:
    """(place, text) of the counts, or of round shares where most units go, that do not run into the one
    before."""
    total = sum(plot.run.sizes.values())
    shares = (
        [step / 10 for step in range(11) if plot.chart.x.low <= total * step / 10 <= plot.chart.x.high]
        if _shows_shares(plot)
        else []
    )
    every = [(plot.chart.x(share * total), f"{share * 100:.0f}{PERCENT}") for share in shares] or [
        (plot.chart.x(n), f"{n:,}") for n in plot.counts
    ]
    kept: list[tuple[float, str]] = []
    for x, text in every:
        if not kept or x - kept[-1][0] > 8 + 4 * (len(text) + len(kept[-1][1])):
            kept.append((x, text))
    return kept


def _write_tick(value: float, plot: Plot) -> str:
    if is_share(plot.metric, plot.unit):
        return (
            f"{value * 100:g}{PERCENT}"
            if abs(value * 100 - round(value * 100, 2)) < 1e-9
            else f"{value * 100:.1f}{PERCENT}"
        )
    return f"{value:,.6g}".replace("-", "\u2212")


def _draw_band(plot: Plot, method: str) -> Markup:
    """The intervals of one method as an area, or as bars where some point has none or stands alone."""
    colour, found = (
        method_colours(plot.run)[method],
        [(plot.chart.x(p.count), ends_of(plot.run, p.measurement)) for p in plot.lines[method]],
    )
    ends = [(x, plot.chart.y(there[0]), plot.chart.y(there[1])) for x, there in found if there]
    if not ends:
        return Markup("")
    if len(ends) == len(plot.lines[method]) > 1:
        outline = (
            polyline([(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]) + "Z"
        )
        return tag("path", d=outline, class_=f"band {colour}")
    return tag(
        "path",
        d="".join(f"M{number(x)} {number(low)}V{number(high)}" for x, low, high in ends),
        class_=f"bar {colour}",
    )


def _draw_line(plot: Plot, method: str) -> Markup:
    chart, colour = plot.chart, method_colours(plot.run)[method]
    points = [
        (point.count, point.measurement.value)
        for point in plot.lines[method]
        if point.measurement.value is not None
    ]
    dots = [mark(colour, chart.x(count), chart.y(value), 3.3) for count, value in points]
    return chart.draw_line(points, colour, *dots)


def _ring_circuit(plot: Plot) -> Markup:
    """A ring around the circuit that this run chose."""
    if plot.circuit is None or plot.circuit.value is None or plot.run.circuit is None:
        return Markup("")
    count = len(plot.run.circuit)
    if not plot.chart.x.low <= count <= plot.chart.x.high:
        return Markup("")
    return tag("circle", cx=plot.chart.x(count), cy=plot.chart.y(plot.circuit.value), r=7.5, class_="chosen")


def _label_lines(plot: Plot) -> Markup:
    """Each method's name where its line ends, and the original's where the reference does."""
    ends = [
        (method_title(method), method_colours(plot.run)[method], line[-1].measurement.value or 0.0)
        for method, line in plot.lines.items()
    ]
    if plot.original and plot.original.value is not None:
        ends.append(("original", "reference-name", plot.original.value))
    return plot.chart.label_ends(
        [(name if len(name) < 15 else name[:13] + "…", colour, value) for name, colour, value in ends]
    )


def _draw_columns(plot: Plot) -> list[Markup]:
    """One place to point at, or to step to, for every count; the script shows its numbers, a reader without
    it hears them."""
    edges = [plot.chart.x(count) for count in plot.counts]
    middles = [LEFT, *((a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)), RIGHT]
    made = []
    for index, count in enumerate(plot.counts):
        tip = _make_tip(plot, count)
        words = f"{tip['head']}: " + "; ".join(
            f"{row['name']} {row['text']}" for row in _tip_rows(plot, count)
        )
        area = tag(
            "rect",
            x=middles[index],
            y=TOP - 8,
            width=middles[index + 1] - middles[index],
            height=BOTTOM - TOP + 8,
            class_="hit",
        )
        rule = tag("line", x1=edges[index], x2=edges[index], y1=TOP - 6, y2=BOTTOM, class_="rule")
        focus = 0 if index == 0 else -1
        made.append(
            tag(
                "g",
                rule,
                area,
                class_="column",
                tabindex=focus,
                role="img",
                aria_label=words,
                data_tip=f"{plot.metric}@{count}",
            )
        )
    return made


def _make_tip(plot: Plot, count: int) -> dict[str, object]:
    total = sum(plot.run.sizes.values())
    share = f" ({percent(count / total)})" if total else ""
    return {
        "head": f"{count:,} {count_units(count, plot.run)} removed{share}",
        "rows": _tip_rows(plot, count),
    }


def _tip_rows(plot: Plot, count: int) -> list[dict[str, str]]:
    here = [point for line in plot.lines.values() for point in line if point.count == count]
    rows = [
        {
            "key": method_colours(plot.run)[p.method],
            "name": method_title(p.method),
            "text": with_interval(p.measurement),
        }
        for p in _sort_by_value(here)
    ]
    if plot.circuit and plot.run.circuit is not None and len(plot.run.circuit) == count:
        own = next((p.measurement.value for p in here if p.method == plot.run.method), None)
        if own != plot.circuit.value:
            rows.insert(0, {"key": "chosen", "name": "this circuit", "text": with_interval(plot.circuit)})
    if plot.original:
        rows.append({"key": "reference-name", "name": "original", "text": value_of(plot.original)})
    return rows


def _sort_by_value(here: list[Point]) -> list[Point]:
    """As the lines stand above each other."""
    return sorted(here, key=lambda point: -(point.measurement.value or 0.0))
