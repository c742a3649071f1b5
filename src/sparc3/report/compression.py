"""What a run that pruned weights says: what each method's perplexity is at one sparsity, and whether every
row has it."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from .charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Figure, Scale, drawing, mark
from .read import RunFolder
from .standing import intervals_overlap
from .variant_names import Point, count_units, curve_points, list_methods, method_colours, method_title
from .words import (
    Remark,
    explained,
    in_words,
    join_words,
    percent,
    plain,
    relative,
    small_interval,
    title,
    value_of,
    with_interval,
)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the first metric that is not a sparsity, of every method, best first."""
    metric = _choose_metric(run)
    found = _rank_methods(run, metric) if metric else []
    original = run.find_measurement(metric, "original") if metric else None
    if metric is None or not found or original is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    best, *rest = found
    own = next((point for point in rest if _is_own(run, point)), None) if not _is_own(run, best) else None
    beside = (
        Markup("; by {} to {}{}").format(
            method_title(own.method), value_of(own.measurement), small_interval(own.measurement)
        )
        if own
        else ""
    )
    where = " in every row" if run.provenance.get("scope") == "row" else ""
    text = Markup('{} removed{}: {} goes from {}{} to <b class="figure after">{}</b>{} by {}{}{}.')
    return text.format(
        _write_share(run, best),
        where,
        in_words(metric),
        value_of(original),
        small_interval(original),
        value_of(best.measurement),
        small_interval(best.measurement),
        method_title(best.method),
        f", the best of {len(found)} ways" if rest else "",
        beside,
    )


def _write_share(run: RunFolder, point: Point) -> str:
    total = sum(run.sizes.values())
    return f"{percent(point.count / total) if total else f'{point.count:,}'} of {count_units(None, run)}"


def _is_own(run: RunFolder, point: Point) -> bool:
    """Whether it is a variant of the run's own method."""
    return bool(run.method) and (point.method == run.method or point.method.startswith(f"{run.method}-"))


def remarks(run: RunFolder) -> list[Remark]:
    metric = _choose_metric(run)
    found = _rank_methods(run, metric) if metric else []
    parts = [
        f"{method_title(p.method)} {with_interval(p.measurement)}{_write_relative(run, p)}" for p in found
    ]
    plain = Remark("plain", Markup("<b>All methods, best first:</b> {}.").format(join_words(parts)))
    return [*([plain] if parts else []), *_remarks_if_behind(run, found), _remark_on_rows(run)]


def _remarks_if_behind(run: RunFolder, found: list[Point]) -> list[Remark]:
    """That the run's own method is not ahead, where it is not."""
    own = next((point for point in found if _is_own(run, point)), None)
    ahead = found[: found.index(own)] if own else []
    if own is None or not ahead:
        return []
    close = all(intervals_overlap(point.measurement, own.measurement) for point in ahead)
    text = Markup("<b>{} is not ahead:</b> {} {} better{}.")
    names = join_words(method_title(point.method) for point in ahead)
    unsure = ", by less than the intervals tell apart" if close else ""
    return [
        Remark(
            "careful",
            text.format(method_title(own.method), names, "is" if len(ahead) == 1 else "are", unsure),
        )
    ]


def _choose_metric(run: RunFolder) -> str | None:
    return next(
        (m for m in ("perplexity", *run.metrics()) if not m.startswith("sparsity") and curve_points(run, m)),
        None,
    )


def _rank_methods(run: RunFolder, metric: str) -> list[Point]:
    """Every method at the largest count that was tried."""
    last = {point.method: point for point in curve_points(run, metric)}
    direction = {point.measurement.direction for point in last.values()}
    found = sorted(
        (last[method] for method in list_methods(run) if method in last),
        key=lambda point: point.measurement.value or 0.0,
    )
    return found[::-1] if direction == {"higher"} else found


def _write_relative(run: RunFolder, point: Point) -> str:
    d = run.difference(point.measurement.metric, point.variant)
    return f", {relative(d.relative)}" if d and d.relative is not None else ""


def _remark_on_rows(run: RunFolder) -> Remark:
    checks = [
        check
        for check in run.provenance.get("checks") or []
        if str(check.get("name", "")).startswith("zeros in a row")
    ]
    if checks and all(check.get("ok") for check in checks):
        return Remark(
            "good",
            Markup("<b>Every row was counted</b> and has exactly the share of zeros that was asked for."),
        )
    if any(check.get("ok") is False for check in checks):
        return Remark(
            "careful", Markup("<b>Some rows have more zeros than were asked for:</b> see the checks.")
        )
    return Remark(
        "plain",
        Markup(
            "<b>Rows may differ:</b> weights were not removed row by row; the least and the most of a row "
            "are in the checks."
        ),
    )


# How many reference samples a pruning needs, and how the scores behind it are spread: what a run with
# compress.samples left in its results.


Points = list[tuple[float, float]]
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
THRESHOLDS = (-6, -5, -4, -3, -2, -1)


def by_samples(run: RunFolder) -> list[Figure]:
    """Each metric against the number of samples, the histograms of the scores, and how many lie above a
    threshold; [] for any other run."""
    rows = list(run.provenance.get("by_samples") or [])
    drawn = dict(run.provenance.get("distributions") or {})
    metrics = dict.fromkeys(str(row["metric"]) for row in rows if row.get("value") is not None)
    return [
        *(_draw_against_samples(run, rows, metric) for metric in metrics),
        *([_draw_histogram(run, drawn), _draw_counts_above(run, drawn)] if drawn else []),
    ]


