"""Offensive words, masked until the reader asks for them: both forms are in the page, and a switch chooses without any script."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .visible import visible_lines

Span = tuple[int, int]
HIDDEN_FROM = 0.5
"""Without a lexicon, a continuation with this score or more is hidden as a whole."""


@dataclass(frozen=True)
class Mask:
    """What to hide: the words of the lexicon, or, without one, whatever the scorer calls toxic."""

    lexicon: tuple[str, ...] = ()

    def spans(self, text: str) -> list[Span]:
        """Where the lexicon's words stand, plurals too."""
        pattern = _pattern(self.lexicon)
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
        """`text` as markup: its hidden spans in two forms, its marked spans in a <mark> of the class `mark`."""
        cuts = sorted({0, len(text), *(end for span in (*hidden, *marked) for end in span)})
        pieces = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            piece = self._piece(text[start:end], _covers(hidden, start))
            pieces.append(Markup('<mark class="{}">{}</mark>').format(mark, piece) if _covers(marked, start) else piece)
        return Markup("").join(pieces)

    def _piece(self, text: str, hidden: bool) -> Markup:
        if not hidden or not text.strip():
            return Markup("{}").format(visible_lines(text))
        form = '<span class="veil">{}</span><span class="bare">{}</span>'
        if self.lexicon:
            return Markup(form).format(_dotted(text), visible_lines(text))
        return Markup(form.replace('"veil"', '"veil blurred"')).format(re.sub(r"\S", "x", text), visible_lines(text))


def _covers(spans: Iterable[Span], place: int) -> bool:
    return any(start <= place < end for start, end in spans)


def _dotted(words: str) -> str:
    """The first letter of each word, and a dot for each of the others."""
    return re.sub(r"(\w)(\w*)", lambda match: match[1] + "•" * len(match[2]), visible_lines(words))


def _pattern(lexicon: tuple[str, ...]) -> re.Pattern[str] | None:
    words = sorted({word.strip() for word in lexicon if word.strip()}, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?:s|es)?(?!\w)", re.IGNORECASE) if words else None
