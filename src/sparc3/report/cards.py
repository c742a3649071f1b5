"""The removed units: a card for each, their overlap with other circuits, and their places in the model."""

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from ..results import Variant
from .charts import Chart, Figure, Scale, Tip, drawing, number, tag, tip_target
from .discovery import find_sparsest_point
from .examples import Mask
from .read import Fired, RunFolder, UnitCard
from .words import MINUS, figure, inline_title, method_title, percent, plain, title, value_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

MOST_CARDS = 120
_CONTEXT = 110


class Card(NamedTuple):
    """One unit on the page; every text is markup in which offensive words are masked.

    Attributes:
        relevances: (name, figure, width of its bar in percent), on one scale.
        fired: (prompt, token, activation) of the strongest activations.
        alone: (metric, its figure with only this unit removed, its figure on the original model).
    """

    title: str
    relevances: list[tuple[str, str, float]]
    promotes: list[Markup]
    suppresses: list[Markup]
    fired: list[tuple[Markup, Markup, str]]
    alone: list[tuple[str, str, str]]


def cards(run: RunFolder, mask: Mask) -> list[Card]:
    """At most MOST_CARDS cards, in the order of the file."""
    toxic = any(metric.startswith("toxicity") for metric in run.metrics)
    return [_make_card(row, run, mask, toxic) for row in run.cards[:MOST_CARDS]]


def _make_card(row: UnitCard, run: RunFolder, mask: Mask, toxic: bool) -> Card:
    def token(text: str) -> Markup:
        # " cat" and "cat" are different tokens, so the leading space is shown.
        text_shown = text[:60].replace(" ", "␣", 1) if text.startswith(" ") else text[:60]
        return mask.write(text_shown, mask.hide_token(text_shown.replace("␣", " "), toxic))

    scores = {"general": row.general, "undesired": row.undesired}
    known_scores = {name: value for name, value in scores.items() if value is not None}
    longest = max(map(abs, known_scores.values()), default=0.0) or 1.0
    alone = []
    for metric, value in row.alone.items():
        if value is not None:
            original = run.find(metric, "original")
            name = inline_title(metric) if metric in run.metrics else title(metric).lower()
            original_text = value_of(original) if original and original.value else ""
            alone.append((name, figure(value, metric), original_text))
    strength = "" if row.strength is None else f", strength {plain(row.strength)}"
    unit = f"{run.unit} {row.index:,}{strength}"
    return Card(
        f"{place(row.module, several=row.layer is None).capitalize()}, {unit}",
        [(name, plain(value), abs(value) / longest * 100) for name, value in known_scores.items()],
        list(map(token, row.promotes[:10])),
        list(map(token, row.suppresses[:10])),
        [
            (
                _shorten_context(occurrence, mask),
                token(occurrence.token),
                plain(occurrence.activation) if occurrence.activation is not None else "",
            )
            for occurrence in row.fired[:3]
        ],
        alone,
    )


def _shorten_context(occurrence: Fired, mask: Mask) -> Markup:
    context = (
        occurrence.prompt
        if len(occurrence.prompt) <= _CONTEXT
        else "… " + occurrence.prompt[-_CONTEXT:].partition(" ")[2]
    )
    token, end = occurrence.token.strip(), len(context.rstrip())
    token_span = [(end - len(token), end)] if token and context.rstrip().endswith(token) else []
    return mask.write(context, mask.spans(context), token_span, "here")


class Sharing(NamedTuple):
    """Another method's circuit of the same size: the number of units that it shares with this one, and the
    number expected by chance."""

    name: str
    colour: str
    both: str
    share: float
    expected: str


def list_shared(run: RunFolder) -> list[Sharing]:
    """The overlaps with other methods' circuits, largest first. In a discovery, those of circuits as
    sparse as its own sparsest one."""
    count = run.count
    if run.provenance.job == "discover":
        best = find_sparsest_point(run, run.method)
        count = best.count if best else 0
    rows = []
    for overlap in run.provenance.overlaps:
        variant = Variant.parse(overlap.variant)
        if variant.count == count and overlap.size:
            name, colour = method_title(variant.method), run.colours.get(variant.method, "mr")
            both = f"{overlap.both:,.0f} ({percent(overlap.both / overlap.size)})"
            expected = "" if overlap.expected is None else f"{overlap.expected:,.0f}"
            rows.append(Sharing(name, colour, both, 100 * (overlap.both / overlap.size), expected))
    return sorted(rows, key=lambda row: -row.share)


