"""Figures: shapes as SVG markup, scales, axes, tips; and curves, a metric against the number of units."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from ..results import Measurement
from ..safe_text import visible
from .read import Point, RunFolder
from .words import (
    MINUS,
    PERCENT,
    count_units,
    explained,
    is_share,
    method_title,
    number_of_units,
    percent,
    title,
    value_of,
    with_interval,
)

Attribute = str | float | int | None
WIDTH, HEIGHT = 480.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 378.0, 14.0, 258.0
"""Size and plotting area of a figure with room for names at the right, in pixels."""


def tag(tag_name: str, *children: str, **attributes: Attribute) -> Markup:
    """One element; `class_` is class, `stroke_width` is stroke-width, None is left out; everything is escaped
    but Markup."""
    written = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"),
            number(value) if isinstance(value, float) else visible(str(value)),
        )
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(child if isinstance(child, Markup) else visible(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag_name), written, body)


def drawing(width: float, height: float, label: str, *children: str, **attributes: Attribute) -> Markup:
    """An SVG of its own, named for those who do not see it."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="group",
        aria_label=label,
        **attributes,
    )


def line(x1: float, x2: float, y1: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=class_)


def mark(colour: str, x: float, y: float, size: float) -> Markup:
    """A method's mark, `size` half its height. Each class has a shape, not a colour alone."""
    outline = _SHAPES.get(colour)
    if outline is None:
        return tag("circle", cx=x, cy=y, r=size, class_="dot")
    return tag("path", d=polyline([(x + size * a, y + size * b) for a, b in outline]) + "Z", class_="dot")


_SHAPES: dict[str, Sequence[tuple[float, float]]] = {
    "m1": ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),
    "m2": ((0, -1.25), (1.15, 0.85), (-1.15, 0.85)),
    "m3": ((0, -1.35), (1.2, 0), (0, 1.35), (-1.2, 0)),
    "m4": ((0, 1.25), (1.15, -0.85), (-1.15, -0.85)),
    "m5": tuple(
        (a * x, a * y)
        for a in (1, -1)
        for x, y in ((0, -0.6), (0.7, -1.3), (1.3, -0.7), (0.6, 0), (1.3, 0.7), (0.7, 1.3))
    ),
    "m6": ((-0.6, -1.1), (0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0)),
    "m7": tuple(
        (a * x, a * y)
        for a in (1, -1)
        for x, y in ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4))
    ),
    "m8": ((-1.1, -1.1), (1.1, -1.1), (0, 0), (1.1, 1.1), (-1.1, 1.1), (0, 0)),
}
"""Corners of a mark of size 1: square, triangles, diamond, cross, hexagon, plus, hourglass; else a disc."""


