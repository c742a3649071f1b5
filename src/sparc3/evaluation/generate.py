"""Batched, seeded continuations: a prompt's draws depend on its seed, not on the rest of the batch."""

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..models.load import context_length, rope_switches, vocabulary_size
from ..models.offloading import device_of
from ..samples.batches import run_longest_first
from ..samples.reference_set import ReferenceSet
from ..samples.tokens import decode_after, read_sample, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        drawn = torch.tensor([row[step] for row in self.uniforms], dtype=torch.float64, device=scores.device)[
            :, None
        ]
        token = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True).clamp_(
            max=scores.shape[-1] - 1
        )
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


class Engine(Protocol):
    """Something other than transformers that writes continuations."""

    def write(self, rows: list[tuple[list[int], int]], new: int, temperature: float, seed: int) -> list[str]:
        """The continuation of each row, (token ids, number of the generation), of up to `new` tokens."""


_ENGINE: ContextVar[Engine | None] = ContextVar("engine", default=None)


@contextmanager
def writes_with(engine: Engine) -> Iterator[None]:
    """Inside, `complete` has the engine write."""
    token = _ENGINE.set(engine)
    try:
        yield
    finally:
        _ENGINE.reset(token)


def read_prompts(
    samples: ReferenceSet, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[str | tuple[int, ...]], list[str]]:
    """Of each sample what `complete` continues, its token ids; and its text for people."""
    read = [
        read_sample(replace(sample, completion=None), tokenizer, f"sample {i}")
        for i, sample in enumerate(samples)
    ]
    return [one.prompt for one in read], [one.text for one in read]


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
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
    rows = [(prompt, k) for prompt in prompts for k in range(generations)]
    encoded = {
        prompt: list(prompt) if isinstance(prompt, tuple) else list(tokenize(prompt, tokenizer))
        for prompt in prompts
    }
    if empty := [place for place, prompt in enumerate(prompts) if not encoded[prompt]]:
        raise UserError(
            f"prompt {empty[0]} has no token for this tokenizer; leave it out, or use a tokenizer that "
            "begins with one of its own"
        )
    known = vocabulary_size(model)
    for place, prompt in enumerate(prompts):
        if (largest := max(encoded[prompt])) >= known:
            raise UserError(
                f"prompt {place} has the token id {largest}, and the model's ids end at {known - 1}; "
                "check that the ids or the tokenizer are this model's"
            )
    longest = max((len(ids) for ids in encoded.values()), default=0)
    if longest + max_new_tokens > context_length(model):
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the model's "
            f"{context_length(model)}; shorten the prompts or max_new_tokens"
        )
    if (engine := _ENGINE.get()) and rows:
        written = engine.write(
            [(encoded[prompt], k) for prompt, k in rows], max_new_tokens, temperature, seed
        )
        return [written[p * generations : (p + 1) * generations] for p in range(len(prompts))]
    texts = run_longest_first(
        [(encoded[prompt], k) for prompt, k in rows],
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


def _rope_side(switches: Sequence[int], new: int, row: tuple[list[int], int]) -> tuple[int, int]:
    """What the rows of one batch agree in: their side of the lengths at which the model's positions change,
    and where one is crossed while the continuation is written, the length too, so that all cross it at
    once."""
    length = len(row[0])
    side, end = (bisect_left(switches, tokens) for tokens in (length, length + new))
    return side, 0 if side == end else length


@contextmanager
def _only_these_settings(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, nothing of the model's generation_config.json counts: `generate` fills in from there whatever a
    call leaves unset."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def _generate_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[tuple[list[int], int]],
    new: int,
    temperature: float,
    seed: int,
) -> list[str]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(ids) for ids, _ in rows)
    # A tokenizer may have been given a padding token that the model has no embedding for; what stands under
    # the mask is all one.
    known = vocabulary_size(model)
    pad = next(
        i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(i, int) and i < known
    )
    ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in rows], device=device_of(model))
    mask = torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows], device=device_of(model)
    )
    finite = _Finite()
    processors = LogitsProcessorList([finite])
    if temperature > 0:
        draws = [random.Random(f"{seed}/{k}/{ids}") for ids, k in rows]
        processors.append(SeededDraw(temperature, [[r.random() for _ in range(new)] for r in draws], width))
    eos = (
        model.generation_config.eos_token_id
        if model.generation_config is not None
        else tokenizer.eos_token_id
    )
    config = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=eos,
        repetition_penalty=1.0,
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
