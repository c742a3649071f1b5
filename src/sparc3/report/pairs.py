"""Before and after: what the original and the ablated model write after the same prompt, with the difference marked."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .folder import RunFolder
from .masking import Mask, Span
from .numbers import percent

MOST = 60
"""Pairs shown of each kind; the rest stay in the run folder."""
LONGEST = 1200
"""Characters shown of a prompt or a continuation."""
_KINDS = {"toxicity": ("Toxicity", "toxicity"), "repetition": ("Repetition", "unique tokens")}


@dataclass(frozen=True)
class Side:
    """One continuation: its text as markup, its score in words, and the width of the score's bar in percent."""

    text: Markup
    score: str
    width: float | None


@dataclass(frozen=True)
class Pair:
    """One prompt with what came after it, before and after; `change` orders the pairs."""

    prompt: Markup
    before: Side
    after: Side
    change: float


@dataclass(frozen=True)
class Kind:
    """All pairs of one kind of text."""

    title: str
    score_name: str
    toxic: bool
    pairs: list[Pair]
    total: int


def kinds(run: RunFolder, mask: Mask) -> list[Kind]:
    """Empty unless both variants left their texts."""
    before, after = run.texts.get("original") or {}, run.texts.get("ablated") or {}
    made = []
    for kind in (name for name in before if name in after):
        heading, score_name = _KINDS.get(kind, (kind.replace("_", " ").capitalize(), "score"))
        toxic = kind == "toxicity"
        matched = list(_matched(before[kind], after[kind]))
        if matched:
            shown = [_pair(*found, mask, toxic) for found in matched[:MOST]]
            made.append(Kind(heading, score_name, toxic, shown, len(matched)))
    return made


def _matched(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The continuations of the prompts that both have, in the order they were drawn: every prompt's first, then its second …"""
    answers = {row["prompt"]: row["continuations"] for row in after}
    rows = [(row["prompt"], row["continuations"], answers[row["prompt"]]) for row in before if row["prompt"] in answers]
    for turn in range(max((min(len(a), len(b)) for _, a, b in rows), default=0)):
        yield from ((prompt, a[turn], b[turn]) for prompt, a, b in rows if turn < min(len(a), len(b)))


def _pair(prompt: str, before: dict[str, Any], after: dict[str, Any], mask: Mask, toxic: bool) -> Pair:
    one, other = _clipped(before["text"]), _clipped(after["text"])
    gone, came = changed(one, other)
    was, now = before.get("score"), after.get("score")
    prompt = _clipped(prompt)
    return Pair(
        mask.write(prompt, mask.spans(prompt)),
        _side(one, was, gone, "gone", mask, toxic),
        _side(other, now, came, "came", mask, toxic),
        (now - was) if was is not None and now is not None else 0.0,
    )


def _side(text: str, score: float | None, marked: list[Span], mark: str, mask: Mask, toxic: bool) -> Side:
    written = mask.write(text, mask.of_continuation(text, score, toxic), marked, mark)
    if score is None:
        return Side(written, "not scored", None)
    share = 0.0 <= score <= 1.0
    return Side(written, percent(score) if share else f"{score:.2f}", score * 100 if share else None)


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def changed(one: str, other: str) -> tuple[list[Span], list[Span]]:
    """Which stretches of each text the other does not have, word by word."""
    words, theirs = _words(one), _words(other)
    matcher = difflib.SequenceMatcher(None, [one[a:b] for a, b in words], [other[a:b] for a, b in theirs], autojunk=False)
    gone: list[Span] = []
    came: list[Span] = []
    for what, i, j, k, m in matcher.get_opcodes():
        if what != "equal" and j > i:
            gone.append((words[i][0], words[j - 1][1]))
        if what != "equal" and m > k:
            came.append((theirs[k][0], theirs[m - 1][1]))
    return gone, came


def _words(text: str) -> list[Span]:
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
