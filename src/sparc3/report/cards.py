"""The removed units: a card for each, what other circuits share of them, and where they sit."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from ..results import Variant
from .charts import Chart, Figure, Scale, Tip, TipRow, drawing, number, tag, tip_target
from .discovery import find_sparsest_point
from .examples import Mask
from .read import Fired, RunFolder, UnitCard
from .words import MINUS, count_units, figure, in_words, method_title, percent, plain, title, value_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

MOST_CARDS = 120
_CONTEXT = 110


@dataclass(frozen=True)
class Card:
    """One unit as the page shows it; every text is markup, masked where it must be."""

    title: str
    relevances: list[tuple[str, str, float]]
    promotes: list[Markup]
    suppresses: list[Markup]
    fired: list[tuple[Markup, Markup, str]]
    alone: list[tuple[str, str, str]]


def cards(run: RunFolder, mask: Mask) -> list[Card]:
    """In the order of the file, at most MOST_CARDS."""
    toxic = any(metric.startswith("toxicity") for metric in run.metrics)
    return [_make_card(row, run, mask, toxic) for row in run.cards[:MOST_CARDS]]


def _make_card(row: UnitCard, run: RunFolder, mask: Mask, toxic: bool) -> Card:
    def token(text: str) -> Markup:
        written = text[:60].replace(" ", "␣", 1) if text.startswith(" ") else text[:60]
        return mask.write(written, mask.of_token(written.replace("␣", " "), toxic))

    where = place(row.module, several=row.layer is None)
    alone = {metric: value for metric, value in row.alone.items() if value is not None}
    return Card(
        f"{where.capitalize()}, {run.unit} {row.index:,}",
        _scale_relevances(row),
        list(map(token, row.promotes[:10])),
        list(map(token, row.suppresses[:10])),
        [
            (
                _shorten_context(one, mask),
                token(one.token),
                "" if one.activation is None else plain(one.activation),
            )
            for one in row.fired[:3]
        ],
        [_describe_effect_alone(metric, value, run) for metric, value in alone.items()],
    )


def _scale_relevances(row: UnitCard) -> list[tuple[str, str, float]]:
    """(name, figure, width of its bar in percent) of either relevance, on one scale."""
    named = {"general": row.general, "undesired": row.undesired}
    found = {name: value for name, value in named.items() if value is not None}
    longest = max(map(abs, found.values()), default=0.0) or 1.0
    return [(name, plain(value), abs(value) / longest * 100) for name, value in found.items()]


def _shorten_context(one: Fired, mask: Mask) -> Markup:
    shown = one.prompt if len(one.prompt) <= _CONTEXT else "… " + one.prompt[-_CONTEXT:].partition(" ")[2]
    token, end = one.token.strip(), len(shown.rstrip())
    here = [(end - len(token), end)] if token and shown.rstrip().endswith(token) else []
    return mask.write(shown, mask.spans(shown), here, "here")


def _describe_effect_alone(metric: str, value: float, run: RunFolder) -> tuple[str, str, str]:
    """(what it is in a sentence, with this unit alone removed, on the original model)."""
    original = run.find(metric, "original")
    name = in_words(metric) if metric in run.metrics else title(metric).lower()
    return name, figure(value, metric), value_of(original) if original and original.value else ""


# What circuits have in common, and which units were kept out of every one of them.


@dataclass(frozen=True)
class Sharing:
    """Another method's circuit of the same size: how many units it shares with this one, and how many would
    by chance."""

    name: str
    colour: str
    both: str
    share: float
    expected: str


def sharing(run: RunFolder) -> list[Sharing]:
    """The methods whose circuits share most first. Of a run that looked for a task, the circuits of the size
    it settled on."""
    count = run.count
    if run.job == "discover":
        best = find_sparsest_point(run, run.method)
        count = best.count if best else 0
    rows = []
    for one in run.provenance.overlaps:
        variant = Variant.parse(one.variant)
        if variant.count == count and one.size:
            share = one.both / one.size
            rows.append(
                Sharing(
                    method_title(variant.method),
                    run.colours.get(variant.method, "mr"),
                    f"{one.both:,.0f} ({percent(share)})",
                    100 * share,
                    "" if one.expected is None else f"{one.expected:,.0f}",
                )
            )
    return sorted(rows, key=lambda row: -row.share)


def protected(run: RunFolder) -> list[tuple[str, str]] | None:
    """(unit, what its removal multiplies perplexity by) of those never selected; None without a search."""
    found = run.provenance.protected
    if found is None:
        return None
    return [
        (
            f"{place(one.module)}, {run.unit} {one.index:,}",
            "beyond all numbers" if one.perplexity_ratio is None else plain(one.perplexity_ratio),
        )
        for one in found
    ]


# Where the removed units sit: a strip a module, dark where the scores speak for removal, a mark on each unit
# that was removed.

LENGTH, BINS, SHADES = 1000.0, 125, 5
MARKED_APART = 600
"""Up to so many removed units, each has a tip of its own."""
MOST_STRIPS = 600
"""Up to so many modules, each has a strip, whether it lost a unit or not."""


@dataclass(frozen=True)
class Strip:
    """One module: its name, how many of its units were removed, and its drawing."""

    label: str
    removed: int
    drawing: Markup


@dataclass(frozen=True)
class UnitMap:
    """The strips of all modules, or of those that lost a unit where there are more than MOST_STRIPS; how many
    were left out; and how the removed units' scores compare with the rest (None without scores)."""

    strips: list[Strip]
    histogram: Figure | None
    tips: dict[str, Tip]
    shaded: bool
    verb: str
    left_out: int

    @property
    def most(self) -> int:
        return max((strip.removed for strip in self.strips), default=0)


