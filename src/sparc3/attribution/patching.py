"""The context that puts the LRP rules on one model, and takes them off again exactly.

Only this model is touched: an instance attribute shadows a class method and is removed again, and attention goes through
transformers' own registries under a name of ours that only this model's (copied) configuration asks for.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..models import Family, family_of, layers_of
from . import rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS: dict[str, rules.Factor] = {
    "SiLUActivation": rules.sigmoid_factor,
    "SiLU": rules.sigmoid_factor,
    "GELUActivation": rules.normal_cdf_factor,
    "GELU": rules.normal_cdf_factor,
    "NewGELUActivation": rules.tanh_gelu_factor,
    "FastGELUActivation": rules.tanh_gelu_factor,
    "GELUTanh": rules.tanh_gelu_factor,
    "QuickGELUActivation": rules.quick_gelu_factor,
    "ReLU": rules.relu_factor,
    "ReLUSquaredActivation": rules.relu_squared_factor,
}
"""Class of a non-linearity f → its closed form f(x)/x."""

TRANSPARENT = {"ModuleList", "Embedding", "Linear", "Linear4bit", "Linear8bitLt", "Conv1D", "Dropout", "Identity"}
"""Modules whose plain gradient is already the rule: linear maps (ε → 0), look-ups and things that only pass on."""

CONTAINERS = ("ForCausalLM", "LMHeadModel", "Model", "Decoder", "DecoderLayer", "Attention", "MLP", "RotaryEmbedding", "LearnedPositionalEmbedding")
"""What a family's own classes may be called after its prefix; their forward is composed of modules and functions met elsewhere."""

OURS = "sparc3_"
"""What the names that we register with transformers begin with."""


@contextmanager
def lrp_rules(model: "PreTrainedModel", *, cp: bool = False) -> Iterator[None]:
    """Inside, gradients through `model` are AttnLRP's modified gradients; CP-LRP's where `cp`. Forward values do not change.

    AttnLRP: attention gives ½ to V, ¼ to Q and K each, the gate of a gated MLP gets ½. CP-LRP: Q, K and the gate are constants.

    Raises:
        UnsupportedModel: a module that no rule is known for; nothing has been touched then.
    """
    family = family_of(model)
    forwards = _plan(model, family, cp)
    with ExitStack() as stack:
        for module, forward in forwards:
            stack.enter_context(_shadowed(module, "forward", forward))
        for module, config in _configs(model, cp):
            stack.enter_context(_shadowed(module, "config", config))
        yield


@contextmanager
def _shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An instance attribute for a while; the earlier one, or its absence, comes back."""
    had = name in module.__dict__
    earlier = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            module.__dict__[name] = earlier
        else:
            del module.__dict__[name]


def _plan(model: "PreTrainedModel", family: Family, cp: bool) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Which module gets which forward; refuses a module it does not know."""
    forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    own = {family.classes + suffix for suffix in CONTAINERS}
    gated = {id(layer.get_submodule(family.gated)) for layer in layers_of(model)} if family.gated else set()
    inside_gated = {id(layer.get_submodule(family.activation)) for layer in layers_of(model)} if family.gated else set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if id(module) in gated:
            forwards.append((module, _gated_mlp(module, family, share=0.0 if cp else 0.5, name=name)))
        elif kind == family.classes + "RMSNorm":
            eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
            forwards.append((module, partial(rules.rms_norm, norm=module.forward, gain=module.weight, eps=eps)))
        elif kind == "LayerNorm":
            forwards.append((module, partial(rules.layer_norm, norm=module.forward, gain=module.weight, eps=module.eps)))
        elif id(module) in inside_gated:
            continue
        elif kind in ACTIVATIONS:
            forwards.append((module, partial(rules.identity_rule, function=module.forward, factor=ACTIVATIONS[kind])))
        elif kind not in TRANSPARENT and kind not in own:
            raise UnsupportedModel(f"no LRP rule for {name or 'the model'}, a {kind}; use method gradient, or add its rule")
    return forwards


def _gated_mlp(module: nn.Module, family: Family, share: float, name: str) -> Callable[[Tensor], Tensor]:
    assert family.gated
    gate, up, down = (module.get_submodule(family.roles[f"mlp.{part}"].removeprefix(family.gated + ".")) for part in ("gate", "up", "down"))
    activation = module.get_submodule(family.activation.removeprefix(family.gated + "."))
    kind = type(activation).__name__
    if kind not in ACTIVATIONS:
        raise UnsupportedModel(f"no LRP rule for the non-linearity of {name}, a {kind}; use method gradient, or add its factor f(x)/x")
    factor = ACTIVATIONS[kind]
    function = activation.forward

    def forward(x: Tensor) -> Tensor:
        return down(rules.gated_product(gate(x), up(x), function, factor, share))  # type: ignore[no-any-return]

    return forward


def _configs(model: "PreTrainedModel", cp: bool) -> list[tuple[nn.Module, Any]]:
    """A copy of the configuration, asking for our attention, for every module of this model that reads one."""
    copies: dict[int, Any] = {}
    swapped = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is None or not hasattr(config, "_attn_implementation"):
            continue
        if id(config) not in copies:
            twin = copy.copy(config)
            twin._attn_implementation_internal = _registered(config._attn_implementation or "eager", cp)
            copies[id(config)] = twin
        swapped.append((module, copies[id(config)]))
    return swapped


def _registered(implementation: str, cp: bool) -> str:
    """The name, in transformers' registries, of `implementation` with LRP's shares on its inputs."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation.startswith(OURS):  # rules within rules: the inner ones replace the outer ones' shares
        implementation = implementation.removeprefix(OURS).split("_", 1)[1]
    name = f"{OURS}{'cp' if cp else 'attn'}lrp_{implementation}"
    to_query_key, to_value = (0.0, 1.0) if cp else (0.25, 0.5)

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        plain = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        scaled = (rules.scale_relevance(x, s) for x, s in ((query, to_query_key), (key, to_query_key), (value, to_value)))
        return plain(module, *scaled, *args, **kwargs)

    if name not in ALL_ATTENTION_FUNCTIONS:
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise UnsupportedModel(f"attention implementation '{implementation}' has no mask function; load with sdpa or eager")
        AttentionInterface.register(name, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient and the model is in eval mode; each gets its earlier state back."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for parameter, was in asked:
            parameter.requires_grad_(was)
        for module, mode in modes:
            module.training = mode
