"""Figures: shapes as SVG markup, scales, and charts with axes, lines, marks and tips."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from ..safe_text import visible

Attribute = str | float | int | None
Place = tuple[float, float]


def tag(tag_name: str, *children: str, **attributes: Attribute) -> Markup:
    """One element. `class_` becomes class, `stroke_width` becomes stroke-width; None is left out; everything
    except Markup is escaped."""
    attribute_text = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"),
            number(value) if isinstance(value, float) else visible(str(value)),
        )
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(child if isinstance(child, Markup) else visible(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag_name), attribute_text, body)


def drawing(width: float, height: float, label: str, *children: str, **attributes: Attribute) -> Markup:
    """A complete SVG, with a label for screen readers."""
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
    """A method's mark; `size` is half its height. Each class has its own shape as well as colour, for readers
    who cannot tell the colours apart."""
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
"""Class → corners of its mark at size 1: square, triangles, diamond, cross, hexagon, plus, hourglass. Other
classes have a disc."""


def number(value: float) -> str:
    """A coordinate to a tenth of a pixel, as short as possible."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a path through the points."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


@dataclass(frozen=True)
class Scale:
    """Numbers → coordinates along an axis.

    Attributes:
        log: whether the axis is logarithmic.
        soft: if not 0, the axis is roughly linear up to this size on either side of zero, and logarithmic
            beyond.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    soft: float = 0.0

    @classmethod
    def fit(
        cls,
        values: Collection[float],
        start: float,
        end: float,
        *,
        share: bool = False,
        anchor: float | None = None,
    ) -> "Scale":
        """A scale from the smallest to the largest value, with some room.

        Args:
            share: whether the values are shares of one, so that the scale starts at zero and ends at most at
                one.
            anchor: the value with which others are compared. If one is far above it, the scale is
                logarithmic; if all are close to it, small differences look small.
        """
        low, high = min(values), max(values)
        if share and low >= 0:
            return cls(0.0, min(1.0, high * 1.06) or 1.0, start, end)
        size = abs(anchor or 0.0)
        if size and low > 0 and high > 8 * size:
            return cls(low * 0.9, high * 1.1, start, end, log=True)
        # At least a hundredth of the anchor, so that differences far smaller than it do not fill the chart.
        room, middle = max(high - low, 0.01 * size, 1e-9), (high + low) / 2
        return cls(middle - 0.56 * room, middle + 0.56 * room, start, end)

    def __call__(self, value: float) -> float:
        def soften(number: float) -> float:
            return math.asinh(number / self.soft)

        # asinh(x) ≈ x near zero and ≈ ± log(2|x|) far away: a logarithm that can show zero.
        bend: Callable[[float], float] = math.log if self.log else soften if self.soft else float
        clamped = min(max(value, self.low), self.high)
        share = (bend(clamped) - bend(self.low)) / ((bend(self.high) - bend(self.low)) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers inside the scale."""
        low, high = self.low, self.high
        if self.log or self.soft:
            first, last = math.log10(self.soft or low), math.log10(max(high, -low))
            powers = [10.0**e for e in range(math.floor(first), math.ceil(last) + 1)]
            candidates = [m * power for power in powers for m in (1, 2, 5)]
            if self.soft:
                candidates = [*(-power for power in reversed(powers)), 0.0, *powers]
            inside_scale = [tick for tick in candidates if low <= tick <= high]
            show_all = self.soft or len(inside_scale) <= 6
            return (
                inside_scale if show_all else [tick for tick in inside_scale if math.log10(tick).is_integer()]
            )
        raw = (high - low) / count or 1.0
        power = 10.0 ** math.floor(math.log10(raw))
        # The smallest round step that gives no more than `count` ticks; 0.999 is for rounding errors.
        step = next(power * size for size in (1, 2, 2.5, 5, 10) if power * size >= raw * 0.999)
        return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Tip(NamedTuple):
    """What the script shows over a mark, and what screen readers say: rows of (name, text, class of the
    colour swatch before them, or "")."""

    head: str
    rows: Sequence[tuple[str, str, str]]

    @property
    def words(self) -> str:
        return f"{self.head}: " + "; ".join(f"{name} {text}" for name, text, _ in self.rows)


@dataclass(frozen=True)
class Figure:
    """One drawing with its title and note; `tips`: id of a mark → its tip."""

    title: str
    note: str
    drawing: Markup
    tips: Mapping[str, Tip] = field(default_factory=dict)


