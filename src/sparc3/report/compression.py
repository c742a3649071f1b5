"""What a run that pruned weights says: what each method's perplexity is at one sparsity, and whether every row has it."""

from markupsafe import Markup

from .folder import RunFolder
from .numbers import in_words, listed, percent, relative, value_of, with_interval
from .remark import Remark
from .variants import Point, methods, named, points, units


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the first metric that is not a sparsity, of every method, best first."""
    metric = _metric(run)
    found = _best_first(run, metric) if metric else []
    original = run.measured(metric, "original") if metric else None
    if metric is None or not found or original is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    total = sum(run.sizes.values())
    share = percent(found[0].count / total) if total else f"{found[0].count:,}"
    where = " in every row" if run.provenance.get("scope") == "row" else ""
    parts = [Markup("{} {}").format(named(point.method), Markup('<b class="figure">{}</b>').format(value_of(point.measurement))) for point in found]
    said = Markup(", ").join(parts)
    return Markup("{} of {} removed{}: {} {} in the original, {}.").format(
        share, units(None, run), where, in_words(metric), value_of(original), said
    )


def remarks(run: RunFolder) -> list[Remark]:
    metric = _metric(run)
    found = _best_first(run, metric) if metric else []
    parts = [f"{named(p.method)} {with_interval(p.measurement)}{_relative(run, p)}" for p in found]
    plain = Remark("plain", Markup("<b>Change from the original:</b> {}.").format(listed(parts)))
    return [*([plain] if parts else []), _rows(run)]


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
    d = next((d for d in run.results.differences if (d.metric, d.from_, d.to) == (metric, "original", variant)), None)
    return f", {relative(d.relative)}" if d and d.relative is not None else ""


def _rows(run: RunFolder) -> Remark:
    checks = [check for check in run.provenance.get("checks") or [] if str(check.get("name", "")).startswith("zeros in a row")]
    if checks and all(check.get("ok") for check in checks):
        return Remark("good", Markup("<b>Every row was counted</b> and has exactly the share of zeros that was asked for."))
    if any(check.get("ok") is False for check in checks):
        return Remark("careful", Markup("<b>Some rows have more zeros than were asked for:</b> see the checks."))
    return Remark("plain", Markup("<b>Rows may differ:</b> weights were not removed row by row; the least and the most of a row are in the checks."))