def list_protected(run: RunFolder) -> list[tuple[str, str]] | None:
    """(unit, factor by which its removal multiplies perplexity) of protected units; None if the run did
    not look for any."""
    units = run.provenance.protected
    if units is None:
        return None
    ratios = ["∞" if (r := unit.perplexity_ratio) is None else plain(r) for unit in units]
    names = [f"{place(unit.module)}, {run.unit} {unit.index:,}" for unit in units]
    return list(zip(names, ratios, strict=True))


# The map of the removed units: a strip for each module, dark where the scores favour removal, with a mark
# on each removed unit.

LENGTH, BINS, SHADES = 1000.0, 125, 5
MARKED_APART = 600
"""Up to this number of removed units, each has its own tip."""
MOST_STRIPS = 600
"""Up to this number of modules, each has a strip, even without a removed unit."""


class UnitMap(NamedTuple):
    """Where the removed units are.

    Attributes:
        strips: (name, number of removed units, drawing) of each module; if there are more than MOST_STRIPS
            modules, only of those with removed units.
        histogram: the removed units' scores among all scores; None without scores.
        shaded: whether the strips show scores.
        verb: what happened to the circuit's units, "removed" or "kept".
        left_out: number of modules without a strip.
        most: the largest number of removed units in a module.
    """

    strips: list[tuple[str, int, Markup]]
    histogram: Figure | None
    tips: dict[str, Tip]
    shaded: bool
    verb: str
    left_out: int
    most: int


def draw_unit_map(run: RunFolder, verb: str = "removed") -> UnitMap | None:
    """The map of the circuit's units; None for weights, which are too many for a strip, or if the circuit
    or its modules' sizes are unknown.

    Args:
        verb: what happened to the circuit's units, "removed" or "kept".
    """
    circuit = run.circuit
    if circuit is None or circuit.unit == "weight" or not set(circuit.members) <= set(run.sizes):
        return None
    # Flip the sign if low scores were selected, so that selected units are always high.
    selection = circuit.provenance.get("selection") or {}
    sign = 1.0 if selection.get("order") == "highest" else -1.0
    scores: dict[str, Values] = {}
    if run.scores is not None and all(tensor.dim() == 1 for tensor in run.scores.values()):
        scores = {name: sign * tensor.double().numpy() for name, tensor in run.scores.items()}
    tips: dict[str, Tip] = {}
    deepest = max((float(values.max(initial=0.0)) for values in scores.values()), default=0.0)
    several_sites = len({place(name).rpartition(" ")[2] for name in run.sizes}) > 1
    names = [name for name in run.sizes if len(run.sizes) <= MOST_STRIPS or circuit.counts.get(name)]
    strips = []
    for name in names:
        indices, size = list(circuit.members.get(name, ())), run.sizes[name]
        shade = _draw_shades(scores[name], deepest) if name in scores else Markup("")
        contrasts = [plain(sign * float(v)) for v in scores[name][indices]] if name in scores else None
        marks = _mark_units(run, name, size, indices, contrasts, tips)
        first = ", ".join(map(str, indices[:12])) + (" …" if len(indices) > 12 else "")
        label = f"{place(name)}: {len(indices):,} of {size:,} {verb}" + (f" ({first})" if indices else "")
        strip = drawing(LENGTH, 10, label, shade, marks, preserveAspectRatio="none", class_="strip")
        strips.append((place(name, several_sites), len(indices), strip))
    histogram = _draw_histogram(run, scores, sign) if scores else None
    most = max((removed for _, removed, _ in strips), default=0)
    return UnitMap(strips, histogram, tips, bool(scores), verb, len(run.sizes) - len(names), most)


