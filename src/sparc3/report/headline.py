"""The sentences of a run with the job correct: the headline, and the remarks below it."""

from markupsafe import Markup

from ..results import Measurement, Variant
from ..verdict import GOOD, judge, judge_change
from .read import Point, RunFolder
from .words import (
    Remark,
    change_with_interval,
    format_p,
    format_with_interval,
    format_with_small_interval,
    inline_title,
    join_words,
    method_title,
    percent,
    plain,
    relative,
    relative_interval,
    remark,
    value_of,
    variant_title,
)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the effect with its interval, and that of as many random units."""
    pair = run.find_pair(run.behaviour)
    if run.behaviour is None or pair is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    before, after = (
        format_with_small_interval(m, c) for m, c in zip(pair, ("figure", "figure after"), strict=True)
    )
    sentence = Markup("Removing {} took {} from {} to {}").format(
        _write_removed(run), inline_title(run.behaviour), before, after
    )
    null = run.find_null(run.behaviour)
    null_clause = (
        Markup("; {} leave it at {}").format(run.null_units, format_with_small_interval(null.measurement))
        if null
        else ""
    )
    return Markup("{}{}.").format(sentence, null_clause)


def damage(run: RunFolder) -> Markup | None:
    """The sentence under the headline: what happened to ordinary text."""
    pair = run.find_pair("perplexity")
    if run.behaviour in (None, "perplexity") or pair is None:
        return None
    d, kl = run.difference("perplexity"), run.find("kl", "ablated")
    has_relative = d is not None and d.relative is not None
    change_text = f"{relative(d.relative)} {relative_interval(d)}".rstrip() if d and has_relative else ""
    change_text = f" ({change_text})" if change_text else ""
    kl_text = f", KL divergence of its next tokens {format_with_interval(kl)} nats" if kl else ""
    return Markup("Perplexity of other text: {} → {}{}{}.").format(*map(value_of, pair), change_text, kl_text)


def _write_removed(run: RunFolder) -> str:
    """What was removed: "40 of 2,048 neurons", "50 % of each of 40 of 2,048 neurons", or "a share of its own
    of each of …"."""
    if run.circuit is None:
        sparsity = run.find("sparsity", "ablated")
        return f"{value_of(sparsity)} of the {run.units}" if sparsity else "the chosen units"
    share = f"{run.circuit.strength * 100:g} % of each of " if run.circuit.strength != 1 else ""
    share = "a share of its own of each of " if run.circuit.strengths else share
    count_text = f"{run.count:,} of {run.write_count(run.total)}" if run.total else None
    return share + (count_text or run.write_count(run.count))


def remark_on_verdict(run: RunFolder) -> list[Remark]:
    """The verdict, in the same words as on the console and in results.json."""
    verdict = judge(run.results, run.unit)
    if verdict is None:
        return []
    head, _, rest = verdict.said.partition(": ")
    kind = "good" if verdict.kind in GOOD else "careful"
    return [remark(kind, "<b>Verdict: {}:</b> {}.", head, rest)]


def remarks(run: RunFolder) -> list[Remark]:
    """What qualifies the headline: whether it is more than chance, what it cost, and what random units and
    other methods do."""
    metric = run.behaviour
    if metric is None:
        return []
    return [
        *remark_on_verdict(run),
        _remark_on_effect(run, metric),
        *_remark_on_null(run, metric),
        *_remark_on_seeds(run, metric),
        *_remark_on_cost(run, metric),
        *standing_remarks(run, metric),
        *_remark_on_fluency(run),
        *_remark_on_failures(run),
    ]


EFFECTS = {
    "unknown": "<b>No interval of the change</b> was recorded, so this page cannot tell it from chance.",
    "none": "<b>No effect is shown.</b> The change, {size}, has zero inside its interval{how}.",
    "harmful": "<b>The change goes the wrong way:</b> {size}, and {direction} is better{how}.",
    "weak": "<b>The evidence is weak:</b> {size}, which leaves out zero; but {p}, n = {n:,}.",
    "shown": "<b>The change is more than chance:</b> {size}{how}, n = {n:,}.",
}
"""Judgement of `judge_change` → the sentence."""


def _remark_on_effect(run: RunFolder, metric: str) -> Remark:
    d, m = run.difference(metric), run.results.find(metric, "ablated")
    judgement = judge_change(d, m.direction)
    p = format_p(d.p) if d else ""
    text = Markup(EFFECTS[judgement]).format(
        size=change_with_interval(d, m.unit) if d else "",
        how=f"; {p}, paired" if p else ", paired",
        p=p,
        direction=m.direction,
        n=m.n,
    )
    return Remark("good" if judgement == "shown" else "careful", text)


