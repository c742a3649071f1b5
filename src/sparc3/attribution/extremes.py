"""How hard each neuron can hit the residual stream: where super weights and massive activations show (Yu et al. 2024; Sun et al. 2024)."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batches import Batch, encode, joined, make_batches
from ..models import context_length, sites_of
from ..samples import ReferenceSet
from .patching import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def largest_writes(model: "PreTrainedModel", samples: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None" = None) -> dict[str, Tensor]:
    """max_t |a_ti| · ‖W_down[:, i]‖₂ of each neuron over all tokens of the samples, by the name of its mlp.up: [out]."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    whole = ReferenceSet(joined(samples, tokenizer))
    encoded = encode(whole, None, "predicted", context=context_length(model), vocabulary=vocabulary, truncate=True)
    sites = sites_of(model, ("mlp.up", "mlp.down"))
    ups = {site.layer: site.name for site in sites if site.role == "mlp.up"}
    downs = {ups[site.layer]: site for site in sites if site.role == "mlp.down"}
    found: dict[str, Tensor] = {}
    with frozen(model), torch.no_grad():
        for batch in make_batches(encoded, 1024, model.device):
            with ExitStack() as hooks:
                for name, down in downs.items():
                    hooks.callback(down.module.register_forward_pre_hook(_hook(name, batch, found)).remove)
                model.base_model(input_ids=batch.ids, use_cache=False)
        return {name: found[name] * down.weight.float().norm(dim=0).cpu() for name, down in downs.items()}


def _hook(name: str, batch: Batch, found: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    mask = batch.mask()

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        a = args[0].detach().reshape(*batch.ids.shape, -1).float().abs()
        largest = a.masked_fill(~mask.to(a.device)[..., None], 0).amax((0, 1)).cpu()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    return hook