def place(module: str, several: bool = True) -> str:
    """ "layer 3, up_proj" for "model.layers.3.mlp.up_proj", or "layer 3" if only one kind of module
    occurs. An expert is always named."""
    path, _, part = module.partition("#")
    match = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", path)
    if not match:
        return module
    expert, _, part_of_expert = part.partition(".") if part[:1].isdigit() else ("", "", part)
    parts = (
        f"layer {match[1]}",
        f"expert {expert}" if expert else "",
        (part_of_expert or match[2]) if several else "",
    )
    return ", ".join(filter(None, parts))


def _draw_shades(values: "Values", deepest: float) -> Markup:
    """The highest score in each of at most BINS sections of a strip, in a few shades, with one path per
    shade."""
    if deepest <= 0 or not len(values):
        return Markup("")
    edges = np.linspace(0, len(values), min(BINS, len(values)) + 1).astype(int)
    # A power below one makes small scores darker: most are far below the largest.
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
    run: RunFolder, name: str, size: int, chosen: list[int], contrasts: list[str] | None, tips: dict[str, Tip]
) -> Markup:
    """Marks for the removed units of one module: each with a tip, which is added to `tips`, or a single
    path if there are many."""
    width = number(max(LENGTH / max(size, 1) * 0.8, 2.6))
    boxes = [f"M{number(index / size * LENGTH)} 0h{width}v10h-{width}Z" for index in chosen]
    if run.count > MARKED_APART:
        return tag("path", d="".join(boxes), class_="mark") if boxes else Markup("")
    marks = []
    for order, (index, box) in enumerate(zip(chosen, boxes, strict=True)):
        rows = [("contrast", contrasts[order], "")] if contrasts else []
        tip = Tip(f"{place(name)}, {run.unit} {index:,}", rows)
        words, key = tip.head + "".join(f", contrast {text}" for _, text, _ in rows), f"{name}#{index}"
        marks.append(tip_target("path", d=box, class_="mark", key=key, words=words, first=not tips))
        tips[key] = tip
    return Markup("").join(marks)


def _draw_histogram(run: RunFolder, scores: "dict[str, Values]", sign: float) -> Figure | None:
    """A histogram of all units' scores with the removed ones highlighted. Counts are logarithmic, so that
    a few units are visible. None if all scores are equal."""
    assert run.circuit is not None
    members = [(scores[name], indices) for name, indices in run.circuit.members.items() if name in scores]
    all_scores = sign * np.concatenate(list(scores.values()))
    removed_scores = sign * np.concatenate([values[list(i)] for values, i in members] or [np.empty(0)])
    if all_scores.min() == all_scores.max():
        return None
    counts, edges = np.histogram(all_scores, bins=64)
    removed, _ = np.histogram(removed_scores, bins=edges)
    left, right, top, bottom = area = 50.0, 352.0, 12.0, 214.0
    x = Scale(float(edges[0]), float(edges[-1]), left + 4, right)
    y = Scale(0.6, float(counts.max()) * 1.5, bottom, top, log=True)  # from 0.6, so that a bar of 1 is seen
    chart = Chart(x, y, area, (360, 256))
    chart.add_axes(
        [(tick, "0" if abs(tick) < 1e-12 else f"{tick:.3g}".replace("-", MINUS)) for tick in x.ticks(3)],
        [(tick, f"{tick:,.0f}") for tick in y.ticks() if float(np.log10(tick)).is_integer()],
        f"contrast (general {MINUS} undesired)",
    )
    ends = [x(float(edge)) for edge in edges]
    for heights, kind in ((counts, "rest"), (removed, "mark")):
        bars = (
            f"M{number(ends[i] + 0.4)} {number(bottom)}V{number(y(float(heights[i])))}"
            f"H{number(ends[i + 1] - 0.4)}V{number(bottom)}Z"
            for i in np.flatnonzero(heights)
        )
        chart.add(tag("path", d="".join(bars), class_=kind))
    units = f"{len(all_scores):,} {run.units}"
    words = f"Histogram of the contrast of {units}; the {len(removed_scores):,} removed lie at one end"
    return chart.draw("How far they stand out", "", words, "histogram")
