"""From samples to token batches: the model's input, and the logits that make up each sample's target y."""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import distributed
from ..errors import UserError, unknown
from ..models.load import rope_switches
from ..models.memory import run_in_batches
from ..progress import Progress
from .reference_set import ReferenceSet, Sample
from .tokens import MaybeTokenizer, plain_ids, read_sample, token_of_word, tokenize

Item = TypeVar("Item")
Result = TypeVar("Result")
TARGETS = ("predicted", "label", "contrast", "completion", "next", "logprob", "words", "logwords")
OF_WORDS = frozenset(TARGETS[-2:])
"""Those that need a list of words."""


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens. y = Σ_n logits[positions[n], tokens[n]], minus the same sum for `against`; or,
    with `among`, y = Σ_n Σ_{v in among} p(v | ids[: positions[n] + 1]).

    Attributes:
        index: index in the reference set.
        ids: token ids.
        positions: positions whose logits y sums.
        tokens: the token whose logit is taken at each position; None for the one with the largest logit.
        against: the token whose logit is subtracted at each position; None to subtract nothing.
        log: whether y sums log-probabilities instead of logits, or instead of the probability of `among`.
        among: tokens whose probabilities are added up at each position; `tokens` is then empty.
    """

    index: int
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...] | None = None
    against: tuple[int, ...] | None = None
    log: bool = False
    among: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to one length: ids [B, T], lengths [B] (on the CPU)."""

    samples: tuple[Encoded, ...]
    ids: Tensor
    lengths: tuple[int, ...]

    def mask(self) -> Tensor:
        """[B, T], true at real tokens, on the device of the ids."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None, :] < lengths[:, None]

    def halves(self) -> "list[Batch]":
        middle = len(self.samples) // 2
        return [make_batch(part, self.ids.device) for part in (self.samples[:middle], self.samples[middle:])]


def parse_target(target: str) -> tuple[str, int | None]:
    """("completion", 3) for "completion:3". Raises UserError for an unknown target or an invalid count."""
    name, _, first = target.partition(":")
    if name not in TARGETS:
        raise unknown("target", target, TARGETS)
    if first and (name != "completion" or not first.isdecimal() or int(first) < 1):
        raise UserError(
            f"target '{target}': only completion takes a number of first tokens, from 1, as in completion:3"
        )
    return name, int(first) if first else None


def encode(
    samples: ReferenceSet,
    tokenizer: MaybeTokenizer,
    target: str,
    *,
    context: int,
    vocabulary: int,
    truncate: bool = False,
    words: Sequence[str | int] = (),
) -> list[Encoded]:
    """Tokenise every sample and find its target tokens.

    Args:
        context: the length of the longest allowed sample, in tokens.
        vocabulary: number of token ids that the model knows.
        truncate: cut longer samples on the right (targets at the end move with it) instead of refusing them.
        words: the words of the targets words and logwords, as for `find_word_tokens`.

    Raises:
        UserError: a text without a tokenizer, an empty sample, samples that are too long (the message says
            how many), or one that lacks what the target needs; the message names the sample.
    """
    name, first = parse_target(target)
    among = find_word_tokens(words, tokenizer, vocabulary) if name in OF_WORDS else ()
    encoded = [_encode(samples, index, tokenizer, name, first, among) for index in range(len(samples))]
    too_long = [e for e in encoded if len(e.ids) > context]
    if too_long and not truncate:
        longest = max(len(e.ids) for e in too_long)
        raise UserError(
            f"{len(too_long)} of {len(encoded)} samples are longer than the model's {context} tokens (the "
            f"longest has {longest}; the first is {samples.where(too_long[0].index)}); shorten them, or "
            "truncate them with --truncate (truncate=True)"
        )
    encoded = [_truncate(e, context, name) if len(e.ids) > context else e for e in encoded]
    for e in encoded:
        if max(e.ids) >= vocabulary:
            raise UserError(
                f"{samples.where(e.index)} has token id {max(e.ids)}, but the model knows ids below "
                f"{vocabulary}; use its own tokenizer"
            )
    return encoded


def _encode(
    samples: ReferenceSet,
    index: int,
    tokenizer: MaybeTokenizer,
    target: str,
    first: int | None,
    among: tuple[int, ...],
) -> Encoded:
    sample, label = samples.samples[index], samples.where(index)
    if among:
        tokens = read_sample(sample, tokenizer, label)
        ids = _require_tokens(tokens.prompt + tokens.completion, label)
        start = max(0, len(tokens.prompt) - 1) if tokens.completion else 0
        return Encoded(index, ids, tuple(range(start, len(ids))), (), log=target == "logwords", among=among)
    if target in ("label", "contrast"):
        keys = ("target",) if target == "label" else ("target", "contrast")
        ids, labels = _read_labels(sample, keys, tokenizer, label)
        return Encoded(index, ids, (len(ids) - 1,), labels[:1], labels[1:] or None)
    if target != "completion":
        ids = _require_tokens(read_sample(replace(sample, completion=None), tokenizer, label).prompt, label)
        last = len(ids) - 1
        if target == "predicted":
            return Encoded(index, ids, (last,))
        if len(ids) < 2:
            raise UserError(f"{label} has one token; target {target} needs at least two")
        return Encoded(index, ids, tuple(range(last)), ids[1:], log=target == "logprob")
    _require_key(sample, "completion", label)
    tokens = read_sample(sample, tokenizer, label)
    ids, answer = tokens.prompt, tokens.completion[:first]
    if not answer:
        raise UserError(f'{label} has a "completion" without tokens; give one with text')
    if not ids:
        raise UserError(
            f"{label}: its text and completion begin with a token that belongs to both, so nothing precedes "
            "the completion; give more text, or a completion that begins with a space"
        )
    # The position before the last target token predicts it, so that token itself is not part of the input.
    return Encoded(index, ids + answer[:-1], tuple(range(len(ids) - 1, len(ids) - 1 + len(answer))), answer)


def find_word_tokens(
    words: Sequence[str | int], tokenizer: MaybeTokenizer, vocabulary: int
) -> tuple[int, ...]:
    """The token id of each word, ascending.

    Args:
        words: each a token's text, with its leading space where it begins a word, or a token id.

    Raises:
        UserError: no word, one that is several tokens, one that the model does not know, or no tokenizer.
    """
    if not words:
        raise UserError(
            "targets words and logwords need the words; give them with attribution.words (words=..., --words)"
        )
    found = [word if isinstance(word, int) else token_of_word(word, tokenizer) for word in words]
    several = [word for word, token in zip(words, found, strict=True) if token is None]
    if several:
        raise UserError(
            f"{len(several)} of {len(words)} words are not one token each, such as {several[0]!r}; leave "
            "them out, or write them as the tokenizer has them (mind the leading space)"
        )
    unknown_id = next((one for one in found if one is not None and not 0 <= one < vocabulary), None)
    if unknown_id is not None:
        raise UserError(f"words has token id {unknown_id}, but the model knows ids below {vocabulary}")
    return tuple(sorted({one for one in found if one is not None}))


def join_completions(samples: ReferenceSet, tokenizer: MaybeTokenizer) -> tuple[Sample, ...]:
    """Each sample as the token ids of its text and, if it has one, its completion."""
    joined = []
    for index, sample in enumerate(samples):
        tokens = read_sample(sample, tokenizer, label := samples.where(index))
        joined.append(Sample(input_ids=_require_tokens(tokens.prompt + tokens.completion, label)))
    return tuple(joined)


def _require_tokens(ids: tuple[int, ...], label: str) -> tuple[int, ...]:
    if not ids:
        raise UserError(f"{label} has no tokens; leave it out")
    return ids


def _require_key(sample: Sample, key: str, label: str) -> str:
    text = getattr(sample, key)
    if text is None:
        raise UserError(f'{label} has no "{key}", which this target needs; add it, or choose another target')
    return str(text)


def _read_labels(
    sample: Sample, keys: Sequence[str], tokenizer: MaybeTokenizer, label: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt's ids, and for each key the single token of its string: as it follows the prompt, if it is a
    single token there, or else on its own."""
    texts = [_require_key(sample, key, label) for key in keys]
    prompt = _require_tokens(read_sample(replace(sample, completion=None), tokenizer, label).prompt, label)
    if tokenizer is None:
        raise UserError(f'{label} has a "{keys[0]}" string; give the model\'s tokenizer')

    def join(text: str) -> tuple[int, ...]:
        if sample.text is not None:
            return tokenize(sample.text + text, tokenizer)
        return prompt + read_sample(replace(sample, completion=text), tokenizer, label).completion

    joined = [join(text) for text in texts]
    # The second head is for a text that ends with a space, which belongs to the next word's token.
    for head in (prompt, tokenize((sample.text or "").rstrip(" "), tokenizer)):
        if head and all(ids[:-1] == head for ids in joined):
            return head, tuple(ids[-1] for ids in joined)
    labels = []
    for key, text, joined_ids in zip(keys, texts, joined, strict=True):
        ids = plain_ids(text, tokenizer)
        if len(ids) != 1:
            count = len(joined_ids) - len(prompt) if joined_ids[: len(prompt)] == prompt else len(ids)
            raise UserError(
                f'{label}: "{key}" {text!r} is {count} tokens, not one; choose a word that is a single token '
                "(mind the leading space)"
            )
        labels.append(ids[0])
    return prompt, tuple(labels)


