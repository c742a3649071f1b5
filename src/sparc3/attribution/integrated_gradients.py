"""The method `ig`: integrated gradients over activations, several forward and backward passes a batch."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.experts import arrange_by_position
from ..models.offloading import value_of
from ..models.sites import Site
from ..samples.batches import Batch
from .activations import capture
from .packing import pack_positions
from .relevance import hook_sites, predict, prepare_model, receivers, target_of, to_float32
from .sums import Settings, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


STEPS = 5
"""Steps of integrated gradients by default, as in EAP-IG."""


def integrated_gradients(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """EAP-IG's rule at units (Hanna et al. 2024, arXiv 2403.17806): an activation's difference from the
    baseline, times the mean of its gradient along the path, 1/m Σ_k ∂y/∂a at e₀ + k/m (e − e₀), k = 1 … m.

    e are the token embeddings; the baseline e₀, at every position, is the mean embedding of the vocabulary.
    The target is that of the original input. m is the number after "ig:", else STEPS.
    """
    settings = replace(settings, epsilon=0.0)
    steps = int(settings.method.partition(":")[2] or 0) or STEPS
    signed = settings.unit == "neuron" and settings.neuron == "signed"
    with prepare_model(model, settings, None):
        for batch in batches:
            gathered: dict[str, Tensor] = {}
            receive = receivers(sites, batch, settings, gathered, sums)
            predicted, shape = predict(model, batch), batch.ids.shape
            grads: dict[str, Tensor] = {}
            differences: dict[str, Tensor] = {}

            # The dictionaries are defaults of these functions, because a closure would see the variables of
            # the loop's later rounds (ruff B023).
            def note_gradient(
                name: str,
                tokens: Tensor | None,
                grad: Tensor,
                a: Tensor,
                grads: dict[str, Tensor] = grads,
                differences: dict[str, Tensor] = differences,
                shape: torch.Size = shape,
            ) -> None:
                grad_by_position = arrange_by_position(to_float32(grad), tokens, shape)
                grads[name] = grads.get(name, 0) + grad_by_position / steps
                # The last step's activations stay: at k = m, the input is the sample's own.
                differences[name] = arrange_by_position(to_float32(a), tokens, shape)

            def subtract(name: str, a: Tensor, differences: dict[str, Tensor] = differences) -> None:
                differences[name] = differences[name] - a

            receive_gradient = {site.name: partial(note_gradient, site.name) for site in sites}
            for step in range(1, steps + 1):
                with (
                    _interpolate_embeddings(model, step / steps),
                    pack_positions(model, batch),
                    hook_sites(sites, settings, receive_gradient),
                ):
                    target_of(model, batch, predicted).backward()
            # At share 0 every embedding is e₀, so what is captured is each activation at the baseline.
            with _interpolate_embeddings(model, 0.0), torch.no_grad():
                sites_by_name = {site.name: site for site in sites}
                with capture(sites_by_name, batch.mask(), subtract, outputs=signed):
                    model.base_model(input_ids=batch.ids, use_cache=False)
            for site in sites:
                receive[site.name](None, grads.pop(site.name), differences.pop(site.name))
            sums.add(batch, gathered)
            yield batch


@contextmanager
def _interpolate_embeddings(model: "PreTrainedModel", share: float) -> Iterator[None]:
    """Inside, each token's embedding is e₀ + share · (e − e₀), where e₀ is the mean of all embeddings."""
    embeddings = model.get_input_embeddings()

    def hook(module: nn.Module, _: object, output: Tensor) -> Tensor:
        # Gemma 3's embedding module multiplies by √hidden_size itself (`embed_scale`).
        mean = value_of(module, "weight").float().mean(0) * getattr(module, "embed_scale", 1.0)
        return torch.lerp(mean.to(output), output, share)

    handle = embeddings.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