def _remark_on_null(run: RunFolder, metric: str) -> list[Remark]:
    """The effect net of the null: the difference between the circuit and as many random units."""
    null, after = run.find_null(metric), run.results.find(metric, "ablated")
    if null is None:
        return []
    net = run.difference(metric, "ablated", null.variant)
    if net is None:
        disjoint = not intervals_overlap(null.measurement, after)
        text = "<b>{}</b> leave {} at {}" + ("." if disjoint else ", which overlaps the circuit’s {}.")
        values = (
            run.null_units,
            inline_title(metric),
            format_with_interval(null.measurement),
            format_with_interval(after),
        )
        return [remark("good" if disjoint else "careful", text, *values)]
    size = f"{change_with_interval(net, after.unit)}; {format_p(net.p)}".rstrip("; ")
    judgement = judge_change(net, after.direction)
    text = "<b>Net of {}</b> the change is {}."
    if judgement == "none":
        text = (
            "<b>Not told apart from chance removals:</b> net of {} the change is {}, "
            "with zero inside its interval."
        )
    kind = "careful" if judgement in ("none", "weak", "harmful") else "good"
    return [remark(kind, text, run.null_units, size)]


def _remark_on_seeds(run: RunFolder, metric: str) -> list[Remark]:
    """How far the figures and the circuit depend on the draw of the reference sets, if seeds are kept
    apart."""
    names = {"ablated": "this circuit", str(Variant("random", run.count)): run.null_units}
    rows = {(row.variant, row.metric): row for row in run.provenance.by_seed if row.variant in names}
    if ("ablated", metric) not in rows:
        return []
    places = [(variant, metric) for variant in names] + [("ablated", "perplexity")] * (metric != "perplexity")
    parts = [
        f"{inline_title(row.metric)} of {names[row.variant]} {plain(row.mean)} ± {plain(row.sem)}"
        for row in (rows[place] for place in places if place in rows)
    ]
    stability = run.find("circuit.jaccard", "ablated")
    shared = f"; two seeds’ circuits share {value_of(stability)} of the units of either" if stability else ""
    text = (
        "<b>Mean ± standard error over {} seeds,</b> each with a circuit of its own: {}{}. All figures are "
        "means over them; the units, cards and texts shown are the first seed’s."
    )
    count = len(rows["ablated", metric].values)
    return [remark("plain", text, count, join_words(parts), shared)]


def _remark_on_cost(run: RunFolder, metric: str) -> list[Remark]:
    d = run.difference("perplexity")
    if d is None or metric == "perplexity":
        return []
    size = change_with_interval(d)
    share = f"{relative(d.relative)}, that is {size}" if d.relative is not None else size
    if d.holds_zero:
        text = "<b>Perplexity did not measurably move:</b> {}; its interval includes zero."
        return [remark("good", text, share)]
    null = run.difference("perplexity", str(Variant("random", run.count))) if run.circuit else None
    has_relative = null is not None and null.relative is not None
    null_text = (
        f"; as many random {run.units} move it by {relative(null.relative)}" if null and has_relative else ""
    )
    return [remark("plain", "<b>Perplexity moved by</b> {}{}.", share, null_text)]


def _remark_on_fluency(run: RunFolder) -> list[Remark]:
    """How likely the ablated model's continuations are under the original model."""
    d, pair, null = run.difference("fluency"), run.find_pair("fluency"), run.find_null("fluency")
    if d is None or pair is None:
        return []
    null_text = f" ({run.null_units}: {value_of(null.measurement)})" if null else ""
    figures = f"{value_of(pair[0])} → {format_with_interval(pair[1])}{null_text}"
    kind, head, rest = "plain", "is likelier to the original model", ""
    if d.holds_zero:
        kind, head = "good", "stays as likely"
    elif d.value > 0:
        head = "is less likely to the original model"
        rest = " Part of that is the behaviour’s absence, part may be broken text."
    else:
        rest = " That does not make it better: loops are likely too."
    text = "<b>The text {}:</b> perplexity of the continuations under the original model {}.{}"
    return [remark(kind, text, head, figures, rest)]


def _remark_on_failures(run: RunFolder) -> list[Remark]:
    failures = [
        f"{m.failures:,} for {inline_title(m.metric)} of {variant_title(m.variant, run)}"
        for m in run.results
        if m.failures
    ]
    if len(failures) > 4:
        failures = [*failures[:3], f"{len(failures) - 3} more"]
    text = "<b>Some units could not be measured</b> and are in no mean: {}."
    return [remark("careful", text, join_words(failures))] if failures else []


# The circuit compared with other methods: at the same count, at the same damage, and under the same budget.


def badness_of(m: Measurement) -> float:
    """The figure with its sign chosen so that lower is better. For a task (ioi.*) a lower accuracy is
    better too: it shows that the removed units carry the task."""
    assert m.value is not None
    return -m.value if m.direction == "higher" and not m.metric.startswith("ioi.") else m.value


def intervals_overlap(first: Measurement, second: Measurement) -> bool:
    """Whether the intervals of two figures overlap."""
    return bool(
        first.ci95 and second.ci95 and first.ci95[0] <= second.ci95[1] and second.ci95[0] <= first.ci95[1]
    )


