"""Curves: a metric against the number of removed units, with one line per method. For a run that compares
numbers of samples, also a metric against that number, and the distribution of the scores."""

from collections.abc import Iterable
from statistics import fmean

from markupsafe import Markup

from ..results import Measurement, Variant
from .charts import Chart, Figure, Place, Scale, Tip, line, number, polyline, tag
from .read import Point, RunFolder
from .words import (
    MINUS,
    PERCENT,
    explain,
    format_with_interval,
    is_share,
    method_title,
    percent,
    plain,
    title,
    value_of,
)

LEFT, RIGHT, TOP, BOTTOM = 68.0, 368.0, 14.0, 258.0
"""The ends of the scales, in pixels."""


def curves(run: RunFolder) -> list[Figure]:
    """A figure for every metric measured at two or more counts, except sparsity, which the count
    determines."""
    metrics = [
        metric for metric in run.chart_metrics if len({point.count for point in run.points(metric)}) > 1
    ]
    return [_draw_curves(run, metric) for metric in metrics]


def _draw_curves(run: RunFolder, metric: str) -> Figure:
    points = run.points(metric)
    counts = sorted({point.count for point in points})
    original, circuit = run.find(metric, "original"), run.find(metric, "ablated")
    measured = points[0].measurement
    lines = {m: line_points for m in run.methods if (line_points := [p for p in points if p.method == m])}
    # Small counts need a logarithmic axis. If most units are removed, what matters is how few are left, so
    # the axis is linear.
    few_removed = counts[-1] <= 0.5 * run.total or not run.total
    x = Scale(
        counts[0], counts[-1], LEFT, RIGHT, log=few_removed and counts[0] > 0 and counts[-1] > 5 * counts[0]
    )
    measurements = [*(point.measurement for point in points), *(m for m in (original, circuit) if m)]
    ends = [end for m in measurements for end in (m.value, *(_find_interval(run, m) or ()))]
    values = [end for end in ends if end is not None]
    anchor = original.value if original and original.value else points[0].value
    share = is_share(metric, measured.unit)
    chart = Chart(x, Scale.fit(values, BOTTOM, TOP, share=share, anchor=anchor))

    def write_tick(value: float) -> str:
        if not share:
            return f"{value:,.6g}".replace("-", MINUS)
        exact = abs(value * 100 - round(value * 100, 2)) < 1e-9
        return f"{value * 100:{'g' if exact else '.1f'}}{PERCENT}"

    steps = [step for step in range(11) if not few_removed and x.low <= run.total * step / 10 <= x.high]
    shares = [(step / 10 * run.total, f"{step * 10}{PERCENT}") for step in steps]
    chart.add_axes(
        _keep_apart(x, shares or [(count, f"{count:,}") for count in counts]),
        [(tick, write_tick(tick)) for tick in chart.y.ticks(5)],
        f"{'' if few_removed else 'share of '}{run.units} removed",
    )
    if original and original.value is not None:
        chart.add_reference(original.value)
    # All bands first, so that no band covers another method's line.
    for method, line_points in lines.items():
        chart.add(_draw_band(run, line_points, chart, run.colours[method]))
    for method, line_points in lines.items():
        places = [(p.count, p.value) for p in line_points]
        chart.add_line(places, run.colours[method], places, 3.3)
    if run.circuit and circuit and circuit.value is not None and x.low <= run.count <= x.high:
        chart.add(tag("circle", cx=x(run.count), cy=chart.y(circuit.value), r=7.5, class_="chosen"))
    names = [(method_title(m), run.colours[m], line_points[-1].value) for m, line_points in lines.items()]
    if original and original.value is not None:
        names.append(("original", "reference-name", original.value))
    chart.add_names([(n if len(n) < 15 else n[:13] + "…", colour, value) for n, colour, value in names])
    tips = {count: _make_tip(run, points, count, circuit, original) for count in counts}
    _add_columns(chart, counts, tips, metric)
    paired = metric == "perplexity" and run.difference(metric) is not None
    notes = (
        explain(metric),
        measured.unit if measured.unit.startswith("nats") else "",
        # A task's circuit may be shown by what its removal breaks, so neither direction is better.
        "" if metric.startswith("ioi.") else f"{measured.direction} is better",
        "shaded, the paired change from the original" if paired else "",
    )
    label = f"{title(metric)} against the number of removed {run.units}; arrow keys step through the counts"
    return chart.draw(title(metric), "; ".join(filter(None, notes)), label)


