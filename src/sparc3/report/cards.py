"""The removed units: a card for each, what other circuits share of them, and where they sit."""

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from ..results import Variant
from .charts import Chart, Figure, Scale, Tip, drawing, number, tag, tip_target
from .discovery import find_sparsest_point
from .examples import Mask
from .read import Fired, RunFolder, UnitCard
from .words import MINUS, figure, in_words, method_title, percent, plain, title, value_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

MOST_CARDS = 120
_CONTEXT = 110


class Card(NamedTuple):
    """One unit as the page shows it; every text is markup, masked where it must be.

    Attributes:
        relevances: (name, figure, width of its bar in percent), on one scale.
        fired: (prompt, token, activation).
        alone: (metric in a sentence, with this unit alone removed, on the original model).
    """

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

    found = {"general": row.general, "undesired": row.undesired}
    told = {name: value for name, value in found.items() if value is not None}
    longest = max(map(abs, told.values()), default=0.0) or 1.0
    alone = []
    for metric, value in row.alone.items():
        if value is not None:
            original = run.find(metric, "original")
            name = in_words(metric) if metric in run.metrics else title(metric).lower()
            was = value_of(original) if original and original.value else ""
            alone.append((name, figure(value, metric), was))
    own = "" if row.strength is None else f", strength {plain(row.strength)}"
    return Card(
        f"{place(row.module, several=row.layer is None).capitalize()}, {run.unit} {row.index:,}{own}",
        [(name, plain(value), abs(value) / longest * 100) for name, value in told.items()],
        list(map(token, row.promotes[:10])),
        list(map(token, row.suppresses[:10])),
        [
            (
                _shorten_context(one, mask),
                token(one.token),
                plain(one.activation) if one.activation is not None else "",
            )
            for one in row.fired[:3]
        ],
        alone,
    )


def _shorten_context(one: Fired, mask: Mask) -> Markup:
    shown = one.prompt if len(one.prompt) <= _CONTEXT else "… " + one.prompt[-_CONTEXT:].partition(" ")[2]
    token, end = one.token.strip(), len(shown.rstrip())
    here = [(end - len(token), end)] if token and shown.rstrip().endswith(token) else []
    return mask.write(shown, mask.spans(shown), here, "here")


class Sharing(NamedTuple):
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
    if run.provenance.job == "discover":
        best = find_sparsest_point(run, run.method)
        count = best.count if best else 0
    rows = []
    for one in run.provenance.overlaps:
        variant = Variant.parse(one.variant)
        if variant.count == count and one.size:
            name, colour = method_title(variant.method), run.colours.get(variant.method, "mr")
            both = f"{one.both:,.0f} ({percent(one.both / one.size)})"
            expected = "" if one.expected is None else f"{one.expected:,.0f}"
            rows.append(Sharing(name, colour, both, 100 * (one.both / one.size), expected))
    return sorted(rows, key=lambda row: -row.share)


def protected(run: RunFolder) -> list[tuple[str, str]] | None:
    """(unit, what its removal multiplies perplexity by) of those never selected; None without a search."""
    found = run.provenance.protected
    if found is None:
        return None
    ratios = ["beyond all numbers" if (r := one.perplexity_ratio) is None else plain(r) for one in found]
    names = [f"{place(one.module)}, {run.unit} {one.index:,}" for one in found]
    return list(zip(names, ratios, strict=True))


# Where the removed units sit: a strip a module, dark where the scores speak for removal, a mark on each unit
# that was removed.

LENGTH, BINS, SHADES = 1000.0, 125, 5
MARKED_APART = 600
"""Up to so many removed units, each has a tip of its own."""
MOST_STRIPS = 600
"""Up to so many modules, each has a strip, whether it lost a unit or not."""


class UnitMap(NamedTuple):
    """The strips of all modules, or of those that lost a unit where there are more than MOST_STRIPS, as
    (name, how many of its units were removed, drawing); how many were left out; and how the removed units'
    scores compare with the rest (None without scores)."""

    strips: list[tuple[str, int, Markup]]
    histogram: Figure | None
    tips: dict[str, Tip]
    shaded: bool
    verb: str
    left_out: int
    most: int


