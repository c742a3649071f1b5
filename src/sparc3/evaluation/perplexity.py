"""Perplexity of texts: exp(Σ nll / Σ tokens), where each predicted token counts once."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.load import context_length
from ..models.memory import logits_at
from ..models.offloading import device_of
from ..samples.batches import pad_right, run_longest_first
from ..samples.reference_set import ReferenceSet, Sample
from ..samples.tokens import Tokenizer, read_sample, tokenize, window_opening
from .metrics import (
    FluencySettings,
    KLSettings,
    Metric,
    MetricContext,
    Model,
    PerplexitySettings,
    Reading,
    register,
)
from .statistics import Observations, finite

log = logging.getLogger(__name__)
PIECE = 512
"""Number of positions whose logits are converted to float32 at once."""

Window = tuple[tuple[int, ...], int]
"""Token ids, and the number of tokens at the end that are predicted."""


def perplexity(
    model: Model,
    tokenizer: Tokenizer,
    samples: ReferenceSet,
    settings: PerplexitySettings,
    progress: bool = False,
) -> Reading:
    """Perplexity with one unit per window. The texts are joined by a blank line and tokenised as one, as in
    Wanda's and the paper's protocol.

    A window whose likelihood is NaN or Inf is a failure.
    """
    windows = make_windows(samples, tokenizer, settings, context_length(model))
    nll = negative_log_likelihoods(model, windows, progress)
    return _make_reading("perplexity", settings.split, "perplexity", windows, nll, exponential=True)


def _make_reading(
    metric: str, split: str, unit: str, windows: list[Window], sums: list[float | None], exponential: bool
) -> Reading:
    """A reading with one unit per window, weighted by its number of predicted tokens."""
    weights = tuple(float(predicted) for _, predicted in windows)
    return Reading(
        (Observations(metric, split, unit, "lower", tuple(sums), weights, sums.count(None), exponential),)
    )


def make_windows(
    samples: ReferenceSet, tokenizer: Tokenizer, settings: PerplexitySettings, context: int
) -> list[Window]:
    """The windows of a protocol, none longer than the model's context. Raises UserError if the text has fewer
    than two tokens."""
    ids = _token_ids(samples, tokenizer)
    opening = window_opening(tokenizer)
    body = ids[len(opening) :] if tuple(ids[: len(opening)]) == opening else ids
    windows = cut_windows(body, settings, context, opening)
    if not windows:
        raise UserError(f"the perplexity text has {len(ids)} tokens; give at least two")
    return windows


def cut_windows(
    ids: Sequence[int], settings: PerplexitySettings, context: int, opening: tuple[int, ...] = ()
) -> list[Window]:
    """The windows of a text's tokens, each preceded by the opening."""
    if settings.protocol == "blocks":
        return block_windows(ids, _limit_size(settings.seq_len, context, "seq_len"), opening)
    size = _limit_size(settings.max_length, context, "max_length")
    stride = max(
        1, settings.stride * size // settings.max_length
    )  # the same overlap where the context is shorter
    if stride >= size:
        raise UserError(
            f"perplexity.stride {settings.stride} is not below max_length {settings.max_length}: tokens "
            "would be left out; lower it"
        )
    return sliding_windows(ids, size, stride, opening)


def _token_ids(samples: ReferenceSet, tokenizer: Tokenizer) -> list[int]:
    if all(sample.input_ids is not None for sample in samples):
        return [token for sample in samples for token in sample.input_ids or ()]
    if any(sample.input_ids is not None for sample in samples):
        raise UserError("perplexity: the source mixes texts and token ids; use only one of them")
    return list(tokenize("\n\n".join(sample.text or "" for sample in samples), tokenizer))


def _limit_size(size: int, context: int, name: str) -> int:
    if size > context:
        log.info("perplexity: %s %d exceeds the model's context; using %d", name, size, context)
    return min(size, context)


def block_windows(ids: Sequence[int], size: int, opening: tuple[int, ...] = ()) -> list[Window]:
    """Non-overlapping windows; a shorter rest at the end is dropped, unless it is the whole text."""
    size -= len(opening)
    starts = range(0, len(ids) - size + 1, size) or range(1)
    windows = [(*opening, *ids[start : start + size]) for start in starts]
    return [(window, len(window) - 1) for window in windows if len(window) > 1]


def sliding_windows(
    ids: Sequence[int], size: int, stride: int, opening: tuple[int, ...] = ()
) -> list[Window]:
    """Windows moved by `stride`; each predicts only tokens that no earlier window predicted."""
    windows: list[Window] = []
    done = 0 if opening else 1  # nothing predicts the first token
    for start in range(0, len(ids), stride):
        end = min(start + size - len(opening), len(ids))
        if end > done:
            windows.append(((*opening, *ids[start:end]), end - done))
            done = end
    return windows


def negative_log_likelihoods(model: Model, windows: list[Window], progress: bool) -> list[float | None]:
    """Σ −log p of each window's predicted tokens, in nats; None if it is not finite."""
    return _sum_windows(model, windows, "perplexity", partial(perplexity_observations, model), progress)


def batch_tokens(metric: str, device: str) -> int:
    """Padded tokens in a batch of a metric, "perplexity" or "kl" (which needs two models' logits), on a
    device "cpu" or "cuda"; a single window may be longer."""
    return 1024 if device == "cpu" else 4096 if metric == "kl" else 8192


