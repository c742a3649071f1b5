"""Words and figures: how metrics, methods, variants and numbers are written on the page."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ..results import Difference, Measurement, Variant
from .read import RunFolder


@dataclass(frozen=True)
class Remark:
    """A sentence beside the headline; `kind` is "good", "plain" or "careful"."""

    kind: str
    text: Markup


def remark(kind: str, text: str, *values: object) -> Remark:
    """A remark from our own markup, with values for its braces, which are escaped."""
    return Remark(kind, Markup(text).format(*values))


METRICS = {
    "perplexity": ("Perplexity", "how surprised the model is by ordinary text"),
    "toxicity.mean": ("Mean toxicity", "the scorer’s mean over all continuations"),
    "toxicity.expected_max": (
        "Expected maximum toxicity",
        "the worst of each prompt’s continuations, averaged",
    ),
    "toxicity.probability": (
        "Prompts with a toxic continuation",
        "share of prompts with at least one continuation of 0.5 or more",
    ),
    "toxicity.rate": ("Toxic continuations", "share of continuations that the scorer gives 0.5 or more"),
    "rur.mean": ("Unique tokens in a response", "unique tokens ÷ tokens of a greedy response"),
    "ioi.accuracy": ("IOI accuracy", "share of sentences with the right name on top"),
    "ioi.logit_difference": ("IOI logit difference", "right name’s logit less the wrong one’s"),
    "ioi.faithfulness": (
        "Faithfulness",
        "the circuit’s logit difference, scaled: 0 without any unit, 1 for the whole model",
    ),
    "circuit.jaccard": (
        "Overlap of circuits across seeds",
        "units that two seeds’ circuits share ÷ units of either, mean over pairs",
    ),
    "circuit.sparsest": (
        "Sparsest circuit that keeps enough",
        "largest share of units that can be removed (and all smaller) at enough accuracy",
    ),
    "circuit.cpr": ("Circuit performance (CPR)", "area under faithfulness against the share of units kept"),
    "circuit.cmd": ("Circuit–model distance (CMD)", "area between that curve and 1"),
    "repetition.4grams": ("Repeated 4-grams", ""),
    "kl": (
        "KL divergence to the original",
        "how far next-token distributions are from the original’s, on ordinary text",
    ),
    "fluency": (
        "Perplexity of the continuations",
        "how surprised the original model is by what this one writes",
    ),
    "sparsity": ("Sparsity", "share of the model’s units that are zero"),
    "sparsity.row_min": ("Least zeros in a row", ""),
    "sparsity.row_max": ("Most zeros in a row", ""),
}
"""Metric → its title, and an explanation."""
METHODS = {
    "lrp": "LRP",
    "cp-lrp": "CP-LRP",
    "relp": "RelP",
    "gim": "GIM",
    "ig": "integrated gradients",
    "gradient": "gradient",
    "wanda": "Wanda",
    "activation": "activation",
    "magnitude": "magnitude",
    "aura": "AurA",
    "det0": "Det-0",
    "random": "random",
}
"""Bundled method → its name as its paper writes it."""
_TOXICITIES = ("toxicity.mean", "toxicity.expected_max", "toxicity.probability", "toxicity.rate")
_SHARES = (*_TOXICITIES, "rur.mean", "ioi.accuracy", "sparsity")
_SHARE_UNITS = ("share", "fraction", "probability", "proportion", "ratio")
PERCENT = "\u202f%"
MINUS = "\u2212"
HARD = "\u00a0"
"""A non-breaking space."""


def title(metric: str) -> str:
    return METRICS[metric][0] if metric in METRICS else metric.replace(".", " ").replace("_", " ")


def explain(metric: str) -> str:
    return METRICS.get(metric, ("", ""))[1]


def word_list(run: RunFolder) -> str:
    """The name of the user's file that says what counts as toxic; "" if another scorer does."""
    scorer = str((run.provenance.metrics.get("toxicity") or {}).get("scorer", ""))
    return Path(scorer.partition(":")[2]).name if scorer.startswith("lexicon:") else ""


