"""A copy of a model that computes in float64 throughout, so that what is left of a gap is a mistake and not
rounding; and AttnLRP once more, by its rules on torch's own functions instead of on modules: an opinion that
needs no name of any module.

While `Rules` is on, each function computes the value it always does, written with constants (`detach`) so
that its plain gradient is the rule's (Arras et al. 2025, the modified-gradient view). It shares no code with
attribution/rules.py and patching.py, computes f(x)/x by dividing, and of the family table reads only where an
MLP's non-linearity is.
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

from ..attribution.patching import frozen
from ..attribution.relevance import checkpoint_layers
from ..models.experts import by_position, tokens_of
from ..models.memory import available
from ..models.offloading import copy_model, device_of, is_offloaded
from ..models.sites import Site, family_of, layers_of, non_linearities, shadowed, sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Float64(TorchFunctionMode):
    """Inside, what is told to round to float32 does not: transformers' norms, softmax and rotations do so in
    any model."""

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
    """A copy in float64, or in float32 where that does not fit into memory; the model itself where neither
    does, or it is quantised."""
    if quantised(model):
        return model
    room = available(torch.device("cpu") if is_offloaded(model) else model.device) or 4 * 2**30
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for dtype in (torch.float64, torch.float32):
        if dtype == model.dtype == torch.float32:
            return model
        # A later check copies the model once more, in 16 bits.
        if numbers * (model.dtype.itemsize + 1.3 * dtype.itemsize) < room:
            twin = copy_model(model).to(dtype)
            if dtype == torch.float64:
                twin.forward = partial(_run_in_float64, twin.forward)
            return twin
    return model


def _run_in_float64(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Float64():
        return forward(*args, **kwargs)


def all_sites(model: "PreTrainedModel") -> list[Site]:
    return sites_of(model, family_of(model).roles)


def quantised(model: "PreTrainedModel") -> bool:
    return any(site.quantised for site in all_sites(model))


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
    """What a router decides is constant: the largest weights, and whose they are."""
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
    """What passes a site on one sequence of T tokens, and the modified gradients of the largest last logit
    there.

    Attributes:
        a, z: input [T, in] and output [T, out].
        of_a, of_z: their modified gradients; of_a is what arrives through this site alone.
    """

    a: Tensor
    z: Tensor
    of_a: Tensor
    of_z: Tensor

    @property
    def signed(self) -> Tensor:
        """Σ_t ĝ_ti z_ti [out]."""
        return (self.of_z * self.z).sum(0)

    def heads(self, count: int) -> Tensor:
        """Σ_t Σ_{d ∈ head} a_td ∂̂y/∂a_td [heads], at attn.o."""
        return (self.a * self.of_a).sum(0).view(count, -1).sum(1)


def flows(model: "PreTrainedModel", ids: list[int], sites: list[Site]) -> dict[str, Flow]:
    """What passes each site on one sequence: site name → Flow. The model is left as it was."""
    seen: dict[nn.Module, tuple[Tensor, Tensor, Tensor | None]] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The first time counts: a checkpointed layer comes by again.
        seen.setdefault(module, (args[0], output, tokens_of(args)))
        return output.clone()  # a model may write into what it gets

    def begin(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    again = checkpoint_layers(model, Rules) if is_offloaded(model) else nullcontext()
    with frozen(model), again, ExitStack() as stack:
        family = family_of(model)
        for module in {one for layer in layers_of(model) for one in non_linearities(layer, family)}:
            stack.enter_context(shadowed(module, "forward", _identity(module.forward)))
        modules = {site.name: site.hooked for site in sites}
        distinct = list(dict.fromkeys(modules.values()))
        for module in distinct:
            stack.callback(module.register_forward_hook(watch).remove)
        stack.callback(model.get_input_embeddings().register_forward_hook(begin).remove)
        with Rules():
            logit = model(torch.tensor([ids], device=device_of(model)), use_cache=False).logits[0, -1].max()
        of_z = torch.autograd.grad(logit, [seen[module][1] for module in distinct], retain_graph=True)
        of_a = torch.autograd.grad(logit, [seen[module][0] for module in distinct])
    gradients = dict(zip(distinct, zip(of_a, of_z, strict=True), strict=True))
    found = {}
    for site in sites:
        (a, z, tokens), (to_a, to_z) = seen[modules[site.name]], gradients[modules[site.name]]
        parts = (a.detach(), site.of(z.detach()), to_a, site.of(to_z))
        found[site.name] = Flow(*(by_position(part, tokens, (1, len(ids)))[0] for part in parts))
    return found