def _truncate(encoded: Encoded, context: int, target: str) -> Encoded:
    """The first `context` tokens. A target at the end moves to the new end; targets inside that no longer fit
    are dropped."""
    ids = encoded.ids[:context]
    if target in ("predicted", "label", "contrast"):
        return Encoded(encoded.index, ids, (context - 1,), encoded.tokens, encoded.against)
    positions = tuple(p for p in encoded.positions if p < context)
    if not positions or encoded.tokens is None:
        raise UserError(f"sample {encoded.index}: truncation removes its whole completion; shorten its text")
    return replace(encoded, ids=ids, positions=positions, tokens=encoded.tokens[: len(positions)])


def token_budget(batch_tokens: int | str, device: str) -> int:
    """Padded tokens in a batch on a device "cpu" or "cuda". "auto" is a number that keeps a CPU's caches
    warm, or a GPU busy.

    Raises:
        UserError: neither auto nor a positive number.
    """
    if batch_tokens == "auto":
        return 1024 if device == "cpu" else 2048
    if not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens!r}; give a positive number of tokens, or auto")
    return batch_tokens


def make_batches(
    encoded: Iterable[Encoded], tokens: int, device: torch.device, switches: Sequence[int] = ()
) -> list[Batch]:
    """Batches of at most `tokens` padded tokens (a longer sample gets its own batch), with samples of similar
    length, longest first. Samples on different sides of a model's `rope_switches` never share a batch."""
    return [make_batch(group, device) for group in group_by_length(encoded, tokens, switches)]


