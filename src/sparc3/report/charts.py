"""Figures: shapes as SVG markup, scales, and the chart that axes, lines, marks and tips are drawn on."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from ..safe_text import visible

Attribute = str | float | int | None
Place = tuple[float, float]


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
        """From the least to the largest value, with some room.

        Args:
            share: whether they are parts of one, so that the scale begins at zero and ends at one at most.
            anchor: the value that others are seen beside: where one runs far away from it, the scale is
                logarithmic, and where all are close to it, small differences stay small.
        """
        low, high = min(values), max(values)
        if share and low >= 0:
            return cls(0.0, min(1.0, high * 1.06) or 1.0, start, end)
        size = abs(anchor or 0.0)
        if size and low > 0 and high > 8 * size:
            return cls(low * 0.9, high * 1.1, start, end, log=True)
        room, middle = max(high - low, 0.01 * size, 1e-9), (high + low) / 2
        return cls(middle - 0.56 * room, middle + 0.56 * room, start, end)

    def __call__(self, value: float) -> float:
        def soften(number: float) -> float:
            return math.asinh(number / self.soft)

        bend: Callable[[float], float] = math.log if self.log else soften if self.soft else float
        held = min(max(value, self.low), self.high)
        share = (bend(held) - bend(self.low)) / ((bend(self.high) - bend(self.low)) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        """Round numbers inside the scale."""
        low, high = self.low, self.high
        if self.log or self.soft:
            first, last = math.log10(self.soft or low), math.log10(max(high, -low))
            powers = [10.0**e for e in range(math.floor(first), math.ceil(last) + 1)]
            every = [m * power for power in powers for m in (1, 2, 5)]
            if self.soft:
                every = [*(-power for power in reversed(powers)), 0.0, *powers]
            inside = [tick for tick in every if low <= tick <= high]
            few = self.soft or len(inside) <= 6
            return inside if few else [tick for tick in inside if math.log10(tick).is_integer()]
        raw = (high - low) / about or 1.0
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * size for size in (1, 2, 2.5, 5, 10) if power * size >= raw * 0.999)
        return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Tip(NamedTuple):
    """What the script shows over a mark, and what is read aloud: rows of (name, text), each with the class of
    the swatch before it, if any."""

    head: str
    rows: Sequence[tuple[str, str, str]]

    @property
    def words(self) -> str:
        return f"{self.head}: " + "; ".join(f"{name} {text}" for name, text, _ in self.rows)


@dataclass(frozen=True)
class Figure:
    """One drawing with its words; `tips` has those of its marks, by their ids."""

    title: str
    note: str
    drawing: Markup
    tips: Mapping[str, Tip] = field(default_factory=dict)


def tip_target(
    name: str, *children: Markup, key: str, words: str, first: bool, **attributes: Attribute
) -> Markup:
    """An element with a tip. The tab key stops at the `first` of a figure, arrow keys go on from there."""
    stop = 0 if first else -1
    return tag(name, *children, **attributes, tabindex=stop, role="img", aria_label=words, data_tip=key)


class Chart:
    """A figure that grows: axes, lines, marks and names are added in the order in which they are drawn.

    Attributes:
        left, right, top, bottom: the plotting area in pixels; the scales may end inside it.
        tips: those of the marks so far, by their ids.
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
        """Grid lines, ticks given as (value, text), the label under the x axis, and any labels of the
        figure's own."""
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
        marked: Iterable[Place] = (),
        size: float = 0.0,
        thin: bool = False,
    ) -> None:
        """A line through points, and marks of this `size` at those `marked`, all in the units of the axes."""
        path = polyline([(self.x(x), self.y(y)) for x, y in points])
        drawn = tag("path", d=path, class_="line thin" if thin else "line")
        marks = [mark(colour, self.x(x), self.y(y), size) for x, y in marked]
        self.add(tag("g", drawn, *marks, class_=f"series {colour}"))

    def add_reference(self, value: float) -> None:
        """A dashed line across the chart at one height."""
        self.add(line(self.left, self.right, self.y(value), self.y(value), "reference"))

    def add_names(self, ends: Sequence[tuple[str, str, float]]) -> None:
        """Names to the right of the lines' ends, moved apart where they would touch: (name, class, height in
        the axis's unit)."""
        heights = spread([self.y(value) for *_, value in ends], 15.0, self.top + 4, self.bottom)
        texts = [
            tag("text", name, x=self.right + 8, y=y + 4, class_=f"name {colour}")
            for (name, colour, _), y in zip(ends, heights, strict=True)
        ]
        self.add(tag("g", *texts, aria_hidden="true"))

    def add_target(self, key: str, tip: Tip, *children: Markup, class_: str) -> None:
        """Shapes with a tip."""
        first = not self.tips
        self.tips[key] = tip
        self.add(tip_target("g", *children, class_=class_, key=key, words=tip.words, first=first))

    def draw(self, title: str, note: str, label: str, class_: str = "curve") -> Figure:
        """The figure; `label` names it for those who do not see it."""
        return Figure(title, note, drawing(*self.size, label, *self._parts, class_=class_), self.tips)


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