def unit_map(run: RunFolder, verb: str = "removed") -> UnitMap | None:
    """None unless the circuit and its modules' sizes are known; None for weights, too many for a strip.

    Args:
        verb: what happened to the circuit's units, "removed" or "kept".
    """
    circuit = run.circuit
    if circuit is None or circuit.unit == "weight" or not set(circuit.members) <= set(run.sizes):
        return None
    # Turned so that what was selected is high.
    selection = circuit.provenance.get("selection") or {}
    sign = 1.0 if selection.get("order") == "highest" else -1.0
    scores: dict[str, Values] = {}
    if run.scores is not None and all(tensor.dim() == 1 for tensor in run.scores.values()):
        scores = {name: sign * tensor.double().numpy() for name, tensor in run.scores.items()}
    tips: dict[str, Tip] = {}
    deepest = max((float(values.max(initial=0.0)) for values in scores.values()), default=0.0)
    several = len({place(name).rpartition(" ")[2] for name in run.sizes}) > 1
    drawn = [name for name in run.sizes if len(run.sizes) <= MOST_STRIPS or circuit.counts.get(name)]
    strips = []
    for name in drawn:
        chosen, size = list(circuit.members.get(name, ())), run.sizes[name]
        shade = _draw_shades(scores[name], deepest) if name in scores else Markup("")
        contrasts = [plain(sign * float(v)) for v in scores[name][chosen]] if name in scores else None
        marks = _mark_units(run, name, size, chosen, contrasts, tips)
        first = ", ".join(map(str, chosen[:12])) + (" …" if len(chosen) > 12 else "")
        label = f"{place(name)}: {len(chosen):,} of {size:,} {verb}" + (f" ({first})" if chosen else "")
        strip = drawing(LENGTH, 10, label, shade, marks, preserveAspectRatio="none", class_="strip")
        strips.append((place(name, several), len(chosen), strip))
    histogram = _draw_histogram(run, scores, sign) if scores else None
    most = max((removed for _, removed, _ in strips), default=0)
    return UnitMap(strips, histogram, tips, bool(scores), verb, len(run.sizes) - len(drawn), most)


def place(module: str, several: bool = True) -> str:
    """ "layer 3, up_proj" of "model.layers.3.mlp.up_proj"; or "layer 3". An expert is always named."""
    path, _, part = module.partition("#")
    found = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", path)
    if not found:
        return module
    expert, _, inside = part.partition(".") if part[:1].isdigit() else ("", "", part)
    named = (
        f"layer {found[1]}",
        f"expert {expert}" if expert else "",
        (inside or found[2]) if several else "",
    )
    return ", ".join(filter(None, named))


def _draw_shades(values: "Values", deepest: float) -> Markup:
    """The strongest score in each of at most BINS stretches, in a few shades, one path each."""
    if deepest <= 0 or not len(values):
        return Markup("")
    edges = np.linspace(0, len(values), min(BINS, len(values)) + 1).astype(int)
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
    """The removed units of one module: each with a tip, put into `tips`, while there are few, else one path
    for all."""
    width = number(max(LENGTH / max(size, 1) * 0.8, 2.6))
    boxes = [f"M{number(index / size * LENGTH)} 0h{width}v10h-{width}Z" for index in chosen]
    if run.count > MARKED_APART:
        return tag("path", d="".join(boxes), class_="mark") if boxes else Markup("")
    marks = []
    for at, (index, box) in enumerate(zip(chosen, boxes, strict=True)):
        rows = [("contrast", contrasts[at], "")] if contrasts else []
        tip = Tip(f"{place(name)}, {run.unit} {index:,}", rows)
        words, key = tip.head + "".join(f", contrast {text}" for _, text, _ in rows), f"{name}#{index}"
        marks.append(tip_target("path", d=box, class_="mark", key=key, words=words, first=not tips))
        tips[key] = tip
    return Markup("").join(marks)


def _draw_histogram(run: RunFolder, wanted: "dict[str, Values]", sign: float) -> Figure | None:
    """How far the removed units stand out: all units by score, counts on a logarithm so that the few are
    seen; None where all are the same."""
    assert run.circuit is not None
    members = [(wanted[name], indices) for name, indices in run.circuit.members.items() if name in wanted]
    every = sign * np.concatenate(list(wanted.values()))
    chosen = sign * np.concatenate([values[list(i)] for values, i in members] or [np.empty(0)])
    if every.min() == every.max():
        return None
    counts, edges = np.histogram(every, bins=64)
    removed, _ = np.histogram(chosen, bins=edges)
    left, right, top, bottom = area = 50.0, 352.0, 12.0, 214.0
    x = Scale(float(edges[0]), float(edges[-1]), left + 4, right)
    y = Scale(0.6, float(counts.max()) * 1.5, bottom, top, log=True)
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
    units = f"{len(every):,} {run.units}"
    words = f"Histogram of the contrast of {units}; the {len(chosen):,} removed lie at one end"
    return chart.draw("How far they stand out", "", words, "histogram")
