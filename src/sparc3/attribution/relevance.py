"""Relevance by (modified) gradients: `lrp`, `cp-lrp` and `gradient`. One forward, one backward with respect to inputs.

No weight ever has a gradient: what a site needs is gathered in a hook on its output while the backward pass goes by.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..experts import by_position, by_sample, tokens_of
from ..logits import logits_at
from ..memory import few_holes
from ..models import Site
from ..offloading import device_of
from ..sites import layers_of
from .packing import packed
from .patching import frozen, lrp_rules
from .sums import Settings, Sums
from .watching import checkpointed, watched
from .weights import weight_hook

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 1536
"""Rows of W ⊙ G handled at once: some megabytes. With few rows, products of short samples run at a third of the speed."""


def lrp(model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums) -> Iterator[Batch]:
    """AttnLRP (Achtibat et al. 2024)."""
    return _relevance(model, batches, sites, settings, sums, lrp_rules(model))


def cp_lrp(model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums) -> Iterator[Batch]:
    """CP-LRP (Ali et al. 2022): queries, keys and gates are constants."""
    return _relevance(model, batches, sites, settings, sums, lrp_rules(model, cp=True))


def gradient(model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums) -> Iterator[Batch]:
    """Weight × gradient, no rules."""
    return _relevance(model, batches, sites, settings, sums, nullcontext())


def _relevance(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums, rules: AbstractContextManager[None]
) -> Iterator[Batch]:
    """Add each batch's relevance to `sums`, and yield the batch when it is in."""
    how = settings.gradient_checkpointing
    again = checkpointed(model, offload=how == "offload") if how in (True, "offload") else nullcontext()
    with frozen(model), rules, again, few_holes(layers_of(model)) if device_of(model).type == "cpu" else nullcontext():
        for batch in batches:
            gathered: dict[str, Tensor] = {}
            with packed(model, batch), _watched(sites, batch, settings, gathered, sums):
                y = target_of(model, batch)
                if y.requires_grad:  # not where CP-LRP holds constant all that the sites compute
                    y.backward()
                del y  # and with it what its graph holds
            sums.add(batch, gathered)
            yield batch


def target_of(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """Σ over the batch of y, the target scalar of each sample (docs/method.md, 2). The head is computed at target positions only."""
    rows = [row for row, sample in enumerate(batch.samples) for _ in sample.positions]
    columns = [position for sample in batch.samples for position in sample.positions]
    logits = logits_at(model, batch.ids, rows, columns)
    ranks = torch.arange(len(rows), device=logits.device)
    if batch.samples[0].tokens is None:
        return logits[ranks, logits.detach().argmax(-1)].sum()
    tokens = [token for sample in batch.samples for token in sample.tokens or ()]
    y = logits[ranks, torch.tensor(tokens, device=logits.device)].sum()
    against = [token for sample in batch.samples for token in sample.against or ()]
    return y - logits[ranks, torch.tensor(against, device=logits.device)].sum() if against else y


@contextmanager
def _watched(sites: list[Site], batch: Batch, settings: Settings, gathered: dict[str, Tensor], sums: Sums) -> Iterator[None]:
    """Hooks on the sites for one forward and backward; what they compute lands in `gathered`, one row a sample, and of weights in `sums`."""
    with ExitStack() as stack:
        for index, site in enumerate(sites):
            if settings.unit == "head":
                hook = site.hooked.register_forward_pre_hook(_head_hook(site, batch, settings, gathered))
            elif settings.unit == "weight":
                hook = site.hooked.register_forward_hook(weight_hook(site, batch, sums, first=not index or sites[index - 1].layer != site.layer))
            else:
                hook = site.hooked.register_forward_hook(_output_hook(site, batch, settings, gathered))
            stack.callback(hook.remove)
        yield


def _head_hook(
    site: Site, batch: Batch, settings: Settings, gathered: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Head relevance Σ_t Σ_{d ∈ head} a_td ∂̂y/∂a_td at the input of attn.o (docs/method.md, 4)."""

    def arrived(grad: Tensor, a: Tensor) -> None:
        relevance = (_wide(grad) * _wide(a)).reshape(*batch.ids.shape, site.heads, -1)
        gathered[site.name] = relevance[:, settings.skip_positions :].sum((1, 3))

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a = args[0]
        gathered.setdefault(site.name, torch.zeros(len(batch.samples), site.heads, device=a.device))
        return (watched(a, a, arrived), *args[1:])

    return hook


def _output_hook(
    site: Site, batch: Batch, settings: Settings, gathered: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Neuron relevance at the site's output z = W a + b (docs/method.md, 4)."""

    def arrived(tokens: Tensor | None, grad: Tensor, kept: Tensor) -> None:
        shape, grad, skip = batch.ids.shape, site.of(grad), settings.skip_positions
        if settings.neuron == "abs":
            g, a = (by_sample(x, tokens, shape, batch.lengths, skip) for x in (grad, kept))
            gathered[site.name] = absolute_rows(site.weight.to(grad.device), g, a)
        else:
            gathered[site.name] = by_position(_wide(grad) * _wide(kept), tokens, shape)[:, skip:].sum(1)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gathered.setdefault(site.name, torch.zeros(len(batch.samples), site.out, device=output.device))  # stays where CP-LRP holds z constant
        kept = args[0] if settings.neuron == "abs" else site.of(output)
        return watched(output, kept, partial(arrived, tokens_of(args)), copied=site.role == "mlp.down")  # Falcon adds to it in place

    return hook


def _wide(x: Tensor) -> Tensor:
    """At least float32, in which everything is summed."""
    return x if x.dtype == torch.float64 else x.float()


def absolute_rows(weight: Tensor, grad: Iterable[Tensor], a: Iterable[Tensor]) -> Tensor:
    """Σ_j |W_ij Σ_t ĝ_ti a_tj| of each sample: [B, out] of weight [out, in] and each sample's grad [T, out] and a [T, in]."""
    pairs = [_for_product(g, x) for g, x in zip(grad, a, strict=True)]
    sums = torch.empty(len(pairs), weight.shape[0], dtype=torch.promote_types(pairs[0][0].dtype, torch.float32), device=weight.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        for sample, (g, x) in enumerate(pairs):  # all samples while these rows of W are in cache
            piece = (g[:, rows].T @ x).mul_(weight[rows]).abs_()  # a norm in one call takes several times as long on a CPU
            sums[sample, rows] = piece.sum(1, dtype=sums.dtype)
    return sums


def _for_product(g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """In float32 where a CPU would compute in 16 bits."""
    return (g.float(), a.float()) if g.device.type == "cpu" and g.dtype in (torch.float16, torch.bfloat16) else (g, a)
