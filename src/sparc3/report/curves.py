"""Curves: a metric against the number of removed units, a line a method; and, of a run that asked how many
samples a pruning needs, against the number of samples, with the scores behind it."""

from collections.abc import Iterable
from statistics import fmean

from markupsafe import Markup

from ..results import Measurement, Variant
from .charts import Chart, Figure, Place, Scale, Tip, line, number, polyline, tag
from .read import Point, RunFolder
from .words import (
    MINUS,
    PERCENT,
    explained,
    is_share,
    method_title,
    percent,
    plain,
    title,
    value_of,
    with_interval,
)

LEFT, RIGHT, TOP, BOTTOM = 68.0, 368.0, 14.0, 258.0
"""Where the scales end, in pixels."""


def curves(run: RunFolder) -> list[Figure]:
    """A figure for every metric that was measured at two counts or more, but sparsity, which follows."""
    several = [metric for metric in run.drawn if len({point.count for point in run.points(metric)}) > 1]
    return [_draw_curves(run, metric) for metric in several]


def _draw_curves(run: RunFolder, metric: str) -> Figure:
    points = run.points(metric)
    counts = sorted({point.count for point in points})
    original, circuit = run.find(metric, "original"), run.find(metric, "ablated")
    measured = points[0].measurement
    lines = {method: [p for p in points if p.method == method] for method in run.methods}
    lines = {method: found for method, found in lines.items() if found}
    # Where most units go, what counts is how few are left: even steps there, a logarithm where few go.
    few = counts[-1] <= 0.5 * run.total or not run.total
    x = Scale(counts[0], counts[-1], LEFT, RIGHT, log=few and counts[0] > 0 and counts[-1] > 5 * counts[0])
    shown = [*(point.measurement for point in points), *(m for m in (original, circuit) if m)]
    values = [end for m in shown for end in (m.value, *(_ends_of(run, m) or ())) if end is not None]
    anchor = original.value if original and original.value else points[0].value
    share = is_share(metric, measured.unit)
    chart = Chart(x, Scale.fit(values, BOTTOM, TOP, share=share, anchor=anchor))

    def write_tick(value: float) -> str:
        if not share:
            return f"{value:,.6g}".replace("-", MINUS)
        exact = abs(value * 100 - round(value * 100, 2)) < 1e-9
        return f"{value * 100:{'g' if exact else '.1f'}}{PERCENT}"

    tenths = [step for step in range(11) if not few and x.low <= run.total * step / 10 <= x.high]
    shares = [(step / 10 * run.total, f"{step * 10}{PERCENT}") for step in tenths]
    chart.add_axes(
        _keep_apart(x, shares or [(count, f"{count:,}") for count in counts]),
        [(tick, write_tick(tick)) for tick in chart.y.ticks(5)],
        f"{'' if few else 'share of '}{run.units} removed",
    )
    if original and original.value is not None:
        chart.add_reference(original.value)
    for method, found in lines.items():
        chart.add(_draw_band(run, found, chart, run.colours[method]))
    for method, found in lines.items():
        places = [(p.count, p.value) for p in found]
        chart.add_line(places, run.colours[method], places, 3.3)
    if run.circuit and circuit and circuit.value is not None and x.low <= run.count <= x.high:
        chart.add(tag("circle", cx=x(run.count), cy=chart.y(circuit.value), r=7.5, class_="chosen"))
    names = [(method_title(m), run.colours[m], found[-1].value) for m, found in lines.items()]
    if original and original.value is not None:
        names.append(("original", "reference-name", original.value))
    chart.add_names([(n if len(n) < 15 else n[:13] + "…", colour, value) for n, colour, value in names])
    _add_columns(
        chart, counts, {count: _make_tip(run, points, count, circuit, original) for count in counts}, metric
    )
    paired = metric == "perplexity" and run.difference(metric) is not None
    told = (
        explained(metric),
        measured.unit if measured.unit.startswith("nats") else "",
        # A task's circuit is found by what its removal breaks, so no way is the better one.
        "" if metric.startswith("ioi.") else f"{measured.direction} is better",
        "shaded, the paired change from the original" if paired else "",
    )
    label = f"{title(metric)} against the number of removed {run.units}; arrow keys step through the counts"
    return chart.draw(title(metric), "; ".join(filter(None, told)), label)


