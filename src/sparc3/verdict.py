"""The verdict on a run that removed a circuit: one sentence and a table of criteria, the same on the console,
in results.json and in the report.

It reads results alone. An effect is shown where the behaviour moves the right way, net of what as many random
units do, with zero outside both intervals; what it costs is held against stated margins.
"""

from collections.abc import Iterator

from .results import Check, Difference, Results, Verdict

SIDE_EFFECTS = ("perplexity", "kl", "fluency", "sparsity")
UNSURE = 0.05
"""From this p on a change is not called more than chance."""
PERPLEXITY_MARGIN = 0.02
"""Perplexity of other text is flat up to this relative increase, where no search stated a budget."""
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
}
"""Kind of a verdict → its words."""


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
    """The verdict; None where no metric was measured on both the original and the ablated model.

    Args:
        unit: what was removed: "neuron", "head", "weight".
    """
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
    margins = {
        "perplexity": float(budget.get("max_perplexity_increase") or PERPLEXITY_MARGIN),
        "fluency": FLUENCY_MARGIN,
    }
    for metric, margin in margins.items():
        d = difference_to(results, metric)
        before = results.find(metric).value if d is not None else None
        if d is None or not before or metric == behaviour:
            continue
        least, most = d.value / before, (d.ci95[1] if d.ci95 else d.value) / before
        ok = True if most <= margin else False if least > margin else None
        yield Check(metric, f"{write_change(results, d)}, margin {margin * 100:+g} %", ok)


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
