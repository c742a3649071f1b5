"""The methods `wanda` and `activation`, which need activations only: one forward, no gradient, no logits."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__, distributed
from ..models.experts import by_position, tokens_of
from ..models.fingerprint import describe
from ..models.load import context_length, rope_switches, vocabulary_size
from ..models.offloading import device_of
from ..models.sites import Site, down_sites, readers_of, sites_of
from ..samples.batches import Batch, Encoded, encode, join_completions, make_batches
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from .patching import frozen
from .sums import Settings, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def wanda(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """Σ_t a_tj² at each site's input: a running sum of squares, never a concatenation of activations (Sun et
    al. 2024)."""
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
    skip = sums.settings.skip_positions
    for batch, found in _measure(model, batches, sites, lambda a: measure(a).sum(1), skip=skip):
        sums.add(batch, found)
        yield batch


def _measure(
    model: "PreTrainedModel",
    batches: Iterable[Batch],
    sites: Mapping[str, Site],
    measure: Callable[[Tensor], Tensor],
    *,
    skip: int = 0,
    **how: Any,
) -> Generator[tuple[Batch, dict[str, Tensor]], None, None]:
    """What `measure` makes of each site's activations [B, T, width], by batch; `how` as in `capture`."""
    with frozen(model), torch.no_grad():
        for batch in batches:
            found: dict[str, Tensor] = {}
            counted = batch.mask()
            counted[:, :skip] = False

            def receive(name: str, a: Tensor, found: dict[str, Tensor] = found) -> None:
                found[name] = measure(a)

            with capture(sites, counted, receive, **how):
                model.base_model(input_ids=batch.ids, use_cache=False)
            yield batch, found


@contextmanager
def capture(
    sites: Mapping[str, Site],
    mask: Tensor,
    receive: Callable[[str, Tensor], None],
    *,
    outputs: bool = False,
    fill: float = 0.0,
) -> Iterator[None]:
    """Inside, a forward pass calls `receive` with the name and the activations of each site.

    The activations are [B, T, width], in float32 or float64, however the module flattens its tokens. An
    expert's are 0 at tokens that are not sent to it.

    Args:
        mask: [B, T], false where activations are replaced by `fill`: at padding, and at positions to be
            ignored.
        outputs: receive the part of the module's output that belongs to the site instead of the module's
            input.
    """

    def hook(name: str, site: Site, _: object, args: Sequence[Tensor], output: Tensor | None = None) -> None:
        x = args[0] if output is None else site.of(output)
        a = by_position(x.detach(), tokens_of(args), mask.shape)
        wide = a if a.dtype == torch.float64 else a.float()
        receive(name, wide.masked_fill(~mask.to(a.device)[..., None], fill))

    with ExitStack() as hooks:
        for name, site in sites.items():
            module = site.hooked
            register = module.register_forward_hook if outputs else module.register_forward_pre_hook
            hooks.callback(register(partial(hook, name, site)).remove)
        yield


def encode_whole(
    model: "PreTrainedModel", samples: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None"
) -> list[Encoded]:
    """The samples with their completions as tokens, cut to the model's context."""
    return encode(
        ReferenceSet(join_completions(samples, tokenizer)),
        None,
        "predicted",
        context=context_length(model),
        vocabulary=vocabulary_size(model),
        truncate=True,
    )


# How hard each neuron can hit the residual stream: where super weights and massive activations show (Yu et
# al. 2024; Sun et al. 2024).


