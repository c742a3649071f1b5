"""Tokenisation: the one place where every metric, source and stage gets a sample's token ids and its text.

The tokens of a prompt and its completion are those of the joined text, as in lm-evaluation-harness
(`_encode_pair`): the whole is tokenised, and the prompt alone shows where the completion begins. Spaces at
the prompt's end belong to the completion, because most tokenizers put them into the next word's token. If the
boundary falls inside a token, that token belongs to the completion (the harness cuts by number of tokens, and
could lose it). A prompt gets the tokenizer's start tokens exactly once, and no end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from ..errors import UserError
from .chat import render, show
from .reference_set import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ids = tuple[int, ...]
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
MaybeTokenizer: TypeAlias = "PreTrainedTokenizerBase | None"
PROBES = ("a", "the", "1", ".", "一")
"""Texts that reveal what a tokenizer adds before and after any text."""
BROKEN = "\ufffd"
"""What a decoder writes for a part of a character."""
ANCHORS = ("a", ".", "\n")
"""Texts after which a completion is tokenised if no text gives its prompt's token ids again."""


@dataclass(frozen=True)
class SampleTokens:
    """A sample's tokens for the model, and its text for people.

    Attributes:
        prompt: token ids of its text, or its own token ids.
        completion: token ids that its completion adds; empty without one.
        text: the prompt for people.
    """

    prompt: Ids
    completion: Ids
    text: str


def read_sample(sample: Sample, tokenizer: MaybeTokenizer, label: str = "a sample") -> SampleTokens:
    """Token ids of prompt and completion, and the prompt's text. Raises UserError for a text without a
    tokenizer."""
    sample = render_sample(sample, tokenizer, label)
    completion = sample.completion or ""
    if sample.input_ids is not None:
        text = decode(sample.input_ids, tokenizer) if tokenizer is not None else ""
        completion_ids = (
            _continue(sample.input_ids, completion, _require(tokenizer, label)) if completion else ()
        )
        return SampleTokens(sample.input_ids, completion_ids, text)
    text = sample.text or ""
    text_shown = text if sample.turns is None else show(sample.turns)
    if not completion:
        return SampleTokens(tokenize(text, _require(tokenizer, label)), (), text_shown)
    prompt_ids = tokenize(text.rstrip(" "), _require(tokenizer, label))
    joined_ids = tokenize(text + completion, _require(tokenizer, label))
    # From the first token that differs on, the tokens belong to the completion.
    differences = (i for i, (a, b) in enumerate(zip(prompt_ids, joined_ids, strict=False)) if a != b)
    shared = next(differences, min(len(prompt_ids), len(joined_ids)))
    return SampleTokens(joined_ids[:shared], joined_ids[shared:], text_shown)


def render_sample(sample: Sample, tokenizer: MaybeTokenizer, label: str) -> Sample:
    """The sample with its turns rendered by the model's template, if it has turns and no text yet.

    Raises:
        UserError: there is no tokenizer, it has no template, or the template refuses the turns.
    """
    if sample.turns is None or sample.text is not None:
        return sample
    return replace(sample, text=render(sample.turns, _require(tokenizer, label), label))


def ask(sample: Sample, tokenizer: MaybeTokenizer, label: str) -> Sample:
    """A plain prompt as a user's turn, rendered; a chat is only rendered. Spaces before a plain text's
    completion are removed, because an assistant's turn starts with a word.

    Raises:
        UserError: the sample is token ids, or the template cannot render it.
    """
    if sample.turns is None:
        if sample.text is None:
            raise UserError(
                f"{label} has token ids, which a chat template cannot render; leave chat out, or give texts"
            )
        completion = sample.completion.lstrip() if sample.completion is not None else None
        turns = (("user", sample.text.strip()),)
        sample = replace(sample, turns=turns, text=None, completion=completion)
    return render_sample(sample, tokenizer, label)


def tokenize(text: str, tokenizer: Tokenizer) -> Ids:
    """Token ids of a text that may be continued: with the tokenizer's start tokens, which are not doubled
    if the text already contains them, and without its end tokens."""
    ids = plain_ids(text, tokenizer)
    opening = _find_opening(tokenizer, text)
    sizes = range(len(opening), 0, -1)  # a rendered chat starts with <s> already
    overlap = next((size for size in sizes if opening[-size:] == ids[:size]), 0)
    return opening[: len(opening) - overlap] + ids


def window_opening(tokenizer: Tokenizer) -> Ids:
    """Tokens at the start of every window of a text, not only the first: the BOS token for Gemma models,
    which predict almost nothing without it (lm-evaluation-harness#1455); nothing for others, as in Wanda's
    protocol.

    As in the harness, the model's type decides; for a tokenizer that was loaded without its model, its class.
    """
    class_names = type(tokenizer).__name__, getattr(tokenizer, "init_kwargs", {}).get("tokenizer_class")
    kinds = (*class_names, getattr(tokenizer, "of_model_type", None))
    if tokenizer.bos_token_id is None or not any("gemma" in str(kind).lower() for kind in kinds):
        return ()
    return (int(tokenizer.bos_token_id),)


