"""The one table that knows the names inside each architecture. A new plain decoder is a new row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import UnsupportedModel

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""Canonical names of the prunable matrices of a decoder layer, in the order data meets them."""


def _key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _falcon_key_value_heads(config: Any) -> int:
    return int(config.num_kv_heads) if config.new_decoder_architecture or not config.multi_query else 1


@dataclass(frozen=True)
class Family:
    """One architecture: where its parts are, as module paths inside a decoder layer unless said otherwise.

    Attributes:
        classes: prefix of the class names of its own modules ("Llama" of LlamaDecoderLayer).
        layers: path, inside the model, of the list of decoder layers.
        roles: role → path. "attn.qkv#q" is the part q of the module attn.qkv, which holds several matrices in one.
        activation: path of the MLP's non-linearity.
        gated: path of an MLP that computes down(act(gate(x)) · up(x)); None where it is down(act(up(x))).
        fused: path of a module with parts → how its output rows are laid out, a key of models.LAYOUTS.
        attention: path of the attention module.
        splits: the attention's method that returns query, key and value; None where it calls transformers' attention interface.
        mixes: or its method that takes query, key and value.
        positions: path, inside the model, of the learned position embedding; None where positions are not learned.
        gain_from_one: whether norms store their gain as its distance from 1.
        key_value_heads: how many heads attn.k and attn.v have, by the configuration.
        refused: flag of the configuration, which no rule covers when it is set → what it does.
    """

    classes: str
    layers: str
    roles: Mapping[str, str]
    activation: str
    gated: str | None = None
    fused: Mapping[str, str] = field(default_factory=dict)
    attention: str = "self_attn"
    splits: str | None = None
    mixes: str | None = None
    positions: str | None = None
    gain_from_one: bool = False
    key_value_heads: Callable[[Any], int] = _key_value_heads
    refused: Mapping[str, str] = field(default_factory=dict)


def _roles(q: str, k: str, v: str, o: str, up: str, down: str, gate: str | None = None) -> dict[str, str]:
    found = {"attn.q": q, "attn.k": k, "attn.v": v, "attn.o": o, "mlp.gate": gate, "mlp.up": up, "mlp.down": down}
    return {role: path for role, path in found.items() if path is not None}


def _fused(qkv: str, o: str, up: str, down: str, gate: str | None = None) -> dict[str, str]:
    return _roles(f"{qkv}#q", f"{qkv}#k", f"{qkv}#v", o, up, down, gate)


_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LLAMA = Family(
    "Llama", "model.layers", _roles(*_SEPARATE, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"), "mlp.act_fn", gated="mlp"
)
_GEMMA = replace(_LLAMA, gain_from_one=True, refused={"use_bidirectional_attention": "attention that looks ahead"})
_GLM = Family(
    "Glm",
    "model.layers",
    _roles(*_SEPARATE, "self_attn.o_proj", "mlp.gate_up_proj#up", "mlp.down_proj", "mlp.gate_up_proj#gate"),
    "mlp.activation_fn",
    gated="mlp",
    fused={"mlp.gate_up_proj": "gate, up"},
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, classes="Mistral"),
    "qwen2": replace(_LLAMA, classes="Qwen2"),
    "qwen3": replace(_LLAMA, classes="Qwen3"),
    "smollm3": replace(_LLAMA, classes="SmolLM3"),
    "ministral": replace(_LLAMA, classes="Ministral"),
    "ministral3": replace(_LLAMA, classes="Ministral3"),
    "olmo2": replace(_LLAMA, classes="Olmo2"),
    "olmo3": replace(_LLAMA, classes="Olmo3"),
    "exaone4": replace(_LLAMA, classes="Exaone4"),
    "ernie4_5": replace(_LLAMA, classes="Ernie4_5"),
    "hunyuan_v1_dense": replace(_LLAMA, classes="HunYuanDenseV1"),
    "seed_oss": replace(_LLAMA, classes="SeedOss"),
    "helium": replace(_LLAMA, classes="Helium"),
    "stablelm": replace(_LLAMA, classes="StableLm"),
    "granite": replace(_LLAMA, classes="Granite"),
    "cohere": replace(_LLAMA, classes="Cohere"),
    "cohere2": replace(_LLAMA, classes="Cohere2"),
    "gemma": replace(_GEMMA, classes="Gemma"),
    "gemma2": replace(_GEMMA, classes="Gemma2"),
    "gemma3_text": replace(_GEMMA, classes="Gemma3"),
    "phi3": Family(
        "Phi3",
        "model.layers",
        _fused("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj#up", "mlp.down_proj", "mlp.gate_up_proj#gate"),
        "mlp.activation_fn",
        gated="mlp",
        fused={"self_attn.qkv_proj": "q, k, v", "mlp.gate_up_proj": "gate, up"},
    ),
    "glm": replace(_GLM, classes="Glm"),
    "glm4": replace(_GLM, classes="Glm4"),
    "arcee": Family("Arcee", "model.layers", _roles(*_SEPARATE, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"), "mlp.act_fn"),
    "phi": Family("Phi", "model.layers", _roles(*_SEPARATE, "self_attn.dense", "mlp.fc1", "mlp.fc2"), "mlp.activation_fn"),
    "starcoder2": Family("Starcoder2", "model.layers", _roles(*_SEPARATE, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"), "mlp.act"),
    "opt": Family(
        "OPT",
        "model.decoder.layers",
        _roles(*_SEPARATE, "self_attn.out_proj", "fc1", "fc2"),
        "activation_fn",
        positions="model.decoder.embed_positions",
    ),
    "gpt2": Family(
        "GPT2",
        "transformer.h",
        _fused("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        "mlp.act",
        fused={"attn.c_attn": "q, k, v"},
        attention="attn",
        positions="transformer.wpe",
        refused={"reorder_and_upcast_attn": "attention past transformers' interface", "add_cross_attention": "cross-attention"},
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        "gpt_neox.layers",
        _fused("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "mlp.act",
        fused={"attention.query_key_value": "q, k, v by head"},
        attention="attention",
    ),
    "gpt_neo": Family(
        "GPTNeo",
        "transformer.h",
        _roles(
            *("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.out_proj"), "mlp.c_fc", "mlp.c_proj"
        ),
        "mlp.act",
        attention="attn.attention",
        mixes="_attn",
        positions="transformer.wpe",
    ),
    "gptj": Family(
        "GPTJ",
        "transformer.h",
        _roles("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
        "mlp.act",
        attention="attn",
        mixes="_attn",
    ),
    "falcon": Family(
        "Falcon",
        "transformer.h",
        _fused("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "mlp.act",
        fused={"self_attention.query_key_value": "q, k, v by head"},
        attention="self_attention",
        splits="_split_heads",
        key_value_heads=_falcon_key_value_heads,
    ),
    "bloom": Family(
        "Bloom",
        "transformer.h",
        _fused("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "mlp.gelu_impl",
        fused={"self_attention.query_key_value": "q, k, v by head"},
        attention="self_attention",
        splits="_reshape",
        refused={"slow_but_exact": "linear maps cut into slices"},
    ),
}
"""model_type of the configuration → Family."""


def require_family(config: Any, what: str) -> Family:
    """The row of a configuration. Raises UnsupportedModel where there is none, or where a flag is set that no rule covers."""
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{what}: architecture '{config.model_type}' is not supported, it has no row in the family table "
            f"(sparc3.families.FAMILIES); supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[config.model_type]
    for flag, meaning in family.refused.items():
        if getattr(config, flag, None):
            raise UnsupportedModel(f"{what}: {flag} is set in its configuration, and no rule is known for {meaning}")
    return family
