"""The sentences of a run with the job compress: each method's perplexity at one sparsity, and whether
every row has that sparsity."""

from markupsafe import Markup

from .headline import intervals_overlap, remark_on_verdict
from .read import Point, RunFolder
from .words import (
    Remark,
    format_with_interval,
    format_with_small_interval,
    inline_title,
    join_words,
    method_title,
    percent,
    plain,
    relative,
    remark,
    variant_title,
)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: perplexity, or another metric, by the best method and by the run's own."""
    metric, points = _rank_methods(run)
    original = run.find(metric, "original")
    if not points or original is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    best, own, own_clause = points[0], _find_own(run, points), Markup("")
    if own and own is not best:
        own_clause = Markup("; by {} to {}").format(
            method_title(own.method), format_with_small_interval(own.measurement)
        )
    return Markup("{} of {} removed{}: {} goes from {} to {} by {}{}{}.").format(
        percent(best.count / run.total) if run.total else f"{best.count:,}",
        run.units,
        " in every row" if run.provenance.scope == "row" else "",
        inline_title(metric),
        format_with_small_interval(original),
        format_with_small_interval(best.measurement, "figure after"),
        method_title(best.method),
        f", the best of {len(points)} ways" if len(points) > 1 else "",
        own_clause,
    )


def _rank_methods(run: RunFolder) -> tuple[str, list[Point]]:
    """The main metric (perplexity, if measured), and every method at its largest count, best first."""
    metrics = [metric for metric in ("perplexity", *run.metrics) if not metric.startswith("sparsity")]
    metric = next((metric for metric in metrics if run.points(metric)), "")
    points = sorted(run.last_points(metric).values(), key=lambda point: point.value)
    return metric, points[::-1] if {p.measurement.direction for p in points} == {"higher"} else points


def _find_own(run: RunFolder, points: list[Point]) -> Point | None:
    """The first variant of the run's own method."""
    own = run.method
    return next((p for p in points if own and (p.method == own or p.method.startswith(f"{own}-"))), None)


def remarks(run: RunFolder) -> list[Remark]:
    metric, points = _rank_methods(run)
    parts, remarks_made = [], remark_on_verdict(run)
    for p in points:
        d = run.difference(p.measurement.metric, p.variant)
        change_text = f", {relative(d.relative)}" if d and d.relative is not None else ""
        parts.append(f"{method_title(p.method)} {format_with_interval(p.measurement)}{change_text}")
    if parts:
        remarks_made.append(remark("plain", "<b>All methods, best first:</b> {}.", join_words(parts)))
    if seed_rows := [row for row in run.provenance.by_seed if row.metric == metric]:
        text = "<b>Mean ± standard error over {} reference sets,</b> each for itself: {}."
        seed_texts = [
            f"{variant_title(row.variant, run)} {plain(row.mean)} ± {plain(row.sem)}" for row in seed_rows
        ]
        remarks_made.append(remark("plain", text, len(seed_rows[0].values), join_words(seed_texts)))
    own = _find_own(run, points)
    if own and (ahead := points[: points.index(own)]):
        overlapping = all(intervals_overlap(point.measurement, own.measurement) for point in ahead)
        note = ", by less than the intervals tell apart" if overlapping else ""
        names, verb = join_words(method_title(p.method) for p in ahead), "is" if len(ahead) == 1 else "are"
        text = "<b>{} is not ahead:</b> {} {} better{}."
        remarks_made.append(remark("careful", text, method_title(own.method), names, verb, note))
    row_checks = [check.ok for check in run.provenance.checks if check.name.startswith("zeros in a row")]
    if row_checks and all(row_checks):
        text = "<b>Every row was counted</b> and has exactly the share of zeros that was asked for."
        return [*remarks_made, remark("good", text)]
    if False in row_checks:
        text = "<b>Some rows have more zeros than were asked for:</b> see the checks."
        return [*remarks_made, remark("careful", text)]
    text = (
        "<b>Rows may differ:</b> weights were not removed row by row; "
        "the least and the most of a row are in the checks."
    )
    return [*remarks_made, remark("plain", text)]
