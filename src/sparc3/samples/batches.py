"""From samples to token batches: what is fed in, and which logits are the target y of each sample."""

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
from ..models.memory import in_batches
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
    """One sample as tokens. y = Σ_n logits[positions[n], tokens[n]], less the same for `against` where it is
    given; or, with `among`, y = Σ_n Σ_{v in among} p(v | ids[: positions[n] + 1]).

    Attributes:
        index: place in the reference set.
        ids: token ids.
        positions: where logits count.
        tokens: which logit at each; None: the largest one.
        against: the logit to subtract at each; None: none.
        log: whether log-probabilities count instead of logits, or instead of the probability of `among`.
        among: tokens whose probabilities add up at each position; `tokens` are none then.
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
    """("completion", 3) of "completion:3". Raises UserError for an unknown target or a count that is none."""
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
        context: the longest sample allowed, in tokens.
        vocabulary: number of token ids the model knows.
        truncate: cut a longer sample on the right (targets at its end move with the cut) instead of refusing
            it.
        words: of the targets words and logwords, as `find_word_tokens` takes them.

    Raises:
        UserError: a text without a tokenizer, an empty sample, one that is too long (the message says how
            many are), or one that lacks what the target needs; the message names the sample.
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
    sample, where = samples.samples[index], samples.where(index)
    if among:
        read = read_sample(sample, tokenizer, where)
        ids = _require_tokens(read.prompt + read.completion, where)
        start = max(0, len(read.prompt) - 1) if read.completion else 0
        return Encoded(index, ids, tuple(range(start, len(ids))), (), log=target == "logwords", among=among)
    if target in ("label", "contrast"):
        keys = ("target",) if target == "label" else ("target", "contrast")
        ids, labels = _read_labels(sample, keys, tokenizer, where)
        return Encoded(index, ids, (len(ids) - 1,), labels[:1], labels[1:] or None)
    if target != "completion":
        ids = _require_tokens(read_sample(replace(sample, completion=None), tokenizer, where).prompt, where)
        last = len(ids) - 1
        if target == "predicted":
            return Encoded(index, ids, (last,))
        if len(ids) < 2:
            raise UserError(f"{where} has one token; target {target} needs at least two")
        return Encoded(index, ids, tuple(range(last)), ids[1:], log=target == "logprob")
    _require_key(sample, "completion", where)
    tokens = read_sample(sample, tokenizer, where)
    ids, answer = tokens.prompt, tokens.completion[:first]
    if not answer:
        raise UserError(f'{where}: its "completion" has no token')
    if not ids:
        raise UserError(
            f"{where}: its text and completion begin with one token that is part of both, so nothing stands "
            "before the completion; give more text, or a completion that begins with a space"
        )
    # The last target token is predicted at the position before it, so it is not fed in.
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
    """Each sample as the token ids of its text with its completion, if it has one."""
    made = []
    for index, sample in enumerate(samples):
        tokens = read_sample(sample, tokenizer, where := samples.where(index))
        made.append(Sample(input_ids=_require_tokens(tokens.prompt + tokens.completion, where)))
    return tuple(made)


def _require_tokens(ids: tuple[int, ...], where: str) -> tuple[int, ...]:
    if not ids:
        raise UserError(f"{where} has no token")
    return ids


def _require_key(sample: Sample, key: str, where: str) -> str:
    text = getattr(sample, key)
    if text is None:
        raise UserError(f'{where} has no "{key}", which this target needs; add it, or choose another target')
    return str(text)


def _read_labels(
    sample: Sample, keys: Sequence[str], tokenizer: MaybeTokenizer, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt's ids, and the one token that each key's string is: after the prompt if it is one there,
    else alone."""
    texts = [_require_key(sample, key, where) for key in keys]
    alone = _require_tokens(read_sample(replace(sample, completion=None), tokenizer, where).prompt, where)
    if tokenizer is None:
        raise UserError(f'{where} has a "{keys[0]}" string; give the model\'s tokenizer')

    def join(text: str) -> tuple[int, ...]:
        if sample.text is not None:
            return tokenize(sample.text + text, tokenizer)
        return alone + read_sample(replace(sample, completion=text), tokenizer, where).completion

    joined = [join(text) for text in texts]
    for head in (alone, tokenize((sample.text or "").rstrip(" "), tokenizer)):
        if head and all(ids[:-1] == head for ids in joined):
            return head, tuple(ids[-1] for ids in joined)
    labels = []
    for key, text, whole in zip(keys, texts, joined, strict=True):
        ids = plain_ids(text, tokenizer)
        if len(ids) != 1:
            many = len(whole) - len(alone) if whole[: len(alone)] == alone else len(ids)
            raise UserError(
                f'{where}: "{key}" {text!r} is {many} tokens, not one; choose a word that is a single token '
                "(mind the leading space)"
            )
        labels.append(ids[0])
    return alone, tuple(labels)