def largest_writes(
    model: "PreTrainedModel", samples: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> dict[str, Tensor]:
    """max_t |a_ti| · ‖W_down[:, i]‖₂ of each neuron over all tokens of the samples, by the name of its
    mlp.up: [out]."""
    of_mlp = down_sites(model)
    downs = {site.name: of_mlp[site.mlp] for site in sites_of(model, ("mlp.up",))}
    encoded = encode_whole(model, samples, tokenizer)
    batches = make_batches(encoded, 1024, device_of(model), rope_switches(model))
    maxima: dict[str, Tensor] = {}
    for _, found in _measure(model, batches, downs, lambda a: a.float().abs().amax((0, 1)).cpu()):
        maxima = {name: torch.maximum(maxima.get(name, largest), largest) for name, largest in found.items()}
    return {
        name: maxima[name] * down.weight.detach().float().norm(dim=0).cpu() for name, down in downs.items()
    }


# Means of outputs, for mean ablation.


def mean_outputs(
    model: "PreTrainedModel",
    samples: ReferenceSet,
    roles: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    batch_tokens: int = 1024,
) -> dict[str, Tensor]:
    """The mean output of each neuron of mlp.up, or of each feature of the heads of attn.o, over the tokens of
    the samples.

    Returns:
        name of each site of the roles → [2, width], float64: at the samples' first tokens, and at all others
        (zero where there is no other).

    Raises:
        UserError: other roles, or experts.
    """
    readers = readers_of(model, sites_of(model, roles))
    sums = {name: torch.zeros(2, reader.inp, dtype=torch.float64) for name, reader in readers.items()}
    counts = torch.zeros(2, 1, dtype=torch.float64)
    encoded = distributed.stride(encode_whole(model, samples, tokenizer))
    batches = make_batches(encoded, batch_tokens, device_of(model), rope_switches(model))

    def add_up(a: Tensor) -> Tensor:
        return torch.stack([a[:, 0].sum(0), a[:, 1:].sum((0, 1))]).cpu().double()

    for batch, found in _measure(model, batches, readers, add_up):
        counts += torch.tensor([[len(batch.lengths)], [sum(batch.lengths) - len(batch.lengths)]])
        for name, added in found.items():
            sums[name] += added
    distributed.sum_([counts, *sums.values()])
    return {name: total / counts.clamp(min=1) for name, total in sums.items()}


# Expertise of a neuron: how well its activation alone tells undesired texts from others (Suau et al. 2024,
# "Whispering experts"). Two methods act on it: Det-0 removes the best experts, AurA damps every neuron whose
# AUROC is above chance.

EXPERTISE_METHODS = ("aura", "det0")


def expertise(
    model: "PreTrainedModel",
    undesired: ReferenceSet,
    benign: ReferenceSet,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    batch_tokens: int = 1024,
) -> Scores:
    """AUROC of each mlp.up neuron, as a classifier of undesired against benign samples; 0.5 is chance.

    A neuron's activation on a sample is the largest output of its row of mlp.up over the sample's tokens, its
    completion included; an expert's neuron has 0 at tokens that are not sent to it.

    Returns:
        Scores in [0, 1], one [out] tensor an mlp.up.
    """
    sites = sites_of(model, ("mlp.up",))
    described = describe(model)
    outputs = [
        _largest_outputs(model, encode_whole(model, samples, tokenizer), sites, batch_tokens)
        for samples in (undesired, benign)
    ]
    values = {site.name: auroc(outputs[0][site.name], outputs[1][site.name]).float() for site in sites}
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
    """P(positive > negative) + ½ P(equal), of every column: positive [P, N], negative [M, N] → [N], in
    float64.

    The rank-sum statistic U / (P M) with midranks for ties, exactly.
    """
    ordered = negative.T.contiguous().sort(-1).values
    values = positive.T.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above).double().sum(-1) / (2 * values.shape[1] * ordered.shape[1])


def aura_factors(scores: Scores, only: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
    """AurA's factor of each neuron: 1 − 2 (AUROC − ½) where AUROC > ½, else 1 (untouched).

    Args:
        only: damp these neurons of each site alone, the best experts for example; None damps all, as AurA
            does.
    """
    factors = {name: (1 - 2 * (auc - 0.5)).clamp(0, 1) for name, auc in scores.items()}
    for name, factor in factors.items() if only is not None else ():
        kept = torch.ones(len(factor), dtype=torch.bool)
        kept[list((only or {}).get(name, ()))] = False
        factor[kept] = 1.0
    return factors


def _largest_outputs(
    model: "PreTrainedModel", encoded: list[Encoded], sites: list[Site], batch_tokens: int
) -> dict[str, Tensor]:
    """Site → [samples, out]: each neuron's largest output over the tokens of each sample."""
    maxima = {site.name: torch.zeros(len(encoded), site.out) for site in sites}
    by_name = {site.name: site for site in sites}
    share = distributed.stride(encoded)
    batches = make_batches(share, batch_tokens, device_of(model), rope_switches(model))
    largest = _measure(
        model, batches, by_name, lambda z: z.float().amax(1).cpu(), outputs=True, fill=-torch.inf
    )
    for batch, found in largest:
        for name, rows in found.items():
            maxima[name][[sample.index for sample in batch.samples]] = rows
    distributed.sum_(maxima.values())  # a sample belongs to one rank, and is zero in the others
    return maxima
