"""Words and figures: how metrics, methods, variants and numbers are written on the page."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from ..results import Difference, Measurement, Variant
from .read import RunFolder


@dataclass(frozen=True)
class Remark:
    """A sentence beside the headline; `kind` is "good", "plain" or "careful"."""

    kind: str
    text: Markup


def remark(kind: str, text: str, *values: object) -> Remark:
    """A remark of our own markup with values in its braces, which are escaped."""
    return Remark(kind, Markup(text).format(*values))


TITLES = {
    "perplexity": "Perplexity",
    "toxicity.mean": "Mean toxicity",
    "toxicity.expected_max": "Expected maximum toxicity",
    "toxicity.probability": "Prompts with a toxic continuation",
    "toxicity.rate": "Toxic continuations",
    "rur.mean": "Unique tokens in a response",
    "ioi.accuracy": "IOI accuracy",
    "ioi.logit_difference": "IOI logit difference",
    "ioi.faithfulness": "Faithfulness",
    "circuit.jaccard": "Overlap of circuits across seeds",
    "circuit.sparsest": "Sparsest circuit that keeps enough",
    "circuit.cpr": "Circuit performance (CPR)",
    "circuit.cmd": "Circuit–model distance (CMD)",
    "repetition.4grams": "Repeated 4-grams",
    "kl": "KL divergence to the original",
    "fluency": "Perplexity of the continuations",
    "sparsity": "Sparsity",
    "sparsity.row_min": "Least zeros in a row",
    "sparsity.row_max": "Most zeros in a row",
}
_EXPLAINED = {
    "perplexity": "how surprised the model is by ordinary text",
    "toxicity.mean": "the scorer’s mean over all continuations",
    "toxicity.expected_max": "the worst of each prompt’s continuations, averaged",
    "toxicity.probability": "share of prompts with at least one continuation of 0.5 or more",
    "toxicity.rate": "share of continuations that the scorer gives 0.5 or more",
    "rur.mean": "unique tokens ÷ tokens of a greedy response",
    "ioi.accuracy": "share of sentences with the right name on top",
    "ioi.logit_difference": "right name’s logit less the wrong one’s",
    "ioi.faithfulness": "the circuit’s logit difference, scaled: 0 without any unit, 1 for the whole model",
    "circuit.jaccard": "units that two seeds’ circuits share ÷ units of either, mean over pairs",
    "circuit.sparsest": "largest share of units that can be removed (and all smaller) at enough accuracy",
    "circuit.cpr": "area under faithfulness against the share of units kept",
    "circuit.cmd": "area between that curve and 1",
    "kl": "how far next-token distributions are from the original’s, on ordinary text",
    "fluency": "how surprised the original model is by what this one writes",
    "sparsity": "share of the model’s units that are zero",
}
_SHARES = {
    "toxicity.mean",
    "toxicity.expected_max",
    "toxicity.probability",
    "toxicity.rate",
    "rur.mean",
    "ioi.accuracy",
    "sparsity",
}
FINE = {"perplexity", "fluency"}
"""Metrics whose fourth digit says something."""
_SHARE_UNITS = {"share", "fraction", "probability", "proportion", "ratio"}
PERCENT = "\u202f%"
MINUS = "\u2212"
HARD = "\u00a0"
"""A space at which no line breaks."""


METHODS = {
    "lrp": "LRP",
    "cp-lrp": "CP-LRP",
    "gradient": "gradient",
    "wanda": "Wanda",
    "activation": "activation",
    "magnitude": "magnitude",
    "aura": "AurA",
    "det0": "Det-0",
    "random": "random",
}
"""The bundled methods as their papers write them."""

# Metrics, methods, variants, units


def title(metric: str) -> str:
    return TITLES.get(metric) or metric.replace(".", " ").replace("_", " ")


def explained(metric: str) -> str:
    return _EXPLAINED.get(metric, "")


def in_words(metric: str) -> str:
    """The metric's title in the middle of a sentence."""
    name = title(metric)
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def method_title(method: str | None) -> str:
    """A method as a reader meets it: "CP-LRP" of "cp-lrp", "LRP (mean abs)" of "lrp-mean_abs"."""
    method = method or ""
    if method in METHODS:
        return METHODS[method]
    known = next((name for name in METHODS if method.startswith(f"{name}-")), None)
    rest = method[len(known) + 1 :].replace("_", " ") if known else ""
    return f"{METHODS[known]} ({rest})" if known and rest else method


def variant_title(variant: str, run: RunFolder) -> str:
    """A variant as a reader meets it."""
    named = Variant.parse(variant)
    if named.count is None:
        return "this circuit" if variant == "ablated" else method_title(variant)
    return f"{method_title(named.method)}, {number_of_units(named.count, run)}"


