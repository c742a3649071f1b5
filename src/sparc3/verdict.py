"""The verdict on a run: one sentence and a table of criteria, the same on the console, in results.json and in
the report.

It reads results alone. A run that corrects shows an effect where the behaviour moves the right way, net of
what as many random units do, with zero outside both intervals; what it costs is held against stated margins.
A run that discovers or compresses holds its own method against each other one, by paired intervals.
"""

from collections.abc import Iterable, Iterator

from .results import Check, Difference, Results, Variant, Verdict

SIDE_EFFECTS = ("perplexity", "kl", "fluency", "sparsity")
UNSURE = 0.05
"""From this p on a change is not called more than chance."""
PERPLEXITY_MARGIN = 0.02
"""Perplexity of other text is flat up to this relative increase, where neither `margins` of the recipe nor
the budget of a search says another."""
FLUENCY_MARGIN = 0.5
"""The original model's perplexity of what the ablated one writes may rise by so much; part of that is the
behaviour's absence."""

SAID = {
    "shown": "an effect is shown",
    "costly": "an effect is shown, at a cost beyond the margin",
    "unproven": "a change is shown, but not compared with random units",
    "random": "no effect is shown beyond that of as many random units",
    "weak": "no effect is shown, the evidence is weak",
    "none": "no effect is shown",
    "harmful": "no effect is shown, the change goes the wrong way",
    "unknown": "no effect is shown, there is no interval",
    "ahead": "the method is ahead of every other",
    "level": "the method is behind no other",
    "behind": "another method does better",
    "chance": "the method is not ahead of random units",
    "lossy": "the loss is beyond the margin",
    "single": "nothing is shown, the method cannot be compared",
}
"""Kind of a verdict → its words."""
GOOD = ("shown", "ahead", "level")
"""The kinds to be glad of."""


def behaviour_of(results: Results) -> str | None:
    """The metric the run is about: the one its provenance names, else the first measured on both models that
    is not a side effect."""
    variants: dict[str, set[str]] = {}
    for m in results:
        if m.value is not None:
            variants.setdefault(m.metric, set()).add(m.variant)
    both = [metric for metric, names in variants.items() if {"original", "ablated"} <= names]
    named = results.provenance.get("headline")
    if named in both:
        return str(named)
    ordered = sorted(both, key=lambda metric: SIDE_EFFECTS.index(metric) if metric in SIDE_EFFECTS else -1)
    return ordered[0] if ordered else None


def judge_change(d: Difference | None, direction: str) -> str:
    """ "shown", "weak", "none", "harmful" or "unknown": what one paired difference says.

    A task (ioi.*) is looked for by what its removal breaks, so there neither direction is wrong.

    Args:
        direction: which way is better, "lower" or "higher".
    """
    if d is None or d.ci95 is None:
        return "unknown"
    if d.holds_zero:
        return "none"
    if not d.metric.startswith("ioi.") and (d.value > 0) == (direction == "lower"):
        return "harmful"
    return "weak" if d.p is not None and d.p >= UNSURE else "shown"


def difference_to(results: Results, metric: str, from_: str = "original") -> Difference | None:
    """What the circuit's removal changed; `from_` "random@" takes the random units beside the circuit."""
    return next(
        (
            d
            for d in results.differences
            if (d.metric, d.to) == (metric, "ablated")
            and (d.from_.startswith(from_) if from_.endswith("@") else d.from_ == from_)
        ),
        None,
    )


