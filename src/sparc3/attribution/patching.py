"""The context manager that applies the LRP rules to one model, and removes them exactly.

Only this model is touched. An instance attribute shadows a class method and is removed again. Attention is
registered with transformers under a name of ours, which only this model's (copied) configuration selects.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..models.experts import MATRICES, compute_one_by_one
from ..models.families import Family
from ..models.offloading import device_of, forward_name, renew_
from ..models.sites import dense_path, experts_in, family_of, layers_of, non_linearities, open_experts, shadow
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
    "BloomGelu": rules.tanh_gelu_factor,
    "GELUTanh": rules.tanh_gelu_factor,
    "QuickGELUActivation": rules.quick_gelu_factor,
    "ReLU": rules.relu_factor,
    "ReLUSquaredActivation": rules.relu_squared_factor,
}
"""Class of a non-linearity f → its closed form f(x)/x."""

TRANSPARENT = set("ModuleList Embedding Linear Linear4bit Linear8bitLt Conv1D Dropout Identity".split())
"""Modules whose plain gradient already is the rule: linear maps (ε → 0), look-ups and containers."""

CONTAINERS = (
    "ForCausalLM LMHeadModel Model TextModel Decoder DecoderLayer Layer Block Attention SelfAttention MLP "
    "SparseMoeBlock TopKRouter RotaryEmbedding LearnedPositionalEmbedding TextScaledWordEmbedding Linear "
    "LayerNormPerHead"
).split()
"""Suffixes of a family's own classes that need no rule: their forward only combines modules and functions
that have one (`LlamaAttention`, `LlamaDecoderLayer`)."""

ORIGINS = ("torch", "transformers", "bitsandbytes", "torchao")
"""Packages that the class names in these tables belong to. A class of the same name from elsewhere (an
adapter's Linear) may compute something else."""

FUSED = ("flash_attention", "flex_attention")
"""Prefixes of attention implementations that are one kernel, inside which no rule can act."""

OURS = "sparc3_"
"""Prefix of the names that we register with transformers."""

LINEAR = {"Linear", "Linear4bit", "Linear8bitLt", "Conv1D"}
"""Classes of linear maps."""


@contextmanager
def lrp_rules(
    model: "PreTrainedModel", *, cp: bool = False, rule_set: rules.RuleSet | None = None
) -> Iterator[None]:
    """Inside, gradients through `model` follow the rule set; by default AttnLRP's, or CP-LRP's if `cp`.
    Forward values do not change.

    AttnLRP: attention gives ½ to V and ¼ each to Q and K; the gate of a gated MLP gets ½. CP-LRP: Q, K and
    the gate are constants. In both, a router's decisions are constants: the experts of each token, and the
    weights of their outputs.

    Raises:
        UnsupportedModel: a module without a rule; nothing has been touched then.
    """
    family, rule_set = family_of(model), rule_set or (rules.CP_LRP if cp else rules.ATTN_LRP)
    # Collect all changes before making any, so that an unknown module leaves the model untouched.
    changes = [
        change
        for find_changes in (_change_forwards, _change_attentions, _change_configs)
        for change in find_changes(model, family, rule_set)
    ]
    with ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(shadow(module, name, value))
        yield


Change = tuple[nn.Module, str, Any]
"""A module, and the name and value of an instance attribute for it."""


def _change_forwards(model: "PreTrainedModel", family: Family, rule_set: rules.RuleSet) -> Iterator[Change]:
    """A forward under the rules for each module that needs one. Raises UnsupportedModel for an unknown
    module."""
    family_classes = {family.classes + suffix for suffix in CONTAINERS}
    gated, inside_gated, experts, constants = (set[nn.Module]() for _ in range(4))
    for layer in layers_of(model):
        if family.gated:
            if path := dense_path(layer, family, family.gated):
                gated.add(layer.get_submodule(path))
            inside_gated.update(non_linearities(layer, family))
        if expert_module := experts_in(layer, family):
            experts.add(expert_module)
            constants.update(layer.get_submodule(path) for path in family.constants)
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    for name, module in model.named_modules():
        kind, origin, forward = type(module).__name__, type(module).__module__, forward_name(module)
        original = getattr(module, forward)
        if origin.partition(".")[0] not in ORIGINS:
            raise UnsupportedModel(
                f"no LRP rule for {name or 'the model'}, a {kind} of {origin}; merge adapters into the "
                "weights first"
            )
        linear = kind in LINEAR or isinstance(module, nn.Linear)
        if linear and rule_set.epsilon:
            original = partial(rules.epsilon_rule, function=original, epsilon=rule_set.epsilon)
        if module in gated and rule_set.identity:
            yield module, forward, _make_gated_mlp(module, family, share=rule_set.gate, name=name)
        elif module in experts and rule_set.identity:
            product = _make_product(module.get_submodule("act_fn"), rule_set.gate, name)
            yield module, forward, compute_one_by_one(module, product, constant_routing=True)
            for matrix in module.__dict__[MATRICES].values() if rule_set.epsilon else ():  # inside `freeze`
                epsilon_rule = partial(rules.epsilon_rule, function=matrix.forward, epsilon=rule_set.epsilon)
                yield matrix, "forward", epsilon_rule
        elif module in constants and rule_set.identity:
            yield module, forward, lambda x, original=original: original(x).detach()
        elif kind == family.classes + "RMSNorm":
            yield module, forward, _make_norm(rules.rms_norm, module, original, family)
        elif kind in ("LayerNorm", family.classes + "LayerNorm"):
            yield module, forward, _make_norm(rules.layer_norm, module, original, family)
        elif module in inside_gated or module in experts or module in constants:
            continue
        elif factor := _factor(module):
            if rule_set.identity:
                yield module, forward, partial(rules.identity_rule, function=original, factor=factor)
        elif module is head and cap and rule_set.identity:
            # Soft-cap the logits here, under the identity rule; `_change_configs` removes the model's own.
            yield module, forward, lambda x, original=original: rules.soft_cap(original(x), cap)
        elif kind not in TRANSPARENT and kind not in family_classes:
            remedy = "use method gradient, or add its rule"
            if "FlashAttention" in kind:
                remedy = 'load with attn_implementation="eager"'
            raise UnsupportedModel(f"no LRP rule for {name or 'the model'}, a {kind}; {remedy}")
        elif linear and rule_set.epsilon:
            yield module, forward, original


def _factor(activation: nn.Module) -> rules.Factor | None:
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":  # one class, two functions
        return rules.tanh_gelu_factor
    return ACTIVATIONS.get(type(activation).__name__)


def _gain(norm: nn.Module, family: Family) -> Tensor | None:
    weight = norm.weight
    assert weight is None or isinstance(weight, Tensor)
    return 1.0 + weight.detach() if family.gain_from_one and weight is not None else weight


def _eps(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps  # type: ignore[return-value]


def _make_norm(
    rule: Callable[..., Tensor], module: nn.Module, original: Callable[[Tensor], Tensor], family: Family
) -> Callable[[Tensor], Tensor]:
    # Read the gain in the forward pass: an offloaded norm has it only then.
    return lambda x: rule(x, original, _gain(module, family), _eps(module))


def _make_gated_mlp(module: nn.Module, family: Family, share: float, name: str) -> Callable[[Tensor], Tensor]:
    paths = {
        part: family.roles[f"mlp.{part}"].removeprefix(f"{family.gated}.").partition("#")
        for part in ("gate", "up", "down")
    }
    gate, up, down = (module.get_submodule(path) for path, _, _ in paths.values())
    activation = module.get_submodule(family.activation.removeprefix(f"{family.gated}."))
    product = _make_product(activation, share, name)

    def forward(x: Tensor) -> Tensor:
        g, u = gate(x).chunk(2, dim=-1) if gate is up else (gate(x), up(x))
        return down(product(g, u))  # type: ignore[no-any-return]

    return forward


def _make_product(activation: nn.Module, share: float, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(gate, up) → activation(gate) · up, under the rules."""
    factor = _factor(activation)
    if factor is None:
        kind = type(activation).__name__
        raise UnsupportedModel(
            f"no LRP rule for the non-linearity of {name}, a {kind}; use method gradient, or add its factor "
            "f(x)/x"
        )
    return partial(rules.gated_product, function=activation.forward, factor=factor, share=share)


def _change_attentions(model: "PreTrainedModel", family: Family, rule_set: rules.RuleSet) -> Iterator[Change]:
    """Apply the shares of query, key and value in attention modules that do not use transformers' attention
    interface, by wrapping the method that splits or mixes them."""
    for attention in [] if _uses_interface(model, family) else _attention_modules(model, family):
        if rule_set.temperature != 1.0:
            raise UnsupportedModel(
                f"no rule for the softmax in {type(attention).__name__}, which does not use transformers' "
                "attention interface; use another method"
            )
        if family.splits:
            yield attention, family.splits, _wrap_split(getattr(attention, family.splits), rule_set)
        if family.mixes:
            yield attention, family.mixes, _wrap_mix(getattr(attention, family.mixes), rule_set)


def _attention_modules(model: "PreTrainedModel", family: Family) -> list[nn.Module]:
    return [layer.get_submodule(family.attention) for layer in layers_of(model)]


def _uses_interface(model: "PreTrainedModel", family: Family) -> bool:
    """Whether attention goes through transformers' interface: by the family's row, or because this release of
    transformers no longer has the method that the row names.

    Raises:
        UnsupportedModel: attention that does neither.
    """
    method = family.splits or family.mixes
    attentions = _attention_modules(model, family) if method else []
    if attentions and all(hasattr(attention, str(method)) for attention in attentions):
        return False
    for attention in attentions:
        if not hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise UnsupportedModel(
                f"no LRP rule for the attention of {type(attention).__name__} in this release of "
                "transformers; use method gradient, or add its rule"
            )
    return True


def _wrap_split(original: Callable[..., tuple[Tensor, ...]], rule_set: rules.RuleSet) -> Callable[..., Any]:
    return lambda *args: _share_out(original(*args), rule_set)


def _wrap_mix(original: Callable[..., Any], rule_set: rules.RuleSet) -> Callable[..., Any]:
    return lambda query, key, value, *args, **kwargs: original(
        *_share_out((query, key, value), rule_set), *args, **kwargs
    )


def _share_out(query_key_value: Iterable[Tensor], rule_set: rules.RuleSet) -> tuple[Tensor, ...]:
    """Query, key and value, each of which gets its share of the gradient."""
    return tuple(
        rules.scale_relevance(x, share) for x, share in zip(query_key_value, rule_set.shares, strict=True)
    )


def _change_configs(model: "PreTrainedModel", family: Family, rule_set: rules.RuleSet) -> Iterator[Change]:
    """A copy of the configuration that selects our attention, for each module that reads one."""
    copies: dict[int, Any] = {}
    interface = _uses_interface(model, family)
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is None or not hasattr(config, "_attn_implementation"):
            continue
        if id(config) not in copies:
            copies[id(config)] = copied = copy.copy(config)
            if interface:
                capped = getattr(config, "attn_logit_softcapping", None) is not None
                copied._attn_implementation_internal = _register_attention(
                    config._attn_implementation or "eager", rule_set, capped
                )
            if getattr(copied, "final_logit_softcapping", None) and rule_set.identity:
                copied.final_logit_softcapping = None
        yield module, "config", copies[id(config)]


def _register_attention(implementation: str, rule_set: rules.RuleSet, capped: bool = False) -> str:
    """Register `implementation` with the rule set's shares on its inputs, and return its name in "
    "transformers"
    registries.

    sdpa replaces fused kernels (flash, flex), or eager does if scores are soft-capped. Eager replaces every
    implementation if a rule concerns the softmax.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation.startswith(OURS):  # nested contexts: the inner rules replace the outer ones
        implementation = implementation.removeprefix(OURS).split("_", 1)[1]
    if implementation.startswith(FUSED):
        implementation = "eager" if capped else "sdpa"
    if implementation == "sdpa" and rule_set.temperature != 1.0:
        implementation = "eager"
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"no LRP rule for attention implementation '{implementation}'; load with "
            'attn_implementation="sdpa" or "eager"'
        )
    options = {"temperature": rule_set.temperature, "identity": rule_set.identity}
    kind = "-".join(str(part) for part in (*rule_set.shares, *options.values()))
    name = f"{OURS}{kind}_{implementation}"

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        implementation_forward = ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
        capped = kwargs.get("softcap") is not None
        if implementation == "eager" and (rule_set.temperature != 1.0 or (capped and rule_set.identity)):
            implementation_forward, kwargs = rules.explicit_attention, {**kwargs, **options}
        # Before 5.2, transformers gives StableLM's attention a mask that is longer than its keys.
        mask = None if mask is None else mask[..., : key.shape[-2]]
        return implementation_forward(
            module, *_share_out((query, key, value), rule_set), mask, *args, **kwargs
        )

    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


@contextmanager
def freeze(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, no parameter requires a gradient, the model is in eval mode, and experts can be hooked
    (`Site.hook_module`); afterwards everything is as before.

    The caller's no_grad, inference_mode and autocast have no effect inside: relevance is computed in the
    model's own precision.
    """
    renew_(model)
    modules = list(model.modules())
    # By name, because an offloaded parameter is a new object after each forward pass.
    flags = [
        (module._parameters, name, parameter.requires_grad)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    modes = [(module, module.training) for module in modules]
    try:
        for parameters, name, _ in flags:
            parameters[name].requires_grad_(False)
        for module in modules:
            module.training = False
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_of(model).type, enabled=False),
            open_experts(model),
        ):
            yield
    finally:
        for parameters, name, requires_grad in flags:
            parameters[name].requires_grad_(requires_grad)
        for module, mode in modes:
            module.training = mode
