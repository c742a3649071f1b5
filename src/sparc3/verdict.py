"""The verdict on a run: one sentence and a table of criteria, the same on the console, in results.json and in
the report.

It depends only on the results. The job correct shows an effect if the behaviour moves in the right direction,
also net of as many random units, with zero outside both intervals; its costs are compared with margins. The
jobs discover and compress compare the run's own method with each other one, by paired intervals.
"""

from collections.abc import Iterable, Iterator

from .results import Check, Difference, Results, Variant, Verdict

SIDE_EFFECTS = ("perplexity", "kl", "fluency", "sparsity")
UNSURE = 0.05
"""A change with this p or a larger one is not called more than chance."""
PERPLEXITY_MARGIN = 0.02
"""Perplexity of other text counts as flat up to this relative increase, unless the recipe's `margins` or a
search's budget set another."""
FLUENCY_MARGIN = 0.5
"""Margin for the relative increase of the original model's perplexity on the ablated model's
continuations. It is wide, because part of the increase is the behaviour's absence."""

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
"""The kinds that are a success."""


def behaviour_of(results: Results) -> str | None:
    """The metric that the run is about: the one its provenance names, or else the first metric measured on
    both models that is not a side effect."""
    variants: dict[str, set[str]] = {}
    for m in results:
        if m.value is not None:
            variants.setdefault(m.metric, set()).add(m.variant)
    candidates = [metric for metric, names in variants.items() if {"original", "ablated"} <= names]
    headline = results.provenance.get("headline")
    if headline in candidates:
        return str(headline)
    # sorted() is stable: the metrics at −1 stay in the order in which they were measured.
    ordered = sorted(
        candidates, key=lambda metric: SIDE_EFFECTS.index(metric) if metric in SIDE_EFFECTS else -1
    )
    return ordered[0] if ordered else None


