"""The context that puts the LRP rules on one model, and takes them off again exactly.

Only this model is touched: an instance attribute shadows a class method and is removed again, and attention
goes through transformers' own registries under a name of ours that only this model's (copied) configuration
asks for.
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
from ..models.experts import MATRICES, one_by_one
from ..models.families import Family
from ..models.offloading import device_of, forward_within, renew_
from ..models.sites import (
    dense_path,
    experts_in,
    family_of,
    layers_of,
    non_linearities,
    open_experts,
    shadowed,
)
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
"""Modules whose plain gradient is already the rule: linear maps (ε → 0), look-ups and things that only pass
on."""

CONTAINERS = (
    "ForCausalLM LMHeadModel Model TextModel Decoder DecoderLayer Layer Block Attention SelfAttention MLP "
    "SparseMoeBlock TopKRouter RotaryEmbedding LearnedPositionalEmbedding TextScaledWordEmbedding Linear "
    "LayerNormPerHead"
).split()
"""What a family's own classes may be called after its prefix; their forward is composed of modules and
functions met elsewhere."""

ORIGINS = ("torch", "transformers", "bitsandbytes", "torchao")
"""Packages whose classes the names in these tables mean; the same name from elsewhere (an adapter's Linear)
is another thing."""

FUSED = ("flash_attention", "flex_attention")
"""What the names of attention in one kernel, which has no place for a rule, begin with."""

OURS = "sparc3_"
"""What the names that we register with transformers begin with."""

LINEAR = {"Linear", "Linear4bit", "Linear8bitLt", "Conv1D"}
"""Classes of linear maps."""


@contextmanager
def lrp_rules(
    model: "PreTrainedModel", *, cp: bool = False, rule_set: rules.RuleSet | None = None
) -> Iterator[None]:
    """Inside, gradients through `model` are modified as the rule set says: AttnLRP's, or CP-LRP's where `cp`,
    if none is given. Forward values do not change.

    AttnLRP: attention gives ½ to V, ¼ to Q and K each, the gate of a gated MLP gets ½. CP-LRP: Q, K and the
    gate are constants. In both, what a router decides is constant: which experts a token is sent to, and the
    weights of what they return.

    Raises:
        UnsupportedModel: a module that no rule is known for; nothing has been touched then.
    """
    family, asked = family_of(model), rule_set or (rules.CP_LRP if cp else rules.ATTN_LRP)
    changes = [change for part in (_forwards, _attentions, _configs) for change in part(model, family, asked)]
    with ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(shadowed(module, name, value))
        yield


Change = tuple[nn.Module, str, Any]
"""A module, and the instance attribute that it gets."""


def _forwards(model: "PreTrainedModel", family: Family, asked: rules.RuleSet) -> Iterator[Change]:
    """Which module gets which forward; refuses a module it does not know."""
    own = {family.classes + suffix for suffix in CONTAINERS}
    gated, inside_gated, experts, constants = (set[nn.Module]() for _ in range(4))
    for layer in layers_of(model):
        if family.gated:
            if path := dense_path(layer, family, family.gated):
                gated.add(layer.get_submodule(path))
            inside_gated.update(non_linearities(layer, family))
        if found := experts_in(layer, family):
            experts.add(found)
            constants.update(layer.get_submodule(path) for path in family.constants)
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    for name, module in model.named_modules():
        kind, origin, forward = type(module).__name__, type(module).__module__, forward_within(module)
        plain = getattr(module, forward)
        if origin.partition(".")[0] not in ORIGINS:
            raise UnsupportedModel(
                f"no LRP rule for {name or 'the model'}, a {kind} of {origin}; merge adapters into the "
                "weights first"
            )
        linear = kind in LINEAR or isinstance(module, nn.Linear)
        if linear and asked.epsilon:
            plain = partial(rules.epsilon_rule, function=plain, epsilon=asked.epsilon)
        if module in gated and asked.identity:
            yield module, forward, _gated_mlp(module, family, share=asked.gate, name=name)
        elif module in experts and asked.identity:
            product = _product(module.get_submodule("act_fn"), asked.gate, name)
            yield module, forward, one_by_one(module, product, constant_routing=True)
            for matrix in module.__dict__[MATRICES].values() if asked.epsilon else ():  # inside `frozen`
                epsilon_rule = partial(rules.epsilon_rule, function=matrix.forward, epsilon=asked.epsilon)
                yield matrix, "forward", epsilon_rule
        elif module in constants and asked.identity:
            yield module, forward, lambda x, plain=plain: plain(x).detach()
        elif kind == family.classes + "RMSNorm":
            yield module, forward, _norm(rules.rms_norm, module, plain, family)
        elif kind in ("LayerNorm", family.classes + "LayerNorm"):
            yield module, forward, _norm(rules.layer_norm, module, plain, family)
        elif module in inside_gated or module in experts or module in constants:
            continue
        elif factor := _factor(module):
            if asked.identity:
                yield module, forward, partial(rules.identity_rule, function=plain, factor=factor)
        elif module is head and cap and asked.identity:
            # The soft-capping of logits under the identity rule; `_configs` takes the model's own away.
            yield module, forward, lambda x, plain=plain: rules.soft_cap(plain(x), cap)
        elif kind not in TRANSPARENT and kind not in own:
            remedy = "use method gradient, or add its rule"
            if "FlashAttention" in kind:
                remedy = 'load with attn_implementation="eager"'
            raise UnsupportedModel(f"no LRP rule for {name or 'the model'}, a {kind}; {remedy}")
        elif linear and asked.epsilon:
            yield module, forward, plain


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


def _norm(
    rule: Callable[..., Tensor], module: nn.Module, plain: Callable[[Tensor], Tensor], family: Family
) -> Callable[[Tensor], Tensor]:
    # The gain is looked up when it is needed: an offloaded norm has it at hand only then.
    return lambda x: rule(x, plain, _gain(module, family), _eps(module))


def _gated_mlp(module: nn.Module, family: Family, share: float, name: str) -> Callable[[Tensor], Tensor]:
    inside = {
        part: family.roles[f"mlp.{part}"].removeprefix(f"{family.gated}.").partition("#")
        for part in ("gate", "up", "down")
    }
    gate, up, down = (module.get_submodule(path) for path, _, _ in inside.values())
    activation = module.get_submodule(family.activation.removeprefix(f"{family.gated}."))
    product = _product(activation, share, name)

    def forward(x: Tensor) -> Tensor:
        g, u = gate(x).chunk(2, dim=-1) if gate is up else (gate(x), up(x))
        return down(product(g, u))  # type: ignore[no-any-return]

    return forward


def _product(activation: nn.Module, share: float, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(gate, up) → activation(gate) · up, under the rules."""
    factor = _factor(activation)
    if factor is None:
        kind = type(activation).__name__
        raise UnsupportedModel(
            f"no LRP rule for the non-linearity of {name}, a {kind}; use method gradient, or add its factor "
            "f(x)/x"
        )
    return partial(rules.gated_product, function=activation.forward, factor=factor, share=share)


def _attentions(model: "PreTrainedModel", family: Family, asked: rules.RuleSet) -> Iterator[Change]:
    """The shares of query, key and value in attention modules that do not use transformers' attention
    interface."""
    for attention in [] if _uses_interface(model, family) else _attention_modules(model, family):
        if asked.temperature != 1.0:
            raise UnsupportedModel(
                f"no rule for the softmax in {type(attention).__name__}, which does not use transformers' "
                "attention interface; use another method"
            )
        if family.splits:
            yield attention, family.splits, _splits(getattr(attention, family.splits), asked)
        if family.mixes:
            yield attention, family.mixes, _mixes(getattr(attention, family.mixes), asked)


def _attention_modules(model: "PreTrainedModel", family: Family) -> list[nn.Module]:
    return [layer.get_submodule(family.attention) for layer in layers_of(model)]


def _uses_interface(model: "PreTrainedModel", family: Family) -> bool:
    """Whether attention goes through transformers' interface: by the family's row, or in a release that has
    dropped the method which the row names.

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


def _splits(plain: Callable[..., tuple[Tensor, ...]], asked: rules.RuleSet) -> Callable[..., Any]:
    return lambda *args: _shared_out(plain(*args), asked)


def _mixes(plain: Callable[..., Any], asked: rules.RuleSet) -> Callable[..., Any]:
    return lambda query, key, value, *args, **kwargs: plain(
        *_shared_out((query, key, value), asked), *args, **kwargs
    )


def _shared_out(query_key_value: Iterable[Tensor], asked: rules.RuleSet) -> tuple[Tensor, ...]:
    """Query, key and value, each with its share of what flows back."""
    return tuple(
        rules.scale_relevance(x, share) for x, share in zip(query_key_value, asked.shares, strict=True)
    )


def _configs(model: "PreTrainedModel", family: Family, asked: rules.RuleSet) -> Iterator[Change]:
    """A copy of the configuration that selects our attention, for each module that reads one."""
    copies: dict[int, Any] = {}
    interface = _uses_interface(model, family)
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is None or not hasattr(config, "_attn_implementation"):
            continue
        if id(config) not in copies:
            copies[id(config)] = twin = copy.copy(config)
            if interface:
                capped = getattr(config, "attn_logit_softcapping", None) is not None
                twin._attn_implementation_internal = _register_attention(
                    config._attn_implementation or "eager", asked, capped
                )
            if getattr(twin, "final_logit_softcapping", None) and asked.identity:
                twin.final_logit_softcapping = None
        yield module, "config", copies[id(config)]


def _register_attention(implementation: str, asked: rules.RuleSet, capped: bool = False) -> str:
    """The name, in transformers' registries, of `implementation` with the rule set's shares on its inputs.

    Fused kernels (flash, flex) compute what sdpa does, or, where scores are soft-capped, what eager does,
    which stands in for them; and for all where a rule is about the softmax.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation.startswith(OURS):  # rules within rules: the inner ones replace the outer ones' shares
        implementation = implementation.removeprefix(OURS).split("_", 1)[1]
    if implementation.startswith(FUSED):
        implementation = "eager" if capped else "sdpa"
    if implementation == "sdpa" and asked.temperature != 1.0:
        implementation = "eager"
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"no LRP rule for attention implementation '{implementation}'; load with "
            'attn_implementation="sdpa" or "eager"'
        )
    explicit = {"temperature": asked.temperature, "identity": asked.identity}
    kind = "-".join(str(part) for part in (*asked.shares, *explicit.values()))
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
        plain = ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
        capped = kwargs.get("softcap") is not None
        if implementation == "eager" and (asked.temperature != 1.0 or (capped and asked.identity)):
            plain, kwargs = rules.explicit_attention, {**kwargs, **explicit}
        # transformers before 5.2 gives StableLM's attention a mask that reaches beyond its keys.
        mask = None if mask is None else mask[..., : key.shape[-2]]
        return plain(module, *_shared_out((query, key, value), asked), mask, *args, **kwargs)

    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


@contextmanager
def frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, no parameter asks for a gradient, the model is in eval mode, and experts can be hooked
    (`Site.hooked`); then all is as before.

    What the caller has switched on around it (no_grad, inference_mode, autocast) does not reach inside:
    relevance has the model's own precision.
    """
    renew_(model)
    modules = list(model.modules())
    # By name: an offloaded parameter is another one after each forward pass.
    asked = [
        (module._parameters, name, one.requires_grad)
        for module in modules
        for name, one in module._parameters.items()
        if one is not None
    ]
    modes = [(module, module.training) for module in modules]
    try:
        for held, name, _ in asked:
            held[name].requires_grad_(False)
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
        for held, name, was in asked:
            held[name].requires_grad_(was)
        for module, mode in modes:
            module.training = mode
