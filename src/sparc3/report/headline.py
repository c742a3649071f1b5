"""What a run that corrects says, in sentences: the headline, and the remarks that belong beside it."""

from markupsafe import Markup

from ..results import Measurement, Variant
from ..verdict import judge, judge_change
from .read import Point, RunFolder
from .words import (
    Remark,
    change_with_interval,
    count_units,
    format_p,
    in_words,
    join_words,
    method_title,
    number_of_units,
    percent,
    relative,
    relative_interval,
    remark,
    small_interval,
    value_of,
    variant_title,
    with_interval,
)


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the effect with its interval, and what as many random units do."""
    pair = run.find_pair(run.behaviour)
    if run.behaviour is None or pair is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    figures = [
        Markup('<b class="{}">{}</b>{}').format(kind, value_of(m), small_interval(m))
        for kind, m in zip(("figure", "figure after"), pair, strict=True)
    ]
    sentence = Markup("Removing {} took {} from {} to {}").format(
        _write_removed(run), in_words(run.behaviour), *figures
    )
    null = run.find_null(run.behaviour)
    if null is None:
        return Markup("{}.").format(sentence)
    return Markup("{}; {} leave it at {}{}.").format(
        sentence, _write_random_units(run), value_of(null.measurement), small_interval(null.measurement)
    )


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
    """What was taken out: "40 of 2,048 neurons", or "50 % of each of 40 of 2,048 neurons"."""
    if run.circuit is None:
        sparsity = run.find("sparsity", "ablated")
        return f"{value_of(sparsity)} of the {count_units(None, run)}" if sparsity else "the chosen units"
    share = f"{run.circuit.strength * 100:g} % of each of " if run.circuit.strength != 1 else ""
    of = f"{run.count:,} of {number_of_units(run.total, run)}" if run.total else None
    return share + (of or number_of_units(run.count, run))


def _write_random_units(run: RunFolder) -> str:
    return f"{run.count:,} random {count_units(run.count, run)}"


def remarks(run: RunFolder) -> list[Remark]:
    """What must stand beside the headline: whether it is more than chance, what it cost, what random units
    and others do."""
    metric = run.behaviour
    if metric is None:
        return []
    found = [
        _write_verdict(run),
        _remark_on_effect(run, metric),
        _remark_on_null(run, metric),
        _remark_on_cost(run, metric),
        *standing_remarks(run, metric),
        _remark_on_fluency(run),
        _remark_on_failures(run),
    ]
    return [one for one in found if one]


def _write_verdict(run: RunFolder) -> Remark | None:
    """The verdict as the console and results.json have it."""
    verdict = judge(run.results, run.unit)
    if verdict is None:
        return None
    head, _, rest = verdict.said.partition(": ")
    kind = "good" if verdict.kind == "shown" else "careful"
    return remark(kind, "<b>Verdict: {}:</b> {}.", head, rest)


def _remark_on_effect(run: RunFolder, metric: str) -> Remark:
    d, m = run.difference(metric), run.results.find(metric, "ablated")
    kind = judge_change(d, m.direction)
    if d is None or kind == "unknown":
        return remark(
            "careful",
            "<b>No interval of the change</b> was recorded, so this page cannot tell it from chance.",
        )
    size = change_with_interval(d, m.unit)
    how = f"; {format_p(d.p)}, paired" if d.p is not None else ", paired"
    if kind == "none":
        text = "<b>No effect is shown.</b> The change, {}, has zero inside its interval{}."
        return remark("careful", text, size, how)
    if kind == "harmful":
        text = "<b>The change goes the wrong way:</b> {}, and {} is better{}."
        return remark("careful", text, size, m.direction, how)
    if kind == "weak":
        text = "<b>The evidence is weak:</b> {}, which leaves out zero; but {}, n = {:,}."
        return remark("careful", text, size, format_p(d.p), m.n)
    return remark("good", "<b>The change is more than chance:</b> {}{}, n = {:,}.", size, how, m.n)


def _remark_on_null(run: RunFolder, metric: str) -> Remark | None:
    """The effect net of the null: what the circuit does that as many random units do not."""
    null, after = run.find_null(metric), run.results.find(metric, "ablated")
    if null is None:
        return None
    units, net = _write_random_units(run), run.difference(metric, "ablated", null.variant)
    if net is None:
        text = "<b>{}</b> leave {} at {}"
        values = (units, in_words(metric), with_interval(null.measurement))
        if not intervals_overlap(null.measurement, after):
            return remark("good", text + ".", *values)
        text += ", which overlaps the circuit’s {}."
        return remark("careful", text, *values, with_interval(after))
    size = f"{change_with_interval(net, after.unit)}; {format_p(net.p)}".rstrip("; ")
    judged = judge_change(net, after.direction)
    if judged == "none":
        text = (
            "<b>Not told apart from chance removals:</b> net of {} the change is {}, "
            "with zero inside its interval."
        )
        return remark("careful", text, units, size)
    kind = "careful" if judged in ("weak", "harmful") else "good"
    return remark(kind, "<b>Net of {}</b> the change is {}.", units, size)


def _remark_on_cost(run: RunFolder, metric: str) -> Remark | None:
    d = run.difference("perplexity")
    if d is None or metric == "perplexity":
        return None
    size = change_with_interval(d)
    share = f"{relative(d.relative)}, that is {size}" if d.relative is not None else size
    if d.holds_zero:
        text = "<b>Perplexity did not measurably move:</b> {}; its interval includes zero."
        return remark("good", text, share)
    null = run.difference("perplexity", str(Variant("random", run.count))) if run.circuit else None
    beside = ""
    if null and null.relative is not None:
        beside = f"; as many random {count_units(None, run)} move it by {relative(null.relative)}"
    return remark("plain", "<b>Perplexity moved by</b> {}{}.", share, beside)


def _remark_on_fluency(run: RunFolder) -> Remark | None:
    """Whether what the ablated model writes reads like the original's own text, to the original."""
    d, pair = run.difference("fluency"), run.find_pair("fluency")
    if d is None or pair is None:
        return None
    before, after = pair
    null = run.find_null("fluency")
    beside = f" ({_write_random_units(run)}: {value_of(null.measurement)})" if null else ""
    figures = f"{value_of(before)} → {with_interval(after)}{beside}"
    figures = f"perplexity of the continuations under the original model {figures}"
    if d.holds_zero:
        return remark("good", "<b>The text stays as likely:</b> {}.", figures)
    if d.value > 0:
        text = (
            "<b>The text is less likely to the original model:</b> {}. "
            "Part of that is the behaviour’s absence, part may be broken text."
        )
    else:
        text = (
            "<b>The text is likelier to the original model:</b> {}. "
            "That does not make it better: loops are likely too."
        )
    return remark("plain", text, figures)


