"""Methods that only look at activations: `wanda` and `activation`. One forward each, no gradient, no logits."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..experts import by_position, tokens_of
from ..models import Site, down_sites
from .patching import frozen
from .sums import Settings, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def wanda(model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums) -> Iterator[Batch]:
    """Σ_t a_tj² at each site's input: a running sum of squares, never a concatenation of activations (Sun et al. 2024)."""
    return _measured(model, batches, {site.name: site for site in sites}, torch.square, sums)


def activation(model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums) -> Iterator[Batch]:
    """Σ_t |h_ti| of each neuron after its non-linearity (and gate): the input of the layer's mlp.down."""
    downs = down_sites(model)
    return _measured(model, batches, {site.name: downs[site.mlp] for site in sites}, torch.abs, sums)


def _measured(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: Mapping[str, Site], measure: Callable[[Tensor], Tensor], sums: Sums
) -> Iterator[Batch]:
    with frozen(model), torch.no_grad():
        for batch in batches:
            gathered: dict[str, Tensor] = {}
            with ExitStack() as stack:
                for name, site in sites.items():
                    hook = _input_hook(name, batch, measure, sums.settings.skip_positions, gathered)
                    stack.callback(site.hooked.register_forward_pre_hook(hook).remove)
                model.base_model(input_ids=batch.ids, use_cache=False)
            sums.add(batch, gathered)
            yield batch


def _input_hook(
    name: str, batch: Batch, measure: Callable[[Tensor], Tensor], skip: int, gathered: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    summed = batch.mask()
    summed[:, :skip] = False

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        a = by_position(args[0].detach(), tokens_of(args), batch.ids.shape)
        wide = a if a.dtype == torch.float64 else a.float()
        gathered[name] = measure(wide).masked_fill_(~summed.to(a.device)[..., None], 0).sum(1)

    return hook
