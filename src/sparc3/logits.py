"""Logits where they are wanted and nowhere else."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logits_at(model: "PreTrainedModel", ids: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Logits [N, V] at the given (row, column) positions of ids [B, T], without a logit anywhere else.

    No attention mask is given: with padding on the right and causal attention no real position sees a padded one.
    """
    head = model.get_output_embeddings()
    assert head is not None

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].view(*ids.shape, -1)
        return (hidden[torch.tensor(rows, device=hidden.device), torch.tensor(columns, device=hidden.device)].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(pick)
    try:
        return model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        hook.remove()
