"""How hard each neuron can hit the residual stream: where super weights and massive activations show (Yu et al. 2024; Sun et al. 2024)."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batches import Batch, encode, joined, make_batches
from ..experts import by_position, tokens_of
from ..models import context_length, down_sites, sites_of
from ..offloading import device_of
from ..samples import ReferenceSet
from .patching import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def largest_writes(model: "PreTrainedModel", samples: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None" = None) -> dict[str, Tensor]:
    """max_t |a_ti| · ‖W_down[:, i]‖₂ of each neuron over all tokens of the samples, by the name of its mlp.up: [out]."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    whole = ReferenceSet(joined(samples, tokenizer))
    encoded = encode(whole, None, "predicted", context=context_length(model), vocabulary=vocabulary, truncate=True)
    of_mlp = down_sites(model)
    downs = {site.name: of_mlp[site.mlp] for site in sites_of(model, ("mlp.up",))}
    found: dict[str, Tensor] = {}
    with frozen(model), torch.no_grad():
        for batch in make_batches(encoded, 1024, device_of(model)):
            with ExitStack() as hooks:
                for name, down in downs.items():
                    hooks.callback(down.hooked.register_forward_pre_hook(_hook(name, batch, found)).remove)
                model.base_model(input_ids=batch.ids, use_cache=False)
        return {name: found[name] * down.weight.float().norm(dim=0).cpu() for name, down in downs.items()}


def _hook(name: str, batch: Batch, found: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    mask = batch.mask()

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        a = by_position(args[0].detach(), tokens_of(args), batch.ids.shape).float().abs()
        largest = a.masked_fill(~mask.to(a.device)[..., None], 0).amax((0, 1)).cpu()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    return hook
