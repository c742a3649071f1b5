"""The methods `wanda` and `activation`, which need activations only: one forward, no gradient, no logits."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__, distributed
from ..models.experts import arrange_by_position, tokens_of
from ..models.fingerprint import describe
from ..models.load import context_length, rope_switches, vocabulary_size
from ..models.offloading import device_of
from ..models.sites import Site, down_sites, readers_of, sites_of
from ..samples.batches import Batch, Encoded, encode, join_completions, make_batches
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from .patching import freeze
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
    for batch, measured in _measure(model, batches, sites, lambda a: measure(a).sum(1), skip=skip):
        sums.add(batch, measured)
        yield batch


def _measure(
    model: "PreTrainedModel",
    batches: Iterable[Batch],
    sites: Mapping[str, Site],
    measure: Callable[[Tensor], Tensor],
    *,
    skip: int = 0,
    **options: Any,
) -> Generator[tuple[Batch, dict[str, Tensor]], None, None]:
    """`measure` of each site's activations [B, T, width], batch by batch; `options` are those of
    `capture`."""
    with freeze(model), torch.no_grad():
        for batch in batches:
            measured: dict[str, Tensor] = {}
            mask = batch.mask()
            mask[:, :skip] = False

            def receive(name: str, a: Tensor, measured: dict[str, Tensor] = measured) -> None:
                measured[name] = measure(a)

            with capture(sites, mask, receive, **options):
                model.base_model(input_ids=batch.ids, use_cache=False)
            yield batch, measured


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

    The activations are [B, T, width], in float32 or float64, even where the module sees flattened tokens. An
    expert's activations are 0 at tokens that are not routed to it.

    Args:
        mask: [B, T], false at padding and at ignored positions, where activations are replaced by `fill`.
        outputs: receive the site's part of the module's output instead of the module's input.
    """

    def hook(name: str, site: Site, _: object, args: Sequence[Tensor], output: Tensor | None = None) -> None:
        x = args[0] if output is None else site.select_features(output)
        a = arrange_by_position(x.detach(), tokens_of(args), mask.shape)
        x32 = a if a.dtype == torch.float64 else a.float()
        receive(name, x32.masked_fill(~mask.to(a.device)[..., None], fill))

    with ExitStack() as hooks:
        for name, site in sites.items():
            module = site.hook_module
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


# The largest contribution of each neuron to the residual stream, which reveals super weights (Yu et al. 2024)
# and massive activations (Sun et al. 2024).


def largest_writes(
    model: "PreTrainedModel", samples: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> dict[str, Tensor]:
    """Name of each mlp.up → [out]: max_t |a_ti| · ‖W_down[:, i]‖₂ of each neuron, over all tokens of the
    samples."""
    down_by_mlp = down_sites(model)
    downs = {site.name: down_by_mlp[site.mlp] for site in sites_of(model, ("mlp.up",))}
    encoded = encode_whole(model, samples, tokenizer)
    batches = make_batches(encoded, 1024, device_of(model), rope_switches(model))
    maxima: dict[str, Tensor] = {}
    for _, batch_maxima in _measure(model, batches, downs, lambda a: a.float().abs().amax((0, 1)).cpu()):
        for name, largest in batch_maxima.items():
            maxima[name] = torch.maximum(maxima.get(name, largest), largest)
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
        name of each site of the roles → [2, width], float64: the means over the samples' first tokens, and
        over all others (zero if there are no others).

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

    for batch, sums_of_batch in _measure(model, batches, readers, add_up):
        counts += torch.tensor([[len(batch.lengths)], [sum(batch.lengths) - len(batch.lengths)]])
        for name, sum_of_batch in sums_of_batch.items():
            sums[name] += sum_of_batch
    distributed.sum_([counts, *sums.values()])
    return {name: total / counts.clamp(min=1) for name, total in sums.items()}


# The expertise of a neuron is how well its activation alone tells undesired texts from others (Suau et al.
# 2024, "Whispering experts"). Det-0 removes the best experts; AurA damps every neuron whose AUROC is above
# chance.

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

    A neuron's activation on a sample is the largest output of its row of mlp.up over the sample's tokens,
    including the completion; a neuron of an expert has 0 at tokens that are not routed to it.

    Returns:
        Scores in [0, 1], one [out] tensor per mlp.up.
    """
    sites = sites_of(model, ("mlp.up",))
    model_info = describe(model)
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
            "model": model_info,
            "samples_fingerprint": [undesired.fingerprint, benign.fingerprint],
            "version": __version__,
        },
    )


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """P(positive > negative) + ½ P(equal) for every column: positive [P, N], negative [M, N] → [N], in
    float64.

    Exactly the rank-sum statistic U / (P M), with midranks for ties (Mann and Whitney 1947).
    """
    ordered = negative.T.contiguous().sort(-1).values
    values = positive.T.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above).double().sum(-1) / (2 * values.shape[1] * ordered.shape[1])


def aura_factors(scores: Scores, neurons: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
    """AurA's factor of each neuron: 1 − 2 (AUROC − ½) where AUROC > ½, else 1 (unchanged).

    Args:
        neurons: damp only these neurons of each site, such as the best experts; None damps all, as AurA does.
    """
    factors = {name: (1 - 2 * (auc - 0.5)).clamp(0, 1) for name, auc in scores.items()}
    for name, factor in factors.items() if neurons is not None else ():
        untouched = torch.ones(len(factor), dtype=torch.bool)
        untouched[list((neurons or {}).get(name, ()))] = False
        factor[untouched] = 1.0
    return factors


def _largest_outputs(
    model: "PreTrainedModel", encoded: list[Encoded], sites: list[Site], batch_tokens: int
) -> dict[str, Tensor]:
    """Site → [samples, out]: each neuron's largest output over the tokens of each sample."""
    maxima = {site.name: torch.zeros(len(encoded), site.out) for site in sites}
    by_name = {site.name: site for site in sites}
    share = distributed.stride(encoded)
    batches = make_batches(share, batch_tokens, device_of(model), rope_switches(model))
    measured = _measure(
        model, batches, by_name, lambda z: z.float().amax(1).cpu(), outputs=True, fill=-torch.inf
    )
    for batch, batch_maxima in measured:
        for name, rows in batch_maxima.items():
            maxima[name][[sample.index for sample in batch.samples]] = rows
    distributed.sum_(maxima.values())  # a sample belongs to one rank, and is zero in the others
    return maxima
