"""Neuron cards: what one removed unit reads, writes, and does when it alone is removed."""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .discovery import sparsest_point
from .examples import Mask
from .read import RunFolder
from .unit_map import place
from .variant_names import method_colours, method_title, parse_variant
from .words import figure, in_words, percent, plain, title, value_of

MOST = 120
_CONTEXT = 110


@dataclass(frozen=True)
class Card:
    """One unit as the page shows it; every text is markup, masked where it must be."""

    title: str
    relevances: list[tuple[str, str, float]]
    promotes: list[Markup]
    suppresses: list[Markup]
    fired: list[tuple[Markup, Markup, str]]
    alone: list[tuple[str, str, str]]


def cards(run: RunFolder, mask: Mask) -> list[Card]:
    """In the order of the file, at most MOST."""
    toxic = any(metric.startswith("toxicity") for metric in run.metrics())
    return [_make_card(row, run, mask, toxic) for row in run.cards[:MOST]]


def _make_card(row: dict[str, Any], run: RunFolder, mask: Mask, toxic: bool) -> Card:
    def token(text: Any) -> Markup:
        written = str(text)[:60].replace(" ", "␣", 1) if str(text).startswith(" ") else str(text)[:60]
        return mask.write(written, mask.of_token(written.replace("␣", " "), toxic))

    where = place(str(row["module"]), several=row.get("layer") is None)
    return Card(
        f"{where.capitalize()}, {run.unit} {int(row['index']):,}",
        _scale_relevances(row),
        [token(text) for text in (row.get("promotes") or [])[:10]],
        [token(text) for text in (row.get("suppresses") or [])[:10]],
        [
            (_shorten_context(one, mask), token(one.get("token", "")), _write_number(one.get("activation")))
            for one in (row.get("fired") or [])[:3]
        ],
        [
            _describe_effect_alone(metric, value, run)
            for metric, value in (row.get("alone") or {}).items()
            if value is not None
        ],
    )


def _scale_relevances(row: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(name, figure, bar width in percent) of the general and the undesired relevance, on one scale."""
    found = {name: float(row[name]) for name in ("general", "undesired") if row.get(name) is not None}
    longest = max(map(abs, found.values()), default=0.0) or 1.0
    return [(name, plain(value), abs(value) / longest * 100) for name, value in found.items()]


def _shorten_context(one: dict[str, Any], mask: Mask) -> Markup:
    prompt = str(one.get("prompt", ""))
    shown = prompt if len(prompt) <= _CONTEXT else "… " + prompt[-_CONTEXT:].partition(" ")[2]
    token = str(one.get("token", "")).strip()
    here = (
        [(len(shown.rstrip()) - len(token), len(shown.rstrip()))]
        if token and shown.rstrip().endswith(token)
        else []
    )
    return mask.write(shown, mask.spans(shown), here, "here")


def _write_number(value: Any) -> str:
    return plain(float(value)) if isinstance(value, int | float) else ""


def _describe_effect_alone(metric: str, value: float, run: RunFolder) -> tuple[str, str, str]:
    """(what it is in a sentence, with this unit alone removed, on the original model)."""
    original = run.find_measurement(metric, "original")
    name = in_words(metric) if metric in run.metrics() else title(metric).lower()
    return name, figure(float(value), metric), value_of(original) if original and original.value else ""


# What circuits have in common, and which units were kept out of every one of them.


@dataclass(frozen=True)
class Sharing:
    """Another method's circuit of the same size: how many units it shares with this one, and how many would
    by chance."""

    name: str
    colour: str
    both: str
    share: float
    expected: str


def sharing(run: RunFolder) -> list[Sharing]:
    """The methods whose circuits share most first. Of a run that looked for a task, the circuits of the size
    it settled on."""
    count = _count_compared_units(run)
    rows = []
    for one in run.provenance.get("overlaps") or []:
        name = parse_variant(str(one.get("variant")))
        if name is None or name[1] != count or not one.get("size"):
            continue
        both, expected = float(one["both"]), one.get("expected")
        share = both / float(one["size"])
        chance = f"{expected:,.0f}" if expected is not None else ""
        rows.append(
            Sharing(
                method_title(name[0]),
                method_colours(run).get(name[0], "mr"),
                f"{both:,.0f} ({percent(share)})",
                100 * share,
                chance,
            )
        )
    return sorted(rows, key=lambda row: -row.share)


def _count_compared_units(run: RunFolder) -> int:
    """How many units the circuit that is compared removes; 0 without one."""
    if run.job != "discover":
        return len(run.circuit) if run.circuit else 0
    best = sparsest_point(run, run.method or "")
    return best.count if best else 0


def protected(run: RunFolder) -> list[tuple[str, str]] | None:
    """(unit, what its removal alone multiplies perplexity by) of those kept out of every selection; None
    where nothing was looked for."""
    found = run.provenance.get("protected")
    if found is None:
        return None
    return [
        (
            f"{place(str(one['module']))}, {run.unit} {int(one['index']):,}",
            _write_ratio(one["perplexity_ratio"]),
        )
        for one in found
    ]


def _write_ratio(ratio: float | None) -> str:
    return "beyond all numbers" if ratio is None else plain(float(ratio))
