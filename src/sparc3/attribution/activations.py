"""Methods that only look at activations: `wanda` and `activation`. One forward each, no gradient, no logits."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import __version__, distributed
from ..models.experts import by_position, tokens_of
from ..models.load import context_length, describe
from ..models.offloading import device_of
from ..models.sites import Site, down_sites, sites_of
from ..samples.batches import Batch, encode, join_completions, make_batches
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from .patching import frozen
from .sums import Settings, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def wanda(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """Σ_t a_tj² at each site's input: a running sum of squares, never a concatenation of activations (Sun et al. 2024)."""
    return _sum_over_positions(model, batches, {site.name: site for site in sites}, torch.square, sums)


def activation(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """Σ_t |h_ti| of each neuron after its non-linearity (and gate): the input of the layer's mlp.down."""
    downs = down_sites(model)
    return _sum_over_positions(
        model, batches, {site.name: downs[site.mlp] for site in sites}, torch.abs, sums
    )


def _sum_over_positions(
    model: "PreTrainedModel",
    batches: Iterable[Batch],
    sites: Mapping[str, Site],
    measure: Callable[[Tensor], Tensor],
    sums: Sums,
) -> Generator[Batch, None, None]:
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


# How hard each neuron can hit the residual stream: where super weights and massive activations show (Yu et al. 2024; Sun et al. 2024).


def largest_writes(
    model: "PreTrainedModel", samples: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> dict[str, Tensor]:
    """max_t |a_ti| · ‖W_down[:, i]‖₂ of each neuron over all tokens of the samples, by the name of its mlp.up: [out]."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    whole = ReferenceSet(join_completions(samples, tokenizer))
    encoded = encode(
        whole, None, "predicted", context=context_length(model), vocabulary=vocabulary, truncate=True
    )
    of_mlp = down_sites(model)
    downs = {site.name: of_mlp[site.mlp] for site in sites_of(model, ("mlp.up",))}
    found: dict[str, Tensor] = {}
    with frozen(model), torch.no_grad():
        for batch in make_batches(encoded, 1024, device_of(model)):
            with ExitStack() as hooks:
                for name, down in downs.items():
                    hooks.callback(
                        down.hooked.register_forward_pre_hook(_extreme_hook(name, batch, found)).remove
                    )
                model.base_model(input_ids=batch.ids, use_cache=False)
        return {name: found[name] * down.weight.float().norm(dim=0).cpu() for name, down in downs.items()}


def _extreme_hook(
    name: str, batch: Batch, found: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    mask = batch.mask()

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        a = by_position(args[0].detach(), tokens_of(args), batch.ids.shape).float().abs()
        largest = a.masked_fill(~mask.to(a.device)[..., None], 0).amax((0, 1)).cpu()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    return hook


# Expertise of a neuron: how well its activation alone tells undesired texts from others (Suau et al. 2024, "Whispering experts").
#
# Two methods act on it: Det-0 removes the best experts, AurA damps every neuron that is one at all.


METHODS = ("aura", "det0")


def expertise(
    model: "PreTrainedModel",
    undesired: ReferenceSet,
    benign: ReferenceSet,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    batch_tokens: int = 1024,
) -> Scores:
    """AUROC of each mlp.up neuron, as a classifier of undesired against benign samples; 0.5 is chance.

    A neuron's activation on a sample is the largest output of its row of mlp.up over the sample's tokens, its completion included; an expert's
    neuron has 0 at tokens that are not sent to it.

    Returns:
        Scores in [0, 1], one [out] tensor an mlp.up.
    """
    sites = sites_of(model, ("mlp.up",))
    described = describe(model)
    seen = [
        _largest(model, ReferenceSet(join_completions(some, tokenizer)), sites, batch_tokens)
        for some in (undesired, benign)
    ]
    values = {site.name: auroc(seen[0][site.name], seen[1][site.name]).float() for site in sites}
    return Scores(
        values,
        {
            "method": "aura",
            "unit": "neuron",
            "sites_roles": ["mlp.up"],
            "target": None,
            "neuron": "activation",
            "reduce": "auroc",
            "samples": len(undesired) + len(benign),
            "skipped": [],
            "model": described,
            "samples_fingerprint": [undesired.fingerprint, benign.fingerprint],
            "version": __version__,
        },
    )


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """P(positive > negative) + ½ P(equal), of every column: positive [P, N], negative [M, N] → [N], in float64.

    The rank-sum statistic U / (P M) with midranks for ties, exactly.
    """
    there = negative.T.contiguous().sort(-1).values
    asked = positive.T.contiguous()
    below = torch.searchsorted(there, asked, right=False)
    not_above = torch.searchsorted(there, asked, right=True)
    return (below + not_above).double().sum(-1) / (2 * asked.shape[1] * there.shape[1])


def strengths(scores: Scores, count: int | None = None) -> dict[str, Tensor]:
    """AurA's factor of each neuron: 1 − 2 (AUROC − ½) where AUROC > ½, else 1.

    Args:
        count: damp only so many of the best experts (ties by site order, then index); None damps all, as AurA does.
    """
    factors = {name: (1 - 2 * (auc - 0.5)).clamp(0, 1) for name, auc in scores.items()}
    if count is None:
        return factors
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:count]] = True
    parts = chosen.split([len(auc) for auc in scores.values()])
    return {
        name: torch.where(part, factor, 1.0)
        for (name, factor), part in zip(factors.items(), parts, strict=True)
    }


def _largest(
    model: "PreTrainedModel", samples: ReferenceSet, sites: list[Site], batch_tokens: int
) -> dict[str, Tensor]:
    """Site → [samples, out]: each neuron's largest output over the tokens of each sample."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    encoded = encode(
        samples, None, "predicted", context=context_length(model), vocabulary=vocabulary, truncate=True
    )
    made = {site.name: torch.zeros(len(encoded), site.out) for site in sites}
    with frozen(model), torch.no_grad():
        for batch in make_batches(distributed.stride(encoded), batch_tokens, device_of(model)):
            gathered: dict[str, Tensor] = {}
            with ExitStack() as stack:
                for site in sites:
                    stack.callback(
                        site.hooked.register_forward_hook(_expertise_hook(site, batch, gathered)).remove
                    )
                model.base_model(input_ids=batch.ids, use_cache=False)
            rows = torch.tensor([sample.index for sample in batch.samples])
            for name, largest in gathered.items():
                made[name][rows] = largest.cpu()
    distributed.sum_(made.values())  # a sample belongs to one rank, and is zero in the others
    return made


def _expertise_hook(
    site: Site, batch: Batch, gathered: dict[str, Tensor]
) -> Callable[[nn.Module, Sequence[Tensor], Tensor], None]:
    mask = batch.mask()

    def hook(_: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
        z = by_position(site.of(output.detach()), tokens_of(args), batch.ids.shape).float()
        gathered[site.name] = z.masked_fill(~mask.to(z.device)[..., None], -torch.inf).amax(1)

    return hook
