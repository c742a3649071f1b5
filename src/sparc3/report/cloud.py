"""A cloud of points: effect against damage, each point with its numbers, the budget as a line, the chosen one in a ring."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .curves import Figure
from .numbers import in_words, is_share, percent, plain
from .svg import Scale, drawing, mark, polyline, tag

WIDTH, HEIGHT = 480.0, 342.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 464.0, 42.0, 292.0
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Spot:
    """One point: its tip's id, its class, whose it is, where it is, and its numbers; `faint` where another point is better in both."""

    key: str
    colour: str
    head: str
    x: float
    y: float
    rows: Rows
    faint: bool = False


@dataclass(frozen=True)
class Cloud:
    """What one figure shows.

    Attributes:
        lines: classes whose spots are joined in their order.
        front: the best of all at each damage, joined by steps.
        chosen: where this run's circuit is.
        budget: the damage that was allowed; None where nothing was.
    """

    damage: str
    metric: str
    direction: str
    spots: list[Spot]
    lines: list[str]
    front: list[Spot]
    original: tuple[float, float] | None
    chosen: tuple[float, float] | None
    budget: float | None



def harm_words(damage: str) -> str:
    return "perplexity" if damage == "perplexity" else "KL divergence"


def cloud_figure(cloud: Cloud, heading: str, note: str) -> Figure:
    x, y = _across(cloud), _up(cloud)
    tips: dict[str, dict[str, object]] = {spot.key: {"head": spot.head, "rows": spot.rows} for spot in cloud.spots}
    lines = [_line([s for s in cloud.spots if s.colour == colour], colour, x, y) for colour in cloud.lines]
    marks = [_spot(spot, x, y, index == 0) for index, spot in enumerate(cloud.spots)]
    parts = [_axes(cloud, x, y), _allowed(cloud, x), *lines, _steps(cloud, x, y), *marks, _ends(cloud, x, y)]
    label = f"{heading}; arrow keys step through the points"
    return Figure(heading, note, drawing(WIDTH, HEIGHT, label, *parts, class_="curve cloud"), tips)


def _across(cloud: Cloud) -> Scale:
    """From no damage, or the least there is, to the most; far beyond the budget the scale turns logarithmic."""
    places = [spot.x for spot in cloud.spots] + [cloud.budget or 0.0, 0.0]
    low, high = min(places), max(*places, 0.002 if cloud.damage == "perplexity" else 1e-6)
    unit = cloud.budget or 3 * sorted(abs(place) for place in places)[len(places) // 2] or high
    room = (high - low) * 0.04
    return Scale(low - room, high + room, LEFT, RIGHT, soft=unit if high > 6 * unit else 0.0)


def _up(cloud: Cloud) -> Scale:
    places = [spot.y for spot in cloud.spots] + [place[1] for place in (cloud.original, cloud.chosen) if place]
    if is_share(cloud.metric) and min(places) >= 0:
        return Scale(0.0, min(1.0, max(places) * 1.06) or 1.0, BOTTOM, TOP)
    room = max(max(places) - min(places), 1e-9) * 0.06
    return Scale(min(places) - room, max(places) + room, BOTTOM, TOP)


def _axes(cloud: Cloud, x: Scale, y: Scale) -> Markup:
    rows = []
    for tick in y.ticks(5):
        rows.append(tag("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        text = percent(tick).replace(".0", "") if is_share(cloud.metric) else plain(tick)
        rows.append(tag("text", text, x=LEFT - 8, y=y(tick) + 4, class_="end tick"))
    for tick in x.ticks(5):
        rows.append(tag("line", x1=x(tick), x2=x(tick), y1=TOP, y2=BOTTOM, class_="grid"))
        rows.append(tag("text", _harm_tick(tick, cloud.damage), x=x(tick), y=BOTTOM + 19, class_="middle tick"))
    under = "increase of perplexity" if cloud.damage == "perplexity" else "KL divergence to the original, nats a token"
    rows.append(tag("text", under, x=(LEFT + RIGHT) / 2, y=BOTTOM + 38, class_="middle tick"))
    rows.append(tag("text", in_words(cloud.metric), x=LEFT - 44, y=14.0, class_="tick"))
    lower = cloud.direction == "lower"
    rows.append(tag("text", "↙ better" if lower else "↖ better", x=LEFT - 44, y=BOTTOM + 38, class_="tick better"))
    return tag("g", *rows, aria_hidden="true")


def _harm_tick(tick: float, damage: str) -> str:
    if abs(tick) < 1e-12:
        return "0"
    return f"{tick * 100:+.3g}\u202f%".replace("-", "\u2212") if damage == "perplexity" else f"{tick:.3g}"


def _allowed(cloud: Cloud, x: Scale) -> Markup:
    if cloud.budget is None:
        return Markup("")
    at = x(cloud.budget)
    over = tag("rect", x=at, y=TOP, width=max(RIGHT - at, 0.0), height=BOTTOM - TOP, class_="over")
    rule = tag("line", x1=at, x2=at, y1=TOP - 6, y2=BOTTOM, class_="budget")
    return tag("g", over, rule, tag("text", "budget", x=at, y=TOP - 10, class_="middle tick budget-name"), aria_hidden="true")


def _line(spots: Sequence[Spot], colour: str, x: Scale, y: Scale) -> Markup:
    return tag("g", tag("path", d=polyline([(x(s.x), y(s.y)) for s in spots]), class_="line thin"), class_=f"series {colour}")


def _steps(cloud: Cloud, x: Scale, y: Scale) -> Markup:
    if len(cloud.front) < 2:
        return Markup("")
    corners: list[tuple[float, float]] = []
    for before, after in zip(cloud.front, cloud.front[1:], strict=False):
        corners += [(x(before.x), y(before.y)), (x(after.x), y(before.y))]
    return tag("path", d=polyline([*corners, (x(cloud.front[-1].x), y(cloud.front[-1].y))]), class_="front")


def _spot(spot: Spot, x: Scale, y: Scale, first: bool) -> Markup:
    words = f"{spot.head}: " + "; ".join(f"{row['name']} {row['text']}" for row in spot.rows)
    hit = tag("circle", cx=x(spot.x), cy=y(spot.y), r=9.0, class_="hit")
    shape = mark(spot.colour, x(spot.x), y(spot.y), 4.2)
    kind = f"spot series {spot.colour}{' faint-spot' if spot.faint else ''}"
    return tag("g", hit, shape, class_=kind, tabindex=0 if first else -1, role="img", aria_label=words, data_tip=spot.key)


def _ends(cloud: Cloud, x: Scale, y: Scale) -> Markup:
    """A cross where the original is, a ring around the circuit that was chosen."""
    parts = []
    if cloud.original:
        a, b = x(cloud.original[0]), y(cloud.original[1])
        parts.append(tag("path", d=f"M{a - 5:.1f} {b:.1f}h10M{a:.1f} {b - 5:.1f}v10", class_="origin"))
    if cloud.chosen:
        parts.append(tag("circle", cx=x(cloud.chosen[0]), cy=y(cloud.chosen[1]), r=8.5, class_="chosen"))
    return tag("g", *parts, aria_hidden="true")