def _ends_of(run: RunFolder, m: Measurement) -> tuple[float, float] | None:
    """The interval to draw; of perplexity, whose texts differ more than variants, of the paired change."""
    before, d = run.find(m.metric, "original"), run.difference(m.metric, m.variant)
    if m.metric != "perplexity" or before is None or before.value is None:
        return m.ci95
    if d and d.ci95:
        return before.value + d.ci95[0], before.value + d.ci95[1]
    return None if m.variant == "original" else m.ci95


def _keep_apart(x: Scale, ticks: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks whose texts do not touch the one before."""
    kept: list[tuple[float, str]] = []
    for value, text in ticks:
        if not kept or x(value) - x(kept[-1][0]) > 8 + 4 * (len(text) + len(kept[-1][1])):
            kept.append((value, text))
    return kept


def _draw_band(run: RunFolder, points: list[Point], chart: Chart, colour: str) -> Markup:
    """The intervals of one method as an area, or as bars where some point has none or stands alone."""
    found = [(chart.x(p.count), _ends_of(run, p.measurement)) for p in points]
    ends = [(x, chart.y(both[0]), chart.y(both[1])) for x, both in found if both]
    if not ends:
        return Markup("")
    if len(ends) == len(points) > 1:
        outline = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
        return tag("path", d=polyline(outline) + "Z", class_=f"band {colour}")
    bars = "".join(f"M{number(x)} {number(low)}V{number(high)}" for x, low, high in ends)
    return tag("path", d=bars, class_=f"bar {colour}")


def _add_columns(chart: Chart, counts: list[int], tips: dict[int, Tip], metric: str) -> None:
    """One place to point at, or to step to, for every count; the script shows its numbers."""
    edges = [chart.x(count) for count in counts]
    middles = [chart.left, *((a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)), chart.right]
    for start, end, edge, count in zip(middles, middles[1:], edges, counts, strict=False):
        area = tag("rect", x=start, y=TOP - 8, width=end - start, height=BOTTOM - TOP + 8, class_="hit")
        rule = line(edge, edge, TOP - 6, BOTTOM, "rule")
        chart.add_target(f"{metric}@{count}", tips[count], rule, area, class_="column")


def _make_tip(
    run: RunFolder, points: list[Point], count: int, circuit: Measurement | None, original: Measurement | None
) -> Tip:
    """The numbers of one count, as the lines stand above each other."""
    here = sorted((p for p in points if p.count == count), key=lambda point: -point.value)
    rows = [(method_title(p.method), with_interval(p.measurement), run.colours[p.method]) for p in here]
    if circuit and run.circuit is not None and run.count == count:
        own = next((p.value for p in here if p.method == run.method), None)
        if own != circuit.value:
            rows.insert(0, ("this circuit", with_interval(circuit), "chosen"))
    if original:
        rows.append(("original", value_of(original), "reference-name"))
    share = f" ({percent(count / run.total)})" if run.total else ""
    return Tip(f"{run.number_of(count)} removed{share}", rows)


# How many reference samples a pruning needs, and how the scores behind it are spread: what a run with
# compress.samples left in its results.

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_samples(run: RunFolder) -> list[Figure]:
    """Each metric against the number of samples, the scores' histogram, and how many are over a threshold."""
    metrics = dict.fromkeys(row.metric for row in run.provenance.by_samples if row.value is not None)
    spreads = _draw_spreads(run) if run.provenance.distributions else []
    return [*(_draw_against_samples(run, metric) for metric in metrics), *spreads]


def _draw_against_samples(run: RunFolder, metric: str) -> Figure:
    """A line through means, a dot a seed; dashed, the original and methods that look at no sample."""
    found: dict[str, list[Place]] = {}
    for row in run.provenance.by_samples:
        if row.metric == metric and row.value is not None:
            found.setdefault(row.method, []).append((row.samples, row.value))
    level = {Variant.parse(m.variant).method: m.value for m in run.results if m.metric == metric}
    flat = {n: v for n, v in level.items() if v is not None and n not in found and ", " not in n}
    values = [value for draws in found.values() for _, value in draws] + list(flat.values())
    counts = sorted({count for draws in found.values() for count, _ in draws})
    x = Scale(counts[0], counts[-1], LEFT, RIGHT, log=counts[-1] > 5 * counts[0])
    chart = Chart(x, Scale.fit(values, BOTTOM, TOP, anchor=min(values)))
    ticks = [(tick, plain(tick)) for tick in chart.y.ticks(5)]
    chart.add_axes([(count, f"{count:,}") for count in counts], ticks, "reference samples")
    names, words = [], []
    for method, draws in found.items():
        means = {count: fmean(v for c, v in draws if c == count) for count in sorted({c for c, _ in draws})}
        chart.add_line(means.items(), _class_of(run, method), draws, 2.6)
        names.append((method_title(method), _class_of(run, method), means[max(means)]))
        said = (f"{count} samples {plain(value)}" for count, value in means.items())
        words.append(f"{method_title(method)}: {', '.join(said)}")
    for name, value in flat.items():
        chart.add_reference(value)
        names.append((method_title(name), "reference-name", value))
    chart.add_names(names)
    told = (explained(metric), "a dot is one draw of the samples, the line their mean")
    label = f"{title(metric)} against the number of reference samples. {'; '.join(words)}"
    return chart.draw(title(metric), "; ".join(filter(None, told)), label)


def _draw_spreads(run: RunFolder) -> list[Figure]:
    """Share of all scores in each eighth of a power of ten, sites together; and how many scores are above
    each power of ten of the largest."""
    shares: dict[str, list[Place]] = {}
    above: dict[str, list[Place]] = {}
    below = []
    for method, one in run.provenance.distributions.items():
        whole = [sum(column) for column in zip(*one.roles.values(), strict=True)]
        total = sum(whole) or 1
        middles = [(a + b) / 2 for a, b in zip(one.exponents, one.exponents[1:], strict=False)]
        shares[method] = [(middle, count / total) for middle, count in zip(middles, whole[1:], strict=True)]
        below.append(f"{method_title(method)} {whole[0] / total:.2%}")
        powers = [at for at in range(-6, 0) if at in one.exponents]
        counts = [(at, sum(whole[1 + one.exponents.index(at) :])) for at in powers]
        above[method] = [(at, count) for at, count in counts if count > 0]
    words = [
        f"{method_title(method)} " + ", ".join(f"{count:,.0f} above 10^{at:g}" for at, count in found)
        for method, found in above.items()
    ]
    note = f"share of the weights at each size of score; further left or zero: {'; '.join(below)}"
    larger = "number of weights whose score is larger"
    return [
        _draw_spread(run, shares, "Histogram of the scores", note, "", log=False),
        _draw_spread(run, above, "Scores above a threshold", larger, "; ".join(words), log=True),
    ]


def _draw_spread(
    run: RunFolder, lines: dict[str, list[Place]], name: str, note: str, words: str, log: bool
) -> Figure:
    places, heights = zip(*(point for found in lines.values() for point in found), strict=True)
    x, low, top = Scale(min(places), max(places), LEFT, RIGHT), min(heights), max(heights)
    chart = Chart(x, Scale(low * 0.8 if log else 0.0, top * (1.2 if log else 1.06), BOTTOM, TOP, log))
    chart.add_axes(
        [(at, "10" + str(at).translate(RAISED)) for at in range(-6, 1, 2) if x.low <= at <= x.high],
        [(tick, f"{tick:,.0f}" if log else f"{100 * tick:.3g} %") for tick in chart.y.ticks(5)],
        "|score| / the largest",
    )
    for method, found in lines.items():
        chart.add_line(found, _class_of(run, method))
    chart.add_names(
        [(method_title(m), _class_of(run, m), found[-1][1]) for m, found in lines.items() if found]
    )
    return chart.draw(name, note, f"{name}, {note}. {words}")


def _class_of(run: RunFolder, method: str) -> str:
    return run.colours.get(method, "mr")
