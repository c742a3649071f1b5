"""What a run that corrects says, in sentences: the headline, and the remarks that belong beside it."""

from markupsafe import Markup

from ..results import Measurement, Variant
from ..verdict import GOOD, judge, judge_change
from .read import Point, RunFolder
from .words import (
    Remark,
    change_with_interval,
    format_p,
    in_words,
    join_words,
    method_title,
    percent,
    plain,
    relative,
    relative_interval,
    remark,
    value_of,
    variant_title,
    with_interval,
    with_small_interval,
)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the effect with its interval, and what as many random units do."""
    pair = run.find_pair(run.behaviour)
    if run.behaviour is None or pair is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    before, after = (with_small_interval(m, c) for m, c in zip(pair, ("figure", "figure after"), strict=True))
    said = Markup("Removing {} took {} from {} to {}").format(
        _write_removed(run), in_words(run.behaviour), before, after
    )
    null = run.find_null(run.behaviour)
    beside = (
        Markup("; {} leave it at {}").format(run.null_units, with_small_interval(null.measurement))
        if null
        else ""
    )
    return Markup("{}{}.").format(said, beside)


def damage(run: RunFolder) -> Markup | None:
    """The sentence under the headline: what happened to ordinary text."""
    pair = run.find_pair("perplexity")
    if run.behaviour in (None, "perplexity") or pair is None:
        return None
    d, kl = run.difference("perplexity"), run.find("kl", "ablated")
    known = d is not None and d.relative is not None
    moved = f" ({relative(d.relative)} {relative_interval(d)})".replace(" )", ")") if d and known else ""
    rest = f", KL divergence of its next tokens {with_interval(kl)} nats" if kl else ""
    return Markup("Perplexity of other text: {} → {}{}{}.").format(*map(value_of, pair), moved, rest)


def _write_removed(run: RunFolder) -> str:
    """What was taken out: "40 of 2,048 neurons", "50 % of each of 40 of 2,048 neurons", or "a share of its
    own of each of …"."""
    if run.circuit is None:
        sparsity = run.find("sparsity", "ablated")
        return f"{value_of(sparsity)} of the {run.units}" if sparsity else "the chosen units"
    share = f"{run.circuit.strength * 100:g} % of each of " if run.circuit.strength != 1 else ""
    share = "a share of its own of each of " if run.circuit.strengths else share
    of = f"{run.count:,} of {run.number_of(run.total)}" if run.total else None
    return share + (of or run.number_of(run.count))


def remark_on_verdict(run: RunFolder) -> list[Remark]:
    """The verdict as the console and results.json have it."""
    verdict = judge(run.results, run.unit)
    if verdict is None:
        return []
    head, _, rest = verdict.said.partition(": ")
    kind = "good" if verdict.kind in GOOD else "careful"
    return [remark(kind, "<b>Verdict: {}:</b> {}.", head, rest)]


def remarks(run: RunFolder) -> list[Remark]:
    """What must stand beside the headline: whether it is more than chance, what it cost, what random units
    and others do."""
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
"""What `judge_change` says → the sentence."""


def _remark_on_effect(run: RunFolder, metric: str) -> Remark:
    d, m = run.difference(metric), run.results.find(metric, "ablated")
    judged = judge_change(d, m.direction)
    p = format_p(d.p) if d else ""
    text = Markup(EFFECTS[judged]).format(
        size=change_with_interval(d, m.unit) if d else "",
        how=f"; {p}, paired" if p else ", paired",
        p=p,
        direction=m.direction,
        n=m.n,
    )
    return Remark("good" if judged == "shown" else "careful", text)


def _remark_on_null(run: RunFolder, metric: str) -> list[Remark]:
    """The effect net of the null: what the circuit does that as many random units do not."""
    null, after = run.find_null(metric), run.results.find(metric, "ablated")
    if null is None:
        return []
    net = run.difference(metric, "ablated", null.variant)
    if net is None:
        apart = not intervals_overlap(null.measurement, after)
        text = "<b>{}</b> leave {} at {}" + ("." if apart else ", which overlaps the circuit’s {}.")
        values = (run.null_units, in_words(metric), with_interval(null.measurement), with_interval(after))
        return [remark("good" if apart else "careful", text, *values)]
    size = f"{change_with_interval(net, after.unit)}; {format_p(net.p)}".rstrip("; ")
    judged = judge_change(net, after.direction)
    text = "<b>Net of {}</b> the change is {}."
    if judged == "none":
        text = (
            "<b>Not told apart from chance removals:</b> net of {} the change is {}, "
            "with zero inside its interval."
        )
    kind = "careful" if judged in ("none", "weak", "harmful") else "good"
    return [remark(kind, text, run.null_units, size)]