def _draw_against_samples(run: RunFolder, rows: Sequence[dict[str, Any]], metric: str) -> Figure:
    """A line through the means over seeds, a dot for every seed; dashed, the original and methods that look
    at no sample."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["metric"] == metric and row.get("value") is not None:
            found.setdefault(str(row["method"]), {}).setdefault(int(row["samples"]), []).append(
                float(row["value"])
            )
    level = {
        m.variant.partition("@")[0]: m.value
        for m in run.results
        if m.metric == metric and m.value is not None
    }
    flat = {name: value for name, value in level.items() if name not in found and ", " not in name}
    values = [value for line in found.values() for some in line.values() for value in some] + list(
        flat.values()
    )
    counts = sorted({count for line in found.values() for count in line})
    x = Scale(counts[0], counts[-1], LEFT + 14, RIGHT - 10, log=counts[-1] > 5 * counts[0])
    chart = Chart(x, _scale_values(values))
    marks = []
    for method, line in found.items():
        dots = [
            mark(_class_of(run, method), x(count), chart.y(value), 2.6)
            for count, some in line.items()
            for value in some
        ]
        means = [(count, fmean(some)) for count, some in sorted(line.items())]
        marks.append(chart.draw_line(means, _class_of(run, method), *dots))
    marks += [chart.draw_reference(value) for value in flat.values()]
    ends = [(method, _class_of(run, method), fmean(line[max(line)])) for method, line in found.items()]
    ends += [(name, "reference-name", value) for name, value in flat.items()]
    names = chart.label_ends([(method_title(name), colour, value) for name, colour, value in ends])
    axes = chart.draw_axes(
        [(x(count), f"{count:,}") for count in counts],
        [(chart.y(tick), plain(tick)) for tick in chart.y.ticks(5)],
        "reference samples",
    )
    words = "; ".join(
        f"{method_title(m)}: " + ", ".join(f"{n} samples {plain(fmean(s))}" for n, s in sorted(line.items()))
        for m, line in found.items()
    )
    label = f"{title(metric)} against the number of reference samples. {words}"
    note = "; ".join(
        part for part in (explained(metric), "a dot is one draw of the samples, the line their mean") if part
    )
    return Figure(title(metric), note, drawing(WIDTH, HEIGHT, label, axes, *marks, names, class_="curve"))


def _draw_histogram(run: RunFolder, drawn: dict[str, Any]) -> Figure:
    """Share of all scores in each eighth of a power of ten, sites together."""
    lines: dict[str, Points] = {}
    for method, spread_out in drawn.items():
        whole, exponents = _sum_roles(spread_out), spread_out["exponents"]
        total = sum(whole) or 1
        middles = [(a + b) / 2 for a, b in zip(exponents, exponents[1:], strict=False)]
        lines[method] = [(middle, count / total) for middle, count in zip(middles, whole[1:], strict=True)]
    below = "; ".join(
        f"{method_title(method)} {_sum_roles(one)[0] / (sum(_sum_roles(one)) or 1):.2%}"
        for method, one in drawn.items()
    )
    note = f"share of the weights at each size of score; further left or zero: {below}"
    return _draw_lines(run, "Histogram of the scores", note, "", lines, log=False)


def _draw_counts_above(run: RunFolder, drawn: dict[str, Any]) -> Figure:
    """How many scores are above each power of ten of the largest."""
    lines: dict[str, Points] = {}
    for method, one in drawn.items():
        whole, exponents = _sum_roles(one), one["exponents"]
        above = [
            (threshold, float(sum(whole[1 + exponents.index(threshold) :])))
            for threshold in THRESHOLDS
            if threshold in exponents
        ]
        lines[method] = [(threshold, count) for threshold, count in above if count > 0]
    words = "; ".join(
        f"{method_title(method)} " + ", ".join(f"{count:,.0f} above 10^{at:g}" for at, count in line)
        for method, line in lines.items()
    )
    return _draw_lines(
        run, "Scores above a threshold", "number of weights whose score is larger", words, lines, log=True
    )


def _draw_lines(
    run: RunFolder, name: str, note: str, words: str, lines: dict[str, Points], log: bool
) -> Figure:
    every = [point for line in lines.values() for point in line]
    x = Scale(min(a for a, _ in every), max(a for a, _ in every), LEFT + 14, RIGHT - 10)
    top, low = max(b for _, b in every), min(b for _, b in every)
    y = Scale(low * 0.8, top * 1.2, BOTTOM, TOP, log=True) if log else Scale(0.0, top * 1.06, BOTTOM, TOP)
    chart = Chart(x, y)
    axes = chart.draw_axes(
        [(x(at), "10" + str(at).translate(RAISED)) for at in range(-6, 1, 2) if x.low <= at <= x.high],
        [(y(tick), f"{tick:,.0f}" if log else f"{100 * tick:.3g} %") for tick in y.ticks(5)],
        "|score| / the largest",
    )
    marks = [chart.draw_line(line, _class_of(run, method)) for method, line in lines.items()]
    names = chart.label_ends(
        [
            (method_title(method), _class_of(run, method), line[-1][1])
            for method, line in lines.items()
            if line
        ]
    )
    return Figure(
        name, note, drawing(WIDTH, HEIGHT, f"{name}, {note}. {words}", axes, *marks, names, class_="curve")
    )


def _sum_roles(one: dict[str, Any]) -> list[int]:
    """Counts by bin, all roles together."""
    return [sum(column) for column in zip(*one["roles"].values(), strict=True)]


def _scale_values(values: list[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high > 8 * low:
        return Scale(low * 0.9, high * 1.1, BOTTOM, TOP, log=True)
    room = max(high - low, 0.05 * abs(high), 1e-9)
    return Scale(low - 0.06 * room, high + 0.06 * room, BOTTOM, TOP)


def _class_of(run: RunFolder, method: str) -> str:
    return method_colours(run).get(method, "mr")
