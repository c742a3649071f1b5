"""Shapes as SVG markup, the scales that place them, and the axes around them: all that the figures of the
report need."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from ..safe_text import visible

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


def mark(kind: str, x: float, y: float, size: float = 3.6, **attributes: Attribute) -> Markup:
    """A method's mark: each class has its own shape, so that no figure rests on colour alone.

    Args:
        kind: the class of variants.colours.
        size: half its height.
    """
    outline = _SHAPES.get(kind)
    if outline is None:
        return tag("circle", cx=x, cy=y, r=size, class_="dot", **attributes)
    return tag(
        "path",
        d=polyline([(x + size * a, y + size * b) for a, b in outline]) + "Z",
        class_="dot",
        **attributes,
    )


_SHAPES: dict[str, Sequence[tuple[float, float]]] = {
    "m1": ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),
    "m2": ((0, -1.25), (1.15, 0.85), (-1.15, 0.85)),
    "m3": ((0, -1.35), (1.2, 0), (0, 1.35), (-1.2, 0)),
    "m4": ((0, 1.25), (1.15, -0.85), (-1.15, -0.85)),
    "m5": (
        (0, -0.6),
        (0.7, -1.3),
        (1.3, -0.7),
        (0.6, 0),
        (1.3, 0.7),
        (0.7, 1.3),
        (0, 0.6),
        (-0.7, 1.3),
        (-1.3, 0.7),
        (-0.6, 0),
        (-1.3, -0.7),
        (-0.7, -1.3),
    ),
    "m6": ((-0.6, -1.1), (0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0)),
}
"""Corners of a mark of size 1: square, triangles, diamond, cross, hexagon; every other class is a disc."""


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
            powers = [
                10.0**e
                for e in range(
                    math.floor(math.log10(self.soft)), math.ceil(math.log10(max(self.high, -self.low))) + 1
                )
            ]
            return [
                tick
                for tick in (*(-p for p in reversed(powers)), 0.0, *powers)
                if self.low <= tick <= self.high
            ]
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high, about)


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * size for size in (1, 2, 2.5, 5, 10) if power * size >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    found = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    inside = [value for value in found if low <= value <= high]
    return inside if len(inside) <= 6 else [value for value in inside if math.log10(value).is_integer()]


@dataclass(frozen=True)
class Figure:
    """One drawing with its words; `tips` is what the script shows over its marks: id → {"head", "rows"}."""

    title: str
    note: str
    drawing: Markup
    tips: dict[str, dict[str, object]] = field(default_factory=dict)


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
            parts.append(tag("line", x1=self.left, x2=self.right, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", text, x=self.left - 8, y=y + 4, class_="end tick"))
        for x, text in x_ticks:
            if vertical_grid:
                parts.append(tag("line", x1=x, x2=x, y1=self.top, y2=self.bottom, class_="grid"))
            parts.append(tag("text", text, x=x, y=self.bottom + 19, class_="middle tick"))
        middle = (self.left + self.right) / 2
        parts.append(tag("text", x_label, x=middle, y=self.bottom + 37, class_="middle tick"))
        return tag("g", *parts, *labels, aria_hidden="true")

    def draw_line(
        self, points: Iterable[tuple[float, float]], colour: str, *marks: Markup, thin: bool = False
    ) -> Markup:
        """A line through points given in the units of the axes, with the marks that belong to it."""
        path = polyline([(self.x(x), self.y(y)) for x, y in points])
        line = tag("path", d=path, class_="line thin" if thin else "line")
        return tag("g", line, *marks, class_=f"series {colour}")

    def draw_reference(self, value: float) -> Markup:
        """A dashed line across the chart at one height."""
        y = self.y(value)
        return tag("line", x1=self.left, x2=self.right, y1=y, y2=y, class_="reference")

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
