"""Where the circuit stands among the other methods: at the same count, at the same damage, under the same
budget."""

from markupsafe import Markup

from ..results import Measurement
from .read import RunFolder
from .tradeoff import budget, harm
from .variant_names import Point, curve_points, method_title, parse_variant, rival_points
from .words import Remark, join_words, percent, relative, value_of, with_interval


def harm_of(m: Measurement) -> float:
    """What is better is less. A task is looked for by what its removal breaks, so there lower is better
    whatever the metric's own direction."""
    assert m.value is not None
    return -m.value if m.direction == "higher" and not m.metric.startswith("ioi.") else m.value


def intervals_overlap(one: Measurement, other: Measurement) -> bool:
    """Whether the intervals of two figures meet."""
    return bool(one.ci95 and other.ci95 and one.ci95[0] <= other.ci95[1] and other.ci95[0] <= one.ci95[1])


def standing_remarks(run: RunFolder, metric: str) -> list[Remark]:
    """At the circuit's own count, then at its damage: under the search's budget where there was one, else at
    no more than its own."""
    here = (
        remark_under_budget(run, metric) if run.search.get("rivals") else remark_at_same_damage(run, metric)
    )
    return [*remarks_at_same_count(run, metric), *([here] if here else [])]


def remarks_at_same_count(run: RunFolder, metric: str) -> list[Remark]:
    others = [point for point in rival_points(run, metric) if point.method != "random"]
    after = run.results.find(metric, "ablated")
    ahead = [point for point in others if harm_of(point.measurement) < harm_of(after)]
    if ahead:
        close = [point for point in ahead if intervals_overlap(point.measurement, after)]
        clear = [Remark("careful", _write_ahead(run, point, after)) for point in ahead if point not in close]
        return [*clear, *([_remark_on_close(run, close)] if close else [])]
    if not others:
        return []
    best = min(others, key=lambda point: harm_of(point.measurement))
    text = Markup("<b>No other method is ahead</b> at the same count; the nearest, {}, reaches {}{}.")
    return [
        Remark(
            "good",
            text.format(
                method_title(best.method), with_interval(best.measurement), _write_perplexity(run, best)
            ),
        )
    ]


def _write_ahead(run: RunFolder, point: Point, after: Measurement) -> Markup:
    text = Markup("<b>{} is ahead at the same count:</b> {}{}, against {} here.")
    return text.format(
        method_title(point.method),
        with_interval(point.measurement),
        _write_perplexity(run, point),
        with_interval(after),
    )


def _remark_on_close(run: RunFolder, points_: list[Point]) -> Remark:
    """Methods that did better by less than the intervals tell apart."""
    names = join_words(method_title(point.method) for point in points_)
    figures = join_words(
        f"{with_interval(point.measurement)}{_write_perplexity(run, point)}" for point in points_
    )
    text = Markup(
        "<b>{} {} slightly ahead at the same count,</b> with {}; the intervals overlap with this circuit’s."
    )
    return Remark("careful", text.format(names, "is" if len(points_) == 1 else "are", figures))


def _write_perplexity(run: RunFolder, point: Point) -> str:
    if point.measurement.metric == "perplexity":
        return ""
    increase, found = (harm(run, point.variant), run.find_measurement("perplexity", point.variant))
    return f" (perplexity {value_of(found)}, {relative(increase)})" if found and increase is not None else ""


def remark_at_same_damage(run: RunFolder, metric: str) -> Remark | None:
    """The best of every method, at any count, that costs not measurably more perplexity than the circuit."""
    limit = _allowed_increase(run)
    if limit is None or metric == "perplexity" or run.method is None:
        return None
    best: dict[str, Point] = {}
    for point in curve_points(run, metric):
        increase = harm(run, point.variant)
        if point.method != "random" and increase is not None and increase <= limit:
            best[point.method] = min(
                best.get(point.method, point), point, key=lambda p: harm_of(p.measurement)
            )
    own, others = (
        best.pop(run.method, None),
        sorted(best.values(), key=lambda point: harm_of(point.measurement)),
    )
    if own is None or not others:
        return None
    where = f"perplexity up to {relative(limit)}, each method at its best count on these prompts"
    said = join_words(
        f"{method_title(p.method)} ({p.count:,}) {with_interval(p.measurement)}" for p in [own, *others]
    )
    if harm_of(others[0].measurement) < harm_of(own.measurement):
        unsure = (
            "; the intervals overlap" if intervals_overlap(others[0].measurement, own.measurement) else ""
        )
        return Remark(
            "careful", Markup("<b>Not ahead at the same damage</b> ({}): {}{}.").format(where, said, unsure)
        )
    return Remark("good", Markup("<b>Ahead at the same damage</b> ({}): {}.").format(where, said))


def _allowed_increase(run: RunFolder) -> float | None:
    """The upper end of the circuit's own increase of perplexity."""
    increase = harm(run, "ablated")
    before = run.find_measurement("perplexity", "original")
    d = run.difference("perplexity")
    if increase is None or before is None or not before.value:
        return None
    return max(increase, d.ci95[1] / before.value) if d and d.ci95 else increase


def remark_under_budget(run: RunFolder, metric: str) -> Remark | None:
    """Every other method at the count that was its best on the validation samples, within the budget of the
    search."""
    own = run.find_measurement(metric, "ablated")
    names = [str(one.get("variant")) for one in run.search.get("rivals") or []]
    found = [(name, m) for name in names if (m := run.find_measurement(metric, name))]
    limit = budget(run, "perplexity")
    if own is None or limit is None or not found:
        return None
    found.sort(key=lambda one: harm_of(one[1]))
    said = join_words(f"{_write_with_count(name)} {with_interval(m)}" for name, m in found)
    ahead = [name for name, m in found if harm_of(m) < harm_of(own)]
    where = f"{percent(limit)} perplexity, each method’s best count chosen on validation prompts"
    if ahead:
        text = Markup("<b>Under the same budget {} {} ahead</b> ({}): {}, against {} here.")
        return Remark(
            "careful",
            text.format(
                join_words(map(_write_with_count, ahead)),
                "is" if len(ahead) == 1 else "are",
                where,
                said,
                with_interval(own),
            ),
        )
    text = Markup("<b>Under the same budget no other method is ahead</b> ({}): {}, against {} here.")
    return Remark("good", text.format(where, said, with_interval(own)))


def _write_with_count(variant: str) -> str:
    name = parse_variant(variant)
    return f"{method_title(name[0])} ({name[1]:,})" if name else variant
