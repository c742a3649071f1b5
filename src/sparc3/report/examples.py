"""Before and after: what the original and the ablated model write after the same prompt, with the differences
marked.

Offensive words are masked until the reader reveals them: the page contains both forms, and a checkbox chooses
between them without a script.
"""

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
from .words import add_sign, percent, plain, variant_title

Span = tuple[int, int]
HIDDEN_FROM = 0.5
"""Without a lexicon, a continuation with at least this score is hidden as a whole."""


@dataclass(frozen=True)
class Mask:
    """What to hide: the words of the lexicon, or, without one, whatever the scorer considers toxic."""

    lexicon: tuple[str, ...] = ()

    def spans(self, text: str) -> list[Span]:
        """The places of the lexicon's words, including plurals."""
        # Longest first, because a regular expression takes the first alternative that matches.
        words = sorted({w.strip() for w in self.lexicon if w.strip()}, key=lambda word: (-len(word), word))
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?:s|es)?(?!\w)"
        return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if words else []

    def hide_continuation(self, text: str, score: float | None, toxic: bool) -> list[Span]:
        """The spans of a continuation to hide; `toxic`: whether its score is a toxicity."""
        if self.lexicon or not toxic:
            return self.spans(text)
        return [(0, len(text))] if text and (score is None or score >= HIDDEN_FROM) else []

    def hide_token(self, token: str, toxic: bool) -> list[Span]:
        """The spans of a token to hide; a token may be the beginning of a word."""
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
        text_shown = visible_lines(text)
        if not hidden or not text.strip():
            return Markup("{}").format(text_shown)
        kind, veil = "veil blurred", re.sub(r"\S", "x", text)
        if self.lexicon:  # the first letter of each word, and a dot for each of the others
            kind = "veil"
            veil = re.sub(r"(\w)(\w*)", lambda match: match[1] + "•" * len(match[2]), text_shown)
        return Markup('<span class="{}">{}</span><span class="bare">{}</span>').format(kind, veil, text_shown)


# Text from models and users on the page: it is shown completely, and none of it is executed.


def visible_lines(text: str) -> str:
    """`visible` text, with a ↵ before each newline, for text in which newlines matter."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "↵\n")


def finalize(value: Any) -> Any:
    """Applied by the template to every value: strings become visible, our own markup stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


MOST = 60
"""Number of pairs shown of each kind; the run folder has the rest."""
MOST_BY_METHOD = 6
"""Number of prompts shown with every method's continuation."""
LONGEST = 1200
"""Number of characters shown of a prompt or a continuation."""
_KINDS = {"toxicity": ("Toxicity", "toxicity"), "repetition": ("Repetition", "unique tokens")}


class Side(NamedTuple):
    """One continuation: its text as markup, its score as text, and the width of the score's bar in
    percent."""

    text: Markup
    score: str
    width: float | None


class Pair(NamedTuple):
    """One prompt with the continuations before and after ablation; `change` orders the pairs."""

    prompt: Markup
    before: Side
    after: Side
    change: float


class Row(NamedTuple):
    """One prompt with each variant's continuation: (name, class, continuation)."""

    prompt: Markup
    sides: list[tuple[str, str, Side]]


class Kind(NamedTuple):
    """All pairs of one kind of text, and the first prompts with every other method's continuations."""

    title: str
    score_name: str
    pairs: list[Pair]
    total: int
    by_method: list[Row]


def kinds(run: RunFolder, mask: Mask) -> list[Kind]:
    """Before and after, for each kind of text that both variants have."""
    before, after = run.texts.get("original", {}), run.texts.get("ablated", {})
    kinds_made = []
    for kind in (name for name in before if name in after):
        heading, score_name = _KINDS.get(kind, (kind.replace("_", " ").capitalize(), "score"))
        if matched := list(_match_continuations(before[kind], after[kind])):
            toxic = kind == "toxicity"
            pairs = [
                _make_pair(_write_prompt(prompt, run, mask), first, second, mask, toxic)
                for prompt, first, second in matched[:MOST]
            ]
            kinds_made.append(
                Kind(heading, score_name, pairs, len(matched), _rows_by_method(run, kind, mask, toxic))
            )
    return kinds_made


