"""A circuit as forward hooks on the modules of its model, which any tool that takes hooks can apply."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.sites import Site, down_sites
from .circuit import Circuit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def make_hooks(model: "PreTrainedModel", circuit: Circuit) -> list[tuple[str, Hook]]:
    """What `Circuit.hooks` returns."""
    readers = down_sites(model) if circuit.unit == "neuron" and not circuit.zeroes else {}
    masks, hooks = circuit.masks(model), list[tuple[str, Hook]]()
    for name, site in circuit.sites(model).items():
        if site.expert is not None:
            raise UserError(
                f"{name} belongs to an expert, and all experts are computed in one call, which a hook cannot "
                "reach; use ablated(model, circuit)"
            )
        factor = torch.ones(masks[name].shape)
        for strength, units in circuit.by_strength(name) if circuit.unit != "weight" else ():
            factor[list(units)] = 1 - strength
        if circuit.unit == "weight":
            hook: Hook = partial(_subtract, site, masks[name], circuit.strength)
        elif circuit.unit == "head":
            hook = partial(_weaken_input, factor.repeat_interleave(site.inp // site.heads))
        elif readers and site.role == "mlp.up":
            # In a plain MLP a non-linearity follows mlp.up, with which a factor does not commute.
            site, hook = readers[site.mlp], partial(_weaken_input, factor)
        else:
            hook = partial(_weaken_output, site, factor)
        hooks.append((site.name.partition("#")[0], hook))
    return hooks


def _weaken_output(site: Site, factor: Tensor, _: nn.Module, __: object, output: Tensor) -> Tensor:
    factors = output.new_ones(output.shape[-1])
    factors[site.stored_rows(torch.arange(site.out, device=output.device))] = factor.to(output)
    return output * factors


def _weaken_input(factor: Tensor, module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """Compute the module again with a weaker input: a forward hook runs after the module and cannot change
    what it read."""
    output: Tensor = module.forward(args[0] * factor.to(args[0]), *args[1:])
    return output


def _subtract(
    site: Site, mask: Tensor, strength: float, _: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """The output minus what the masked weights contribute to it."""
    removed = (site.weight * mask.to(output.device)).to(output.dtype)
    rows = site.stored_rows(torch.arange(site.out, device=output.device))
    return output.index_add(-1, rows, args[0] @ removed.T, alpha=-strength)
