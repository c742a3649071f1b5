"""Indirect object identification, or any task of a text, a target token and a contrast token."""

from typing import TYPE_CHECKING

import torch

from .. import distributed
from ..batches import Encoded, encode
from ..logits import logits_at
from ..memory import in_batches
from ..models import context_length
from ..offloading import device_of
from ..samples import ReferenceSet
from .metrics import IOISettings, Measured, Metric, register
from .observations import Observations, finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROWS = 32
"""Texts of one batch at the start."""


def ioi(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", samples: ReferenceSet, settings: IOISettings, progress: bool = False
) -> Measured:
    """Logit of the target less that of the contrast at the last position, and how often it is above zero; one unit a text."""
    encoded = encode(samples, tokenizer, "contrast", context=context_length(model), vocabulary=model.get_input_embeddings().weight.shape[0])
    found = distributed.in_parallel(encoded, lambda share: in_batches(share, ROWS, lambda part: logit_differences(model, part), of=(model, "ioi")))
    differences = tuple(map(finite, found))
    right = tuple(None if d is None else float(d > 0) for d in differences)
    ones, failures = (1.0,) * len(differences), differences.count(None)
    return Measured(
        (
            Observations("ioi.accuracy", settings.split, "share of texts", "higher", right, ones, failures),
            Observations("ioi.logit_difference", settings.split, "logits", "higher", differences, ones, failures),
        )
    )


@torch.inference_mode()
def logit_differences(model: "PreTrainedModel", part: "Sequence[Encoded]") -> list[float]:
    """One of each text."""
    from ..batches import make_batch

    batch = make_batch(part, device_of(model))
    logits = logits_at(model, batch.ids, list(range(len(part))), [sample.positions[0] for sample in part]).float()
    return [
        float(row[(sample.tokens or (0,))[0]] - row[(sample.against or (0,))[0]]) for row, sample in zip(logits, part, strict=True)
    ]


register(Metric("ioi", IOISettings, ioi, prompts=True, gives=("ioi.accuracy", "ioi.logit_difference")))
