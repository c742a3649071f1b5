"""The LRP rules as modified gradients. Tensors and autograd only: forward values never change, only gradients
do.

Relevance of an activation is activation × (modified gradient), so a rule is a choice of backward factor.
Sources: AttnLRP (Achtibat et al. 2024, arXiv 2402.05602), the modified-gradient view (Arras et al. 2025),
CP-LRP (Ali et al. 2022).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Factor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RuleSet:
    """Which rules a method has. Statistics of norms are constants in all of them.

    Attributes:
        shares: the shares of an attention's gradient for query, key and value.
        identity: whether relevance passes an element-wise non-linearity unchanged and a router's decisions
            are constants; otherwise both have their plain gradient, and so has a gated product.
        gate: the gate's share of a gated product's relevance.
        temperature: the temperature of the attention's softmax in the backward pass.
        epsilon: the ε of linear maps (`epsilon_rule`).
    """

    shares: tuple[float, float, float] = (0.25, 0.25, 0.5)
    identity: bool = True
    gate: float = 0.5
    temperature: float = 1.0
    epsilon: float = 0.0


ATTN_LRP = RuleSet()
"""Achtibat et al. 2024."""
CP_LRP = RuleSet(shares=(0.0, 0.0, 1.0), gate=0.0)
"""Ali et al. 2022: queries, keys and gates are constants."""
RELP = RuleSet(shares=(0.0, 0.0, 1.0))
"""Relevance patching (Jafari et al. 2025, arXiv 2508.21258): queries and keys are constants, gates not."""
GIM = RuleSet(identity=False, temperature=2.0)
"""Gradient interaction modifications (Edin et al. 2025, arXiv 2505.17630), as in the package gim-explain."""


def sigmoid_factor(x: Tensor) -> Tensor:
    """silu(x) / x = σ(x)."""
    return torch.sigmoid(x)


def normal_cdf_factor(x: Tensor) -> Tensor:
    """gelu(x) / x = Φ(x), the distribution function of the standard normal."""
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))


def tanh_gelu_factor(x: Tensor) -> Tensor:
    """gelu_tanh(x) / x = ½ (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def quick_gelu_factor(x: Tensor) -> Tensor:
    """quick_gelu(x) / x = σ(1.702 x)."""
    return torch.sigmoid(1.702 * x)


def relu_factor(x: Tensor) -> Tensor:
    """relu(x) / x = 1[x > 0]."""
    return (x > 0).to(x.dtype)


def relu_squared_factor(x: Tensor) -> Tensor:
    """relu(x)² / x = relu(x)."""
    return torch.relu(x)


def tanh_factor(x: Tensor) -> Tensor:
    """tanh(x) / x, and 1 at 0."""
    return torch.where(x == 0, torch.ones_like(x), torch.tanh(x) / x)


class _Identity(torch.autograd.Function):
    """Identity rule: forward f(x), backward g · f(x)/x with f(x)/x in closed form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], factor: Factor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.factor(x), None, None


def identity_rule(x: Tensor, function: Callable[[Tensor], Tensor], factor: Factor) -> Tensor:
    """function(x), whose relevance passes unchanged: R_x = R_y (AttnLRP, Eq. 9)."""
    return _Identity.apply(x, function, factor)  # type: ignore[no-untyped-call, no-any-return]


class _GatedProduct(torch.autograd.Function):
    """Identity rule on the gate's non-linearity and uniform rule on the product, in one step that saves only
    its two inputs for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor], factor: Factor, share: float
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.function, ctx.factor, ctx.share = function, factor, share
        product = function(gate)
        if product is gate:  # the non-linearity returned its argument
            return product * up
        return product.mul_(up)  # in place, because on a CPU new memory costs as much as what is computed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        to_gate = to_up = None
        if not ctx.share:
            to_up = grad * ctx.function(gate) if ctx.needs_input_grad[1] else None
            return None, to_up, None, None, None
        # f(gate) = gate · factor(gate), so one evaluation of the factor serves both gradients; then share ·
        # factor · grad in one pass over memory, in place.
        flow = ctx.factor(gate)
        flow = torch.addcmul(flow.new_zeros(()), flow, grad, value=ctx.share, out=flow)
        if ctx.needs_input_grad[1]:
            to_up = flow * gate
            if ctx.share != 0.5:
                to_up = to_up.mul_((1.0 - ctx.share) / ctx.share)
        if ctx.needs_input_grad[0]:
            to_gate = flow.mul_(up)
        return to_gate, to_up, None, None, None


