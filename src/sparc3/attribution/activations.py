"""Methods that only look at activations: `wanda` and `activation`. One forward each, no gradient, no logits."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..models import Site, family_of
from .patching import frozen
from .sums import Settings, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def wanda(model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums) -> Iterator[Batch]:
    """Σ_t a_tj² at each site's input: a running sum of squares, never a concatenation of activations (Sun et al. 2024)."""
    return _measured(model, batches, [(site.name, site.module) for site in sites], lambda a: a.square(), sums)


def activation(model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums) -> Iterator[Batch]:
    """Σ_t |h_ti| of each neuron after its non-linearity (and gate): the input of the layer's mlp.down."""
    family = family_of(model)
    downs = [(site.name, model.get_submodule(f"{family.layers}.{site.layer}.{family.roles['mlp.down']}")) for site in sites]
    return _measured(model, batches, downs, torch.abs, sums)


def _measured(
    model: "PreTrainedModel", batches: Iterable[Batch], modules: list[tuple[str, nn.Module]], measure: Callable[[Tensor], Tensor], sums: Sums
) -> Iterator[Batch]:
    with frozen(model), torch.no_grad():
        for batch in batches:
            gathered: dict[str, Tensor] = {}
            with ExitStack() as stack:
                for name, module in modules:
                    stack.callback(module.register_forward_pre_hook(_input_hook(name, batch, measure, sums.settings.skip_positions, gathered)).remove)
                model.base_model(input_ids=batch.ids, use_cache=False)
            sums.add(batch, gathered)
            yield batch


def _input_hook(
    name: str, batch: Batch, measure: Callable[[Tensor], Tensor], skip: int, gathered: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    summed = batch.mask()
    summed[:, :skip] = False

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        a = args[0].detach().reshape(*batch.ids.shape, -1)
        wide = a if a.dtype == torch.float64 else a.float()
        gathered[name] = measure(wide).masked_fill_(~summed.to(a.device)[..., None], 0).sum(1)

    return hook