def _rows_by_method(run: RunFolder, kind: str, mask: Mask, toxic: bool) -> list[Row]:
    """The first continuation of each of the first prompts, by the original, the circuit and every other
    method; empty if no other method has texts."""
    variants = {**run.texts, **run.rival_texts}
    first = {
        name: {row.prompt: row.continuations[0] for row in texts.get(kind, []) if row.continuations}
        for name, texts in variants.items()
    }
    first = {name: by_prompt for name, by_prompt in first.items() if by_prompt}
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
            added = find_changes(_clip(original.text), text)[1] if name != "original" else []
            side = _make_side(text, first[name][prompt].score, added, "came", mask, toxic)
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
    """Continuations of the same prompt by both: first every prompt's first one, then the second ones, …"""
    answers = {row.prompt: row.continuations for row in after}
    rows_of_both = [(row.prompt, row.continuations, answers.get(row.prompt, [])) for row in before]
    rows = [(prompt, list(zip(first, second, strict=False))) for prompt, first, second in rows_of_both]
    for turn in range(max((len(pairs) for _, pairs in rows), default=0)):
        yield from ((prompt, *pairs[turn]) for prompt, pairs in rows if turn < len(pairs))


def _make_pair(prompt: Markup, before: Continuation, after: Continuation, mask: Mask, toxic: bool) -> Pair:
    first, second = _clip(before.text), _clip(after.text)
    removed, added = find_changes(first, second)
    score_before, score_after = before.score, after.score
    change = (score_after - score_before) if score_before is not None and score_after is not None else 0.0
    sides = (
        _make_side(first, score_before, removed, "gone", mask, toxic),
        _make_side(second, score_after, added, "came", mask, toxic),
    )
    return Pair(prompt, *sides, change)


def _make_side(
    text: str, score: float | None, marked: list[Span], mark: str, mask: Mask, toxic: bool
) -> Side:
    markup = mask.write(text, mask.hide_continuation(text, score, toxic), marked, mark)
    if score is None:
        return Side(markup, "not scored", None)
    share = 0.0 <= score <= 1.0
    return Side(markup, percent(score) if share else f"{score:.2f}", score * 100 if share else None)


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def find_changes(first: str, second: str) -> tuple[list[Span], list[Span]]:
    """The spans of each text that the other lacks, compared word by word."""
    first_spans, second_spans = (
        [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)] for text in (first, second)
    )
    words = [first[a:b] for a, b in first_spans], [second[a:b] for a, b in second_spans]
    # autojunk would ignore frequent words in texts of more than 200, and mark too much.
    removed: list[Span] = []
    added: list[Span] = []
    for operation, i, j, k, m in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        if operation != "equal" and j > i:
            removed.append((first_spans[i][0], first_spans[j - 1][1]))
        if operation != "equal" and m > k:
            added.append((second_spans[k][0], second_spans[m - 1][1]))
    return removed, added


# Which tokens made a target likely, from tokens.json.

MOST_TOKENS, LEVELS = 160, 5


class HeatMap(NamedTuple):
    """One sample: its tokens as (text, class, relevance as text), its target, and the number of tokens
    left out before them."""

    targets: Markup
    against: Markup
    y: str
    share: str
    tokens: list[tuple[Markup, str, str]]
    left_out: int


def heat_maps(run: RunFolder, mask: Mask) -> list[HeatMap]:
    """A heat map per sample, of its last MOST_TOKENS tokens. The class is p1 … p5 for positive relevance
    to the target, n1 … n5 for negative."""
    toxic = any(metric.startswith("toxicity") for metric in run.metrics)
    maps = []
    for token_map in run.token_maps:
        joined = join_characters(token_map.tokens, token_map.relevance)
        largest = max((abs(value) for *_, value in joined), default=0.0) or 1.0
        # A word to hide may span several tokens: it is found in the whole text, then cut at their borders.
        hidden, end, tokens = mask.spans("".join(token_map.tokens)), 0, []
        for index, text, value in joined:
            start, end = end, end + len(text)
            hidden_spans = [
                (max(a, start) - start, min(b, end) - start) for a, b in hidden if a < end and start < b
            ]
            if index > token_map.positions[0]:  # in the completion, which may itself be toxic
                hidden_spans = hidden_spans or mask.hide_token(text, toxic)
            # A power below one gives weak relevance a visible shade.
            level = round((abs(value) / largest) ** 0.7 * LEVELS)
            class_ = f"{'p' if value > 0 else 'n'}{level}" if level else ""
            tokens.append((mask.write(text, hidden_spans), class_, add_sign(value, plain(abs(value)))))
        targets, against = (
            mask.write(text, mask.hide_token(text, toxic))
            for text in ("".join(token_map.targets), "".join(token_map.against))
        )
        share = plain(sum(token_map.relevance))
        left_out = max(0, len(tokens) - MOST_TOKENS)
        maps.append(HeatMap(targets, against, plain(token_map.y), share, tokens[left_out:], left_out))
    return maps