def tip_target(
    name: str, *children: Markup, key: str, words: str, first: bool, **attributes: Attribute
) -> Markup:
    """An element with a tip. The tab key stops at the `first` of a figure; arrow keys move on from there."""
    stop = 0 if first else -1
    return tag(name, *children, **attributes, tabindex=stop, role="img", aria_label=words, data_tip=key)


class Chart:
    """A figure under construction: axes, lines, marks and names are drawn in the order in which they are
    added.

    Attributes:
        left, right, top, bottom: the plotting area in pixels; the scales may end inside it.
        tips: id of each mark so far → its tip.
    """

    def __init__(
        self,
        x: Scale,
        y: Scale,
        area: tuple[float, float, float, float] = (54.0, 378.0, 14.0, 258.0),
        size: tuple[float, float] = (480.0, 300.0),
    ) -> None:
        self.x, self.y, self.size = x, y, size
        self.left, self.right, self.top, self.bottom = area
        self.tips: dict[str, Tip] = {}
        self._parts: list[Markup] = []

    def add(self, *parts: Markup) -> None:
        self._parts += parts

    def add_axes(
        self,
        x_ticks: Iterable[tuple[float, str]],
        y_ticks: Iterable[tuple[float, str]],
        x_label: str,
        *labels: Markup,
        vertical_grid: bool = False,
    ) -> None:
        """Add grid lines, ticks given as (value, text), the label under the x axis, and further labels."""
        parts = []
        for y, text in ((self.y(value), text) for value, text in y_ticks):
            parts.append(line(self.left, self.right, y, y, "grid"))
            parts.append(tag("text", text, x=self.left - 8, y=y + 4, class_="end tick"))
        for x, text in ((self.x(value), text) for value, text in x_ticks):
            if vertical_grid:
                parts.append(line(x, x, self.top, self.bottom, "grid"))
            parts.append(tag("text", text, x=x, y=self.bottom + 19, class_="middle tick"))
        middle = (self.left + self.right) / 2
        parts.append(tag("text", x_label, x=middle, y=self.bottom + 37, class_="middle tick"))
        self.add(tag("g", *parts, *labels, aria_hidden="true"))

    def add_line(
        self,
        points: Iterable[Place],
        colour: str,
        marks_at: Iterable[Place] = (),
        size: float = 0.0,
        thin: bool = False,
    ) -> None:
        """Add a line through points, and marks of this `size` at `marks_at`, all in the units of the axes."""
        path = polyline([(self.x(x), self.y(y)) for x, y in points])
        path_tag = tag("path", d=path, class_="line thin" if thin else "line")
        marks = [mark(colour, self.x(x), self.y(y), size) for x, y in marks_at]
        self.add(tag("g", path_tag, *marks, class_=f"series {colour}"))

    def add_reference(self, value: float) -> None:
        """Add a dashed line across the chart at one height."""
        self.add(line(self.left, self.right, self.y(value), self.y(value), "reference"))

    def add_names(self, ends: Sequence[tuple[str, str, float]]) -> None:
        """Add names, given as (name, class, value on the y axis), to the right of the lines' ends, moved
        apart if they would touch."""
        heights = spread([self.y(value) for *_, value in ends], 15.0, self.top + 4, self.bottom)
        texts = [
            tag("text", name, x=self.right + 8, y=y + 4, class_=f"name {colour}")
            for (name, colour, _), y in zip(ends, heights, strict=True)
        ]
        self.add(tag("g", *texts, aria_hidden="true"))

    def add_target(self, key: str, tip: Tip, *children: Markup, class_: str) -> None:
        """Add shapes with a tip."""
        first = not self.tips
        self.tips[key] = tip
        self.add(tip_target("g", *children, class_=class_, key=key, words=tip.words, first=first))

    def draw(self, title: str, note: str, label: str, class_: str = "curve") -> Figure:
        """The finished figure; `label` is for screen readers."""
        return Figure(title, note, drawing(*self.size, label, *self._parts, class_=class_), self.tips)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved apart until neighbours are `gap` away, in the same order, and inside low … high if
    possible."""
    # From the top each is pushed down by its neighbour; if the last one leaves the range, all are pushed
    # back.
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    overflow = max(0.0, moved[order[-1]] - high) if order else 0.0
    if overflow:
        moved[order[-1]] -= overflow
        for after, before in zip(order[::-1], order[-2::-1], strict=False):
            moved[before] = max(low, min(moved[before], moved[after] - gap))
    return moved
