"""Batched, seeded continuations: a prompt's draws depend on its seed, not on the rest of the batch."""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.load import context_length, rope_switches, vocabulary_size
from ..models.offloading import device_of
from ..samples.batches import run_longest_first
from ..samples.reference_set import ReferenceSet
from ..samples.sources import Score
from ..samples.tokens import Tokenizer, decode_after, read_sample, tokenize
from .metrics import Model

ROWS = 64
"""Texts of one batch at the start."""


class SeededDraw:
    """A logits processor that samples: for each row one uniform number a step, turned into a token by the
    inverse distribution.

    Original and ablated model meet the same numbers, so what differs between their texts is the model.
    """

    def __init__(self, temperature: float, uniforms: list[list[float]], prompt: int) -> None:
        self.temperature, self.uniforms, self.prompt = temperature, uniforms, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - self.prompt
        cumulated = torch.softmax(scores.double() / self.temperature, -1).cumsum(-1)
        drawn = torch.tensor(
            [[row[step]] for row in self.uniforms], dtype=torch.float64, device=scores.device
        )
        token = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True)
        token.clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class _Finite:
    """A logits processor that changes nothing and notes the rows in which a logit was NaN or Inf: what they
    go on to write is no text."""

    def __init__(self) -> None:
        self.lost: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        lost = ~scores.amax(-1).isfinite()  # a NaN or +Inf anywhere; −Inf everywhere
        self.lost = lost if self.lost is None else self.lost | lost
        return torch.where(lost[:, None], 0.0, scores)


Row = tuple[list[int], int]
"""Token ids of a prompt, and the number of the generation."""
Write = Callable[[list[Row], int, float, int], list[str]]
"""(rows, new tokens, temperature, seed) → the continuation of each row."""
_ENGINE: ContextVar[Write | None] = ContextVar("engine", default=None)


@contextmanager
def writes_with(write: Write) -> Iterator[None]:
    """Inside, `complete` has another engine than transformers write."""
    token = _ENGINE.set(write)
    try:
        yield
    finally:
        _ENGINE.reset(token)


def read_prompts(
    samples: ReferenceSet, tokenizer: Tokenizer
) -> tuple[list[str | tuple[int, ...]], list[str]]:
    """Of each sample what `complete` continues, its token ids; and its text for people."""
    alone = (replace(sample, completion=None) for sample in samples)
    read = [read_sample(sample, tokenizer, f"sample {i}") for i, sample in enumerate(alone)]
    return [one.prompt for one in read], [one.text for one in read]


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | tuple[int, ...]],
    *,
    max_new_tokens: int,
    generations: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = ROWS,
    progress: bool = False,
) -> list[list[str]]:
    """For each prompt, a text or its token ids, `generations` continuations, without the prompt and without
    special tokens.

    A continuation in which the model gave a logit that is NaN or Inf is empty, which every metric counts as a
    failure.

    Args:
        temperature: 0 is greedy; otherwise plain sampling from the softmax at this temperature.
        batch: rows of one batch at the start; halved when they do not fit into memory.

    Raises:
        UserError: a prompt without a token, or one so long that its continuation would leave the model's
            context.
    """
    encoded = [
        list(prompt) if isinstance(prompt, tuple) else list(tokenize(prompt, tokenizer)) for prompt in prompts
    ]
    known = vocabulary_size(model)
    for place, ids in enumerate(encoded):
        if not ids:
            raise UserError(
                f"prompt {place} has no token for this tokenizer; leave it out, or use a tokenizer that "
                "begins with one of its own"
            )
        if max(ids) >= known:
            raise UserError(
                f"prompt {place} has the token id {max(ids)}, and the model's ids end at {known - 1}; "
                "check that the ids or the tokenizer are this model's"
            )
    rows = [(ids, k) for ids in encoded for k in range(generations)]
    longest = max(map(len, encoded), default=0)
    if longest + max_new_tokens > context_length(model):
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the model's "
            f"{context_length(model)}; shorten the prompts or max_new_tokens"
        )
    if (write := _ENGINE.get()) and rows:
        texts = write(rows, max_new_tokens, temperature, seed)
    else:
        texts = run_longest_first(
            rows,
            lambda row: len(row[0]),
            lambda part: _generate_batch(model, tokenizer, part, max_new_tokens, temperature, seed),
            size=batch,
            of=(model, f"generate {longest + max_new_tokens}"),
            label="generate",
            unit="text",
            progress=progress,
            apart=partial(_rope_side, rope_switches(model), max_new_tokens),
        )
    return [texts[p * generations : (p + 1) * generations] for p in range(len(prompts))]


def _rope_side(switches: Sequence[int], new: int, row: Row) -> tuple[int, int]:
    """What the rows of one batch agree in: their side of the lengths at which the model's positions change,
    and where one is crossed while the continuation is written, the length too, so that all cross it at
    once."""
    length = len(row[0])
    side, end = (bisect_left(switches, tokens) for tokens in (length, length + new))
    return side, 0 if side == end else length


def own_continuations(
    model: Model,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    rate: Callable[[list[str], list[str]], list[float | None]],
    progress: bool = False,
) -> Score:
    """Prompts → this model's own greedy continuations with their figure, for choose_by: completion and
    repetition.

    Args:
        rate: (prompts, continuations) → a figure of each continuation, None where there is none.
    """

    def score(prompts: list[str]) -> list[tuple[str, float | None]]:
        made = complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress)
        written = [texts[0] for texts in made]
        return list(zip(written, rate(prompts, written), strict=True))

    return score


@contextmanager
def _only_these_settings(model: Model) -> Iterator[None]:
    """Inside, nothing of the model's generation_config.json counts: `generate` fills in from there whatever a
    call leaves unset."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: Model, tokenizer: Tokenizer) -> list[int] | None:
    """Tokens that end a text: the model's and the tokenizer's. A fine-tuned chat model often says <|im_end|>
    in only one of the two, and would go on with the user's next turn (open-r1#663, lighteval#1279)."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id]
    known = vocabulary_size(model)
    return sorted({i for i in ids if isinstance(i, int) and 0 <= i < known}) or None


@torch.inference_mode()
def _generate_batch(
    model: Model, tokenizer: Tokenizer, rows: list[Row], new: int, temperature: float, seed: int
) -> list[str]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(ids) for ids, _ in rows)
    # A tokenizer may have been given a padding token that the model has no embedding for; what stands under
    # the mask is all one.
    known = vocabulary_size(model)
    pad = next(
        i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(i, int) and i < known
    )
    device, gaps = device_of(model), [width - len(ids) for ids, _ in rows]
    ids = torch.tensor([[pad] * gap + ids for gap, (ids, _) in zip(gaps, rows, strict=True)], device=device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=device)
    finite = _Finite()
    processors = LogitsProcessorList([finite])
    if temperature > 0:
        draws = [random.Random(f"{seed}/{k}/{ids}") for ids, k in rows]
        processors.append(SeededDraw(temperature, [[r.random() for _ in range(new)] for r in draws], width))
    config = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=_ends(model, tokenizer),
        use_cache=True,
    )
    with _only_these_settings(model):
        made: Any = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
    lost = finite.lost.tolist() if finite.lost is not None else [False] * len(rows)
    return [
        "" if gone else decode_after(prompt, new_ids, tokenizer)
        for (prompt, _), new_ids, gone in zip(rows, made[:, width:].tolist(), lost, strict=True)
    ]
