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
"""Texts in the first batch; halved when they do not fit into memory."""


class SeededDraw:
    """A logits processor that samples by inversion: a uniform number per row and step picks the token.

    The original and the ablated model get the same numbers, so their texts differ only because of the model.
    """

    def __init__(self, temperature: float, uniforms: list[list[float]], prompt: int) -> None:
        self.temperature, self.uniforms, self.prompt = temperature, uniforms, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - self.prompt
        cumulative = torch.softmax(scores.double() / self.temperature, -1).cumsum(-1)
        uniforms = torch.tensor(
            [[row[step]] for row in self.uniforms], dtype=torch.float64, device=scores.device
        )
        token = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
        token.clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class _Finite:
    """A logits processor that records the rows in which a logit was NaN or Inf, whose continuations are
    discarded; their logits become 0, so that generation can go on."""

    def __init__(self) -> None:
        self.lost: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        is_lost = ~scores.amax(-1).isfinite()  # a NaN or +Inf anywhere; −Inf everywhere
        self.lost = is_lost if self.lost is None else self.lost | is_lost
        return torch.where(is_lost[:, None], 0.0, scores)


Row = tuple[list[int], int]
"""Token ids of a prompt, and the number of the generation."""
Write = Callable[[list[Row], int, float, int], list[str]]
"""(rows, new tokens, temperature, seed) → the continuation of each row."""
_ENGINE: ContextVar[Write | None] = ContextVar("engine", default=None)


@contextmanager
def use_engine(write: Write) -> Iterator[None]:
    """Inside, `complete` generates with this function instead of transformers."""
    token = _ENGINE.set(write)
    try:
        yield
    finally:
        _ENGINE.reset(token)


def read_prompts(
    samples: ReferenceSet, tokenizer: Tokenizer
) -> tuple[list[str | tuple[int, ...]], list[str]]:
    """For each sample, the token ids that `complete` continues, and its text for people."""
    prompts = (replace(sample, completion=None) for sample in samples)
    tokens = [read_sample(sample, tokenizer, f"sample {i}") for i, sample in enumerate(prompts)]
    return [item.prompt for item in tokens], [item.text for item in tokens]


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
    """For each prompt, given as text or token ids, `generations` continuations, without the prompt and
    without special tokens.

    A continuation for which the model gave a NaN or Inf logit is empty, which every metric counts as a
    failure.

    Args:
        temperature: 0 is greedy; otherwise plain sampling from the softmax at this temperature.
        batch: rows in the first batch; halved when they do not fit into memory.

    Raises:
        UserError: a prompt without tokens, or one that exceeds the model's context with its continuation.
    """
    encoded = [
        list(prompt) if isinstance(prompt, tuple) else list(tokenize(prompt, tokenizer)) for prompt in prompts
    ]
    vocabulary = vocabulary_size(model)
    for index, ids in enumerate(encoded):
        if not ids:
            raise UserError(
                f"prompt {index} has no tokens with this tokenizer; leave it out, or use a tokenizer that "
                "adds a start token"
            )
        if max(ids) >= vocabulary:
            raise UserError(
                f"prompt {index} has the token id {max(ids)}, and the model's ids end at {vocabulary - 1}; "
                "check that the ids or the tokenizer are this model's"
            )
    rows = [(ids, k) for ids in encoded for k in range(generations)]
    longest = max(map(len, encoded), default=0)
    if longest + max_new_tokens > context_length(model):
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{context_length(model)}; shorten the prompts or lower max_new_tokens"
        )
    if (write := _ENGINE.get()) and rows:
        texts = write(rows, max_new_tokens, temperature, seed)
    else:
        texts = run_longest_first(
            rows,
            lambda row: len(row[0]),
            lambda part: _generate_batch(model, tokenizer, part, max_new_tokens, temperature, seed),
            size=batch,
            memory_key=(model, f"generate {longest + max_new_tokens}"),
            label="generate",
            unit="text",
            progress=progress,
            separate_by=partial(_rope_side, rope_switches(model), max_new_tokens),
        )
    return [texts[p * generations : (p + 1) * generations] for p in range(len(prompts))]


def _rope_side(switches: Sequence[int], new: int, row: Row) -> tuple[int, int]:
    """The key by which rows share a batch: their side of the lengths at which the model's position encoding
    switches (LongRoPE); and if a continuation crosses a switch, also the prompt's length, so that all rows of
    a batch cross it at the same step."""
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
    """A `Score` that returns this model's own greedy continuations with a figure, for choose_by:
    completion and repetition.

    Args:
        rate: (prompts, continuations) → the figure of each continuation, or None.
    """

    def score(prompts: list[str]) -> list[tuple[str, float | None]]:
        generations = complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress)
        continuations = [texts[0] for texts in generations]
        return list(zip(continuations, rate(prompts, continuations), strict=True))

    return score


@contextmanager
def _ignore_generation_config(model: Model) -> Iterator[None]:
    """Inside, the model's generation_config.json is ignored; otherwise `generate` takes whatever a call
    leaves unset from it, such as a repetition penalty."""
    from transformers import GenerationConfig

    original = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


def _find_end_tokens(model: Model, tokenizer: Tokenizer) -> list[int] | None:
    """Tokens that end a text: the model's and the tokenizer's. Fine-tuned chat models often list
    <|im_end|> in only one of the two, and would go on to write the user's next turn (open-r1#663,
    lighteval#1279)."""
    model_tokens: Any = getattr(model.generation_config, "eos_token_id", None)
    ids = [
        *(model_tokens if isinstance(model_tokens, list | tuple) else [model_tokens]),
        tokenizer.eos_token_id,
    ]
    vocabulary = vocabulary_size(model)
    return sorted({i for i in ids if isinstance(i, int) and 0 <= i < vocabulary}) or None


@torch.inference_mode()
def _generate_batch(
    model: Model, tokenizer: Tokenizer, rows: list[Row], new: int, temperature: float, seed: int
) -> list[str]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(ids) for ids, _ in rows)
    # The padding token may have no embedding in the model, if it was added to the tokenizer later. Any token
    # will do, as the mask hides it.
    vocabulary = vocabulary_size(model)
    pad = next(
        i
        for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        if isinstance(i, int) and i < vocabulary
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
        eos_token_id=_find_end_tokens(model, tokenizer),
        use_cache=True,
    )
    with _ignore_generation_config(model):
        output: Any = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
    lost = finite.lost.tolist() if finite.lost is not None else [False] * len(rows)
    return [
        "" if is_lost else decode_after(prompt, new_ids, tokenizer)
        for (prompt, _), new_ids, is_lost in zip(rows, output[:, width:].tolist(), lost, strict=True)
    ]