def inline_title(metric: str) -> str:
    """The metric's title for the middle of a sentence: lower case, unless it starts with an acronym."""
    name = title(metric)
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def method_title(method: str | None) -> str:
    """A method's name for readers: "CP-LRP" for "cp-lrp", "LRP (mean abs)" for "lrp-mean_abs"."""
    method = method or ""
    if method in METHODS:
        return METHODS[method]
    base = next((name for name in METHODS if method.startswith(f"{name}-")), None)
    rest = method[len(base) + 1 :].replace("_", " ") if base else ""
    return f"{METHODS[base]} ({rest})" if base and rest else method


def variant_title(variant: str, run: RunFolder) -> str:
    """A variant's name for readers."""
    parsed = Variant.parse(variant)
    if parsed.count is None:
        return "this circuit" if variant == "ablated" else method_title(variant)
    return f"{method_title(parsed.method)}, {run.write_count(parsed.count)}"


# Figures: shares as percent, the rest with as many digits as are meaningful.


def is_share(metric: str, unit: str = "") -> bool:
    """Whether a figure is a share of one, which is written as percent."""
    return metric in _SHARES or unit.partition(" ")[0] in _SHARE_UNITS


def plain(value: float) -> str:
    """A number with three to four significant digits, thousands separators and a real minus sign."""
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
    """A value of a metric; a dash for None."""
    if value is None:
        return "–"
    if is_share(metric, unit):
        return percent(value)
    # Perplexities of variants often differ only in the fourth digit.
    if metric in ("perplexity", "fluency") and 1 <= value < 100:
        return f"{value:.3f}" if value < 10 else f"{value:.2f}"
    return plain(value)


def value_of(m: Measurement) -> str:
    return figure(m.value, m.metric, m.unit)


def interval_of(m: Measurement) -> str:
    """The 95 % interval in brackets; "" without one."""
    ends = [figure(end, m.metric, m.unit).removesuffix(PERCENT) for end in m.ci95 or ()]
    return _bracket(ends)


def _bracket(ends: list[str]) -> str:
    return f"[{f',{HARD}'.join(ends)}]" if ends else ""


def format_with_interval(m: Measurement) -> str:
    return f"{value_of(m)} {interval_of(m)}".strip()


def format_with_small_interval(m: Measurement, class_: str = "") -> Markup:
    """A figure for a headline, bold if it has a class, followed by its interval in small print."""
    value = Markup('<b class="{}">{}</b>' if class_ else "{1}").format(class_, value_of(m))
    return Markup("{} <small>{}</small>" if m.ci95 else "{}").format(value, interval_of(m))


def add_sign(value: float, size: str) -> str:
    return f"{MINUS if value < 0 else '+'}{size}"


def _format_change(d: Difference, unit: str) -> list[str]:
    """The value of a difference and the ends of its interval, with signs: percentage points for a share, else
    decimals such that the largest has three significant digits (two below one)."""
    numbers = [d.value, *(d.ci95 or ())]
    largest, scale, digits = max(map(abs, numbers)), 1, 2
    if is_share(d.metric, unit):
        scale, digits = 100, 1
    elif largest != 0 and math.isfinite(largest):
        digits = min(6, max(0, (2 if largest >= 1 else 1) - math.floor(math.log10(largest))))
    return [add_sign(x, f"{abs(x) * scale:,.{digits}f}") for x in numbers]


def change(d: Difference, unit: str = "") -> str:
    """A difference with its sign: percentage points for a share, else in the metric's own unit."""
    return _format_change(d, unit)[0] + (" points" if is_share(d.metric, unit) else "")


def change_interval(d: Difference, unit: str = "") -> str:
    return _bracket(_format_change(d, unit)[1:])


def change_with_interval(d: Difference, unit: str = "") -> str:
    return f"{change(d, unit)} {change_interval(d, unit)}".strip()


def relative(share: float | None) -> str:
    """A relative change with its sign in percent; below one percent with two decimals."""
    if share is None:
        return ""
    return add_sign(share, f"{abs(share) * 100:.{1 if abs(share) >= 0.01 else 2}f}") + PERCENT


def relative_interval(d: Difference) -> str:
    """The interval of a difference as shares of the original; "" without one."""
    if d.ci95 is None or not d.relative or not d.value:
        return ""
    ends = [end * d.relative / d.value for end in d.ci95]
    digits = 1 if max(map(abs, ends)) >= 0.01 else 2
    return _bracket([add_sign(end, f"{abs(end) * 100:.{digits}f}") for end in ends])


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