def unit_map(run: RunFolder, verb: str = "removed") -> UnitMap | None:
    """None unless the circuit and its modules' sizes are known; None for weights, too many for a strip.

    Args:
        verb: what happened to the circuit's units, "removed" or "kept".
    """
    if run.circuit is None or run.circuit.unit == "weight" or not set(run.circuit.members) <= set(run.sizes):
        return None
    scores = _orient_scores(run)
    tips: dict[str, Tip] = {}
    deepest = max((float(values.max(initial=0.0)) for values in scores.values()), default=0.0)
    several = len({place(name).rpartition(" ")[2] for name in run.sizes}) > 1
    drawn = [name for name in run.sizes if len(run.sizes) <= MOST_STRIPS or run.circuit.counts.get(name)]
    strips = []
    for name in drawn:
        chosen, size = list(run.circuit.members.get(name, ())), run.sizes[name]
        shade = _draw_shades(scores[name], deepest) if name in scores else Markup("")
        marks, its_tips = _mark_units(run, name, size, chosen, scores.get(name))
        tips |= its_tips
        first = ", ".join(map(str, chosen[:12])) + (" …" if len(chosen) > 12 else "")
        label = f"{place(name)}: {len(chosen):,} of {size:,} {verb}" + (f" ({first})" if chosen else "")
        strip = drawing(LENGTH, 10, label, shade, marks, preserveAspectRatio="none", class_="strip")
        strips.append(Strip(place(name, several), len(chosen), strip))
    histogram = _draw_histogram(run, scores) if scores else None
    return UnitMap(strips, histogram, tips, bool(scores), verb, len(run.sizes) - len(drawn))


def place(module: str, several: bool = True) -> str:
    """ "layer 3, up_proj" of "model.layers.3.mlp.up_proj"; or "layer 3". An expert is always named."""
    path, _, part = module.partition("#")
    found = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", path)
    if not found:
        return module
    expert, _, inside = part.partition(".") if part[:1].isdigit() else ("", "", part)
    named = [
        f"layer {found[1]}",
        f"expert {expert}" if expert else "",
        (inside or found[2]) if several else "",
    ]
    return ", ".join(filter(None, named))


def _sign(run: RunFolder) -> float:
    """1 where the highest scores were selected, −1 where the lowest were."""
    selection = (run.circuit.provenance.get("selection") or {}) if run.circuit else {}
    return 1.0 if selection.get("order") == "highest" else -1.0


def _orient_scores(run: RunFolder) -> "dict[str, Values]":
    """Scores turned so that what was selected is high."""
    if run.scores is None or any(tensor.dim() != 1 for tensor in run.scores.values()):
        return {}
    return {name: _sign(run) * tensor.double().numpy() for name, tensor in run.scores.items()}