def number(value: float) -> str:
    """A coordinate, as short as a tenth of a pixel allows."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a path through the points."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


@dataclass(frozen=True)
class Scale:
    """Numbers → places along an axis.

    Attributes:
        soft: where it is not 0: about even up to this size, on either side of zero, and logarithmic beyond.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    soft: float = 0.0

    def __call__(self, value: float) -> float:
        bend: Callable[[float], float] = math.log if self.log else self._bend_softly if self.soft else float
        held = min(max(value, self.low), self.high)
        share = (bend(held) - bend(self.low)) / ((bend(self.high) - bend(self.low)) or 1.0)
        return self.start + share * (self.end - self.start)

    def _bend_softly(self, value: float) -> float:
        return math.asinh(value / self.soft)

    def ticks(self, about: int = 4) -> list[float]:
        """Round numbers inside the scale."""
        if self.soft:
            powers = _powers(self.soft, max(self.high, -self.low))
            every = [*(-p for p in reversed(powers)), 0.0, *powers]
            return [tick for tick in every if self.low <= tick <= self.high]
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high, about)


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, from the one at or below `low` to the one at or above `high`."""
    return [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * size for size in (1, 2, 2.5, 5, 10) if power * size >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    inside = [value for p in _powers(low, high) for m in (1, 2, 5) if low <= (value := m * p) <= high]
    return inside if len(inside) <= 6 else [value for value in inside if math.log10(value).is_integer()]


class TipRow(NamedTuple):
    """A line of a tip; `key` is the class of the swatch before it."""

    name: str
    text: str
    key: str = ""


@dataclass(frozen=True)
class Tip:
    """What the script shows over a mark, and what is read aloud."""

    head: str
    rows: Sequence[TipRow]

    @property
    def words(self) -> str:
        return f"{self.head}: " + "; ".join(f"{row.name} {row.text}" for row in self.rows)


@dataclass(frozen=True)
class Figure:
    """One drawing with its words; `tips` has those of its marks, by their ids."""

    title: str
    note: str
    drawing: Markup
    tips: dict[str, Tip] = field(default_factory=dict)


def tip_target(
    name: str, *children: Markup, key: str, words: str, first: bool, **attributes: Attribute
) -> Markup:
    """An element with a tip. The tab key stops at the `first` of a figure, arrow keys go on from there."""
    stop = 0 if first else -1
    return tag(name, *children, **attributes, tabindex=stop, role="img", aria_label=words, data_tip=key)


@dataclass(frozen=True)
class Chart:
    """The plotting area of a figure, in pixels, and the scales of its axes, which may end inside it."""

    x: Scale
    y: Scale
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP
    bottom: float = BOTTOM

    def draw_axes(
        self,
        x_ticks: Iterable[tuple[float, str]],
        y_ticks: Iterable[tuple[float, str]],
        x_label: str,
        *labels: Markup,
        vertical_grid: bool = False,
    ) -> Markup:
        """Grid lines, ticks given as (place in pixels, text), the label under the x axis, and any labels of
        the figure's own."""
        parts = []
        for y, text in y_ticks:
            parts.append(line(self.left, self.right, y, y, "grid"))
            parts.append(tag("text", text, x=self.left - 8, y=y + 4, class_="end tick"))
        for x, text in x_ticks:
            if vertical_grid:
                parts.append(line(x, x, self.top, self.bottom, "grid"))
            parts.append(tag("text", text, x=x, y=self.bottom + 19, class_="middle tick"))
        middle = (self.left + self.right) / 2
        parts.append(tag("text", x_label, x=middle, y=self.bottom + 37, class_="middle tick"))
        return tag("g", *parts, *labels, aria_hidden="true")

    def draw_line(
        self,
        points: Iterable[tuple[float, float]],
        colour: str,
        marked: Iterable[tuple[float, float]] = (),
        size: float = 0.0,
        thin: bool = False,
    ) -> Markup:
        """A line through points, and marks of this `size` at those `marked`, all in the units of the axes."""
        path = polyline([(self.x(x), self.y(y)) for x, y in points])
        drawn = tag("path", d=path, class_="line thin" if thin else "line")
        marks = [mark(colour, self.x(x), self.y(y), size) for x, y in marked]
        return tag("g", drawn, *marks, class_=f"series {colour}")

    def draw_reference(self, value: float) -> Markup:
        """A dashed line across the chart at one height."""
        return line(self.left, self.right, self.y(value), self.y(value), "reference")

    def label_ends(self, ends: Sequence[tuple[str, str, float]]) -> Markup:
        """Names to the right of the lines' ends, moved apart where they would touch: (name, class, height in
        the axis's unit)."""
        heights = spread([self.y(value) for *_, value in ends], 15.0, self.top + 4, self.bottom)
        texts = [
            tag("text", name, x=self.right + 8, y=y + 4, class_=f"name {colour}")
            for (name, colour, _), y in zip(ends, heights, strict=True)
        ]
        return tag("g", *texts, aria_hidden="true")


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`places` moved apart until neighbours are `gap` away, in the same order, inside low … high where that
    can be."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    overflow = max(0.0, moved[order[-1]] - high) if order else 0.0
    if overflow:
        moved[order[-1]] -= overflow
        for after, before in zip(order[::-1], order[-2::-1], strict=False):
            moved[before] = max(low, min(moved[before], moved[after] - gap))
    return moved


# Curves: a metric against the number of removed units, a line a method, its 95 % interval as a band.


@dataclass(frozen=True)
class Plot:
    """What the parts of one figure share; `lines`: method → its points by count."""

    run: RunFolder
    metric: str
    lines: dict[str, list[Point]]
    original: Measurement | None
    circuit: Measurement | None
    chart: Chart

    @property
    def points(self) -> list[Point]:
        return [point for points in self.lines.values() for point in points]

    @property
    def counts(self) -> list[int]:
        return sorted({point.count for point in self.points})

    @property
    def shows_shares(self) -> bool:
        """Whether most units go, so that the axis tells shares of them."""
        return bool(self.run.total) and max(self.counts) > 0.5 * self.run.total


