"""What a run that pruned weights says: what each method's perplexity is at one sparsity, and whether every
row has it."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from ..results import Distribution, SampleRow, Variant
from .charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Figure, Scale, drawing
from .headline import intervals_overlap
from .read import Point, RunFolder
from .words import (
    Remark,
    count_units,
    explained,
    in_words,
    join_words,
    method_title,
    percent,
    plain,
    relative,
    remark,
    small_interval,
    title,
    value_of,
    with_interval,
)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the first metric that is not a sparsity, of every method, best first."""
    metric, found = _rank_methods(run)
    original = run.find(metric, "original")
    if not found or original is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    best, *rest = found
    own = None if _is_own(run, best) else next((point for point in rest if _is_own(run, point)), None)
    beside = Markup("")
    if own:
        values = (method_title(own.method), value_of(own.measurement), small_interval(own.measurement))
        beside = Markup("; by {} to {}{}").format(*values)
    share = percent(best.count / run.total) if run.total else f"{best.count:,}"
    text = Markup('{} of {} removed{}: {} goes from {}{} to <b class="figure after">{}</b>{} by {}{}{}.')
    return text.format(
        share,
        count_units(None, run),
        " in every row" if run.provenance.scope == "row" else "",
        in_words(metric),
        value_of(original),
        small_interval(original),
        value_of(best.measurement),
        small_interval(best.measurement),
        method_title(best.method),
        f", the best of {len(found)} ways" if rest else "",
        beside,
    )


def _is_own(run: RunFolder, point: Point) -> bool:
    """Whether it is a variant of the run's own method."""
    return bool(run.method) and (point.method == run.method or point.method.startswith(f"{run.method}-"))


def remarks(run: RunFolder) -> list[Remark]:
    _, found = _rank_methods(run)
    parts = []
    for p in found:
        d = run.difference(p.measurement.metric, p.variant)
        more = f", {relative(d.relative)}" if d and d.relative is not None else ""
        parts.append(f"{method_title(p.method)} {with_interval(p.measurement)}{more}")
    said = [remark("plain", "<b>All methods, best first:</b> {}.", join_words(parts))] if parts else []
    return [*said, *_remarks_if_behind(run, found), _remark_on_rows(run)]


def _remarks_if_behind(run: RunFolder, found: list[Point]) -> list[Remark]:
    """That the run's own method is not ahead, where it is not."""
    own = next((point for point in found if _is_own(run, point)), None)
    ahead = found[: found.index(own)] if own else []
    if own is None or not ahead:
        return []
    close = all(intervals_overlap(point.measurement, own.measurement) for point in ahead)
    unsure = ", by less than the intervals tell apart" if close else ""
    names, verb = join_words(method_title(p.method) for p in ahead), "is" if len(ahead) == 1 else "are"
    text = "<b>{} is not ahead:</b> {} {} better{}."
    return [remark("careful", text, method_title(own.method), names, verb, unsure)]


def _rank_methods(run: RunFolder) -> tuple[str, list[Point]]:
    """The metric to tell, perplexity if measured, and every method at its largest count, best first."""
    metrics = [metric for metric in ("perplexity", *run.metrics) if not metric.startswith("sparsity")]
    metric = next((metric for metric in metrics if run.points(metric)), "")
    found = sorted(run.last_points(metric).values(), key=lambda point: point.value)
    return metric, found[::-1] if {p.measurement.direction for p in found} == {"higher"} else found


def _remark_on_rows(run: RunFolder) -> Remark:
    counted = [check for check in run.provenance.checks if check.name.startswith("zeros in a row")]
    if counted and all(check.ok for check in counted):
        text = "<b>Every row was counted</b> and has exactly the share of zeros that was asked for."
        return remark("good", text)
    if any(check.ok is False for check in counted):
        return remark("careful", "<b>Some rows have more zeros than were asked for:</b> see the checks.")
    text = "<b>Rows may differ:</b> weights were not removed row by row; {} of a row are in the checks."
    return remark("plain", text, "the least and the most")


# How many reference samples a pruning needs, and how the scores behind it are spread: what a run with
# compress.samples left in its results.


Points = list[tuple[float, float]]
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
THRESHOLDS = (-6, -5, -4, -3, -2, -1)


def draw_samples(run: RunFolder) -> list[Figure]:
    """Each metric against the number of samples, the scores' histogram, and how many are over a threshold."""
    rows = [row for row in run.provenance.by_samples if row.value is not None]
    drawn = run.provenance.distributions
    return [
        *(_draw_against_samples(run, rows, metric) for metric in dict.fromkeys(row.metric for row in rows)),
        *([_draw_histogram(run, drawn), _draw_counts_above(run, drawn)] if drawn else []),
    ]