def _draw_shades(values: "Values", deepest: float) -> Markup:
    """The strongest score in each of at most BINS stretches, in a few shades, one path each."""
    if deepest <= 0 or not len(values):
        return Markup("")
    bins = min(BINS, len(values))
    edges = np.linspace(0, len(values), bins + 1).astype(int)
    peaks = (np.maximum(np.maximum.reduceat(values, edges[:-1]), 0.0) / deepest) ** 0.7
    levels = np.ceil(peaks * SHADES - 1e-9).astype(int)
    starts = [number(start) for start in edges / len(values) * LENGTH]
    paths = []
    for level in range(1, SHADES + 1):
        boxes = (f"M{starts[i]} 0H{starts[i + 1]}V10H{starts[i]}Z" for i in np.flatnonzero(levels == level))
        if d := "".join(boxes):
            paths.append(tag("path", d=d, class_=f"shade s{level}"))
    return Markup("").join(paths)


def _mark_units(
    run: RunFolder, name: str, size: int, chosen: list[int], scores: "Values | None"
) -> tuple[Markup, dict[str, Tip]]:
    """The removed units of one module: each with a tip while there are few, else one path for all."""
    assert run.circuit is not None
    width = number(max(LENGTH / max(size, 1) * 0.8, 2.6))
    boxes = {index: f"M{number(index / size * LENGTH)} 0h{width}v10h-{width}Z" for index in chosen}
    if run.count > MARKED_APART:
        return (tag("path", d="".join(boxes.values()), class_="mark") if boxes else Markup("")), {}
    marks: list[Markup] = []
    tips: dict[str, Tip] = {}
    for index, box in boxes.items():
        known = scores is not None and index < len(scores)
        score = [plain(_sign(run) * float(scores[index]))] if scores is not None and known else []
        key, head = f"{name}#{index}", f"{place(name)}, {run.unit} {index:,}"
        tips[key] = Tip(head, [TipRow("contrast", text) for text in score])
        words = head + "".join(f", contrast {text}" for text in score)
        first = not marks and name == next(iter(run.circuit.members))
        marks.append(tip_target("path", d=box, class_="mark", key=key, words=words, first=first))
    return Markup("").join(marks), tips


# How far the removed units stand out

PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 50.0, 352.0, 12.0, 214.0


def _draw_histogram(run: RunFolder, wanted: "dict[str, Values]") -> Figure | None:
    """All units by score, counts on a logarithm so that the few are seen; None where all are the same."""
    assert run.circuit is not None
    members = [(wanted[name], indices) for name, indices in run.circuit.members.items() if name in wanted]
    every = _sign(run) * np.concatenate(list(wanted.values()))
    chosen = _sign(run) * np.concatenate([values[list(i)] for values, i in members] or [np.empty(0)])
    if every.min() == every.max():
        return None
    counts, edges = np.histogram(every, bins=64)
    removed, _ = np.histogram(chosen, bins=edges)
    x = Scale(float(edges[0]), float(edges[-1]), PLOT_LEFT + 4, PLOT_RIGHT)
    y = Scale(0.6, float(counts.max()) * 1.5, PLOT_BOTTOM, PLOT_TOP, log=True)
    axes = Chart(x, y, PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM).draw_axes(
        [(x(tick), "0" if abs(tick) < 1e-12 else f"{tick:.3g}".replace("-", MINUS)) for tick in x.ticks(3)],
        [(y(tick), f"{tick:,.0f}") for tick in y.ticks() if float(np.log10(tick)).is_integer()],
        f"contrast (general {MINUS} undesired)",
    )
    bars = [
        tag("path", d=_draw_bars(heights, edges, x, y), class_=kind)
        for heights, kind in ((counts, "rest"), (removed, "mark"))
    ]
    units = f"{len(every):,} {count_units(None, run)}"
    words = f"Histogram of the contrast of {units}; the {len(chosen):,} removed lie at one end"
    return Figure("How far they stand out", "", drawing(360, 256, words, axes, *bars, class_="histogram"))


def _draw_bars(counts: "NDArray[np.int64]", edges: "Values", x: Scale, y: Scale) -> str:
    floor = number(PLOT_BOTTOM)
    ends = [x(float(edge)) for edge in edges]
    return "".join(
        f"M{number(ends[i] + 0.4)} {floor}V{number(y(float(counts[i])))}H{number(ends[i + 1] - 0.4)}V{floor}Z"
        for i in np.flatnonzero(counts)
    )
