"""What a run that pruned weights says: what each method's perplexity is at one sparsity, and whether every
row has it."""

from markupsafe import Markup

from .headline import intervals_overlap, remark_on_verdict
from .read import Point, RunFolder
from .words import (
    Remark,
    in_words,
    join_words,
    method_title,
    percent,
    plain,
    relative,
    remark,
    variant_title,
    with_interval,
    with_small_interval,
)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the first metric that is not a sparsity, of every method, best first."""
    metric, found = _rank_methods(run)
    original = run.find(metric, "original")
    if not found or original is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    best, own, beside = found[0], _find_own(run, found), Markup("")
    if own and own is not best:
        beside = Markup("; by {} to {}").format(
            method_title(own.method), with_small_interval(own.measurement)
        )
    return Markup("{} of {} removed{}: {} goes from {} to {} by {}{}{}.").format(
        percent(best.count / run.total) if run.total else f"{best.count:,}",
        run.units,
        " in every row" if run.provenance.scope == "row" else "",
        in_words(metric),
        with_small_interval(original),
        with_small_interval(best.measurement, "figure after"),
        method_title(best.method),
        f", the best of {len(found)} ways" if len(found) > 1 else "",
        beside,
    )


def _rank_methods(run: RunFolder) -> tuple[str, list[Point]]:
    """The metric to tell, perplexity if measured, and every method at its largest count, best first."""
    metrics = [metric for metric in ("perplexity", *run.metrics) if not metric.startswith("sparsity")]
    metric = next((metric for metric in metrics if run.points(metric)), "")
    found = sorted(run.last_points(metric).values(), key=lambda point: point.value)
    return metric, found[::-1] if {p.measurement.direction for p in found} == {"higher"} else found


def _find_own(run: RunFolder, found: list[Point]) -> Point | None:
    """The first variant of the run's own method."""
    own = run.method
    return next((p for p in found if own and (p.method == own or p.method.startswith(f"{own}-"))), None)


def remarks(run: RunFolder) -> list[Remark]:
    metric, found = _rank_methods(run)
    parts, said = [], remark_on_verdict(run)
    for p in found:
        d = run.difference(p.measurement.metric, p.variant)
        more = f", {relative(d.relative)}" if d and d.relative is not None else ""
        parts.append(f"{method_title(p.method)} {with_interval(p.measurement)}{more}")
    if parts:
        said.append(remark("plain", "<b>All methods, best first:</b> {}.", join_words(parts)))
    if apart := [row for row in run.provenance.by_seed if row.metric == metric]:
        text = "<b>Mean ± standard error over {} reference sets,</b> each for itself: {}."
        named = [f"{variant_title(row.variant, run)} {plain(row.mean)} ± {plain(row.sem)}" for row in apart]
        said.append(remark("plain", text, len(apart[0].values), join_words(named)))
    own = _find_own(run, found)
    if own and (ahead := found[: found.index(own)]):
        close = all(intervals_overlap(point.measurement, own.measurement) for point in ahead)
        unsure = ", by less than the intervals tell apart" if close else ""
        names, verb = join_words(method_title(p.method) for p in ahead), "is" if len(ahead) == 1 else "are"
        text = "<b>{} is not ahead:</b> {} {} better{}."
        said.append(remark("careful", text, method_title(own.method), names, verb, unsure))
    counted = [check.ok for check in run.provenance.checks if check.name.startswith("zeros in a row")]
    if counted and all(counted):
        text = "<b>Every row was counted</b> and has exactly the share of zeros that was asked for."
        return [*said, remark("good", text)]
    if False in counted:
        text = "<b>Some rows have more zeros than were asked for:</b> see the checks."
        return [*said, remark("careful", text)]
    text = (
        "<b>Rows may differ:</b> weights were not removed row by row; "
        "the least and the most of a row are in the checks."
    )
    return [*said, remark("plain", text)]
