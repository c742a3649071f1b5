"""What the run says, in sentences: the headline, and the remarks that belong beside it."""

from markupsafe import Markup

from ..results import Measurement
from .read import RunFolder
from .standing import intervals_overlap, standing_remarks
from .variant_names import count_units, find_null, variant_title
from .words import (
    Remark,
    change,
    change_interval,
    format_p,
    in_words,
    interval_of,
    join_words,
    relative,
    relative_interval,
    small_interval,
    value_of,
    with_interval,
)

UNSURE = 0.05
"""From this p on a change is not called more than chance."""


def headline(run: RunFolder) -> Markup:
    """The run in one sentence: the effect with its interval, and what as many random units do."""
    metric = run.behaviour
    if metric is None:
        return Markup("{} figures of one run").format(len(run.results.measurements))
    sentence = Markup("Removing {} took {}").format(removed(run), _write_from_to(run, metric))
    null = _measured_null(run, metric)
    if null is None:
        return Markup("{}.").format(sentence)
    return Markup("{}; {} leave it at {}{}.").format(
        sentence, _write_random_units(run), value_of(null), small_interval(null)
    )


def damage(run: RunFolder) -> Markup | None:
    """The sentence under the headline: what happened to ordinary text."""
    if run.behaviour in (None, "perplexity") or not (
        run.find_measurement("perplexity", "ablated") and run.find_measurement("perplexity", "original")
    ):
        return None
    before, after = run.results.find("perplexity"), run.results.find("perplexity", "ablated")
    d, kl = run.difference("perplexity"), run.find_measurement("kl", "ablated")
    moved = (
        f" ({relative(d.relative)} {relative_interval(d)})".replace(" )", ")")
        if d and d.relative is not None
        else ""
    )
    rest = Markup(", KL divergence of its next tokens {} nats").format(with_interval(kl)) if kl else ""
    return Markup("Perplexity of other text: {} → {}{}{}.").format(
        value_of(before), value_of(after), moved, rest
    )


def removed(run: RunFolder) -> str:
    """What was taken out: "40 of 2,048 neurons", or "50 % of each of 40 of 2,048 neurons"."""
    if run.circuit is None:
        sparsity = run.find_measurement("sparsity", "ablated")
        return f"{value_of(sparsity)} of the {count_units(None, run)}" if sparsity else "the chosen units"
    count, total = len(run.circuit), sum(run.sizes.values())
    share = f"{run.circuit.strength * 100:g} % of each of " if run.circuit.strength != 1 else ""
    return share + (
        f"{count:,} of {total:,} {count_units(total, run)}"
        if total
        else f"{count:,} {count_units(count, run)}"
    )


def _write_from_to(run: RunFolder, metric: str) -> Markup:
    before, after = run.results.find(metric), run.results.find(metric, "ablated")
    return Markup("{} from {} to {}").format(in_words(metric), _write_figure(before), _write_figure(after))


def _write_figure(m: Measurement) -> Markup:
    """A figure that never breaks across lines, its interval small behind it."""
    return Markup('<b class="{}">{}</b>{}').format(
        "figure after" if m.variant == "ablated" else "figure", value_of(m), small_interval(m)
    )


def _measured_null(run: RunFolder, metric: str) -> Measurement | None:
    null = find_null(run, metric)
    return null.measurement if null else None


def _write_random_units(run: RunFolder) -> str:
    count = len(run.circuit) if run.circuit else 0
    return f"{count:,} random {count_units(count, run)}"


def remarks(run: RunFolder) -> list[Remark]:
    """What must stand beside the headline: whether it is more than chance, what it cost, what random units
    and others do."""
    metric = run.behaviour
    if metric is None:
        return []
    found = [
        _remark_on_effect(run, metric),
        _remark_on_null(run, metric),
        _remark_on_cost(run, metric),
        *standing_remarks(run, metric),
        _remark_on_fluency(run),
        _remark_on_failures(run),
    ]
    return [remark for remark in found if remark]