def _remark_on_failures(run: RunFolder) -> Remark | None:
    failed = [
        f"{m.failures:,} for {in_words(m.metric)} of {variant_title(m.variant, run)}"
        for m in run.results
        if m.failures
    ]
    if not failed:
        return None
    rest = [f"{len(failed) - 3} more"] if len(failed) > 4 else []
    where = join_words([*failed[: 3 if rest else 4], *rest])
    return remark("careful", "<b>Some units could not be measured</b> and are in no mean: {}.", where)


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
    return [*_remarks_at_same_count(run, metric), *([here] if here else [])]


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
    text = "<b>{} is ahead at the same count:</b> {}, against {} here."
    said = [
        remark(
            "careful",
            text,
            method_title(point.method),
            _write_with_perplexity(run, point),
            with_interval(after),
        )
        for point in ahead
        if not intervals_overlap(point.measurement, after)
    ]
    close = [point for point in ahead if intervals_overlap(point.measurement, after)]
    if close:
        text = (
            "<b>{} {} slightly ahead at the same count,</b> with {}; "
            "the intervals overlap with this circuit’s."
        )
        names = join_words(method_title(point.method) for point in close)
        figures = join_words(_write_with_perplexity(run, point) for point in close)
        said.append(remark("careful", text, names, "is" if len(close) == 1 else "are", figures))
    return said


def _write_with_perplexity(run: RunFolder, point: Point) -> str:
    increase, found = run.harm(point.variant), run.find("perplexity", point.variant)
    said = with_interval(point.measurement)
    if point.measurement.metric == "perplexity" or not found or increase is None:
        return said
    return f"{said} (perplexity {value_of(found)}, {relative(increase)})"


def _remark_at_same_damage(run: RunFolder, metric: str) -> Remark | None:
    """The best of every method, at any count, that costs not measurably more perplexity than the circuit."""
    limit = _allowed_increase(run)
    if limit is None or metric == "perplexity" or run.method is None:
        return None
    best: dict[str, Point] = {}
    for point in run.points(metric):
        increase = run.harm(point.variant)
        if point.method != "random" and increase is not None and increase <= limit:
            held = best.get(point.method, point)
            best[point.method] = min(held, point, key=lambda p: harm_of(p.measurement))
    own = best.pop(run.method, None)
    others = sorted(best.values(), key=lambda point: harm_of(point.measurement))
    if own is None or not others:
        return None
    where = f"perplexity up to {relative(limit)}, each method at its best count on these prompts"
    said = join_words(
        f"{method_title(p.method)} ({p.count:,}) {with_interval(p.measurement)}" for p in [own, *others]
    )
    if harm_of(others[0].measurement) >= harm_of(own.measurement):
        return remark("good", "<b>Ahead at the same damage</b> ({}): {}.", where, said)
    unsure = "; the intervals overlap" if intervals_overlap(others[0].measurement, own.measurement) else ""
    return remark("careful", "<b>Not ahead at the same damage</b> ({}): {}{}.", where, said, unsure)


def _allowed_increase(run: RunFolder) -> float | None:
    """The upper end of the circuit's own increase of perplexity."""
    increase, before, d = (
        run.harm("ablated"),
        run.find("perplexity", "original"),
        run.difference("perplexity"),
    )
    if increase is None or before is None or not before.value:
        return None
    return max(increase, d.ci95[1] / before.value) if d and d.ci95 else increase


def _remark_under_budget(run: RunFolder, metric: str) -> Remark | None:
    """Every other method at the count that was its best on validation samples within the budget."""
    own, limit, found = run.find(metric, "ablated"), run.budget("perplexity"), run.budgeted(metric)
    if own is None or limit is None or not found:
        return None
    found.sort(key=lambda one: harm_of(one[1]))
    said = join_words(f"{_write_with_count(variant)} {with_interval(m)}" for variant, m in found)
    ahead = [_write_with_count(variant) for variant, m in found if harm_of(m) < harm_of(own)]
    where = f"{percent(limit)} perplexity, each method’s best count chosen on validation prompts"
    if not ahead:
        text = "<b>Under the same budget no other method is ahead</b> ({}): {}, against {} here."
        return remark("good", text, where, said, with_interval(own))
    text = "<b>Under the same budget {} {} ahead</b> ({}): {}, against {} here."
    verb = "is" if len(ahead) == 1 else "are"
    return remark("careful", text, join_words(ahead), verb, where, said, with_interval(own))


def _write_with_count(variant: Variant) -> str:
    name = method_title(variant.method)
    return name if variant.count is None else f"{name} ({variant.count:,})"