def judge_change(d: Difference | None, direction: str) -> str:
    """ "shown", "weak", "none", "harmful" or "unknown", from one paired difference.

    For a task (ioi.*) neither direction is wrong: removing its units may break it, and shows where it is.

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
    """The difference that the circuit's removal makes; with `from_` "random@", compared with random units."""
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
    """The verdict; None if no metric was measured on both the original and the changed model.

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
        label = f"effect net of {net.from_.rpartition('@')[2]} random {unit}s"
        criteria.append(Check(label, write_change(results, net), _is_shown(of_net)))
    costs = list(_judge_costs(results, metric))
    kind = of_effect
    # Removing any units moves some metrics, so an effect must also stand out from random units' effect.
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
    """ok is True if the whole interval is within the margin, False if the figure itself is beyond it, and
    None in between."""
    value, upper = d.value / before, (d.ci95[1] if d.ci95 else d.value) / before
    ok = True if upper <= margin else False if value > margin else None
    return Check(d.metric, f"{write_change(results, d)}, margin {margin * 100:+g} %", ok)


# The jobs discover and compress: one method against the others.


def _judge_discovery(results: Results) -> Verdict | None:
    """Compare methods by the area under faithfulness (CPR), paired by reference set."""
    own = str(results.provenance.get("method"))
    areas = {m.variant: m.value for m in results if m.metric == "circuit.cpr" and m.value is not None}
    if own not in areas:
        return None
    criteria, kinds = _compare(results, "circuit.cpr", "higher", own, areas)
    sparsest, enough = results.find("circuit.sparsest", own).value, results.provenance.get("enough", 0.9)
    kept = f"until {100 * (sparsest or 0.0):.3g} % of the units are removed"
    criteria.append(Check(f"accuracy of {enough:g} is kept", kept, bool(sparsest)))
    kind = _sum_up(kinds)
    details = [f"{own} has a CPR of {areas[own]:.3g}", *(f"{check.name} {check.value}" for check in criteria)]
    return Verdict(kind, f"{SAID[kind]}: {'; '.join(details)}", criteria)


def _judge_compression(results: Results) -> Verdict | None:
    """Compare methods by perplexity, or else the first measured metric, paired by window, at each number of
    weights."""
    metrics = ["perplexity", *(m.metric for m in results if not m.metric.startswith("sparsity"))]
    metric = next((name for name in metrics if any(m.metric == name for m in results)), "")
    by_variant = {m.variant: m for m in results if m.metric == metric and m.value is not None}
    margin = dict(results.provenance.get("margins") or {}).get(metric)
    own, criteria, kinds, costs, details = str(results.provenance.get("method")), [], [], [], []
    for count in dict.fromkeys(Variant.parse(name).count for name in by_variant):
        names = [name for name in by_variant if count is not None and Variant.parse(name).count == count]
        own_variant = next((name for name in names if is_way_of(Variant.parse(name).method, own)), None)
        d = next((d for d in results.differences if (d.metric, d.to) == (metric, own_variant)), None)
        if own_variant is None or d is None:
            continue
        dense = Check(f"{metric} of {own_variant} against the dense model", write_change(results, d))
        if margin is not None and "original" in by_variant and by_variant["original"].value:
            judgement = _judge_cost(results, d, by_variant["original"].value, margin)
            dense = Check(dense.name, judgement.value, judgement.ok)
        comparisons, outcomes = _compare(
            results, metric, by_variant[own_variant].direction, own_variant, names
        )
        costs.append(dense.ok)
        criteria += [dense, *comparisons]
        kinds += outcomes
        details.append(
            f"{metric} of {own_variant} {by_variant[own_variant].value:.4g}, {dense.value} of the dense model"
        )
        details += [f"{check.name} {check.value}" for check in comparisons]
    # Results from before compressions had a verdict contain no differences between methods.
    if not criteria or (kinds and not any(d.from_ != "original" for d in results.differences)):
        return None
    kind = _sum_up(kinds)
    kind = "lossy" if kind in GOOD and False in costs else kind
    return Verdict(kind, f"{SAID[kind]}: {'; '.join(details)}", criteria)


def is_way_of(name: str, method: str) -> bool:
    """Whether this is the method, or the method with one of its rankings or reductions."""
    suffixes = ("", "-abs", "-signed", "-mean_abs", "-abs_mean", "-rms")
    return name in [f"{method}{suffix}" for suffix in suffixes]


def _compare(
    results: Results, metric: str, direction: str, own: str, others: Iterable[str]
) -> tuple[list[Check], list[tuple[str, str]]]:
    """The difference of `own` from each other variant as criteria, and (method, "ahead", "behind", "level" or
    "unknown") for each that is another method."""
    criteria, kinds = [], []
    base = str(results.provenance.get("method"))
    for other in (name for name in others if name != own):
        d = next((d for d in results.differences if (d.metric, d.from_, d.to) == (metric, other, own)), None)
        kind = "unknown"
        if d is not None and d.ci95 is not None:
            kind = "ahead" if (d.value < 0) == (direction == "lower") else "behind"
            kind = "level" if d.holds_zero else kind
        text = "not measured" if d is None else f"{d.value:+.3g} (no interval)"
        if d is not None and d.ci95 is not None:
            text = f"{d.value:+.3g} (95 %: {d.ci95[0]:+.3g} to {d.ci95[1]:+.3g})"
        other_method = Variant.parse(other).method
        is_same_method = is_way_of(other_method, base)  # its other rankings and reductions are not judged
        ok = None if is_same_method or kind in ("unknown", "level") else kind == "ahead"
        # To be level with another method is no failure; to be level with random units is one.
        if other_method.partition(":")[0] == "random" and kind == "level":
            ok = False
        criteria.append(Check(f"{own} against {other_method}", text, ok))
        kinds += [] if is_same_method else [(other_method, kind)]
    return criteria, kinds


def _sum_up(kinds: list[tuple[str, str]]) -> str:
    """The kind of the verdict, from the outcomes of the comparisons."""
    if any(name.startswith("random") and kind in ("level", "behind") for name, kind in kinds):
        return "chance"
    if any(kind == "behind" for _, kind in kinds):
        return "behind"
    if not kinds or any(kind == "unknown" for _, kind in kinds):
        return "single"
    return "ahead" if all(kind == "ahead" for _, kind in kinds) else "level"


def write_change(results: Results, d: Difference | None) -> str:
    """A difference with its interval and p, relative to the original's figure unless that is zero."""
    if d is None:
        return "not measured"
    base = next((m.value for m in results if (m.metric, m.variant) == (d.metric, "original")), None)

    def write(value: float, end: str = "") -> str:
        return f"{value / base * 100:+.1f}{end}" if base else f"{value:+.4g}"

    details = [f"95 %: {write(d.ci95[0])} to {write(d.ci95[1])}"] if d.ci95 else ["no interval"]
    details += [f"p = {d.p:.2g}"] if d.p is not None else []
    return f"{write(d.value, ' %')} ({', '.join(details)})"