def _sum_windows(
    model: Model,
    windows: list[Window],
    metric: str,
    work: Callable[[list[Window]], list[float]],
    progress: bool,
) -> list[float | None]:
    """work() over all windows; None for sums that are not finite."""
    longest = max(len(ids) for ids, _ in windows)
    sums = run_longest_first(
        windows,
        lambda window: len(window[0]),
        work,
        size=max(1, batch_tokens(metric, device_of(model).type) // longest),
        memory_key=(model, f"{metric} {longest}"),
        label=metric,
        unit="window",
        progress=progress,
    )
    return list(map(finite, sums))


@torch.inference_mode()
def perplexity_observations(model: Model, windows: list[Window]) -> list[float]:
    """`negative_log_likelihoods` of one batch."""
    ids = pad_right([ids for ids, _ in windows], device_of(model))
    targets = [
        (row, position)
        for row, (tokens, predicted) in enumerate(windows)
        for position in range(len(tokens) - 1 - predicted, len(tokens) - 1)
    ]
    rows, columns = [row for row, _ in targets], [position for _, position in targets]
    logits = logits_at(model, ids, rows, columns)
    labels = ids[rows, [position + 1 for position in columns]].to(logits.device)
    pairs = zip(
        logits.split(PIECE), labels.split(PIECE), strict=True
    )  # float32 takes twice the memory of 16 bits
    nll = torch.cat(
        [
            torch.nn.functional.cross_entropy(piece.float(), piece_labels, reduction="none")
            for piece, piece_labels in pairs
        ]
    ).double()
    return [float(part.sum()) for part in nll.split([predicted for _, predicted in windows])]


register(Metric("perplexity", PerplexitySettings, perplexity, prompts=False, gives=("perplexity",)))

# The divergence of the variant's next-token distributions from the original's, on ordinary text.


def divergence(
    model: Model,
    tokenizer: Tokenizer,
    samples: ReferenceSet,
    settings: KLSettings,
    progress: bool = False,
    beside: MetricContext | None = None,
) -> Reading:
    """Mean KL(original ‖ variant) of the next token, in nats per token; one unit per window of perplexity's
    protocol."""
    windows = make_windows(samples, tokenizer, settings, context_length(model))
    sums: list[float | None] = [0.0] * len(windows)
    if changed := beside.changed if beside else None:

        def work(part: list[Window]) -> list[float]:
            return divergence_observations(model, part, changed())

        sums = _sum_windows(model, windows, "kl", work, progress)
    return _make_reading("kl", settings.split, "nats a token", windows, sums, exponential=False)


@torch.inference_mode()
def divergence_observations(
    model: Model, windows: list[Window], variant: AbstractContextManager[Any]
) -> list[float]:
    """Σ KL over the predicted tokens of each window: the batch goes through the original, then through the
    variant."""
    ids = pad_right([ids for ids, _ in windows], device_of(model))
    before = model(input_ids=ids, use_cache=False).logits
    with variant:
        after = model(input_ids=ids, use_cache=False).logits
    spans = [
        (row, slice(len(tokens) - 1 - predicted, len(tokens) - 1))
        for row, (tokens, predicted) in enumerate(windows)
    ]
    return [float(kl_per_token(before[row, span], after[row, span]).sum()) for row, span in spans]


def kl_per_token(before: Tensor, after: Tensor) -> Tensor:
    """Σ_v p(v) (log p(v) − log q(v)) of two sets of logits [..., V], in float64: [...]."""
    p, q = (logits.float().log_softmax(-1) for logits in (before, after))
    return (p.exp() * (p - q)).sum(-1).double()


register(Metric("kl", KLSettings, divergence, prompts=False, gives=("kl",), compares=True))

# Fluency: how likely the variant's texts are under the original model, to tell "less toxic" from "broken".


def fluency(
    model: Model,
    tokenizer: Tokenizer,
    samples: ReferenceSet,
    settings: FluencySettings,
    progress: bool = False,
    beside: MetricContext | None = None,
) -> Reading:
    """Perplexity of the variant's continuations under the original model; one unit per prompt.

    Empty continuations are failures. Repetitive texts are likely too, so look at the texts as well.
    """
    context = beside or MetricContext()
    rows = context.texts.get(settings.of, [])
    prompts, split = context.samples.get(settings.of, ()), context.splits.get(settings.of, "test")
    owned = [
        (owner, _make_window(tokenizer, sample, continuation["text"], context_length(model)))
        for owner, (sample, row) in enumerate(zip(prompts, rows, strict=True))
        for continuation in row["continuations"]
    ]
    windows = [window for _, window in owned if window]
    nll = iter(negative_log_likelihoods(model, windows, progress) if windows else [])
    sums, weights, failures = [0.0] * len(rows), [0.0] * len(rows), 0
    for owner, window in owned:
        if window is None or (value := next(nll)) is None:
            failures += 1
        else:
            sums[owner] += value
            weights[owner] += window[1]
    measured = tuple(value if weight else None for value, weight in zip(sums, weights, strict=True))
    filled = tuple(weight or 1.0 for weight in weights)
    return Reading(
        (Observations("fluency", split, "perplexity", "lower", measured, filled, failures, exponential=True),)
    )


def _make_window(tokenizer: Tokenizer, prompt: Sample, text: str, context: int) -> Window | None:
    """Prompt and continuation, of which only the latter is predicted; None if either has no tokens."""
    tokens = read_sample(replace(prompt, completion=text), tokenizer)
    head, tail = tokens.prompt, tokens.completion[: max(0, context - len(tokens.prompt))]
    return ((*head, *tail), len(tail)) if tail and head else None


register(Metric("fluency", FluencySettings, fluency, prompts=False, gives=("fluency",), compares=True))
