"""Mixtures of experts: MLPs of which a router sends each token to a few.

transformers keeps the experts of a layer in fused parameters, gate_up_proj [experts, 2 · inner, hidden] and
down_proj [experts, hidden, inner], and computes them in one call that has no place for a hook. Here they are
computed one by one from the same parameters.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATRICES = "_sparc3_matrices"
"""The attribute that holds the matrices of open experts: (parameter, expert) → Matrix."""

Product = Callable[[Tensor, Tensor], Tensor]


class Matrix(nn.Module):
    """One expert's matrix of a fused parameter, which hooks can watch.

    Called with the features [n, in] of the tokens that the router sent to the expert, and with these tokens'
    places [n], ascending, among all tokens of the batch, row after row.
    """

    def __init__(self, experts: nn.Module, parameter: str, expert: int) -> None:
        super().__init__()
        self._of = experts, parameter, expert  # in a tuple, which makes the experts no part of this module

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        experts, parameter, expert = self._of
        return F.linear(x, getattr(experts, parameter)[expert])


def matrices(experts: nn.Module) -> dict[tuple[str, int], Matrix]:
    """All matrices of a layer's experts."""
    count = len(experts.gate_up_proj)  # type: ignore[arg-type]
    return {
        (name, expert): Matrix(experts, name, expert)
        for name in ("gate_up_proj", "down_proj")
        for expert in range(count)
    }


def one_by_one(
    experts: nn.Module, product: Product | None = None, *, constant_routing: bool = False
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of a layer's experts, one expert after the other: what transformers' own computes, but for
    the order of the sum over experts.

    Args:
        product: (gate, up) → what the down projection reads; act(gate) · up where it is None.
        constant_routing: whether relevance stops at the routing weights instead of flowing into the router.
    """
    return partial(_compute_experts, experts, product or partial(_apply_gate, experts), constant_routing)


def _apply_gate(experts: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    act: Callable[[Tensor], Tensor] = experts.get_submodule("act_fn")
    return act(gate) * up


def _compute_experts(
    experts: nn.Module,
    product: Product,
    constant_routing: bool,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Σ over a token's k experts of weight · expert(token): [N, hidden] of [N, hidden], [N, k], [N, k]."""
    within = experts.__dict__.get(MATRICES) or matrices(experts)
    count, (tokens, k) = len(within) // 2, top_k_index.shape
    routed = top_k_index.reshape(-1)
    order = routed.argsort(stable=True)
    shares = top_k_weights.detach() if constant_routing else top_k_weights
    parts = []
    # An expert without a token is computed all the same, so that whoever watches it learns of its zeros.
    for expert, pairs in enumerate(order.split(torch.bincount(routed, minlength=count).tolist())):
        places = pairs // k
        gate, up = within["gate_up_proj", expert](hidden_states[places], places).chunk(2, dim=-1)
        parts.append(within["down_proj", expert](product(gate, up), places))
    weighted = torch.cat(parts) * shares.reshape(-1)[order, None]
    return weighted[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def tokens_of(args: Sequence[Tensor]) -> Tensor | None:
    """Of what a hook's module was called with, the tokens of a Matrix; None for every other map, which sees
    them all."""
    return args[1] if len(args) > 1 else None


def by_position(x: Tensor, tokens: Tensor | None, shape: Sequence[int]) -> Tensor:
    """What a hook sees as features of each position: [B, T, d], zero where the token was not sent to this
    expert.

    Args:
        x: the input or output of a linear map [..., d], or its gradient.
        tokens: which tokens x is of (`tokens_of`).
        shape: (B, T) of the batch.
    """
    if tokens is None:
        return x.reshape(*shape, -1)
    return x.new_zeros(shape[0] * shape[1], x.shape[-1]).index_copy(0, tokens, x).view(*shape, -1)


def by_sample(
    x: Tensor, tokens: Tensor | None, shape: Sequence[int], lengths: Sequence[int], skip: int = 0
) -> list[Tensor]:
    """What a hook sees, sample by sample: [n, d] each of its positions from `skip` to its length, of an
    expert those sent to it."""
    if tokens is None:
        rows = x.reshape(*shape, -1)
        return [rows[row, skip:length] for row, length in enumerate(lengths)]
    ends = [(row * shape[1] + skip, row * shape[1] + length) for row, length in enumerate(lengths)]
    edges = torch.tensor(ends, device=x.device)
    return [x[begin:end] for begin, end in torch.searchsorted(tokens, edges).tolist()]