def _find_interval(run: RunFolder, m: Measurement) -> tuple[float, float] | None:
    """The interval to draw. For perplexity it is that of the paired change: texts differ much more than
    variants do, so unpaired intervals would hide every difference."""
    before, d = run.find(m.metric, "original"), run.difference(m.metric, m.variant)
    if m.metric != "perplexity" or before is None or before.value is None:
        return m.ci95
    if d and d.ci95:
        return before.value + d.ci95[0], before.value + d.ci95[1]
    return None if m.variant == "original" else m.ci95


def _keep_apart(x: Scale, ticks: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks whose labels do not touch the previous one."""
    kept_ticks: list[tuple[float, str]] = []
    for value, text in ticks:
        if not kept_ticks or x(value) - x(kept_ticks[-1][0]) > 8 + 4 * (len(text) + len(kept_ticks[-1][1])):
            kept_ticks.append((value, text))
    return kept_ticks


def _draw_band(run: RunFolder, points: list[Point], chart: Chart, colour: str) -> Markup:
    """The intervals of one method as an area, or as bars if a point has none or there is only one point."""
    intervals = [(chart.x(p.count), _find_interval(run, p.measurement)) for p in points]
    ends = [(x, chart.y(interval[0]), chart.y(interval[1])) for x, interval in intervals if interval]
    if not ends:
        return Markup("")
    if len(ends) == len(points) > 1:
        outline = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
        return tag("path", d=polyline(outline) + "Z", class_=f"band {colour}")
    bars = "".join(f"M{number(x)} {number(low)}V{number(high)}" for x, low, high in ends)
    return tag("path", d=bars, class_=f"bar {colour}")


def _add_columns(chart: Chart, counts: list[int], tips: dict[int, Tip], metric: str) -> None:
    """A column for every count, to point at or to step to with the keys; the script shows its numbers."""
    edges = [chart.x(count) for count in counts]
    middles = [chart.left, *((a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)), chart.right]
    for start, end, edge, count in zip(middles, middles[1:], edges, counts, strict=False):
        area = tag("rect", x=start, y=TOP - 8, width=end - start, height=BOTTOM - TOP + 8, class_="hit")
        rule = line(edge, edge, TOP - 6, BOTTOM, "rule")
        chart.add_target(f"{metric}@{count}", tips[count], rule, area, class_="column")


def _make_tip(
    run: RunFolder, points: list[Point], count: int, circuit: Measurement | None, original: Measurement | None
) -> Tip:
    """The numbers of one count, in the order of the lines from top to bottom."""
    at_count = sorted((p for p in points if p.count == count), key=lambda point: -point.value)
    rows = [
        (method_title(p.method), format_with_interval(p.measurement), run.colours[p.method]) for p in at_count
    ]
    if circuit and run.circuit is not None and run.count == count:
        own = next((p.value for p in at_count if p.method == run.method), None)
        if own != circuit.value:
            rows.insert(0, ("this circuit", format_with_interval(circuit), "chosen"))
    if original:
        rows.append(("original", value_of(original), "reference-name"))
    share = f" ({percent(count / run.total)})" if run.total else ""
    return Tip(f"{run.write_count(count)} removed{share}", rows)


# How many reference samples a pruning needs, and how its scores are distributed, from the results of a run
# with compress.samples.

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_samples(run: RunFolder) -> list[Figure]:
    """Each metric against the number of samples, the scores' histogram, and the number above a threshold."""
    metrics = dict.fromkeys(row.metric for row in run.provenance.by_samples if row.value is not None)
    spreads = _draw_spreads(run) if run.provenance.distributions else []
    return [*(_draw_against_samples(run, metric) for metric in metrics), *spreads]


def _draw_against_samples(run: RunFolder, metric: str) -> Figure:
    """A line through the means and a dot per seed; dashed lines for the original and methods without
    samples."""
    by_method: dict[str, list[Place]] = {}
    for row in run.provenance.by_samples:
        if row.metric == metric and row.value is not None:
            by_method.setdefault(row.method, []).append((row.samples, row.value))
    level = {Variant.parse(m.variant).method: m.value for m in run.results if m.metric == metric}
    # A name with ", " is a pooled number of samples ("lrp, 8 samples"), which the lines show already.
    constant_methods = {
        n: v for n, v in level.items() if v is not None and n not in by_method and ", " not in n
    }
    values = [value for draws in by_method.values() for _, value in draws] + list(constant_methods.values())
    counts = sorted({count for draws in by_method.values() for count, _ in draws})
    x = Scale(counts[0], counts[-1], LEFT, RIGHT, log=counts[-1] > 5 * counts[0])
    chart = Chart(x, Scale.fit(values, BOTTOM, TOP, anchor=min(values)))
    ticks = [(tick, plain(tick)) for tick in chart.y.ticks(5)]
    chart.add_axes([(count, f"{count:,}") for count in counts], ticks, "reference samples")
    names, words = [], []
    for method, draws in by_method.items():
        means = {count: fmean(v for c, v in draws if c == count) for count in sorted({c for c, _ in draws})}
        chart.add_line(means.items(), _class_of(run, method), draws, 2.6)
        names.append((method_title(method), _class_of(run, method), means[max(means)]))
        figures = (f"{count} samples {plain(value)}" for count, value in means.items())
        words.append(f"{method_title(method)}: {', '.join(figures)}")
    for name, value in constant_methods.items():
        chart.add_reference(value)
        names.append((method_title(name), "reference-name", value))
    chart.add_names(names)
    notes = (explain(metric), "a dot is one draw of the samples, the line their mean")
    label = f"{title(metric)} against the number of reference samples. {'; '.join(words)}"
    return chart.draw(title(metric), "; ".join(filter(None, notes)), label)


def _draw_spreads(run: RunFolder) -> list[Figure]:
    """Two figures over all sites: the share of scores in each eighth of a power of ten, and the number of
    scores above each power of ten relative to the largest."""
    shares: dict[str, list[Place]] = {}
    above: dict[str, list[Place]] = {}
    below = []
    for method, distribution in run.provenance.distributions.items():
        bin_counts = [sum(column) for column in zip(*distribution.roles.values(), strict=True)]
        total = sum(bin_counts) or 1
        exponents = distribution.exponents
        middles = [(a + b) / 2 for a, b in zip(exponents, exponents[1:], strict=False)]
        # The first count is of scores below the first exponent; it has no place on the axis.
        inside = zip(middles, bin_counts[1:], strict=True)
        shares[method] = [(middle, count / total) for middle, count in inside]
        below.append(f"{method_title(method)} {bin_counts[0] / total:.2%}")
        powers = [exponent for exponent in range(-6, 0) if exponent in exponents]
        counts = [(exponent, sum(bin_counts[1 + exponents.index(exponent) :])) for exponent in powers]
        above[method] = [(exponent, count) for exponent, count in counts if count > 0]
    words = [
        f"{method_title(method)} "
        + ", ".join(f"{count:,.0f} above 10^{exponent:g}" for exponent, count in exceeding)
        for method, exceeding in above.items()
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
    places, heights = zip(*(point for points in lines.values() for point in points), strict=True)
    x, low, top = Scale(min(places), max(places), LEFT, RIGHT), min(heights), max(heights)
    chart = Chart(x, Scale(low * 0.8 if log else 0.0, top * (1.2 if log else 1.06), BOTTOM, TOP, log))
    chart.add_axes(
        [
            (exponent, "10" + str(exponent).translate(RAISED))
            for exponent in range(-6, 1, 2)
            if x.low <= exponent <= x.high
        ],
        [(tick, f"{tick:,.0f}" if log else f"{100 * tick:.3g} %") for tick in chart.y.ticks(5)],
        "|score| / the largest",
    )
    for method, points in lines.items():
        chart.add_line(points, _class_of(run, method))
    chart.add_names(
        [(method_title(m), _class_of(run, m), points[-1][1]) for m, points in lines.items() if points]
    )
    return chart.draw(name, note, f"{name}, {note}. {words}")


def _class_of(run: RunFolder, method: str) -> str:
    return run.colours.get(method, "mr")
