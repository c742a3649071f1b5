"""What a sample is to the model, its token ids, and to people, its text: asked here by every metric, source
and stage.

The tokens of a prompt and its completion are those of the joined text, as lm-evaluation-harness has it
(`_encode_pair`): the whole is tokenised, the prompt alone says where the completion begins, and spaces at the
prompt's end are the completion's, for most tokenizers have them in the next word's token. Where the boundary
falls inside a token, that token is the completion's too (the harness would cut by number of tokens, and could
lose it). Nothing closes a prompt, and it is opened once.
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
"""Texts by which it is found out what a tokenizer puts before and behind any text."""
BROKEN = "\ufffd"
"""What a decoder writes for a part of a character."""
ANCHORS = ("a", ".", "\n")
"""Texts after which a completion is read where its prompt has no text that gives its token ids again."""


@dataclass(frozen=True)
class SampleTokens:
    """A sample as the model and as people read it.

    Attributes:
        prompt: token ids of its text, or its own token ids.
        completion: token ids that its completion adds to them; none where it has none.
        text: the prompt for people.
    """

    prompt: Ids
    completion: Ids
    text: str


def read_sample(sample: Sample, tokenizer: MaybeTokenizer, where: str = "a sample") -> SampleTokens:
    """Token ids of prompt and completion, and the prompt's text. Raises UserError where a text has no
    tokenizer."""
    sample = render_sample(sample, tokenizer, where)
    completion = sample.completion or ""
    if sample.input_ids is not None:
        text = decode(sample.input_ids, tokenizer) if tokenizer is not None else ""
        added = _continue(sample.input_ids, completion, _require(tokenizer, where)) if completion else ()
        return SampleTokens(sample.input_ids, added, text)
    text = sample.text or ""
    shown = text if sample.turns is None else show(sample.turns)
    if not completion:
        return SampleTokens(tokenize(text, _require(tokenizer, where)), (), shown)
    alone = tokenize(text.rstrip(" "), _require(tokenizer, where))
    whole = tokenize(text + completion, _require(tokenizer, where))
    differ = (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b)
    shared = next(differ, min(len(alone), len(whole)))
    return SampleTokens(whole[:shared], whole[shared:], shown)


def render_sample(sample: Sample, tokenizer: MaybeTokenizer, where: str) -> Sample:
    """The sample with the text of its turns by the model's template, if it has turns and no text yet.

    Raises:
        UserError: there is no tokenizer, it has no template, or the template refuses the turns.
    """
    if sample.turns is None or sample.text is not None:
        return sample
    return replace(sample, text=render(sample.turns, _require(tokenizer, where), where))


def ask(sample: Sample, tokenizer: MaybeTokenizer, where: str) -> Sample:
    """A plain prompt as a user's turn, rendered; a chat as it is. The space before a plain text's completion
    goes, since an assistant's turn begins with a word.

    Raises:
        UserError: the sample is token ids, or the template cannot render it.
    """
    if sample.turns is None:
        if sample.text is None:
            raise UserError(
                f"{where} is token ids, which no chat template renders; leave chat out, or give texts"
            )
        completion = sample.completion.lstrip() if sample.completion is not None else None
        turns = (("user", sample.text.strip()),)
        sample = replace(sample, turns=turns, text=None, completion=completion)
    return render_sample(sample, tokenizer, where)


def tokenize(text: str, tokenizer: Tokenizer) -> Ids:
    """Token ids of a text that more may follow: opened as the tokenizer opens a text, but once where it opens
    itself, and not closed."""
    plain = plain_ids(text, tokenizer)
    opening = _opening(tokenizer, text)
    sizes = range(len(opening), 0, -1)  # a rendered chat opens itself, with <s>
    there = next((size for size in sizes if opening[-size:] == plain[:size]), 0)
    return opening[: len(opening) - there] + plain


def window_opening(tokenizer: Tokenizer) -> Ids:
    """What each window of a text begins with, and not the first alone: of Gemma's models the BOS token,
    without which they predict next to nothing (lm-evaluation-harness#1455); of others nothing, as Wanda's
    protocol has it.

    As in the harness, the model's type says so; where a tokenizer was not loaded with its model, its class.
    """
    known = type(tokenizer).__name__, getattr(tokenizer, "init_kwargs", {}).get("tokenizer_class")
    kinds = (*known, getattr(tokenizer, "of_model_type", None))
    if tokenizer.bos_token_id is None or not any("gemma" in str(kind).lower() for kind in kinds):
        return ()
    return (int(tokenizer.bos_token_id),)


def plain_ids(text: str, tokenizer: Tokenizer) -> Ids:
    """Token ids of a text alone, neither opened nor closed."""
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
    """The text of token ids, with its special tokens or without, and no space mended away."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    )


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """One token's text. Decoded alone it would lose its leading space with some tokenizers."""
    piece = tokenizer.convert_ids_to_tokens(token)
    spaced = isinstance(piece, str) and piece[:1] in ("\u2581", "\u0120")
    text = str(tokenizer.decode([token]))
    return f" {text.lstrip()}" if spaced else text


LONGEST_CHARACTER = 16
"""Tokens: a character is at most four bytes, and one token may end it and begin the next."""


def texts_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text. Characters that several tokens make together stand with the first, and the others
    have no text."""
    texts = [text_of(tokenizer, one) for one in ids]
    for start in range(len(texts)):
        ends = range(start + 2, min(start + LONGEST_CHARACTER, len(texts)) + 1)
        for end in ends if BROKEN in texts[start] else ():
            whole = decode(ids[start:end], tokenizer, special=True)
            if BROKEN not in whole:
                texts[start:end] = [whole, *[""] * (end - start - 1)]
                break
    return texts


def join_characters(texts: Sequence[str], values: Sequence[float]) -> list[tuple[int, str, float]]:
    """(place, text, sum of the values) of each token with the ones behind it that have no text of their
    own."""
    joined: list[tuple[int, str, float]] = []
    for place, (text, value) in enumerate(zip(texts, values, strict=True)):
        if text or not joined:
            joined.append((place, text, value))
        else:
            first, whole, so_far = joined[-1]
            joined[-1] = first, whole, so_far + value
    return joined


def decode_after(prompt: Sequence[int], new: Sequence[int], tokenizer: Tokenizer) -> str:
    """What new tokens add to the text of the prompt: alone, SentencePiece's decoders would take the first
    one's space away."""
    before, whole = decode(prompt, tokenizer), decode([*prompt, *new], tokenizer)
    return whole[len(before) :] if whole.startswith(before) else decode(new, tokenizer)


def _opening(tokenizer: Tokenizer, text: str) -> Ids:
    """What the tokenizer puts before a text."""
    for probe in (*PROBES, text):
        plain = plain_ids(probe, tokenizer)
        whole = tuple(tokenizer(probe, verbose=False)["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start]
    return ()


def _continue(ids: Ids, completion: str, tokenizer: Tokenizer) -> Ids:
    """Token ids of a completion of token ids, which stay as they are."""
    for special in (False, True):
        whole = decode(ids, tokenizer, special) + completion
        for read in (tokenize(whole, tokenizer), plain_ids(whole, tokenizer)):
            if read[: len(ids)] == ids:
                return read[len(ids) :]
    for anchor in ANCHORS:
        before, both = plain_ids(anchor, tokenizer), plain_ids(anchor + completion, tokenizer)
        if before and both[: len(before)] == before:
            return both[len(before) :]
    return plain_ids(completion, tokenizer)


def _require(tokenizer: MaybeTokenizer, where: str) -> Tokenizer:
    if tokenizer is None:
        raise UserError(f"{where} has a text; give the model's tokenizer, or token ids")
    return tokenizer