def _draw_against_samples(run: RunFolder, rows: Sequence[SampleRow], metric: str) -> Figure:
    """A line through means, a dot a seed; dashed, the original and methods that look at no sample."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.metric == metric and row.value is not None:
            found.setdefault(row.method, {}).setdefault(row.samples, []).append(row.value)
    level = {Variant.parse(m.variant).method: m.value for m in run.results if m.metric == metric}
    flat = {
        name: value
        for name, value in level.items()
        if value is not None and name not in found and ", " not in name
    }
    values = [value for line in found.values() for some in line.values() for value in some]
    counts = sorted({count for line in found.values() for count in line})
    x = Scale(counts[0], counts[-1], LEFT + 14, RIGHT - 10, log=counts[-1] > 5 * counts[0])
    chart = Chart(x, _scale_values([*values, *flat.values()]))
    marks, ends, words = [], list[tuple[str, str, float]](), []
    for method, line in found.items():
        colour = _class_of(run, method)
        means = {count: fmean(some) for count, some in sorted(line.items())}
        draws = [(count, value) for count, some in line.items() for value in some]
        marks.append(chart.draw_line(means.items(), colour, draws, 2.6))
        ends.append((method_title(method), colour, means[max(means)]))
        words.append(
            f"{method_title(method)}: " + ", ".join(f"{n} samples {plain(v)}" for n, v in means.items())
        )
    marks += [chart.draw_reference(value) for value in flat.values()]
    ends += [(method_title(name), "reference-name", value) for name, value in flat.items()]
    axes = chart.draw_axes(
        [(x(count), f"{count:,}") for count in counts],
        [(chart.y(tick), plain(tick)) for tick in chart.y.ticks(5)],
        "reference samples",
    )
    label = f"{title(metric)} against the number of reference samples. {'; '.join(words)}"
    told = (explained(metric), "a dot is one draw of the samples, the line their mean")
    drawn = drawing(WIDTH, HEIGHT, label, axes, *marks, chart.label_ends(ends), class_="curve")
    return Figure(title(metric), "; ".join(filter(None, told)), drawn)


def _draw_histogram(run: RunFolder, drawn: Mapping[str, Distribution]) -> Figure:
    """Share of all scores in each eighth of a power of ten, sites together."""
    lines: dict[str, Points] = {}
    below = []
    for method, one in drawn.items():
        whole = _sum_roles(one)
        total = sum(whole) or 1
        middles = [(a + b) / 2 for a, b in zip(one.exponents, one.exponents[1:], strict=False)]
        lines[method] = [(middle, count / total) for middle, count in zip(middles, whole[1:], strict=True)]
        below.append(f"{method_title(method)} {whole[0] / total:.2%}")
    note = f"share of the weights at each size of score; further left or zero: {'; '.join(below)}"
    return _draw_lines(run, "Histogram of the scores", note, "", lines, log=False)


def _draw_counts_above(run: RunFolder, drawn: Mapping[str, Distribution]) -> Figure:
    """How many scores are above each power of ten of the largest."""
    lines: dict[str, Points] = {}
    for method, one in drawn.items():
        whole = _sum_roles(one)
        starts = {at: 1 + one.exponents.index(at) for at in THRESHOLDS if at in one.exponents}
        above = [(float(at), float(sum(whole[start:]))) for at, start in starts.items()]
        lines[method] = [(at, count) for at, count in above if count > 0]
    words = "; ".join(
        f"{method_title(method)} " + ", ".join(f"{count:,.0f} above 10^{at:g}" for at, count in line)
        for method, line in lines.items()
    )
    note = "number of weights whose score is larger"
    return _draw_lines(run, "Scores above a threshold", note, words, lines, log=True)


def _draw_lines(
    run: RunFolder, name: str, note: str, words: str, lines: dict[str, Points], log: bool
) -> Figure:
    places, heights = zip(*(point for line in lines.values() for point in line), strict=True)
    x, low, top = Scale(min(places), max(places), LEFT + 14, RIGHT - 10), min(heights), max(heights)
    y = Scale(low * 0.8, top * 1.2, BOTTOM, TOP, log=True) if log else Scale(0.0, top * 1.06, BOTTOM, TOP)
    chart = Chart(x, y)
    axes = chart.draw_axes(
        [(x(at), "10" + str(at).translate(RAISED)) for at in range(-6, 1, 2) if x.low <= at <= x.high],
        [(y(tick), f"{tick:,.0f}" if log else f"{100 * tick:.3g} %") for tick in y.ticks(5)],
        "|score| / the largest",
    )
    marks = [chart.draw_line(line, _class_of(run, method)) for method, line in lines.items()]
    ends = [(method_title(m), _class_of(run, m), line[-1][1]) for m, line in lines.items() if line]
    label = f"{name}, {note}. {words}"
    drawn = drawing(WIDTH, HEIGHT, label, axes, *marks, chart.label_ends(ends), class_="curve")
    return Figure(name, note, drawn)


def _sum_roles(one: Distribution) -> list[int]:
    """Counts by bin, all roles together."""
    return [sum(column) for column in zip(*one.roles.values(), strict=True)]


def _scale_values(values: list[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high > 8 * low:
        return Scale(low * 0.9, high * 1.1, BOTTOM, TOP, log=True)
    room = max(high - low, 0.05 * abs(high), 1e-9)
    return Scale(low - 0.06 * room, high + 0.06 * room, BOTTOM, TOP)


def _class_of(run: RunFolder, method: str) -> str:
    return run.colours.get(method, "mr")