def _remark_on_seeds(run: RunFolder, metric: str) -> list[Remark]:
    """How far the figures and the circuit depend on the draw of the reference sets, where seeds are apart."""
    names = {"ablated": "this circuit", str(Variant("random", run.count)): run.null_units}
    rows = {(row.variant, row.metric): row for row in run.provenance.by_seed if row.variant in names}
    if ("ablated", metric) not in rows:
        return []
    places = [(variant, metric) for variant in names] + [("ablated", "perplexity")] * (metric != "perplexity")
    parts = [
        f"{in_words(row.metric)} of {names[row.variant]} {plain(row.mean)} ± {plain(row.sem)}"
        for row in (rows[place] for place in places if place in rows)
    ]
    stable = run.find("circuit.jaccard", "ablated")
    shared = f"; two seeds’ circuits share {value_of(stable)} of the units of either" if stable else ""
    text = (
        "<b>Mean ± standard error over {} seeds,</b> each with a circuit of its own: {}{}. All figures are "
        "means over them; the units, cards and texts shown are the first seed’s."
    )
    many = len(rows["ablated", metric].values)
    return [remark("plain", text, many, join_words(parts), shared)]


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
    known = null is not None and null.relative is not None
    beside = f"; as many random {run.units} move it by {relative(null.relative)}" if null and known else ""
    return [remark("plain", "<b>Perplexity moved by</b> {}{}.", share, beside)]


def _remark_on_fluency(run: RunFolder) -> list[Remark]:
    """Whether what the ablated model writes reads like the original's own text, to the original."""
    d, pair, null = run.difference("fluency"), run.find_pair("fluency"), run.find_null("fluency")
    if d is None or pair is None:
        return []
    beside = f" ({run.null_units}: {value_of(null.measurement)})" if null else ""
    figures = f"{value_of(pair[0])} → {with_interval(pair[1])}{beside}"
    kind, head, rest = (
        ("good", "stays as likely", "")
        if d.holds_zero
        else (
            "plain",
            "is less likely to the original model",
            " Part of that is the behaviour’s absence, part may be broken text.",
        )
        if d.value > 0
        else (
            "plain",
            "is likelier to the original model",
            " That does not make it better: loops are likely too.",
        )
    )
    text = "<b>The text {}:</b> perplexity of the continuations under the original model {}.{}"
    return [remark(kind, text, head, figures, rest)]


def _remark_on_failures(run: RunFolder) -> list[Remark]:
    failed = [
        f"{m.failures:,} for {in_words(m.metric)} of {variant_title(m.variant, run)}"
        for m in run.results
        if m.failures
    ]
    if len(failed) > 4:
        failed = [*failed[:3], f"{len(failed) - 3} more"]
    text = "<b>Some units could not be measured</b> and are in no mean: {}."
    return [remark("careful", text, join_words(failed))] if failed else []


# Where the circuit stands among the other methods: at the same count, at the same damage, under the same
# budget.


def harm_of(m: Measurement) -> float:
    """Less is better. So it is of a task too, which is looked for by what its removal breaks."""
    assert m.value is not None
    return -m.value if m.direction == "higher" and not m.metric.startswith("ioi.") else m.value


def intervals_overlap(one: Measurement, other: Measurement) -> bool:
    """Whether the intervals of two figures meet."""
    return bool(one.ci95 and other.ci95 and one.ci95[0] <= other.ci95[1] and other.ci95[0] <= one.ci95[1])


def standing_remarks(run: RunFolder, metric: str) -> list[Remark]:
    """At the circuit's own count, then under the search's budget, or else at no more than its damage."""
    searched = run.search is not None and run.search.rivals
    here = _remark_under_budget(run, metric) if searched else _remark_at_same_damage(run, metric)
    return [*_remarks_at_same_count(run, metric), *here]


