"""How far the variant's next-token distributions are from the original's, on ordinary text."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..memory import in_batches
from ..models import context_length
from ..offloading import device_of
from ..samples import ReferenceSet
from .metrics import Beside, KLSettings, Measured, Metric, register
from .observations import Observations, finite
from .perplexity import Window, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def divergence(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: ReferenceSet,
    settings: KLSettings,
    progress: bool = False,
    beside: Beside | None = None,
) -> Measured:
    """Mean KL(original ‖ variant) of the next token, in nats a token; one unit a window of perplexity's protocol."""
    windows = windows_of(samples, tokenizer, settings, context_length(model))
    changed = beside.changed if beside else None
    sums = tuple(map(finite, _of_windows(model, windows, changed, progress))) if changed else (0.0,) * len(windows)
    weights = tuple(float(predicted) for _, predicted in windows)
    return Measured((Observations("kl", settings.split, "nats a token", "lower", sums, weights, sums.count(None)),))


def _of_windows(model: "PreTrainedModel", windows: list[Window], changed: Any, progress: bool) -> list[float]:
    longest = max(len(ids) for ids, _ in windows)
    size = max(1, batch_tokens(device_of(model).type) // longest)
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i][0]), i))
    with tqdm(total=len(windows), desc="kl", unit="window", disable=not progress or not distributed.is_main()) as bar:

        def work(part: Sequence[int]) -> list[float]:
            return of_windows(model, [windows[i] for i in part], changed())

        made = distributed.in_parallel(order, lambda share: in_batches(share, size, work, bar.update, of=(model, f"kl {longest}")))
    by_window = dict(zip(order, made, strict=True))
    return [by_window[i] for i in range(len(windows))]


def batch_tokens(device: str) -> int:
    """Padded tokens of one batch on a device "cpu" or "cuda"; a single window may be longer."""
    return 1024 if device == "cpu" else 4096


@torch.inference_mode()
def of_windows(model: "PreTrainedModel", windows: list[Window], variant: AbstractContextManager[Any]) -> list[float]:
    """Σ KL over the predicted tokens of each window: the batch goes through the original, then through the variant."""
    longest = max(len(ids) for ids, _ in windows)
    ids = torch.tensor([(*ids, *(0,) * (longest - len(ids))) for ids, _ in windows], device=device_of(model))
    before = model(input_ids=ids, use_cache=False).logits
    with variant:
        after = model(input_ids=ids, use_cache=False).logits
    spans = [(row, slice(len(tokens) - 1 - predicted, len(tokens) - 1)) for row, (tokens, predicted) in enumerate(windows)]
    return [float(kl(before[row, span], after[row, span]).sum()) for row, span in spans]


def kl(before: Tensor, after: Tensor) -> Tensor:
    """Σ_v p(v) (log p(v) − log q(v)) of two sets of logits [..., V], in float64: [...]."""
    p, q = (logits.float().log_softmax(-1) for logits in (before, after))
    return (p.exp() * (p - q)).sum(-1).double()


register(Metric("kl", KLSettings, divergence, prompts=False, gives=("kl",), compares=True))
