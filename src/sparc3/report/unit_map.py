"""Where the removed units sit: a strip a module, dark where the scores speak for removal, a mark on each unit
that was removed."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from .charts import Chart, Figure, Scale, drawing, number, tag
from .read import RunFolder
from .variant_names import count_units
from .words import MINUS, plain

if TYPE_CHECKING:
    from numpy.typing import NDArray


LENGTH, BINS, SHADES = 1000.0, 125, 5
MARKED_APART = 600
"""Up to so many removed units, each has a tip of its own."""
MOST = 600
"""Up to so many modules, each has a strip, whether it lost a unit or not."""


@dataclass(frozen=True)
class Strip:
    """One module: its name, how many of its units were removed, and its drawing."""

    label: str
    removed: int
    size: int
    drawing: Markup


@dataclass(frozen=True)
class UnitMap:
    """The strips of all modules, or of those that lost a unit where there are more than MOST; how many were
    left out; and how the scores of the removed units compare with the rest (None without scores)."""

    strips: list[Strip]
    histogram: Figure | None
    tips: dict[str, dict[str, object]]
    shaded: bool
    verb: str
    left_out: int = 0

    @property
    def most(self) -> int:
        return max((strip.removed for strip in self.strips), default=0)


def unit_map(run: RunFolder, verb: str = "removed") -> UnitMap | None:
    """None unless the circuit and the size of every one of its modules are known; None for weights, too many
    for a strip.

    Args:
        verb: what happened to the circuit's units, "removed" or "kept".
    """
    if run.circuit is None or run.circuit.unit == "weight" or not set(run.circuit.members) <= set(run.sizes):
        return None
    scores = _orient_scores(run)
    tips: dict[str, dict[str, object]] = {}
    deepest = max((float(values.max(initial=0.0)) for values in scores.values()), default=0.0)
    strips = []
    several = len({place(name).rpartition(" ")[2] for name in run.sizes}) > 1
    lost = run.circuit.counts
    drawn = [name for name in run.sizes if len(run.sizes) <= MOST or lost.get(name)]
    for name, size in ((name, run.sizes[name]) for name in drawn):
        chosen = list(run.circuit.members.get(name, ()))
        shade = _draw_shades(scores[name], deepest) if name in scores else Markup("")
        marks, its_tips = _mark_units(run, name, size, chosen, scores.get(name))
        tips |= its_tips
        label = f"{place(name)}: {len(chosen):,} of {size:,} {verb}" + (
            f" ({_list_first(chosen)})" if chosen else ""
        )
        strip = drawing(LENGTH, 10, label, shade, marks, preserveAspectRatio="none", class_="strip")
        strips.append(Strip(place(name, several=several), len(chosen), size, strip))
    return UnitMap(
        strips, _draw_histogram(run, scores), tips, bool(scores), verb, len(run.sizes) - len(drawn)
    )


def place(module: str, several: bool = True) -> str:
    """ "layer 3, up_proj" of "model.layers.3.mlp.up_proj"; without `several`, "layer 3". An expert is always
    named."""
    path, _, part = module.partition("#")
    found = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", path)
    if not found:
        return module
    expert, _, inside = part.partition(".") if part[:1].isdigit() else ("", "", part)
    return ", ".join(
        [
            f"layer {found[1]}",
            *([f"expert {expert}"] if expert else []),
            *([inside or found[2]] if several else []),
        ]
    )


def _orient_scores(run: RunFolder) -> dict[str, "NDArray[np.float64]"]:
    """Scores turned so that what was selected is high."""
    assert run.circuit is not None
    if run.scores is None or any(tensor.dim() != 1 for tensor in run.scores.values()):
        return {}
    selection = run.circuit.provenance.get("selection") or {}
    sign = 1.0 if selection.get("order") == "highest" else -1.0
    return {name: sign * tensor.double().numpy() for name, tensor in run.scores.items()}


def _draw_shades(values: "NDArray[np.float64]", deepest: float) -> Markup:
    """The strongest score in each of at most BINS stretches, in a few shades: one path a shade, however many
    units there are."""
    if deepest <= 0 or not len(values):
        return Markup("")
    bins = min(BINS, len(values))
    edges = np.linspace(0, len(values), bins + 1).astype(int)
    peaks = (np.maximum(np.maximum.reduceat(values, edges[:-1]), 0.0) / deepest) ** 0.7
    levels = np.ceil(peaks * SHADES - 1e-9).astype(int)
    starts = edges / len(values) * LENGTH
    paths = []
    for level in range(1, SHADES + 1):
        d = "".join(
            f"M{number(starts[i])} 0H{number(starts[i + 1])}V10H{number(starts[i])}Z"
            for i in np.flatnonzero(levels == level)
        )
        if d:
            paths.append(tag("path", d=d, class_=f"shade s{level}"))
    return Markup("").join(paths)


def _mark_units(
    run: RunFolder, name: str, size: int, chosen: list[int], scores: "NDArray[np.float64] | None"
) -> tuple[Markup, dict[str, dict[str, object]]]:
    """The removed units of one module: each with a tip while there are few, else one path for all."""
    assert run.circuit is not None
    width = max(LENGTH / max(size, 1) * 0.8, 2.6)
    boxes = {
        index: f"M{number(index / size * LENGTH)} 0h{number(width)}v10h-{number(width)}Z" for index in chosen
    }
    if len(run.circuit) > MARKED_APART:
        return (tag("path", d="".join(boxes.values()), class_="mark") if boxes else Markup("")), {}
    marks: list[Markup] = []
    tips: dict[str, dict[str, object]] = {}
    for index, box in boxes.items():
        score = float(scores[index]) if scores is not None and index < len(scores) else None
        rows = (
            []
            if score is None
            else [{"key": "", "name": "contrast", "text": plain(_undo_orientation(run, score))}]
        )
        tips[f"{name}#{index}"] = {"head": f"{place(name)}, {run.unit} {index:,}", "rows": rows}
        words = f"{place(name)}, {run.unit} {index:,}" + "".join(
            f", {row['name']} {row['text']}" for row in rows
        )
        focus = 0 if not marks and name == next(iter(run.circuit.members)) else -1
        marks.append(
            tag(
                "path",
                d=box,
                class_="mark",
                tabindex=focus,
                role="img",
                aria_label=words,
                data_tip=f"{name}#{index}",
            )
        )
    return Markup("").join(marks), tips


def _undo_orientation(run: RunFolder, wanted: float) -> float:
    assert run.circuit is not None
    return wanted if (run.circuit.provenance.get("selection") or {}).get("order") == "highest" else -wanted


def _list_first(chosen: list[int]) -> str:
    return ", ".join(map(str, chosen[:12])) + (" …" if len(chosen) > 12 else "")


# How far the removed units stand out
# ---------------------------------------------------------------------------------

PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 50.0, 352.0, 12.0, 214.0


def _draw_histogram(run: RunFolder, wanted: dict[str, "NDArray[np.float64]"]) -> Figure | None:
    """All units by score, counts on a logarithm so that the few are seen beside the many."""
    assert run.circuit is not None
    if not wanted:
        return None
    every = np.concatenate(list(wanted.values()))
    members = run.circuit.members.items()
    chosen = np.concatenate(
        [wanted[name][list(indices)] for name, indices in members if name in wanted] or [np.empty(0)]
    )
    every, chosen = (np.array([_undo_orientation(run, 1.0)]) * values for values in (every, chosen))
    if every.min() == every.max():
        return None
    counts, edges = np.histogram(every, bins=64)
    removed, _ = np.histogram(chosen, bins=edges)
    x = Scale(float(edges[0]), float(edges[-1]), PLOT_LEFT + 4, PLOT_RIGHT)
    y = Scale(0.6, float(counts.max()) * 1.5, PLOT_BOTTOM, PLOT_TOP, log=True)
    bars = [
        tag("path", d=_draw_bars(counts, edges, x, y), class_="rest"),
        tag("path", d=_draw_bars(removed, edges, x, y), class_="mark"),
    ]
    words = (
        f"Histogram of the contrast of {len(every):,} {count_units(None, run)}; "
        f"the {len(chosen):,} removed lie at one end"
    )
    axes = _draw_histogram_axes(x, y)
    return Figure("How far they stand out", "", drawing(360, 256, words, axes, *bars, class_="histogram"))


def _draw_bars(counts: "NDArray[np.int64]", edges: "NDArray[np.float64]", x: Scale, y: Scale) -> str:
    floor = number(PLOT_BOTTOM)
    places = (
        (x(float(edges[i])), x(float(edges[i + 1])), y(float(counts[i]))) for i in np.flatnonzero(counts)
    )
    return "".join(
        f"M{number(a + 0.4)} {floor}V{number(top)}H{number(b - 0.4)}V{floor}Z" for a, b, top in places
    )


def _draw_histogram_axes(x: Scale, y: Scale) -> Markup:
    return Chart(x, y, PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM).draw_axes(
        [(x(tick), "0" if abs(tick) < 1e-12 else f"{tick:.3g}".replace("-", MINUS)) for tick in x.ticks(3)],
        [(y(tick), f"{tick:,.0f}") for tick in y.ticks() if float(np.log10(tick)).is_integer()],
        f"contrast (general {MINUS} undesired)",
    )
