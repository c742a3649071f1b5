"""Before and after: what the original and the ablated model write after the same prompt, with the difference
marked, and offensive words masked until the reader asks for them: both forms are in the page, and a switch
chooses without any script."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from ..results import Variant
from ..safe_text import visible
from ..samples.tokens import join_characters
from .read import Continuation, Prompt, RunFolder
from .words import percent, plain, signed, variant_title

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
MOST_BY_METHOD = 6
"""Prompts shown with what every method writes after them."""
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


class Row(NamedTuple):
    """One prompt with what each variant wrote after it: (name, class, continuation)."""

    prompt: Markup
    sides: list[tuple[str, str, Side]]


class Kind(NamedTuple):
    """All pairs of one kind of text, and the first prompts with what every other method wrote, too."""

    title: str
    score_name: str
    pairs: list[Pair]
    total: int
    by_method: list[Row]


def kinds(run: RunFolder, mask: Mask) -> list[Kind]:
    """Empty unless both variants left their texts."""
    before, after = run.texts.get("original", {}), run.texts.get("ablated", {})
    made = []
    for kind in (name for name in before if name in after):
        heading, score_name = _KINDS.get(kind, (kind.replace("_", " ").capitalize(), "score"))
        if matched := list(_match_continuations(before[kind], after[kind])):
            toxic = kind == "toxicity"
            shown = [
                _make_pair(_write_prompt(prompt, run, mask), one, other, mask, toxic)
                for prompt, one, other in matched[:MOST]
            ]
            made.append(
                Kind(heading, score_name, shown, len(matched), _rows_by_method(run, kind, mask, toxic))
            )
    return made


def _rows_by_method(run: RunFolder, kind: str, mask: Mask, toxic: bool) -> list[Row]:
    """The first continuation of each of the first prompts, by the original, the circuit and every other
    method; empty where no other method left texts."""
    variants = {**run.texts, **run.rival_texts}
    first = {
        name: {row.prompt: row.continuations[0] for row in texts.get(kind, []) if row.continuations}
        for name, texts in variants.items()
    }
    first = {name: found for name, found in first.items() if found}
    if not first.keys() - {"original", "ablated"}:
        return []
    titles = {name: variant_title(name, run) for name in first}
    colours = {name: run.colours.get(Variant.parse(name).method, "m6") for name in first}
    colours |= {"original": "m-original", "ablated": "m0"}
    rows = []
    for prompt, original in list(first["original"].items())[:MOST_BY_METHOD]:
        sides = []
        for name in (name for name in first if prompt in first[name]):
            text = _clip(first[name][prompt].text)
            came = find_changes(_clip(original.text), text)[1] if name != "original" else []
            side = _make_side(text, first[name][prompt].score, came, "came", mask, toxic)
            sides.append((titles[name], colours[name], side))
        rows.append(Row(_write_prompt(prompt, run, mask), sides))
    return rows


def _write_prompt(prompt: str, run: RunFolder, mask: Mask) -> Markup:
    """A prompt as markup; of a chat, its turns one below the other, the role beside each."""
    turns = [(role, _clip(content)) for role, content in run.chats.get(prompt, ())]
    if not turns:
        return mask.write(_clip(prompt), mask.spans(_clip(prompt)))
    row = Markup('<span class="turn"><span class="role">{}</span><span>{}</span></span>')
    return Markup("").join(
        row.format(visible(role), mask.write(content, mask.spans(content))) for role, content in turns
    )


def _match_continuations(
    before: list[Prompt], after: list[Prompt]
) -> Iterator[tuple[str, Continuation, Continuation]]:
    """What both wrote after the same prompt: every prompt's first continuation, then its second …"""
    answers = {row.prompt: row.continuations for row in after}
    both = [(row.prompt, row.continuations, answers.get(row.prompt, [])) for row in before]
    rows = [(prompt, list(zip(one, other, strict=False))) for prompt, one, other in both]
    for turn in range(max((len(pairs) for _, pairs in rows), default=0)):
        yield from ((prompt, *pairs[turn]) for prompt, pairs in rows if turn < len(pairs))


def _make_pair(prompt: Markup, before: Continuation, after: Continuation, mask: Mask, toxic: bool) -> Pair:
    one, other = _clip(before.text), _clip(after.text)
    gone, came = find_changes(one, other)
    was, now = before.score, after.score
    change = (now - was) if was is not None and now is not None else 0.0
    sides = _make_side(one, was, gone, "gone", mask, toxic), _make_side(other, now, came, "came", mask, toxic)
    return Pair(prompt, *sides, change)


def _make_side(
    text: str, score: float | None, marked: list[Span], mark: str, mask: Mask, toxic: bool
) -> Side:
    written = mask.write(text, mask.of_continuation(text, score, toxic), marked, mark)
    if score is None:
        return Side(written, "not scored", None)
    share = 0.0 <= score <= 1.0
    return Side(written, percent(score) if share else f"{score:.2f}", score * 100 if share else None)


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


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


# Which tokens made a target likely: what the run left in tokens.json.

MOST_TOKENS, LEVELS = 160, 5


class HeatMap(NamedTuple):
    """One sample: its tokens as (text, class, relevance in words), what was asked of it, and what is left out
    before them."""

    targets: Markup
    against: Markup
    y: str
    share: str
    tokens: list[tuple[Markup, str, str]]
    left_out: int


def heat_maps(run: RunFolder, mask: Mask) -> list[HeatMap]:
    """The last MOST_TOKENS tokens of every sample; the class is p1 … p5 for tokens that speak for the target,
    n1 … n5 against it."""
    toxic = any(metric.startswith("toxicity") for metric in run.metrics)
    made = []
    for one in run.token_maps:
        joined = join_characters(one.tokens, one.relevance)
        largest = max((abs(value) for *_, value in joined), default=0.0) or 1.0
        hidden, end, tokens = mask.spans("".join(one.tokens)), 0, []
        for index, text, value in joined:
            start, end = end, end + len(text)
            inside = [
                (max(a, start) - start, min(b, end) - start) for a, b in hidden if a < end and start < b
            ]
            if index > one.positions[0]:  # of the completion, which may be what is looked for
                inside = inside or mask.of_token(text, toxic)
            level = round((abs(value) / largest) ** 0.7 * LEVELS)
            class_ = f"{'p' if value > 0 else 'n'}{level}" if level else ""
            tokens.append((mask.write(text, inside), class_, signed(value, plain(abs(value)))))
        targets, against = (
            mask.write(text, mask.of_token(text, toxic))
            for text in ("".join(one.targets), "".join(one.against))
        )
        share = plain(sum(one.relevance))
        left_out = max(0, len(tokens) - MOST_TOKENS)
        made.append(HeatMap(targets, against, plain(one.y), share, tokens[left_out:], left_out))
    return made