def group_by_length(
    encoded: Iterable[Encoded], tokens: int, switches: Sequence[int] = ()
) -> list[list[Encoded]]:
    """The samples of each batch of `make_batches`.

    Longest first, so that a sample that does not fit into memory fails at the start and not after an hour.
    """
    groups: list[list[Encoded]] = []
    for sample in sorted(encoded, key=lambda e: (-len(e.ids), e.index)):
        first = groups[-1][0].ids if groups else ()
        same_side = bisect_left(switches, len(first)) == bisect_left(switches, len(sample.ids))
        if groups and same_side and len(first) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def make_batch(samples: Sequence[Encoded], device: torch.device) -> Batch:
    ids = pad_right([sample.ids for sample in samples], device)
    return Batch(tuple(samples), ids, tuple(len(sample.ids) for sample in samples))


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [rows, longest], padded with 0. With causal attention no real position sees the padding."""
    longest = max(map(len, rows))
    return torch.tensor([(*row, *(0,) * (longest - len(row))) for row in rows], device=device)


def run_longest_first(
    items: Sequence[Item],
    length: Callable[[Item], int],
    work: Callable[[list[Item]], list[Result]],
    *,
    size: int,
    memory_key: tuple[Any, str],
    label: str,
    unit: str,
    progress: bool,
    separate_by: Callable[[Item], Hashable] | None = None,
) -> list[Result]:
    """work() over the items in batches of similar length, longest first, shared among the ranks.

    Args:
        size: items in the first batch; halved when they do not fit into memory.
        memory_key: the model and the kind of work, for which the size that fits is remembered.
        label, unit: shown by the progress bar.
        separate_by: items with different values never share a batch; by default, their side of the model's
            `rope_switches`.

    Returns:
        one result per item, in the items' order; the same on every rank.
    """
    order = sorted(range(len(items)), key=lambda i: (-length(items[i]), i))
    switches = rope_switches(memory_key[0])
    group_key = separate_by or (lambda item: bisect_left(switches, length(item)))
    # groupby joins neighbours only; lengths descend, so that each side of a switch is one part.
    parts = [list(part) for _, part in groupby(order, lambda i: group_key(items[i]))]
    results: dict[int, Result] = {}
    with Progress(sum(len(distributed.stride(part)) for part in parts), label, unit, show=progress) as bar:

        def run_part(share: Sequence[int]) -> list[Result]:
            return run_in_batches(
                share,
                size,
                lambda indices: work([items[i] for i in indices]),
                bar.update,
                memory_key=memory_key,
            )

        for part in parts:
            results |= zip(part, distributed.run_in_parallel(part, run_part), strict=True)
    return [results[i] for i in range(len(items))]
