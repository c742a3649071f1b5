"""Mixtures of experts: a router sends each token to a few of a layer's MLPs.

transformers keeps the experts of a layer in fused parameters, gate_up_proj [experts, 2 · inner, hidden] and
down_proj [experts, hidden, inner], and computes them in one call, inside which no hook can act. Here they are
computed one by one from the same parameters.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATRICES = "_sparc3_matrices"
"""The attribute of open experts with their matrices: (parameter, expert) → Matrix."""

Product = Callable[[Tensor, Tensor], Tensor]


class Matrix(nn.Module):
    """One expert's matrix of a fused parameter, as a module that can be hooked.

    It is called with the features [n, in] of the tokens that are routed to the expert, and with the
    indices [n] of these tokens, ascending, in the flattened batch.
    """

    def __init__(self, experts: nn.Module, parameter: str, expert: int) -> None:
        super().__init__()
        self._of = experts, parameter, expert  # a tuple, so that they are not registered as submodules

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


def compute_one_by_one(
    experts: nn.Module, product: Product | None = None, *, constant_routing: bool = False
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward for a layer's experts that computes one expert after the other. It equals transformers' own,
    apart from the order of the sum over experts.

    Args:
        product: (gate, up) → the input of the down projection; act(gate) · up by default.
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
    """Σ over a token's k experts of weight · expert(token): [N, hidden] from [N, hidden], [N, k], [N, k]."""
    matrix_of = experts.__dict__.get(MATRICES) or matrices(experts)
    count, (tokens, k) = len(matrix_of) // 2, top_k_index.shape
    expert_of_pair = top_k_index.reshape(-1)
    order = expert_of_pair.argsort(stable=True)
    routing_weights = top_k_weights.detach() if constant_routing else top_k_weights
    parts = []
    # Experts without tokens are computed too, so that their hooks are called and see empty inputs.
    for expert, pairs in enumerate(order.split(torch.bincount(expert_of_pair, minlength=count).tolist())):
        token_indices = pairs // k
        gate_up = matrix_of["gate_up_proj", expert](hidden_states[token_indices], token_indices)
        gate, up = gate_up.chunk(2, dim=-1)
        parts.append(matrix_of["down_proj", expert](product(gate, up), token_indices))
    # The pairs are sorted by expert; argsort of that order puts them back, k adjacent pairs per token.
    weighted = torch.cat(parts) * routing_weights.reshape(-1)[order, None]
    return weighted[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def tokens_of(args: Sequence[Tensor]) -> Tensor | None:
    """The token indices among the arguments of a hooked module: of a Matrix; None for every other map,
    which sees all tokens."""
    return args[1] if len(args) > 1 else None


def arrange_by_position(x: Tensor, tokens: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Features seen by a hook, arranged by position: [B, T, d], zero where the token is not routed to this
    expert.

    Args:
        x: the input or output of a linear map [..., d], or its gradient.
        tokens: the indices of the tokens in x (`tokens_of`).
        shape: (B, T) of the batch.
    """
    if tokens is None:
        return x.reshape(*shape, -1)
    return x.new_zeros(shape[0] * shape[1], x.shape[-1]).index_copy(0, tokens, x).view(*shape, -1)


def split_by_sample(
    x: Tensor, tokens: Tensor | None, shape: Sequence[int], lengths: Sequence[int], skip: int = 0
) -> list[Tensor]:
    """Features seen by a hook, split by sample: [n, d] for its positions from `skip` to its length; for an
    expert, only those routed to it."""
    if tokens is None:
        rows = x.reshape(*shape, -1)
        return [rows[row, skip:length] for row, length in enumerate(lengths)]
    # The token indices ascend, so that those of a sample are one slice, found by bisection.
    ends = [(row * shape[1] + skip, row * shape[1] + length) for row, length in enumerate(lengths)]
    edges = torch.tensor(ends, device=x.device)
    return [x[begin:end] for begin, end in torch.searchsorted(tokens, edges).tolist()]
