"""AttnLRP once more, by its rules on torch's own functions instead of on modules: a third opinion that needs no name of any model.

While `Surrogate` is on, each function computes the value it always does, written with constants (`detach`) so that its plain gradient
is the rule's (Arras et al. 2025, the modified-gradient view). It knows no architecture and shares no code with the engine.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _half(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def _product(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Uniform rule: half to each factor, where both carry relevance."""

    def rule(a: Any, b: Any, **kwargs: Any) -> Tensor:
        both = all(isinstance(x, Tensor) and x.requires_grad for x in (a, b))
        return function(_half(a), _half(b), **kwargs) if both else function(a, b, **kwargs)

    return rule


def _identity(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Identity rule: f(x) = x · (f(x)/x), the factor a constant."""

    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factor = torch.where(x == 0, torch.zeros_like(x), function(x, *args, **kwargs) / x)
        return x * factor.detach()

    return rule


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * (x > 0)


def _layer_norm(x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt().detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = _half(q) @ _half(k).transpose(-1, -2) * (kwargs.get("scale") or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return _half(scores.softmax(-1)) @ _half(v)


def _baddbmm(added: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * added + alpha * (_half(batch1) @ _half(batch2))


RULES: dict[Any, Callable[..., Tensor]] = {
    **{f: _product(f) for f in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)},
    **{f: _identity(f) for f in (F.silu, F.gelu, torch.tanh, torch.square)},
    **{f: lambda x, f=f: f(x).detach() for f in (torch.rsqrt, Tensor.rsqrt)},
    **{F.relu: _relu, torch.relu: _relu, F.layer_norm: _layer_norm, F.scaled_dot_product_attention: _attention, Tensor.baddbmm: _baddbmm},
}


class Surrogate(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return RULES.get(func, func)(*args, **(kwargs or {}))
