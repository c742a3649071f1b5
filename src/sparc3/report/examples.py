"""Before and after: what the original and the ablated model write after the same prompt, with the difference
marked, and offensive words masked until the reader asks for them: both forms are in the page, and a switch
chooses without any script."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from ..safe_text import visible
from .read import Continuation, Prompt, RunFolder
from .words import percent

Span = tuple[int, int]
HIDDEN_FROM = 0.5
"""Without a lexicon, a continuation with this score or more is hidden as a whole."""


@dataclass(frozen=True)
class Mask:
    """What to hide: the words of the lexicon, or, without one, whatever the scorer calls toxic."""

    lexicon: tuple[str, ...] = ()

    def spans(self, text: str) -> list[Span]:
        """Where the lexicon's words stand, plurals too."""
        words = sorted({w.strip() for w in self.lexicon if w.strip()}, key=lambda word: (-len(word), word))
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?:s|es)?(?!\w)"
        return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if words else []

    def of_continuation(self, text: str, score: float | None, toxic: bool) -> list[Span]:
        """What to hide of a continuation; `toxic`: whether its score is a toxicity."""
        if self.lexicon or not toxic:
            return self.spans(text)
        return [(0, len(text))] if text and (score is None or score >= HIDDEN_FROM) else []

    def of_token(self, token: str, toxic: bool) -> list[Span]:
        """What to hide of a token, which may be the beginning of a word."""
        letters = token.strip().lower()
        if not self.lexicon:
            return [(0, len(token))] if toxic and letters else []
        starts = len(letters) >= 3 and any(word.startswith(letters) for word in map(str.lower, self.lexicon))
        return [(0, len(token))] if starts else self.spans(token)

    def write(self, text: str, hidden: Sequence[Span], marked: Sequence[Span] = (), mark: str = "") -> Markup:
        """`text` as markup: hidden spans in two forms, marked spans in a <mark> of the class `mark`."""
        cuts = sorted({0, len(text), *(end for span in (*hidden, *marked) for end in span)})
        pieces = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            veiled, is_marked = (any(a <= start < b for a, b in spans) for spans in (hidden, marked))
            piece = self._write_piece(text[start:end], veiled)
            pieces.append(Markup('<mark class="{0}">{1}</mark>' if is_marked else "{1}").format(mark, piece))
        return Markup("").join(pieces)

    def _write_piece(self, text: str, hidden: bool) -> Markup:
        shown = visible_lines(text)
        if not hidden or not text.strip():
            return Markup("{}").format(shown)
        kind, veil = "veil blurred", re.sub(r"\S", "x", text)
        if self.lexicon:  # the first letter of each word, and a dot for each of the others
            kind, veil = "veil", re.sub(r"(\w)(\w*)", lambda match: match[1] + "•" * len(match[2]), shown)
        return Markup('<span class="{}">{}</span><span class="bare">{}</span>').format(kind, veil, shown)


# Text of models and users on the page: nothing in it is left out, and nothing in it acts.


def visible_lines(text: str) -> str:
    """`visible` text, with a ↵ before each newline, for text in which a newline says something."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "↵\n")


def finalize(value: Any) -> Any:
    """What the template does to every value it prints: a string becomes visible, markup of our own stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


MOST = 60
"""Pairs shown of each kind; the rest stay in the run folder."""
LONGEST = 1200
"""Characters shown of a prompt or a continuation."""
_KINDS = {"toxicity": ("Toxicity", "toxicity"), "repetition": ("Repetition", "unique tokens")}


class Side(NamedTuple):
    """One continuation: text as markup, score in words, and width of the score's bar in percent."""

    text: Markup
    score: str
    width: float | None


class Pair(NamedTuple):
    """One prompt with what came after it, before and after; `change` orders the pairs."""

    prompt: Markup
    before: Side
    after: Side
    change: float


class Kind(NamedTuple):
    """All pairs of one kind of text."""

    title: str
    score_name: str
    pairs: list[Pair]
    total: int


def kinds(run: RunFolder, mask: Mask) -> list[Kind]:
    """Empty unless both variants left their texts."""
    before, after = run.texts.get("original", {}), run.texts.get("ablated", {})
    made = []
    for kind in (name for name in before if name in after):
        heading, score_name = _KINDS.get(kind, (kind.replace("_", " ").capitalize(), "score"))
        if matched := list(_match_continuations(before[kind], after[kind])):
            shown = [_make_pair(*found, mask, kind == "toxicity") for found in matched[:MOST]]
            made.append(Kind(heading, score_name, shown, len(matched)))
    return made


def _match_continuations(
    before: list[Prompt], after: list[Prompt]
) -> Iterator[tuple[str, Continuation, Continuation]]:
    """What both wrote after the same prompt: every prompt's first continuation, then its second …"""
    answers = {row.prompt: row.continuations for row in after}
    both = [(row.prompt, row.continuations, answers.get(row.prompt, [])) for row in before]
    rows = [(prompt, list(zip(one, other, strict=False))) for prompt, one, other in both]
    for turn in range(max((len(pairs) for _, pairs in rows), default=0)):
        yield from ((prompt, *pairs[turn]) for prompt, pairs in rows if turn < len(pairs))


def _make_pair(prompt: str, before: Continuation, after: Continuation, mask: Mask, toxic: bool) -> Pair:
    one, other, prompt = (
        text if len(text) <= LONGEST else text[:LONGEST] + " …" for text in (before.text, after.text, prompt)
    )
    gone, came = find_changes(one, other)
    was, now = before.score, after.score

    def side(text: str, score: float | None, marked: list[Span], mark: str) -> Side:
        written = mask.write(text, mask.of_continuation(text, score, toxic), marked, mark)
        if score is None:
            return Side(written, "not scored", None)
        share = 0.0 <= score <= 1.0
        return Side(written, percent(score) if share else f"{score:.2f}", score * 100 if share else None)

    change = (now - was) if was is not None and now is not None else 0.0
    shown = mask.write(prompt, mask.spans(prompt))
    return Pair(shown, side(one, was, gone, "gone"), side(other, now, came, "came"), change)


def find_changes(one: str, other: str) -> tuple[list[Span], list[Span]]:
    """Which stretches of each text the other does not have, word by word."""
    ours, theirs = ([match.span() for match in re.finditer(r"\w+|[^\w\s]", text)] for text in (one, other))
    words = [one[a:b] for a, b in ours], [other[a:b] for a, b in theirs]
    gone: list[Span] = []
    came: list[Span] = []
    for what, i, j, k, m in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        if what != "equal" and j > i:
            gone.append((ours[i][0], ours[j - 1][1]))
        if what != "equal" and m > k:
            came.append((theirs[k][0], theirs[m - 1][1]))
    return gone, came