def plain_ids(text: str, tokenizer: Tokenizer) -> Ids:
    """Token ids of a text without start and end tokens."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_of_word(word: str, tokenizer: MaybeTokenizer) -> int | None:
    """The one token that a word is, inside a text if it begins with a space; None where it is several. Raises
    UserError where there is no tokenizer."""
    tokenizer = _require(tokenizer, f"the word {word!r}")
    for before in ANCHORS if word[:1].isspace() else ():
        alone, both = plain_ids(before, tokenizer), plain_ids(before + word, tokenizer)
        if alone and both[: len(alone)] == alone and len(both) == len(alone) + 1:
            return both[-1]
    ids = plain_ids(word, tokenizer)
    return ids[0] if len(ids) == 1 else None


def decode(ids: Sequence[int], tokenizer: Tokenizer, special: bool = False) -> str:
    """The text of token ids, with or without special tokens, and without clean-up of spaces."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token's text, with the leading space that some tokenizers drop when decoding a single token."""
    piece = tokenizer.convert_ids_to_tokens(token)
    # A leading space is ▁ in SentencePiece, and Ġ in byte-level BPE.
    spaced = isinstance(piece, str) and piece[:1] in ("\u2581", "\u0120")
    text = str(tokenizer.decode([token]))
    return f" {text.lstrip()}" if spaced else text


LONGEST_CHARACTER = 16
"""The largest number of tokens that make up a character together: it has at most four bytes, and a token may
end one and begin the next."""


def texts_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text. If several tokens make up a character, the first one's text has it, and the others'
    are empty."""
    texts = [token_text(tokenizer, token) for token in ids]
    for start in range(len(texts)):
        ends = range(start + 2, min(start + LONGEST_CHARACTER, len(texts)) + 1)
        for end in ends if BROKEN in texts[start] else ():
            whole = decode(ids[start:end], tokenizer, special=True)
            if BROKEN not in whole:
                texts[start:end] = [whole, *[""] * (end - start - 1)]
                break
    return texts


def join_characters(texts: Sequence[str], values: Sequence[float]) -> list[tuple[int, str, float]]:
    """(index, text, sum of the values) of each token, together with those after it that have no text of their
    own."""
    joined: list[tuple[int, str, float]] = []
    for index, (text, value) in enumerate(zip(texts, values, strict=True)):
        if text or not joined:
            joined.append((index, text, value))
        else:
            first_index, first_text, total = joined[-1]
            joined[-1] = first_index, first_text, total + value
    return joined


def decode_after(prompt: Sequence[int], new: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text that new tokens add to the prompt. Decoding them alone would lose the first token's space with
    SentencePiece."""
    before, joined = decode(prompt, tokenizer), decode([*prompt, *new], tokenizer)
    return joined[len(before) :] if joined.startswith(before) else decode(new, tokenizer)


def _find_opening(tokenizer: Tokenizer, text: str) -> Ids:
    """The tokens that the tokenizer adds before a text."""
    # Where the text's own tokens begin in the output with special tokens, the opening ends. A probe fails if
    # the tokenizer has no tokens for it.
    for probe in (*PROBES, text):
        bare = plain_ids(probe, tokenizer)
        ids = tuple(tokenizer(probe, verbose=False)["input_ids"])
        for start in range(len(ids) - len(bare) + 1):
            if bare and ids[start : start + len(bare)] == bare:
                return ids[:start]
    return ()


def _continue(ids: Ids, completion: str, tokenizer: Tokenizer) -> Ids:
    """Token ids of a completion after given token ids, which stay as they are."""
    # The given ids need not be the ones that the tokenizer would choose for their text, so several ways to
    # write this text are tried, until one gives the same ids again.
    for special in (False, True):
        text = decode(ids, tokenizer, special) + completion
        for joined_ids in (tokenize(text, tokenizer), plain_ids(text, tokenizer)):
            if joined_ids[: len(ids)] == ids:
                return joined_ids[len(ids) :]
    for anchor in ANCHORS:
        before, joined = plain_ids(anchor, tokenizer), plain_ids(anchor + completion, tokenizer)
        if before and joined[: len(before)] == before:
            return joined[len(before) :]
    return plain_ids(completion, tokenizer)


def _require(tokenizer: MaybeTokenizer, label: str) -> Tokenizer:
    if tokenizer is None:
        raise UserError(f"{label} has a text; give the model's tokenizer, or token ids")
    return tokenizer