def _remark_on_effect(run: RunFolder, metric: str) -> Remark:
    d, m = run.difference(metric), run.results.find(metric, "ablated")
    if d is None or d.ci95 is None:
        return Remark(
            "careful",
            Markup("<b>No interval of the change</b> was recorded, so this page cannot tell it from chance."),
        )
    size = f"{change(d, m.unit)} {change_interval(d, m.unit)}"
    how = f"; {format_p(d.p)}, paired" if d.p is not None else ", paired"
    if d.holds_zero:
        return Remark(
            "careful",
            Markup("<b>No effect is shown.</b> The change, {}, has zero inside its interval{}.").format(
                size, how
            ),
        )
    if not metric.startswith("ioi.") and (d.value > 0) == (m.direction == "lower"):
        better = f"{m.direction} is better"
        return Remark(
            "careful", Markup("<b>The change goes the wrong way:</b> {}, and {}{}.").format(size, better, how)
        )
    if d.p is not None and d.p >= UNSURE:
        return Remark(
            "careful",
            Markup("<b>The evidence is weak:</b> {}, which leaves out zero; but {}, n = {:,}.").format(
                size, format_p(d.p), m.n
            ),
        )
    return Remark(
        "good", Markup("<b>The change is more than chance:</b> {}{}, n = {:,}.").format(size, how, m.n)
    )


def _remark_on_null(run: RunFolder, metric: str) -> Remark | None:
    """The effect net of the null: what the circuit does that as many random units do not."""
    null, after = _measured_null(run, metric), run.results.find(metric, "ablated")
    if null is None or run.circuit is None:
        return None
    net = run.difference(metric, "ablated", null.variant)
    size = (
        f"{change(net, after.unit)} {change_interval(net, after.unit)}; {format_p(net.p)}".rstrip("; ")
        if net
        else ""
    )
    if net and net.holds_zero:
        text = Markup(
            "<b>Not told apart from chance removals:</b> net of {} the change is {}, with zero inside its "
            "interval."
        )
        return Remark("careful", text.format(_write_random_units(run), size))
    text = Markup("<b>{}</b> leave {} at {}").format(
        _write_random_units(run), in_words(metric), with_interval(null)
    )
    if intervals_overlap(null, after) and not net:
        return Remark(
            "careful", Markup("{}, which overlaps the circuit’s {}.").format(text, with_interval(after))
        )
    kind = "careful" if net and net.p is not None and net.p >= UNSURE else "good"
    if net:
        return Remark(
            kind, Markup("<b>Net of {}</b> the change is {}.").format(_write_random_units(run), size)
        )
    return Remark(kind, Markup("{}.").format(text))


def _remark_on_cost(run: RunFolder, metric: str) -> Remark | None:
    d = run.difference("perplexity")
    if d is None or metric == "perplexity":
        return None
    size = f"{change(d)} {change_interval(d)}".strip()
    share = f"{relative(d.relative)}, that is {size}" if d.relative is not None else size
    if d.holds_zero:
        return Remark(
            "good",
            Markup("<b>Perplexity did not measurably move:</b> {}; its interval includes zero.").format(
                share
            ),
        )
    null = run.difference("perplexity", f"random@{len(run.circuit)}") if run.circuit else None
    beside = (
        f"; as many random {count_units(None, run)} move it by {relative(null.relative)}"
        if null and null.relative is not None
        else ""
    )
    return Remark("plain", Markup("<b>Perplexity moved by</b> {}{}.").format(share, beside))


def _remark_on_fluency(run: RunFolder) -> Remark | None:
    """Whether what the ablated model writes reads like the original's own text, to the original."""
    d, before, after = (
        run.difference("fluency"),
        run.find_measurement("fluency", "original"),
        run.find_measurement("fluency", "ablated"),
    )
    if d is None or before is None or after is None:
        return None
    null = _measured_null(run, "fluency")
    beside = f" ({_write_random_units(run)}: {value_of(null)})" if null else ""
    figures = (
        f"perplexity of the continuations under the original model {value_of(before)} → {value_of(after)} "
        f"{interval_of(after)}{beside}"
    )
    if d.holds_zero:
        return Remark("good", Markup("<b>The text stays as likely:</b> {}.").format(figures))
    if d.value > 0:
        text = Markup(
            "<b>The text is less likely to the original model:</b> {}. Part of that is the behaviour’s "
            "absence, part may be broken text."
        )
    else:
        text = Markup(
            "<b>The text is likelier to the original model:</b> {}. That does not make it better: loops are "
            "likely too."
        )
    return Remark("plain", text.format(figures))


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
    return Remark(
        "careful", Markup("<b>Some units could not be measured</b> and are in no mean: {}.").format(where)
    )
