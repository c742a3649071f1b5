"""A copy of a model that computes entirely in float64, so that a remaining gap is a mistake and not
rounding; and a second implementation of AttnLRP, on torch's functions instead of modules, which needs no
names of modules.

Inside `Rules`, each function computes its usual value, but some parts are constants (`detach`), such that
its plain gradient is the rule's (Arras et al. 2025, the modified-gradient view). This implementation
shares no code with attribution/rules.py and patching.py, computes f(x)/x by division, and uses the table
of families only to find the MLPs' non-linearities.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attribution.patching import freeze
from ..attribution.relevance import checkpoint_layers
from ..models.experts import arrange_by_position, tokens_of
from ..models.memory import available
from ..models.offloading import copy_model, device_of, is_offloaded
from ..models.sites import Site, family_of, layers_of, non_linearities, shadow, sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Float64(TorchFunctionMode):
    """Inside, conversions to float32 convert to float64: transformers' norms, softmax and rotary
    embeddings round to float32 in every model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        elif func in (Tensor.to, torch.softmax, Tensor.softmax, F.softmax):
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {
                key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()
            }
        return func(*args, **kwargs)


def exact_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy in float64, or in float32 if that does not fit into memory; the model itself if neither fits,
    or if it is quantised."""
    if is_quantised(model):
        return model
    room = available(torch.device("cpu") if is_offloaded(model) else model.device) or 4 * 2**30
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for dtype in (torch.float64, torch.float32):
        if dtype == model.dtype == torch.float32:
            return model
        # A later check copies the model once more, in 16 bits.
        if numbers * (model.dtype.itemsize + 1.3 * dtype.itemsize) < room:
            copied = copy_model(model).to(dtype)
            if dtype == torch.float64:
                copied.forward = partial(_run_in_float64, copied.forward)
            return copied
    return model


def _run_in_float64(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Float64():
        return forward(*args, **kwargs)


def all_sites(model: "PreTrainedModel") -> list[Site]:
    return sites_of(model, family_of(model).roles)


def is_quantised(model: "PreTrainedModel") -> bool:
    return any(site.is_quantised for site in all_sites(model))


def _half(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def _product(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Uniform rule: each factor gets half, if both carry relevance."""

    def rule(a: Any, b: Any, **kwargs: Any) -> Tensor:
        both_vary = all(isinstance(x, Tensor) and x.requires_grad for x in (a, b))
        return function(_half(a), _half(b), **kwargs) if both_vary else function(a, b, **kwargs)

    return rule


def _identity(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Identity rule: f(x) = x · (f(x)/x), where the factor is a constant."""

    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            factor = torch.where(x == 0, torch.zeros_like(x), function(x, *args, **kwargs) / x)
        return x * factor

    return rule


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt().detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = _half(q) @ _half(k).transpose(-1, -2) * (kwargs.get("scale") or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(scores).masked_fill_(~attn_mask, -torch.inf)
        scores = scores + attn_mask
    return _half(scores.softmax(-1)) @ _half(v)


def _baddbmm(added: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * added + alpha * (_half(batch1) @ _half(batch2))


def _route_tokens(*args: Any, **kwargs: Any) -> Any:
    """A router's decisions are constants: the largest weights and their experts."""
    values, indices = torch.topk(*args, **kwargs)
    return values.detach(), indices


_PRODUCTS: tuple[Any, ...] = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_PRODUCTS += (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)
_RULES: dict[Any, Callable[..., Tensor]] = {
    **{function: _product(function) for function in _PRODUCTS},
    **{function: lambda x, f=function: f(x).detach() for function in (torch.rsqrt, Tensor.rsqrt)},
    torch.topk: _route_tokens,
    torch.tanh: _identity(torch.tanh),
    Tensor.sigmoid: lambda x: x.detach().sigmoid(),
    Tensor.baddbmm: _baddbmm,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
}


class Rules(TorchFunctionMode):
    """Inside, torch's functions have the gradients of AttnLRP."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _RULES.get(func, func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Flow:
    """Input and output of a site on one sequence of T tokens, and the modified gradients of the largest
    last logit with respect to them.

    Attributes:
        a, z: input [T, in] and output [T, out].
        of_a, of_z: their modified gradients; of_a includes only what arrives through this site.
    """

    a: Tensor
    z: Tensor
    of_a: Tensor
    of_z: Tensor

    @property
    def signed_relevance(self) -> Tensor:
        """Σ_t ĝ_ti z_ti [out]."""
        return (self.of_z * self.z).sum(0)

    def heads(self, count: int) -> Tensor:
        """Σ_t Σ_{d ∈ head} a_td ∂̂y/∂a_td [heads], at attn.o."""
        return (self.a * self.of_a).sum(0).view(count, -1).sum(1)


def record_flows(model: "PreTrainedModel", ids: list[int], sites: list[Site]) -> dict[str, Flow]:
    """Site name → Flow on one sequence. The model is left as it was."""
    passed: dict[nn.Module, tuple[Tensor, Tensor, Tensor | None]] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Keep the first call: a checkpointed layer is computed again.
        passed.setdefault(module, (args[0], output, tokens_of(args)))
        return output.clone()  # the model may change it in place

    def begin(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    checkpointing = checkpoint_layers(model, Rules) if is_offloaded(model) else nullcontext()
    with freeze(model), checkpointing, ExitStack() as stack:
        family = family_of(model)
        for module in {
            module_of_layer
            for layer in layers_of(model)
            for module_of_layer in non_linearities(layer, family)
        }:
            stack.enter_context(shadow(module, "forward", _identity(module.forward)))
        modules = {site.name: site.hook_module for site in sites}
        modules_once = list(dict.fromkeys(modules.values()))
        for module in modules_once:
            stack.callback(module.register_forward_hook(watch).remove)
        stack.callback(model.get_input_embeddings().register_forward_hook(begin).remove)
        with Rules():
            logit = model(torch.tensor([ids], device=device_of(model)), use_cache=False).logits[0, -1].max()
        gradients_z = torch.autograd.grad(
            logit, [passed[module][1] for module in modules_once], retain_graph=True
        )
        gradients_a = torch.autograd.grad(logit, [passed[module][0] for module in modules_once])
    gradients = dict(zip(modules_once, zip(gradients_a, gradients_z, strict=True), strict=True))
    flow_by_site = {}
    for site in sites:
        (a, z, tokens), (gradient_a, gradient_z) = passed[modules[site.name]], gradients[modules[site.name]]
        parts = (a.detach(), site.select_features(z.detach()), gradient_a, site.select_features(gradient_z))
        flow_by_site[site.name] = Flow(
            *(arrange_by_position(part, tokens, (1, len(ids)))[0] for part in parts)
        )
    return flow_by_site
