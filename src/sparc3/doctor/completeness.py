"""The ledger: where the relevance of one target logit ends up. In CP mode nothing is lost, so the parts must
add up to the logit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attribution.patching import frozen, lrp_rules
from ..attribution.relevance import checkpoint_layers, target_of
from ..models.offloading import device_of, is_offloaded, value_of
from ..models.sites import family_of
from ..samples.batches import Encoded, make_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ledger:
    """Relevance of the largest logit at the last position, by the part of the model that it ends in.

    Attributes:
        target: the logit.
        tokens: relevance of each input token's embedding [T], float64, on the CPU.
        positions: of the learned position embeddings together; 0 where there are none.
        biases: of all biases together.
    """

    target: float
    tokens: Tensor
    positions: float
    biases: float

    @property
    def embeddings(self) -> float:
        return float(self.tokens.sum())

    @property
    def gap(self) -> float:
        """|target − sum of the parts|, relative to the larger of |target| and Σ |part|, so that parts that
        cancel are no excuse."""
        parts = (self.embeddings, self.positions, self.biases)
        return abs(self.target - sum(parts)) / max(abs(self.target), sum(map(abs, parts)), 1e-300)


def relevance_ledger(model: "PreTrainedModel", ids: Sequence[int], *, cp: bool = True) -> Ledger:
    """The ledger of one sequence of token ids.

    AttnLRP (cp=False) loses relevance in the softmax and has no reason to balance; its `tokens` are the usual
    input heatmap.

    Raises:
        UnsupportedModel: a module without a rule.
    """
    batch = make_batch([Encoded(0, tuple(ids), (len(ids) - 1,))], device_of(model))
    flows: dict[str, list[Tensor]] = {"tokens": [], "positions": [], "biases": []}
    again = checkpoint_layers(model) if is_offloaded(model) else nullcontext()
    with frozen(model), lrp_rules(model, cp=cp), again, _record_relevance(model, flows):
        y = target_of(model, batch)
        y.backward()
    total = {
        part: sum((flow.sum(0) for flow in flow_list), torch.zeros(1, dtype=torch.float64))
        for part, flow_list in flows.items()
    }
    return Ledger(
        float(y.detach()), total["tokens"], float(total["positions"].sum()), float(total["biases"].sum())
    )


@contextmanager
def _record_relevance(model: "PreTrainedModel", flows: dict[str, list[Tensor]]) -> Iterator[None]:
    """Hooks on the embeddings, which the graph then begins at, and on every module that adds a bias."""
    family = family_of(model)
    inputs: dict[nn.Module, str] = {model.get_input_embeddings(): "tokens"}
    if family.positions:
        inputs[model.get_submodule(family.positions)] = "positions"
    with ExitStack() as stack:
        for module in model.modules():
            biased = module._parameters.get("bias") is not None
            if module in inputs:
                stack.callback(module.register_forward_hook(_input_hook(flows[inputs[module]])).remove)
            elif biased:
                stack.callback(
                    module.register_forward_hook(
                        _bias_hook(value_of(module, "bias").detach(), flows["biases"])
                    ).remove
                )
        yield


def _input_hook(flow: list[Tensor]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        value = output.detach().requires_grad_()
        value.register_hook(lambda grad: flow.append((grad.double() * value.detach().double()).sum(-1).cpu()))
        return value

    return hook


def _bias_hook(bias: Tensor, flow: list[Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        def receive(grad: Tensor | None) -> None:
            if grad is not None:  # nothing flows to queries, keys and gates in CP mode
                flow.append((grad.double() * bias.to(grad.device).double()).sum().reshape(1, 1).cpu())

        if output.requires_grad:
            output.register_hook(receive)

    return hook