def standing_remarks(run: RunFolder, metric: str) -> list[Remark]:
    """Comparisons at the circuit's own count, then under the search's budget, or without a search at no more
    than the circuit's damage."""
    was_searched = run.search is not None and run.search.rivals
    remarks = _remark_under_budget(run, metric) if was_searched else _remark_at_same_damage(run, metric)
    return [*_remarks_at_same_count(run, metric), *remarks]


def _remarks_at_same_count(run: RunFolder, metric: str) -> list[Remark]:
    others = [point for point in run.rival_points(metric) if point.method != "random"]
    after = run.results.find(metric, "ablated")
    ahead = [point for point in others if badness_of(point.measurement) < badness_of(after)]
    if not others:
        return []
    if not ahead:
        best = min(others, key=lambda point: badness_of(point.measurement))
        text = "<b>No other method is ahead</b> at the same count; the nearest, {}, reaches {}."
        return [remark("good", text, method_title(best.method), _write_with_perplexity(run, best))]
    overlapping = [point for point in ahead if intervals_overlap(point.measurement, after)]
    text = "<b>{} is ahead at the same count:</b> {}, against {} here."
    remarks = [
        remark(
            "careful",
            text,
            method_title(p.method),
            _write_with_perplexity(run, p),
            format_with_interval(after),
        )
        for p in ahead
        if p not in overlapping
    ]
    if overlapping:
        names = join_words(method_title(point.method) for point in overlapping)
        figures = join_words(_write_with_perplexity(run, point) for point in overlapping)
        text = (
            "<b>{} {} slightly ahead at the same count,</b> with {}; "
            "the intervals overlap with this circuit’s."
        )
        remarks.append(remark("careful", text, names, "is" if len(overlapping) == 1 else "are", figures))
    return remarks


def _write_with_perplexity(run: RunFolder, point: Point) -> str:
    increase, perplexity = run.harm(point.variant), run.find("perplexity", point.variant)
    text = format_with_interval(point.measurement)
    if point.measurement.metric == "perplexity" or not perplexity or increase is None:
        return text
    return f"{text} (perplexity {value_of(perplexity)}, {relative(increase)})"


def _remark_at_same_damage(run: RunFolder, metric: str) -> list[Remark]:
    """Every method at its best count, among those that do not cost measurably more perplexity than the
    circuit."""
    limit, d, before = run.harm("ablated"), run.difference("perplexity"), run.find("perplexity", "original")
    if limit is None or metric == "perplexity" or run.method is None or before is None or not before.value:
        return []
    # Up to the upper end of the circuit's own interval, another method does not measurably cost more.
    if d and d.ci95:
        limit = max(limit, d.ci95[1] / before.value)
    best: dict[str, Point] = {}
    for point in run.points(metric):
        increase = run.harm(point.variant)
        if point.method != "random" and increase is not None and increase <= limit:
            best_so_far = best.get(point.method, point)
            best[point.method] = min(best_so_far, point, key=lambda p: badness_of(p.measurement))
    own = best.pop(run.method, None)
    others = sorted(best.values(), key=lambda point: badness_of(point.measurement))
    if own is None or not others:
        return []
    condition = f"perplexity up to {relative(limit)}, each method at its best count on these prompts"
    figures = join_words(
        f"{method_title(p.method)} ({p.count:,}) {format_with_interval(p.measurement)}"
        for p in [own, *others]
    )
    if badness_of(others[0].measurement) >= badness_of(own.measurement):
        return [remark("good", "<b>Ahead at the same damage</b> ({}): {}.", condition, figures)]
    note = "; the intervals overlap" if intervals_overlap(others[0].measurement, own.measurement) else ""
    return [remark("careful", "<b>Not ahead at the same damage</b> ({}): {}{}.", condition, figures, note)]


def _remark_under_budget(run: RunFolder, metric: str) -> list[Remark]:
    """Every other method at its best count on validation samples within the budget."""
    own, limit = run.find(metric, "ablated"), run.budget("perplexity")
    rivals = run.rivals_under_budget(metric)
    if own is None or limit is None or not rivals:
        return []
    rivals.sort(key=lambda rival: badness_of(rival[1]))

    def name(variant: Variant) -> str:
        count_text = "" if variant.count is None else f" ({variant.count:,})"
        return method_title(variant.method) + count_text

    figures = join_words(f"{name(variant)} {format_with_interval(m)}" for variant, m in rivals)
    ahead = [name(variant) for variant, m in rivals if badness_of(m) < badness_of(own)]
    condition = f"{percent(limit)} perplexity, each method’s best count chosen on validation prompts"
    subject = f"{join_words(ahead)} {'is' if len(ahead) == 1 else 'are'}" if ahead else "no other method is"
    text = "<b>Under the same budget {} ahead</b> ({}): {}, against {} here."
    return [
        remark("careful" if ahead else "good", text, subject, condition, figures, format_with_interval(own))
    ]