def _truncate(encoded: Encoded, context: int, target: str) -> Encoded:
    """The first `context` tokens; a target at the end moves to the new end, targets inside that no longer fit
    fall away."""
    ids = encoded.ids[:context]
    if target in ("predicted", "label", "contrast"):
        return Encoded(encoded.index, ids, (context - 1,), encoded.tokens, encoded.against)
    kept = tuple(p for p in encoded.positions if p < context)
    if not kept or encoded.tokens is None:
        raise UserError(
            f"sample {encoded.index}: truncation leaves nothing of its completion; shorten its text"
        )
    return replace(encoded, ids=ids, positions=kept, tokens=encoded.tokens[: len(kept)])


def token_budget(batch_tokens: int | str, device: str) -> int:
    """Padded tokens of a batch on a device "cpu" or "cuda". auto: what keeps a CPU's caches warm, or a GPU
    busy.

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
    """Batches of at most `tokens` padded tokens (a longer sample is alone), of samples of like length,
    longest first. Samples on either side of one of the model's `rope_switches` share no batch."""
    return [make_batch(group, device) for group in group_by_length(encoded, tokens, switches)]


def group_by_length(
    encoded: Iterable[Encoded], tokens: int, switches: Sequence[int] = ()
) -> list[list[Encoded]]:
    """The samples of each batch of `make_batches`.

    Longest first, because what does not fit into memory should fail at the start and not after an hour.
    """
    groups: list[list[Encoded]] = []
    for sample in sorted(encoded, key=lambda e: (-len(e.ids), e.index)):
        first = groups[-1][0].ids if groups else ()
        together = bisect_left(switches, len(first)) == bisect_left(switches, len(sample.ids))
        if groups and together and len(first) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def make_batch(samples: Sequence[Encoded], device: torch.device) -> Batch:
    ids = pad_right([sample.ids for sample in samples], device)
    return Batch(tuple(samples), ids, tuple(len(sample.ids) for sample in samples))


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[rows, longest]; with causal attention no real position sees a padded one."""
    longest = max(map(len, rows))
    return torch.tensor([(*row, *(0,) * (longest - len(row))) for row in rows], device=device)


def run_longest_first(
    items: Sequence[Item],
    length: Callable[[Item], int],
    work: Callable[[list[Item]], list[Result]],
    *,
    size: int,
    of: tuple[Any, str],
    label: str,
    unit: str,
    progress: bool,
    apart: Callable[[Item], Hashable] | None = None,
) -> list[Result]:
    """work() over the items in batches of similar length, longest first, shared among the ranks.

    Args:
        size: items in a batch at the start; halved when they do not fit into memory.
        of: the model and the kind of work, for which it is remembered what fits.
        label, unit: what the progress shows.
        apart: items for which it differs share no batch; by default the side of the model's `rope_switches`.

    Returns:
        one result an item, in the items' order; the same on every rank.
    """
    order = sorted(range(len(items)), key=lambda i: (-length(items[i]), i))
    switches = rope_switches(of[0])
    differ = apart or (lambda item: bisect_left(switches, length(item)))
    parts = [list(part) for _, part in groupby(order, lambda i: differ(items[i]))]
    results: dict[int, Result] = {}
    with Progress(sum(len(distributed.stride(part)) for part in parts), label, unit, show=progress) as bar:

        def run_part(share: Sequence[int]) -> list[Result]:
            return in_batches(share, size, lambda places: work([items[i] for i in places]), bar.update, of=of)

        for part in parts:
            results |= zip(part, distributed.in_parallel(part, run_part), strict=True)
    return [results[i] for i in range(len(items))]