def judge(results: Results, unit: str = "unit") -> Verdict | None:
    """The verdict; None where no metric was measured on both the original and the changed model.

    Args:
        unit: what was removed: "neuron", "head", "weight".
    """
    if (job := results.provenance.get("job", "correct")) != "correct":
        return _judge_discovery(results) if job == "discover" else _judge_compression(results)
    metric = behaviour_of(results)
    if metric is None:
        return None
    direction = results.find(metric, "ablated").direction
    effect, net = difference_to(results, metric), difference_to(results, metric, "random@")
    of_effect, of_net = judge_change(effect, direction), judge_change(net, direction)
    criteria = [Check(f"effect on {metric}", write_change(results, effect), _is_shown(of_effect))]
    if net is not None:
        beside = f"effect net of {net.from_.rpartition('@')[2]} random {unit}s"
        criteria.append(Check(beside, write_change(results, net), _is_shown(of_net)))
    costs = list(_judge_costs(results, metric))
    kind = of_effect
    if kind == "shown":
        kind = {"shown": "shown", "unknown": "unproven"}.get(of_net, "random")
    if kind == "shown" and any(cost.ok is False for cost in costs):
        kind = "costly"
    details = [f"{metric} {write_change(results, effect)}"]
    if net is not None:
        details.append(f"net of as many random {unit}s {write_change(results, net)}")
    details += [f"{cost.name} {cost.value}" for cost in costs]
    return Verdict(kind, f"{SAID[kind]}: {'; '.join(details)}", [*criteria, *costs])


def _is_shown(kind: str) -> bool | None:
    return None if kind == "unknown" else kind == "shown"


def _judge_costs(results: Results, behaviour: str) -> Iterator[Check]:
    budget = dict(dict(results.provenance.get("tune") or {}).get("budget") or {})
    flat = float(budget.get("max_perplexity_increase") or PERPLEXITY_MARGIN)
    margins = {"perplexity": flat, "fluency": FLUENCY_MARGIN, **(results.provenance.get("margins") or {})}
    for metric, margin in margins.items():
        d = difference_to(results, metric)
        before = results.find(metric).value if d is not None else None
        if d is None or not before or metric == behaviour:
            continue
        yield _judge_cost(results, d, before, margin)


def _judge_cost(results: Results, d: Difference, before: float, margin: float) -> Check:
    """Within the margin where the whole interval is, beyond it where the figure is."""
    least, most = d.value / before, (d.ci95[1] if d.ci95 else d.value) / before
    ok = True if most <= margin else False if least > margin else None
    return Check(d.metric, f"{write_change(results, d)}, margin {margin * 100:+g} %", ok)


# The jobs discover and compress: one method against the others.


def _judge_discovery(results: Results) -> Verdict | None:
    """By the area under faithfulness (CPR), paired by reference set."""
    own = str(results.provenance.get("method"))
    areas = {m.variant: m.value for m in results if m.metric == "circuit.cpr" and m.value is not None}
    if own not in areas:
        return None
    criteria, kinds = _compare(results, "circuit.cpr", "higher", own, areas)
    sparsest, enough = results.find("circuit.sparsest", own).value, results.provenance.get("enough", 0.9)
    kept = f"until {100 * (sparsest or 0.0):.3g} % of the units are removed"
    criteria.append(Check(f"accuracy of {enough:g} is kept", kept, bool(sparsest)))
    kind = _sum_up(kinds)
    details = [f"{own} has a CPR of {areas[own]:.3g}", *(f"{one.name} {one.value}" for one in criteria)]
    return Verdict(kind, f"{SAID[kind]}: {'; '.join(details)}", criteria)


