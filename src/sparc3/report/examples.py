"""Before and after: what the original and the ablated model write after the same prompt, with the difference
marked."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..safe_text import visible
from .read import Continuation, Prompt, RunFolder
from .words import percent

# Offensive words, masked until the reader asks for them: both forms are in the page, and a switch chooses
# without any script.


Span = tuple[int, int]
HIDDEN_FROM = 0.5
"""Without a lexicon, a continuation with this score or more is hidden as a whole."""


@dataclass(frozen=True)
class Mask:
    """What to hide: the words of the lexicon, or, without one, whatever the scorer calls toxic."""

    lexicon: tuple[str, ...] = ()

    def spans(self, text: str) -> list[Span]:
        """Where the lexicon's words stand, plurals too."""
        pattern = _compile_lexicon(self.lexicon)
        return [match.span() for match in pattern.finditer(text)] if pattern else []

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
            piece = self._write_piece(text[start:end], _is_covered(hidden, start))
            form = '<mark class="{0}">{1}</mark>' if _is_covered(marked, start) else "{1}"
            pieces.append(Markup(form).format(mark, piece))
        return Markup("").join(pieces)

    def _write_piece(self, text: str, hidden: bool) -> Markup:
        if not hidden or not text.strip():
            return Markup("{}").format(visible_lines(text))
        kind, veil = (
            ("veil", _dot_letters(text)) if self.lexicon else ("veil blurred", re.sub(r"\S", "x", text))
        )
        form = Markup('<span class="{}">{}</span><span class="bare">{}</span>')
        return form.format(kind, veil, visible_lines(text))


def _is_covered(spans: Iterable[Span], place: int) -> bool:
    return any(start <= place < end for start, end in spans)


def _dot_letters(words: str) -> str:
    """The first letter of each word, and a dot for each of the others."""
    return re.sub(r"(\w)(\w*)", lambda match: match[1] + "•" * len(match[2]), visible_lines(words))


def _compile_lexicon(lexicon: tuple[str, ...]) -> re.Pattern[str] | None:
    words = sorted({word.strip() for word in lexicon if word.strip()}, key=lambda word: (-len(word), word))
    either = "|".join(map(re.escape, words))
    return re.compile(rf"(?<!\w)(?:{either})(?:s|es)?(?!\w)", re.IGNORECASE) if words else None


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


@dataclass(frozen=True)
class Side:
    """One continuation: text as markup, score in words, and width of the score's bar in percent."""

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
    before, after = run.texts.get("original", {}), run.texts.get("ablated", {})
    made = []
    for kind in (name for name in before if name in after):
        heading, score_name = _KINDS.get(kind, (kind.replace("_", " ").capitalize(), "score"))
        toxic = kind == "toxicity"
        matched = list(_match_continuations(before[kind], after[kind]))
        if matched:
            shown = [_make_pair(*found, mask, toxic) for found in matched[:MOST]]
            made.append(Kind(heading, score_name, toxic, shown, len(matched)))
    return made


def _match_continuations(
    before: list[Prompt], after: list[Prompt]
) -> Iterator[tuple[str, Continuation, Continuation]]:
    """What both wrote after the same prompt: every prompt's first continuation, then its second …"""
    answers = {row.prompt: row.continuations for row in after}
    rows = [
        (row.prompt, list(zip(row.continuations, answers[row.prompt], strict=False)))
        for row in before
        if row.prompt in answers
    ]
    for turn in range(max((len(pairs) for _, pairs in rows), default=0)):
        yield from ((prompt, *pairs[turn]) for prompt, pairs in rows if turn < len(pairs))


def _make_pair(prompt: str, before: Continuation, after: Continuation, mask: Mask, toxic: bool) -> Pair:
    one, other, prompt = _clip_text(before.text), _clip_text(after.text), _clip_text(prompt)
    gone, came = find_changes(one, other)
    was, now = before.score, after.score
    return Pair(
        mask.write(prompt, mask.spans(prompt)),
        _make_side(one, was, gone, "gone", mask, toxic),
        _make_side(other, now, came, "came", mask, toxic),
        (now - was) if was is not None and now is not None else 0.0,
    )


def _make_side(
    text: str, score: float | None, marked: list[Span], mark: str, mask: Mask, toxic: bool
) -> Side:
    written = mask.write(text, mask.of_continuation(text, score, toxic), marked, mark)
    if score is None:
        return Side(written, "not scored", None)
    share = 0.0 <= score <= 1.0
    return Side(written, percent(score) if share else f"{score:.2f}", score * 100 if share else None)


def _clip_text(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def find_changes(one: str, other: str) -> tuple[list[Span], list[Span]]:
    """Which stretches of each text the other does not have, word by word."""
    words, other_words = _find_words(one), _find_words(other)
    matcher = difflib.SequenceMatcher(
        None, [one[a:b] for a, b in words], [other[a:b] for a, b in other_words], autojunk=False
    )
    gone: list[Span] = []
    came: list[Span] = []
    for what, i, j, k, m in matcher.get_opcodes():
        if what != "equal" and j > i:
            gone.append((words[i][0], words[j - 1][1]))
        if what != "equal" and m > k:
            came.append((other_words[k][0], other_words[m - 1][1]))
    return gone, came


def _find_words(text: str) -> list[Span]:
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