def gated_product(
    gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor], factor: Factor, share: float
) -> Tensor:
    """function(gate) · up. The gate gets `share` of its relevance, and up the rest.

    share ½ is the uniform rule of AttnLRP (Eq. 12); share 0 is CP-LRP, where the gate is a constant.
    """
    return _GatedProduct.apply(gate, up, function, factor, share)  # type: ignore[no-untyped-call, no-any-return]


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap), whose relevance passes unchanged (identity rule)."""
    return identity_rule(x / cap, torch.tanh, tanh_factor) * cap


def explicit_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    identity: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention as transformers computes it, with the rules inside: query [B, H, T, d]; key and value
    may have fewer heads.

    Args:
        softcap: soft-capping of scores, as in Gemma 2; under the identity rule if `identity`.
        temperature: the temperature of the softmax in the backward pass.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = soft_cap(scores, softcap) if identity else torch.tanh(scores / softcap) * softcap
    scores = scores if mask is None else scores + mask
    if temperature == 1.0:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        weights = _TemperedSoftmax.apply(scores, temperature)  # type: ignore[no-untyped-call]
    weights = weights.to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class _TemperedSoftmax(torch.autograd.Function):
    """softmax(x), backward s ⊙ (g − Σ_j g_j s_j) with s = softmax(x / T): a saturated softmax passes back
    the gradient that it would have at temperature T (Edin et al. 2025)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.temperature = temperature
        return torch.softmax(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        soft = torch.softmax(x / ctx.temperature, dim=-1, dtype=grads[0].dtype)
        return (soft * (grads[0] - (grads[0] * soft).sum(-1, keepdim=True))).to(x.dtype), None


class _Epsilon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.epsilon = epsilon
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return absorb(grads[0], z, ctx.epsilon), None


def absorb(grad: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """ĝ z / (z + ε sign z), and zero where z is zero: the part of the modified gradient ĝ at its output
    that a linear map z = W a + b passes back under the ε-rule."""
    z32 = z if z.dtype == torch.float64 else z.float()  # in 16 bits 1 + 1e-6 is 1
    return grad * (z32.abs() / (z32.abs() + epsilon)).to(grad.dtype)


def epsilon_rule(*args: Tensor, function: Callable[..., Tensor], epsilon: float) -> Tensor:
    """A linear map's output z; each input gets R_{i←j} = a_i w_ji R_j / (z_j + ε sign z_j) of its relevance
    R = ĝ z (Bach et al. 2015, Eq. 58)."""
    return _Epsilon.apply(function(*args), epsilon)  # type: ignore[no-untyped-call, no-any-return]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_relevance(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient is multiplied by `factor`. Factor 0 makes it a constant."""
    if factor == 1.0:
        return x
    return x.detach() if factor == 0.0 else _Scale.apply(x, factor)  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    """norm(x), with the backward pass of the linear map that it is when its statistic is a constant: gain ·
    scale, after which LayerNorm subtracts the mean."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Callable[[Tensor], Tensor], gain: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        x32 = x if x.dtype == torch.float64 else x.float()  # as transformers' norms do
        square = x32.var(-1, keepdim=True, correction=0) if centred else x32.pow(2).mean(-1, keepdim=True)
        ctx.save_for_backward(torch.rsqrt(square + eps), *([] if gain is None else [gain]))
        ctx.centred = centred
        return norm(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gain = ctx.saved_tensors
        flow = grads[0] * gain[0] * scale if gain else grads[0] * scale
        if ctx.centred:
            flow = flow - flow.mean(-1, keepdim=True)
        return flow.to(grads[0].dtype), None, None, None, None


def rms_norm(x: Tensor, norm: Callable[[Tensor], Tensor], gain: Tensor | None, eps: float) -> Tensor:
    """norm(x) = gain · x / rms(x), where rms(x) is a constant in the backward pass (AttnLRP, Eq. 18)."""
    return _Norm.apply(x, norm, gain, eps, False)  # type: ignore[no-untyped-call, no-any-return]


def layer_norm(x: Tensor, norm: Callable[[Tensor], Tensor], gain: Tensor | None, eps: float) -> Tensor:
    """norm(x) = gain · (x − mean(x)) / std(x) + bias, where std(x) is a constant in the backward pass and the
    mean, which is linear, is not."""
    return _Norm.apply(x, norm, gain, eps, True)  # type: ignore[no-untyped-call, no-any-return]