def curves(run: RunFolder) -> list[Figure]:
    """A figure for every metric that was measured at two counts or more, but sparsity, which follows."""
    return [_draw_curves(plot) for metric in run.drawn if (plot := _make_plot(run, metric))]


def _make_plot(run: RunFolder, metric: str) -> Plot | None:
    found = run.points(metric)
    low, high = min((p.count for p in found), default=0), max((p.count for p in found), default=0)
    if low == high:
        return None
    lines = {method: [p for p in found if p.method == method] for method in run.methods}
    original, circuit = run.find(metric, "original"), run.find(metric, "ablated")
    # Where most units go, what counts is how few are left: even steps there, a logarithm where few go.
    few = high <= 0.5 * run.total or not run.total
    x = Scale(low, high, LEFT + 14, RIGHT - 10, log=few and low > 0 and high / low > 5)
    shown = [*(point.measurement for point in found), *(m for m in (original, circuit) if m)]
    chart = Chart(x, _scale_values(run, shown, original))
    return Plot(run, metric, {m: points for m, points in lines.items() if points}, original, circuit, chart)


def _ends_of(run: RunFolder, m: Measurement) -> tuple[float, float] | None:
    """The interval to draw; of perplexity, whose texts differ more than variants, of the paired change."""
    before, d = run.find(m.metric, "original"), run.difference(m.metric, m.variant)
    if m.metric != "perplexity" or before is None or before.value is None:
        return m.ci95
    if d and d.ci95:
        return before.value + d.ci95[0], before.value + d.ci95[1]
    return None if m.variant == "original" else m.ci95


def _scale_values(run: RunFolder, shown: list[Measurement], original: Measurement | None) -> Scale:
    """From the lowest to the highest end; logarithmic where one method runs away, from zero for shares."""
    values = [m.value for m in shown if m.value is not None]
    ends = [end for m in shown for end in _ends_of(run, m) or ()]
    low, high = min(values + ends), max(values + ends)
    if is_share(shown[0].metric, shown[0].unit) and low >= 0:
        return Scale(0.0, min(1.0, high * 1.06) if high > 0 else 1.0, BOTTOM, TOP)
    anchor = original.value if original and original.value else values[0]
    if min(values) > 0 and max(values) > 8 * abs(anchor) and low > 0:
        return Scale(low * 0.9, high * 1.1, BOTTOM, TOP, log=True)
    room = max(high - low, 0.01 * abs(anchor), 1e-9)
    middle = (high + low) / 2
    return Scale(middle - 0.56 * room, middle + 0.56 * room, BOTTOM, TOP)


def _draw_curves(plot: Plot) -> Figure:
    run, metric, chart = plot.run, plot.metric, plot.chart
    tips = {f"{metric}@{count}": _make_tip(plot, count) for count in plot.counts}
    measured = plot.points[0].measurement
    heights = [(chart.y(tick), _write_tick(tick, measured)) for tick in chart.y.ticks(5)]
    across = f"{'share of ' if plot.shows_shares else ''}{count_units(None, run)} removed"
    original = plot.original.value if plot.original else None
    parts = [
        chart.draw_axes(_choose_ticks(plot), heights, across),
        *([] if original is None else [chart.draw_reference(original)]),
        *(_draw_band(plot, method) for method in plot.lines),
        *(
            chart.draw_line(places, run.colours[method], places, 3.3)
            for method, points in plot.lines.items()
            if (places := [(p.count, p.value) for p in points])
        ),
        _ring_circuit(plot),
        _label_lines(plot),
        *_draw_columns(plot, tips),
    ]
    # A task's circuit is found by what its removal breaks, so no way is the better one.
    better = "" if metric.startswith("ioi.") else f"{measured.direction} is better"
    measured_in = measured.unit if measured.unit.startswith("nats") else ""
    paired = metric == "perplexity" and run.difference(metric) is not None
    shaded = "shaded, the paired change from the original" if paired else ""
    note = "; ".join(part for part in (explained(metric), measured_in, better, shaded) if part)
    units = count_units(None, run)
    label = f"{title(metric)} against the number of removed {units}; arrow keys step through the counts"
    return Figure(title(metric), note, drawing(WIDTH, HEIGHT, label, *parts, class_="curve"), tips)


