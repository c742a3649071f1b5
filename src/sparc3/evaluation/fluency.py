"""Fluency: how likely the original model finds what the variant wrote, so that "less toxic" is not "broken"."""

from typing import TYPE_CHECKING, Any

from ..models import context_length
from ..samples import ReferenceSet
from .metrics import Beside, FluencySettings, Measured, Metric, register
from .observations import Observations
from .perplexity import Window, negative_log_likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fluency(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: ReferenceSet,
    settings: FluencySettings,
    progress: bool = False,
    beside: Beside | None = None,
) -> Measured:
    """Perplexity, under the original model, of the continuations that the variant wrote; one unit a prompt.

    Empty continuations are failures. A text that repeats itself is likely too, so read this beside the texts.
    """
    seen = beside or Beside()
    rows = seen.texts.get(settings.of, [])
    windows: list[Window] = []
    owners: list[int] = []
    for prompt, row in enumerate(rows):
        for continuation in row["continuations"]:
            window = _window(tokenizer, row["prompt"], continuation["text"], context_length(model))
            if window:
                windows.append(window)
                owners.append(prompt)
    nll = negative_log_likelihoods(model, windows, progress) if windows else []
    sums, weights = [0.0] * len(rows), [0.0] * len(rows)
    for owner, (_, predicted), value in zip(owners, windows, nll, strict=True):
        if value is not None:
            sums[owner] += value
            weights[owner] += predicted
    failures = sum(len(row["continuations"]) for row in rows) - len(windows) + nll.count(None)
    measured = tuple(value if weight else None for value, weight in zip(sums, weights, strict=True))
    filled = tuple(weight or 1.0 for weight in weights)
    split = seen.splits.get(settings.of, "test")
    return Measured((Observations("fluency", split, "perplexity", "lower", measured, filled, failures, exponential=True),))


def _window(tokenizer: "PreTrainedTokenizerBase", prompt: str, text: str, context: int) -> Window | None:
    """Prompt and continuation, of which only the latter is predicted; None of an empty one."""
    head: Any = tokenizer(prompt, verbose=False)["input_ids"]
    tail: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    tail = tail[: max(0, context - len(head))]
    return ((*head, *tail), len(tail)) if tail and head else None


register(Metric("fluency", FluencySettings, fluency, prompts=False, gives=("fluency",), compares=True))
