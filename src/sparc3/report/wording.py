"""What the run says, in sentences: the headline, and the honest remarks that belong beside it."""

from dataclasses import dataclass

from markupsafe import Markup

from ..results import Difference, Measurement
from .folder import SIDE_EFFECTS, RunFolder
from .numbers import chance, change, change_interval, in_words, interval_of, listed, relative, value_of, with_interval
from .variants import Point, rivals, shown, units


@dataclass(frozen=True)
class Remark:
    """A sentence beside the headline; `kind` is "good", "plain" or "careful"."""

    kind: str
    text: Markup


def behaviour(run: RunFolder) -> str | None:
    """The metric the run is about: the one its provenance names, else the first measured on both that is not a side effect."""
    both = [metric for metric in run.metrics() if run.measured(metric, "original") and run.measured(metric, "ablated")]
    named = run.provenance.get("headline")
    if named in both:
        return str(named)
    return next((metric for metric in both if metric not in SIDE_EFFECTS), both[0] if both else None)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence, with intervals."""
    metric = behaviour(run)
    if metric is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    sentence = Markup("Removing {} took {}").format(removed(run), _from_to(run, metric))
    if metric != "perplexity" and run.measured("perplexity", "ablated") and run.measured("perplexity", "original"):
        return Markup("{}, and {}.").format(sentence, _from_to(run, "perplexity"))
    return Markup("{}.").format(sentence)


def removed(run: RunFolder) -> str:
    """What was taken out: "40 of 2,048 neurons"."""
    if run.circuit is None:
        sparsity = run.measured("sparsity", "ablated")
        return f"{value_of(sparsity)} of the {units(None, run)}" if sparsity else "the chosen units"
    count, total = len(run.circuit), sum(run.sizes.values())
    return f"{count:,} of {total:,} {units(total, run)}" if total else f"{count:,} {units(count, run)}"


def _from_to(run: RunFolder, metric: str) -> Markup:
    before, after = run.results.find(metric), run.results.find(metric, "ablated")
    return Markup("{} from {} to {}").format(in_words(metric), _figure(before), _figure(after))


def _figure(m: Measurement) -> Markup:
    """A figure that never breaks across lines, its interval small behind it."""
    small = Markup(" <small>{}</small>").format(interval_of(m)) if m.ci95 else ""
    return Markup('<b class="{}">{}</b>{}').format("figure after" if m.variant == "ablated" else "figure", value_of(m), small)


def remarks(run: RunFolder) -> list[Remark]:
    """What must stand beside the headline: whether it is more than chance, what it cost, what random units and others do."""
    metric = behaviour(run)
    if metric is None:
        return []
    found = [_effect(run, metric), _cost(run, metric), _null(run, metric), *_others(run, metric), _failed(run)]
    return [remark for remark in found if remark]


def difference(run: RunFolder, metric: str, to: str = "ablated") -> Difference | None:
    return next((d for d in run.results.differences if (d.metric, d.from_, d.to) == (metric, "original", to)), None)


def holds_zero(d: Difference) -> bool | None:
    """Whether the interval of a difference includes zero; None without an interval."""
    return None if d.ci95 is None else d.ci95[0] <= 0 <= d.ci95[1]


def _effect(run: RunFolder, metric: str) -> Remark:
    d, m = difference(run, metric), run.results.find(metric, "ablated")
    if d is None or d.ci95 is None:
        return Remark("careful", Markup("<b>No interval of the change</b> was recorded, so this page cannot tell it from chance."))
    size = f"{change(d, m.unit)} {change_interval(d, m.unit)}"
    how = f"; {chance(d.p)}, paired" if d.p is not None else ", paired"
    if holds_zero(d):
        return Remark("careful", Markup("<b>No effect is shown.</b> The change, {}, has zero inside its interval{}.").format(size, how))
    if not metric.startswith("ioi.") and (d.value > 0) == (m.direction == "lower"):
        better = f"{m.direction} is better"
        return Remark("careful", Markup("<b>The change goes the wrong way:</b> {}, and {}{}.").format(size, better, how))
    return Remark("good", Markup("<b>The change is more than chance:</b> {}{}, n = {:,}.").format(size, how, m.n))


def _cost(run: RunFolder, metric: str) -> Remark | None:
    d = difference(run, "perplexity")
    if d is None or metric == "perplexity":
        return None
    size = f"{change(d)} {change_interval(d)}".strip()
    share = f"{relative(d.relative)}, that is {size}" if d.relative is not None else size
    if holds_zero(d):
        return Remark("good", Markup("<b>Perplexity did not measurably move:</b> {}; its interval includes zero.").format(share))
    return Remark("plain", Markup("<b>Perplexity moved by</b> {}.").format(share))


def _null(run: RunFolder, metric: str) -> Remark | None:
    null = next((point.measurement for point in rivals(run, metric) if point.method == "random"), None)
    after = run.results.find(metric, "ablated")
    if null is None or run.circuit is None:
        return None
    count = f"{len(run.circuit):,} random {units(len(run.circuit), run)}"
    text = Markup("<b>{}</b> leave {} at {}").format(count, in_words(metric), with_interval(null))
    if _overlap(null, after):
        return Remark("careful", Markup("{}, which overlaps the circuit’s {}.").format(text, with_interval(after)))
    return Remark("good", Markup("{}.").format(text))


def _others(run: RunFolder, metric: str) -> list[Remark]:
    others = [point for point in rivals(run, metric) if point.method != "random"]
    after = run.results.find(metric, "ablated")
    ahead = [point for point in others if is_ahead(point.measurement, after)]
    if ahead:
        close = [point for point in ahead if _overlap(point.measurement, after)]
        clear = [Remark("careful", _ahead(run, point, after)) for point in ahead if point not in close]
        return [*clear, *([_close(run, close)] if close else [])]
    if not others:
        return []
    best = min(others, key=lambda point: _badness(point.measurement))
    text = Markup("<b>No other method is ahead</b> at the same count; the nearest, {}, reaches {}{}.")
    return [Remark("plain", text.format(best.method, with_interval(best.measurement), _at_perplexity(run, best)))]


def _ahead(run: RunFolder, point: Point, after: Measurement) -> Markup:
    text = Markup("<b>{} is ahead at the same count:</b> {}{}, against {} here.")
    return text.format(point.method, with_interval(point.measurement), _at_perplexity(run, point), with_interval(after))


def _close(run: RunFolder, points: list[Point]) -> Remark:
    """Methods that did better by less than the intervals tell apart."""
    names = listed(point.method for point in points)
    figures = listed(f"{with_interval(point.measurement)}{_at_perplexity(run, point)}" for point in points)
    text = Markup("<b>{} {} slightly ahead at the same count,</b> with {}; the intervals overlap with this circuit’s.")
    return Remark("careful", text.format(names, "is" if len(points) == 1 else "are", figures))


def _at_perplexity(run: RunFolder, point: Point) -> str:
    found = run.measured("perplexity", f"{point.method}@{point.count}")
    return f" (perplexity {value_of(found)})" if found and point.measurement.metric != "perplexity" else ""


def is_ahead(one: Measurement, other: Measurement) -> bool:
    """Whether `one` did better at what the run is about."""
    return _badness(one) < _badness(other)


def _badness(m: Measurement) -> float:
    """A task is looked for by what its removal breaks, so there lower is better whatever the metric's own direction."""
    assert m.value is not None
    return -m.value if m.direction == "higher" and not m.metric.startswith("ioi.") else m.value


def _overlap(one: Measurement, other: Measurement) -> bool:
    return bool(one.ci95 and other.ci95 and one.ci95[0] <= other.ci95[1] and other.ci95[0] <= one.ci95[1])


def _failed(run: RunFolder) -> Remark | None:
    failed = [f"{m.failures:,} for {in_words(m.metric)} of {shown(m.variant, run)}" for m in run.results if m.failures]
    if not failed:
        return None
    rest = [f"{len(failed) - 3} more"] if len(failed) > 4 else []
    where = listed([*failed[: 3 if rest else 4], *rest])
    return Remark("careful", Markup("<b>Some units could not be measured</b> and are in no mean: {}.").format(where))
