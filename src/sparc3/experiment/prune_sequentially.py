"""Sequential Wanda: score each layer on the outputs of the layers before it, which are already pruned."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__, distributed
from ..attribution.activations import capture
from ..attribution.patching import freeze
from ..circuits.ablate import ablated
from ..circuits.circuit import Circuit
from ..circuits.select import select
from ..errors import UserError
from ..models.families import ROLES
from ..models.fingerprint import describe
from ..models.load import context_length, rope_switches, vocabulary_size
from ..models.offloading import device_of
from ..models.sites import Site, family_of, layers_of, sites_of
from ..progress import Progress
from ..samples.batches import Batch, encode, make_batches
from ..samples.reference_set import ReferenceSet, Sample
from ..scores import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH_TOKENS = 2048
"""Padded tokens in one forward pass of a layer."""


def prune_sequentially(
    model: "PreTrainedModel",
    samples: "ReferenceSet | Iterable[str | Sequence[int] | Sample]",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    fraction: float | None = None,
    scope: str = "row",
    sites: Sequence[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    truncate: bool = False,
    progress: bool = False,
) -> Circuit:
    """The weights that Wanda's published code would remove (Sun et al. 2024): layer after layer, by |W_ij| ·
    ‖a_j‖₂ with the activations of the model without the weights removed so far. Within a layer, all sites are
    scored before any weight is removed.

    One pass over the layers, each of which runs twice; the hidden states of all samples are in memory at
    once. Afterwards the model is as it was.

    Args:
        samples: as in `attribute`.
        tokenizer: as in `attribute`.
        truncate: as in `attribute`.
        fraction: the share of every output row, or of every site.
        scope: "row", "site", or "n:m" without a fraction.
        sites: canonical roles; by default all that the model has.
        batch_tokens: padded tokens in one forward pass of a layer.

    Returns:
        a circuit of weights, for `ablated`, `ablate_` or `export`.

    Raises:
        UserError: as `attribute` and `select` do.
    """
    if scope == "global":
        raise UserError(
            "sequential pruning works one layer at a time, so it has no scope global; use row, site, "
            "or n:m such as 2:4"
        )
    references = ReferenceSet.of(samples)
    model_sites = sites_of(model, sites or [role for role in ROLES if role in family_of(model).roles])
    encoded = encode(
        references,
        tokenizer,
        "predicted",
        context=context_length(model),
        vocabulary=vocabulary_size(model),
        truncate=truncate,
    )
    model_info = describe(model)
    members: dict[str, Tensor] = {}
    with freeze(model), torch.no_grad(), ExitStack() as removed:
        # As in Wanda's published code, the first layer's inputs are caught once; from then on the layers are
        # run one by one on them, and the rest of the model is not.
        flows = [
            capture_layer_inputs(model, batch)
            for batch in make_batches(
                distributed.stride(encoded), batch_tokens, device_of(model), rope_switches(model)
            )
        ]
        layers = list(layers_of(model))
        progress_bar = removed.enter_context(Progress(len(layers), "pruning", "layer", show=progress))
        for index, layer in enumerate(progress_bar.each(layers)):
            scores = layer_scores(
                layer, [site for site in model_sites if site.layer == index], flows, model_info
            )
            part = select(scores, fraction=fraction, scope=scope)
            members |= part.members
            # The layer stays pruned until the end of the `with`, and its outputs are the next one's inputs.
            removed.enter_context(ablated(model, part))
            for flow in flows:
                flow.hidden = flow.run_layer(layer)
    return Circuit(
        "weight",
        members,
        model_info,
        {
            "selection": {"fraction": fraction, "scope": scope, "order": "lowest", "sequential": True},
            "scores": {
                "method": "wanda",
                "unit": "weight",
                "samples": len(encoded),
                "samples_fingerprint": references.fingerprint,
            },
            "sizes": {site.name: site.out * site.inp for site in model_sites},
            "version": __version__,
        },
    )


@dataclass
class _LayerFlow:
    """One batch on its way through the layers.

    Attributes:
        hidden: [B, T, hidden], the input of the next layer.
        others: layer → its other arguments (masks, position embeddings).
    """

    batch: Batch
    hidden: Tensor
    others: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]

    def run_layer(self, layer: nn.Module) -> Tensor:
        args, kwargs = self.others[layer]
        output = layer(self.hidden, *args, **kwargs)
        # Some families' layers return (hidden, …), others the hidden state itself.
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def capture_layer_inputs(model: "PreTrainedModel", batch: Batch) -> _LayerFlow:
    """The inputs of the first layer, and the other arguments of all layers, recorded in one forward pass."""
    layers = list(layers_of(model))
    first: list[Tensor] = []
    others: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not first:
            first.append(hidden)
        others[layer] = args[1:], kwargs

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model.base_model(input_ids=batch.ids, use_cache=False)
    return _LayerFlow(batch, first[0], others)


def layer_scores(
    layer: nn.Module, sites: list[Site], flows: list[_LayerFlow], model_info: dict[str, str]
) -> Scores:
    """|W_ij| · ‖a_j‖₂ of one layer's sites, over the tokens of all samples and ranks."""
    squares = {site.name: torch.zeros(site.inp, dtype=torch.float64) for site in sites}
    sites_by_name = {site.name: site for site in sites}
    for flow in flows:
        mask = flow.batch.mask()

        def receive(name: str, a: Tensor, mask: Tensor = mask) -> None:
            squares[name] += a[mask.to(a.device)].square().sum(0).cpu()

        with capture(sites_by_name, mask, receive):
            flow.run_layer(layer)
    distributed.sum_(squares.values())
    values = {}
    for site in sites:
        size = site.weight.detach().to("cpu", torch.float32, copy=True).abs_()
        values[site.name] = size.mul_(squares[site.name].sqrt().float())
    return Scores(values, {"unit": "weight", "method": "wanda", "model": model_info})