def _choose_ticks(plot: Plot) -> list[tuple[float, str]]:
    """(place, text) of the counts, or of round shares where most units go, as far as they do not touch."""
    x, total = plot.chart.x, plot.run.total
    tenths = [step for step in range(11) if plot.shows_shares and x.low <= total * step / 10 <= x.high]
    every = [(x(step / 10 * total), f"{step * 10}{PERCENT}") for step in tenths]
    kept: list[tuple[float, str]] = []
    for place, text in every or [(x(n), f"{n:,}") for n in plot.counts]:
        if not kept or place - kept[-1][0] > 8 + 4 * (len(text) + len(kept[-1][1])):
            kept.append((place, text))
    return kept


def _write_tick(value: float, measured: Measurement) -> str:
    if not is_share(measured.metric, measured.unit):
        return f"{value:,.6g}".replace("-", MINUS)
    exact = abs(value * 100 - round(value * 100, 2)) < 1e-9
    return f"{value * 100:{'g' if exact else '.1f'}}{PERCENT}"


def _draw_band(plot: Plot, method: str) -> Markup:
    """The intervals of one method as an area, or as bars where some point has none or stands alone."""
    colour, points, y = plot.run.colours[method], plot.lines[method], plot.chart.y
    found = [(plot.chart.x(p.count), _ends_of(plot.run, p.measurement)) for p in points]
    ends = [(x, y(both[0]), y(both[1])) for x, both in found if both]
    if not ends:
        return Markup("")
    if len(ends) == len(points) > 1:
        outline = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
        return tag("path", d=polyline(outline) + "Z", class_=f"band {colour}")
    bars = "".join(f"M{number(x)} {number(low)}V{number(high)}" for x, low, high in ends)
    return tag("path", d=bars, class_=f"bar {colour}")


def _ring_circuit(plot: Plot) -> Markup:
    """A ring around the circuit that this run chose."""
    x, count = plot.chart.x, plot.run.count
    inside = plot.run.circuit is not None and x.low <= count <= x.high
    if plot.circuit is None or plot.circuit.value is None or not inside:
        return Markup("")
    return tag("circle", cx=x(count), cy=plot.chart.y(plot.circuit.value), r=7.5, class_="chosen")


def _label_lines(plot: Plot) -> Markup:
    """Each method's name where its line ends, and the original's where the reference does."""
    ends = [(method_title(m), plot.run.colours[m], points[-1].value) for m, points in plot.lines.items()]
    if plot.original and plot.original.value is not None:
        ends.append(("original", "reference-name", plot.original.value))
    return plot.chart.label_ends(
        [(name if len(name) < 15 else name[:13] + "…", colour, value) for name, colour, value in ends]
    )


def _draw_columns(plot: Plot, tips: dict[str, Tip]) -> list[Markup]:
    """One place to point at, or to step to, for every count; the script shows its numbers."""
    edges = [plot.chart.x(count) for count in plot.counts]
    middles = [LEFT, *((a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)), RIGHT]
    made = []
    for index, (key, tip) in enumerate(tips.items()):
        start, width = middles[index], middles[index + 1] - middles[index]
        area = tag("rect", x=start, y=TOP - 8, width=width, height=BOTTOM - TOP + 8, class_="hit")
        rule = line(edges[index], edges[index], TOP - 6, BOTTOM, "rule")
        made.append(tip_target("g", rule, area, class_="column", key=key, words=tip.words, first=index == 0))
    return made


def _make_tip(plot: Plot, count: int) -> Tip:
    """The numbers of one count, as the lines stand above each other."""
    run = plot.run
    here = sorted((p for p in plot.points if p.count == count), key=lambda point: -point.value)
    rows = [TipRow(method_title(p.method), with_interval(p.measurement), run.colours[p.method]) for p in here]
    if plot.circuit and run.circuit is not None and run.count == count:
        own = next((p.value for p in here if p.method == run.method), None)
        if own != plot.circuit.value:
            rows.insert(0, TipRow("this circuit", with_interval(plot.circuit), "chosen"))
    if plot.original:
        rows.append(TipRow("original", value_of(plot.original), "reference-name"))
    share = f" ({percent(count / run.total)})" if run.total else ""
    return Tip(f"{number_of_units(count, run)} removed{share}", rows)