def _judge_compression(results: Results) -> Verdict | None:
    """By perplexity, or what else is measured, paired by window, at each number of weights."""
    metrics = ["perplexity", *(m.metric for m in results if not m.metric.startswith("sparsity"))]
    metric = next((name for name in metrics if any(m.metric == name for m in results)), "")
    found = {m.variant: m for m in results if m.metric == metric and m.value is not None}
    margin = dict(results.provenance.get("margins") or {}).get(metric)
    own, criteria, kinds, costs, details = str(results.provenance.get("method")), [], [], [], []
    for count in dict.fromkeys(Variant.parse(name).count for name in found):
        at = [name for name in found if count is not None and Variant.parse(name).count == count]
        ours = next((name for name in at if is_way_of(Variant.parse(name).method, own)), None)
        d = next((d for d in results.differences if (d.metric, d.to) == (metric, ours)), None)
        if ours is None or d is None:
            continue
        dense = Check(f"{metric} of {ours} against the dense model", write_change(results, d))
        if margin is not None and "original" in found and found["original"].value:
            judged = _judge_cost(results, d, found["original"].value, margin)
            dense = Check(dense.name, judged.value, judged.ok)
        compared, theirs = _compare(results, metric, found[ours].direction, ours, at)
        costs.append(dense.ok)
        criteria += [dense, *compared]
        kinds += theirs
        details.append(f"{metric} of {ours} {found[ours].value:.4g}, {dense.value} of the dense model")
        details += [f"{one.name} {one.value}" for one in compared]
    # Results of before there were verdicts on compressions have no paired differences of methods.
    if not criteria or (kinds and not any(d.from_ != "original" for d in results.differences)):
        return None
    kind = _sum_up(kinds)
    kind = "lossy" if kind in GOOD and False in costs else kind
    return Verdict(kind, f"{SAID[kind]}: {'; '.join(details)}", criteria)


def is_way_of(name: str, method: str) -> bool:
    """Whether this is the method, or the method with one of its rankings or reductions."""
    ends = ("", "-abs", "-signed", "-mean_abs", "-abs_mean", "-rms")
    return name in [f"{method}{end}" for end in ends]


def _compare(
    results: Results, metric: str, direction: str, own: str, others: Iterable[str]
) -> tuple[list[Check], list[tuple[str, str]]]:
    """How far `own` is from each other variant, as criteria; and (method, "ahead", "behind", "level" or
    "unknown") of each that is another method."""
    criteria, kinds = [], []
    base = str(results.provenance.get("method"))
    for other in (name for name in others if name != own):
        d = next((d for d in results.differences if (d.metric, d.from_, d.to) == (metric, other, own)), None)
        kind = "unknown"
        if d is not None and d.ci95 is not None:
            kind = "ahead" if (d.value < 0) == (direction == "lower") else "behind"
            kind = "level" if d.holds_zero else kind
        said = "not measured" if d is None else f"{d.value:+.3g} (no interval)"
        if d is not None and d.ci95 is not None:
            said = f"{d.value:+.3g} (95 %: {d.ci95[0]:+.3g} to {d.ci95[1]:+.3g})"
        theirs = Variant.parse(other).method
        same = is_way_of(theirs, base)  # another ranking or reduction of it is told, not judged
        ok = None if same or kind in ("unknown", "level") else kind == "ahead"
        if theirs.partition(":")[0] == "random" and kind == "level":
            ok = False
        criteria.append(Check(f"{own} against {theirs}", said, ok))
        kinds += [] if same else [(theirs, kind)]
    return criteria, kinds


def _sum_up(kinds: list[tuple[str, str]]) -> str:
    """The kind of the verdict from those of the single comparisons."""
    if any(name.startswith("random") and kind in ("level", "behind") for name, kind in kinds):
        return "chance"
    if any(kind == "behind" for _, kind in kinds):
        return "behind"
    if not kinds or any(kind == "unknown" for _, kind in kinds):
        return "single"
    return "ahead" if all(kind == "ahead" for _, kind in kinds) else "level"


def write_change(results: Results, d: Difference | None) -> str:
    """A difference with its interval and p, as a share of the original's figure where that is not zero."""
    if d is None:
        return "not measured"
    base = next((m.value for m in results if (m.metric, m.variant) == (d.metric, "original")), None)

    def write(value: float, end: str = "") -> str:
        return f"{value / base * 100:+.1f}{end}" if base else f"{value:+.4g}"

    inside = [f"95 %: {write(d.ci95[0])} to {write(d.ci95[1])}"] if d.ci95 else ["no interval"]
    inside += [f"p = {d.p:.2g}"] if d.p is not None else []
    return f"{write(d.value, ' %')} ({', '.join(inside)})"
