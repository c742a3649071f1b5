"""What a run that pruned weights says: what each method's perplexity is at one sparsity, and whether every row has it."""

from markupsafe import Markup

from .folder import RunFolder
from .numbers import in_words, listed, percent, relative, small_interval, value_of, with_interval
from .remark import Remark
from .standing import overlap
from .variants import Point, methods, named, points, units


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the first metric that is not a sparsity, of every method, best first."""
    metric = _metric(run)
    found = _best_first(run, metric) if metric else []
    original = run.measured(metric, "original") if metric else None
    if metric is None or not found or original is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    best, *rest = found
    own = next((point for point in rest if _is_own(run, point)), None) if not _is_own(run, best) else None
    beside = Markup("; by {} to {}{}").format(named(own.method), value_of(own.measurement), small_interval(own.measurement)) if own else ""
    where = " in every row" if run.provenance.get("scope") == "row" else ""
    text = Markup('{} removed{}: {} goes from {}{} to <b class="figure after">{}</b>{} by {}{}{}.')
    return text.format(
        _share(run, best), where, in_words(metric), value_of(original), small_interval(original), value_of(best.measurement),
        small_interval(best.measurement), named(best.method), f", the best of {len(found)} ways" if rest else "", beside,
    )  # fmt: skip


def _share(run: RunFolder, point: Point) -> str:
    total = sum(run.sizes.values())
    return f"{percent(point.count / total) if total else f'{point.count:,}'} of {units(None, run)}"


def _is_own(run: RunFolder, point: Point) -> bool:
    """Whether it is a variant of the run's own method."""
    return bool(run.method) and (point.method == run.method or point.method.startswith(f"{run.method}-"))


def remarks(run: RunFolder) -> list[Remark]:
    metric = _metric(run)
    found = _best_first(run, metric) if metric else []
    parts = [f"{named(p.method)} {with_interval(p.measurement)}{_relative(run, p)}" for p in found]
    plain = Remark("plain", Markup("<b>All methods, best first:</b> {}.").format(listed(parts)))
    return [*([plain] if parts else []), *_behind(run, found), _rows(run)]


def _behind(run: RunFolder, found: list[Point]) -> list[Remark]:
    """That the run's own method is not ahead, where it is not."""
    own = next((point for point in found if _is_own(run, point)), None)
    ahead = found[: found.index(own)] if own else []
    if own is None or not ahead:
        return []
    close = all(overlap(point.measurement, own.measurement) for point in ahead)
    text = Markup("<b>{} is not ahead:</b> {} {} better{}.")
    names = listed(named(point.method) for point in ahead)
    unsure = ", by less than the intervals tell apart" if close else ""
    return [Remark("careful", text.format(named(own.method), names, "is" if len(ahead) == 1 else "are", unsure))]


def _metric(run: RunFolder) -> str | None:
    return next((m for m in ("perplexity", *run.metrics()) if not m.startswith("sparsity") and points(run, m)), None)


def _best_first(run: RunFolder, metric: str) -> list[Point]:
    """Every method at the largest count that was tried."""
    last = {point.method: point for point in points(run, metric)}
    direction = {point.measurement.direction for point in last.values()}
    found = sorted((last[method] for method in methods(run) if method in last), key=lambda point: point.measurement.value or 0.0)
    return found[::-1] if direction == {"higher"} else found


def _relative(run: RunFolder, point: Point) -> str:
    variant = f"{point.method}@{point.count}"
    metric = point.measurement.metric
    d = run.difference(metric, variant)
    return f", {relative(d.relative)}" if d and d.relative is not None else ""


def _rows(run: RunFolder) -> Remark:
    checks = [check for check in run.provenance.get("checks") or [] if str(check.get("name", "")).startswith("zeros in a row")]
    if checks and all(check.get("ok") for check in checks):
        return Remark("good", Markup("<b>Every row was counted</b> and has exactly the share of zeros that was asked for."))
    if any(check.get("ok") is False for check in checks):
        return Remark("careful", Markup("<b>Some rows have more zeros than were asked for:</b> see the checks."))
    return Remark("plain", Markup("<b>Rows may differ:</b> weights were not removed row by row; the least and the most of a row are in the checks."))