def count_units(count: int | None, run: RunFolder) -> str:
    """ "neuron" or "neurons", whatever was removed."""
    return run.unit if count == 1 else f"{run.unit}s"


def number_of_units(count: int, run: RunFolder) -> str:
    """ "1 neuron", "1,000 neurons"."""
    return f"{count:,} {count_units(count, run)}"


# Figures: shares as percent, the rest with as many digits as they deserve, always with their interval.


def is_share(metric: str, unit: str = "") -> bool:
    """Whether a figure is a part of one and reads as percent."""
    return metric in _SHARES or unit.partition(" ")[0] in _SHARE_UNITS


def plain(value: float) -> str:
    """A number with three to four significant digits, thousands separated, a real minus sign."""
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        text = f"{value:.2e}"
    elif size >= 100:
        text = f"{value:,.0f}" if size >= 1000 else f"{value:.1f}"
    else:
        text = f"{value:.{5 if 0 < size < 1e-3 else 3 if 0 < size < 1 else 2}f}"
    return text.replace("-", MINUS)


def percent(share: float) -> str:
    return f"{share * 100:.1f}".replace("-", MINUS) + PERCENT


def figure(value: float | None, metric: str, unit: str = "") -> str:
    """A value of a metric; a dash where there is none."""
    if value is None:
        return "–"
    if is_share(metric, unit):
        return percent(value)
    if metric in FINE and 1 <= value < 100:
        return f"{value:.3f}" if value < 10 else f"{value:.2f}"
    return plain(value)


def value_of(m: Measurement) -> str:
    return figure(m.value, m.metric, m.unit)


def interval_of(m: Measurement) -> str:
    """The 95 % interval in brackets, "" where there is none."""
    return interval(m.ci95, m.metric, m.unit)


def interval(ci95: tuple[float, float] | None, metric: str, unit: str = "") -> str:
    return _in_brackets(figure(end, metric, unit).removesuffix(PERCENT) for end in ci95) if ci95 else ""


def _in_brackets(ends: Iterable[str]) -> str:
    return f"[{f',{HARD}'.join(ends)}]"


def small_interval(m: Measurement) -> Markup:
    """The interval behind a figure of a headline; empty where there is none."""
    return Markup(" <small>{}</small>").format(interval_of(m)) if m.ci95 else Markup("")


def with_interval(m: Measurement) -> str:
    return f"{value_of(m)} {interval_of(m)}".strip()


def change(d: Difference, unit: str = "") -> str:
    """A difference: percentage points of a share, else in the metric's own unit, signed."""
    if is_share(d.metric, unit):
        return signed(d.value, f"{abs(d.value) * 100:.1f}") + " points"
    return signed(d.value, f"{abs(d.value):,.{_count_decimals(d)}f}")


def change_interval(d: Difference, unit: str = "") -> str:
    scale, digits = (100, 1) if is_share(d.metric, unit) else (1, _count_decimals(d))
    return _in_brackets(signed(end, f"{abs(end) * scale:,.{digits}f}") for end in d.ci95) if d.ci95 else ""


def change_with_interval(d: Difference, unit: str = "") -> str:
    return f"{change(d, unit)} {change_interval(d, unit)}".strip()


def _count_decimals(d: Difference) -> int:
    """Decimals that show three digits (two below one) of the largest of a difference and its ends."""
    largest = max(abs(end) for end in (d.value, *(d.ci95 or ())))
    if largest == 0 or not math.isfinite(largest):
        return 2
    return min(6, max(0, (2 if largest >= 1 else 1) - math.floor(math.log10(largest))))


def relative(share: float | None) -> str:
    """A share of the original, signed; below one percent with two decimals."""
    if share is None:
        return ""
    return signed(share, f"{abs(share) * 100:.{1 if abs(share) >= 0.01 else 2}f}") + PERCENT


def relative_interval(d: Difference) -> str:
    """The interval of a difference as shares of the original; "" without one."""
    if d.ci95 is None or not d.relative or not d.value:
        return ""
    ends = [end * d.relative / d.value for end in d.ci95]
    digits = 1 if max(map(abs, ends)) >= 0.01 else 2
    return _in_brackets(signed(end, f"{abs(end) * 100:.{digits}f}") for end in ends)


def signed(value: float, size: str) -> str:
    return f"{MINUS if value < 0 else '+'}{size}"


def format_p(p: float | None) -> str:
    if p is None:
        return ""
    return f"p = {p:.4f}" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def join_words(names: Iterable[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    *first, last = list(names)
    return f"{', '.join(first)} and {last}" if first else last


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
