"""The tiles under the headline: each metric before and after, with both intervals on one small axis."""

from dataclasses import dataclass

from markupsafe import Markup

from ..results import Measurement
from .folder import RunFolder
from .numbers import change, change_interval, explained, interval_of, relative, title, value_of
from .svg import Scale, drawing, tag


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
    """A tile for every metric that was measured on the original and on the ablated model, what the run is about first."""
    both = [(run.measured(metric, "original"), run.measured(metric, "ablated")) for metric in run.drawn()]
    return [_tile(run, before, after) for before, after in both if before and after]


def _tile(run: RunFolder, before: Measurement, after: Measurement) -> Tile:
    return Tile(
        title(before.metric),
        explained(before.metric),
        value_of(before),
        value_of(after),
        interval_of(before),
        interval_of(after),
        _change(run, before),
        _strip(before, after),
    )


def _change(run: RunFolder, m: Measurement) -> str:
    d = run.difference(m.metric)
    if d is None or d.is_nothing:
        return "" if d is None else "no change on any sample"
    share = f" ({relative(d.relative)})" if d.relative is not None else ""
    zero = ", zero inside" if d.holds_zero else ""
    return f"change {change(d, m.unit)}{share} {change_interval(d, m.unit)}{zero}".replace(" ,", ",")


def _strip(before: Measurement, after: Measurement) -> Markup:
    shown = [end for m in (before, after) for end in (m.value, *(m.ci95 or ())) if end is not None]
    low, high = min(shown), max(shown)
    room = max(high - low, 0.02 * abs(high), 1e-9)
    scale = Scale((low + high - room) / 2, (low + high + room) / 2, 8, 252)
    label = f"original {value_of(before)} {interval_of(before)}, ablated {value_of(after)} {interval_of(after)}"
    rows = [_row(m, scale, y, colour) for m, y, colour in ((before, 8.0, "m-original"), (after, 22.0, "m0"))]
    return drawing(260, 30, label, *rows, class_="pair")


def _row(m: Measurement, scale: Scale, y: float, colour: str) -> Markup:
    track = tag("line", x1=8, x2=252, y1=y, y2=y, class_="grid")
    ends = [tag("line", x1=scale(m.ci95[0]), x2=scale(m.ci95[1]), y1=y, y2=y, class_="interval")] if m.ci95 else []
    return tag("g", track, *ends, tag("circle", cx=scale(m.value or 0.0), cy=y, r=4.5, class_="dot"), class_=f"series {colour}")