def _remarks_at_same_count(run: RunFolder, metric: str) -> list[Remark]:
    others = [point for point in run.rival_points(metric) if point.method != "random"]
    after = run.results.find(metric, "ablated")
    ahead = [point for point in others if harm_of(point.measurement) < harm_of(after)]
    if not others:
        return []
    if not ahead:
        best = min(others, key=lambda point: harm_of(point.measurement))
        text = "<b>No other method is ahead</b> at the same count; the nearest, {}, reaches {}."
        return [remark("good", text, method_title(best.method), _write_with_perplexity(run, best))]
    close = [point for point in ahead if intervals_overlap(point.measurement, after)]
    text = "<b>{} is ahead at the same count:</b> {}, against {} here."
    said = [
        remark("careful", text, method_title(p.method), _write_with_perplexity(run, p), with_interval(after))
        for p in ahead
        if p not in close
    ]
    if close:
        names = join_words(method_title(point.method) for point in close)
        figures = join_words(_write_with_perplexity(run, point) for point in close)
        text = (
            "<b>{} {} slightly ahead at the same count,</b> with {}; "
            "the intervals overlap with this circuit’s."
        )
        said.append(remark("careful", text, names, "is" if len(close) == 1 else "are", figures))
    return said


def _write_with_perplexity(run: RunFolder, point: Point) -> str:
    increase, found = run.harm(point.variant), run.find("perplexity", point.variant)
    said = with_interval(point.measurement)
    if point.measurement.metric == "perplexity" or not found or increase is None:
        return said
    return f"{said} (perplexity {value_of(found)}, {relative(increase)})"


def _remark_at_same_damage(run: RunFolder, metric: str) -> list[Remark]:
    """The best of every method, at any count, that costs not measurably more perplexity than the circuit."""
    limit, d, before = run.harm("ablated"), run.difference("perplexity"), run.find("perplexity", "original")
    if limit is None or metric == "perplexity" or run.method is None or before is None or not before.value:
        return []
    if d and d.ci95:
        limit = max(limit, d.ci95[1] / before.value)
    best: dict[str, Point] = {}
    for point in run.points(metric):
        increase = run.harm(point.variant)
        if point.method != "random" and increase is not None and increase <= limit:
            held = best.get(point.method, point)
            best[point.method] = min(held, point, key=lambda p: harm_of(p.measurement))
    own = best.pop(run.method, None)
    others = sorted(best.values(), key=lambda point: harm_of(point.measurement))
    if own is None or not others:
        return []
    where = f"perplexity up to {relative(limit)}, each method at its best count on these prompts"
    said = join_words(
        f"{method_title(p.method)} ({p.count:,}) {with_interval(p.measurement)}" for p in [own, *others]
    )
    if harm_of(others[0].measurement) >= harm_of(own.measurement):
        return [remark("good", "<b>Ahead at the same damage</b> ({}): {}.", where, said)]
    unsure = "; the intervals overlap" if intervals_overlap(others[0].measurement, own.measurement) else ""
    return [remark("careful", "<b>Not ahead at the same damage</b> ({}): {}{}.", where, said, unsure)]


def _remark_under_budget(run: RunFolder, metric: str) -> list[Remark]:
    """Every other method at the count that was its best on validation samples within the budget."""
    own, limit, found = run.find(metric, "ablated"), run.budget("perplexity"), run.budgeted(metric)
    if own is None or limit is None or not found:
        return []
    found.sort(key=lambda one: harm_of(one[1]))

    def name(variant: Variant) -> str:
        counted = "" if variant.count is None else f" ({variant.count:,})"
        return method_title(variant.method) + counted

    said = join_words(f"{name(variant)} {with_interval(m)}" for variant, m in found)
    ahead = [name(variant) for variant, m in found if harm_of(m) < harm_of(own)]
    where = f"{percent(limit)} perplexity, each method’s best count chosen on validation prompts"
    who = f"{join_words(ahead)} {'is' if len(ahead) == 1 else 'are'}" if ahead else "no other method is"
    text = "<b>Under the same budget {} ahead</b> ({}): {}, against {} here."
    return [remark("careful" if ahead else "good", text, who, where, said, with_interval(own))]
