"""The table of architectures: where each has its parts. A new plain decoder needs only a new row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UnsupportedModel

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""Canonical names of the prunable matrices of a decoder layer, in the order in which data passes them."""


PARTS = {
    "mlp.gate": ("gate_up_proj", "gate"),
    "mlp.up": ("gate_up_proj", "up"),
    "mlp.down": ("down_proj", ""),
}
"""Role → the fused parameter of a layer's experts, and the part of its rows ("" for all)."""


def _key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _falcon_key_value_heads(config: Any) -> int:
    # Falcon 7B has one key and one value for all query heads (multi_query); its num_kv_heads is not used.
    return int(config.num_kv_heads) if config.new_decoder_architecture or not config.multi_query else 1


@dataclass(frozen=True)
class Family:
    """One architecture: where its parts are, as module paths inside a decoder layer unless said otherwise.

    Attributes:
        classes: prefix of the class names of its own modules ("Llama" of LlamaDecoderLayer).
        layers: path, inside the model, of the list of decoder layers.
        roles: role → path. "attn.qkv#q" is the part q of the module attn.qkv, which fuses several matrices.
        activation: path of the MLP's non-linearity.
        gated: path of an MLP that computes down(act(gate(x)) · up(x)); None for down(act(up(x))).
        experts: path of a mixture's experts, in fused parameters (PARTS); layers without experts have the MLP
            of `roles`.
        shared: path of a gated MLP that processes all tokens in addition to the experts; None without one.
        constants: paths of linear maps whose output is a constant for relevance: the weight of the shared
            MLP.
        fused: path of a fused module → the layout of its output rows, a key of `sites.LAYOUTS`.
        attention: path of the attention module.
        splits: the attention's method that returns query, key and value; None if it calls transformers'
            attention interface.
        mixes: or its method that takes query, key and value. Releases of transformers without that method
            call the interface.
        positions: path, inside the model, of the learned position embedding; None without learned positions.
        gain_from_one: whether norms store gain − 1 instead of the gain.
        key_value_heads: configuration → number of heads of attn.k and attn.v.
        refused: flag of the configuration that no rule covers if it is set → its meaning.
        needed: keys of the configuration without which transformers' own code fails.
        models: names of the models with this architecture, for the documentation.
    """

    classes: str
    layers: str
    roles: Mapping[str, str]
    activation: str
    gated: str | None = None
    experts: str | None = None
    shared: str | None = None
    constants: tuple[str, ...] = ()
    fused: Mapping[str, str] = field(default_factory=dict)
    attention: str = "self_attn"
    splits: str | None = None
    mixes: str | None = None
    positions: str | None = None
    gain_from_one: bool = False
    key_value_heads: Callable[[Any], int] = _key_value_heads
    refused: Mapping[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    models: str = ""

    def describe_role(self, role: str) -> str:
        """The path of a role, for the documentation; E stands for the number of an expert."""
        if self.experts is None or role not in PARTS:
            return self.roles[role]
        parameter, part = PARTS[role]
        return f"{self.experts}.{parameter}#E{part and '.'}{part}"


def _roles(attention: str, names: str, mlp: str, maps: str) -> dict[str, str]:
    """Role → path of the maps q, k, v and o in the attention (or of a fused one for the first three, and
    o), and of up, down and, if present, gate in the MLP."""
    paths = [f"{attention}.{name}" for name in names.split()]
    if len(paths) == 2:
        paths = [*(f"{paths[0]}#{part}" for part in "qkv"), paths[1]]
    # OPT's decoder layer contains fc1 and fc2 itself: it has no MLP module, and `mlp` is empty.
    paths += [f"{mlp}.{name}".lstrip(".") for name in maps.split()]
    # Without a gate, the list of paths is one shorter.
    return dict(
        zip(("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "mlp.gate"), paths, strict=False)
    )


_SEPARATE, _FUSED_MLP = "q_proj k_proj v_proj o_proj", "gate_up_proj#up down_proj gate_up_proj#gate"
_BY_HEAD = "query_key_value dense"

_LLAMA = Family(
    "Llama",
    "model.layers",
    _roles("self_attn", _SEPARATE, "mlp", "up_proj down_proj gate_proj"),
    "mlp.act_fn",
    gated="mlp",
)
_GEMMA = replace(
    _LLAMA, gain_from_one=True, refused={"use_bidirectional_attention": "attention that looks ahead"}
)
_EXPERTS = replace(_LLAMA, experts="mlp.experts")
_GLM = replace(
    _LLAMA,
    roles=_roles("self_attn", _SEPARATE, "mlp", _FUSED_MLP),
    activation="mlp.activation_fn",
    fused={"mlp.gate_up_proj": "gate, up"},
)

FAMILIES: dict[str, Family] = {
    "llama": replace(_LLAMA, models="Llama 2, 3, 3.x; TinyLlama; SmolLM 1, 2"),
    "mistral": replace(_LLAMA, classes="Mistral", models="Mistral 7B, Nemo"),
    "qwen2": replace(_LLAMA, classes="Qwen2", models="Qwen 2, 2.5"),
    "qwen3": replace(_LLAMA, classes="Qwen3", models="Qwen 3 (dense)"),
    "smollm3": replace(_LLAMA, classes="SmolLM3", models="SmolLM 3"),
    "ministral": replace(_LLAMA, classes="Ministral", models="Ministral"),
    "ministral3": replace(_LLAMA, classes="Ministral3", models="Ministral 3"),
    "olmo2": replace(_LLAMA, classes="Olmo2", models="OLMo 2"),
    "olmo3": replace(_LLAMA, classes="Olmo3", models="OLMo 3"),
    "exaone4": replace(_LLAMA, classes="Exaone4", models="EXAONE 4"),
    "ernie4_5": replace(_LLAMA, classes="Ernie4_5", models="ERNIE 4.5 (dense)"),
    "hunyuan_v1_dense": replace(
        _LLAMA, classes="HunYuanDenseV1", needed=("head_dim",), models="Hunyuan (dense)"
    ),
    "seed_oss": replace(_LLAMA, classes="SeedOss", models="Seed-OSS"),
    "helium": replace(_LLAMA, classes="Helium", models="Helium"),
    "stablelm": replace(_LLAMA, classes="StableLm", models="StableLM"),
    "granite": replace(_LLAMA, classes="Granite", models="Granite 3.x (dense)"),
    "cohere": replace(_LLAMA, classes="Cohere", models="Command R"),
    "cohere2": replace(_LLAMA, classes="Cohere2", models="Command R7B, Command A"),
    "gemma": replace(_GEMMA, classes="Gemma", models="Gemma"),
    "gemma2": replace(_GEMMA, classes="Gemma2", models="Gemma 2"),
    "gemma3_text": replace(_GEMMA, classes="Gemma3", models="Gemma 3 (text only)"),
    "mixtral": replace(_EXPERTS, classes="Mixtral", models="Mixtral 8x7B, 8x22B"),
    "qwen2_moe": replace(
        _EXPERTS,
        classes="Qwen2Moe",
        shared="mlp.shared_expert",
        constants=("mlp.shared_expert_gate",),
        models="Qwen 1.5 MoE, Qwen 2 57B-A14B",
    ),
    "qwen3_moe": replace(_EXPERTS, classes="Qwen3Moe", models="Qwen 3 30B-A3B, 235B-A22B"),
    "olmoe": replace(
        _EXPERTS,
        classes="Olmoe",
        refused={"clip_qkv": "queries, keys and values that are cut off"},
        models="OLMoE",
    ),
    "flex_olmo": replace(_EXPERTS, classes="FlexOlmo", models="FlexOlmo"),
    "phi3": replace(
        _GLM,
        classes="Phi3",
        roles=_roles("self_attn", "qkv_proj o_proj", "mlp", _FUSED_MLP),
        fused={"self_attn.qkv_proj": "q, k, v", "mlp.gate_up_proj": "gate, up"},
        models="Phi-3, Phi-4",
    ),
    "glm": replace(_GLM, classes="Glm", models="GLM-4"),
    "glm4": replace(_GLM, classes="Glm4", models="GLM-4-0414"),
    "arcee": Family(
        "Arcee",
        "model.layers",
        _roles("self_attn", _SEPARATE, "mlp", "up_proj down_proj"),
        "mlp.act_fn",
        models="AFM",
    ),
    "phi": Family(
        "Phi",
        "model.layers",
        _roles("self_attn", "q_proj k_proj v_proj dense", "mlp", "fc1 fc2"),
        "mlp.activation_fn",
        models="Phi-1, 1.5, 2",
    ),
    "starcoder2": Family(
        "Starcoder2",
        "model.layers",
        _roles("self_attn", _SEPARATE, "mlp", "c_fc c_proj"),
        "mlp.act",
        models="StarCoder2",
    ),
    "opt": Family(
        "OPT",
        "model.decoder.layers",
        _roles("self_attn", "q_proj k_proj v_proj out_proj", "", "fc1 fc2"),
        "activation_fn",
        positions="model.decoder.embed_positions",
        models="OPT (350m too)",
    ),
    "gpt2": Family(
        "GPT2",
        "transformer.h",
        _roles("attn", "c_attn c_proj", "mlp", "c_fc c_proj"),
        "mlp.act",
        fused={"attn.c_attn": "q, k, v"},
        attention="attn",
        positions="transformer.wpe",
        refused={
            "reorder_and_upcast_attn": "attention past transformers' interface",
            "add_cross_attention": "cross-attention",
        },
        models="GPT-2, DistilGPT-2",
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        "gpt_neox.layers",
        _roles("attention", _BY_HEAD, "mlp", "dense_h_to_4h dense_4h_to_h"),
        "mlp.act",
        fused={"attention.query_key_value": "q, k, v by head"},
        attention="attention",
        models="Pythia, GPT-NeoX",
    ),
    "gpt_neo": Family(
        "GPTNeo",
        "transformer.h",
        _roles("attn.attention", "q_proj k_proj v_proj out_proj", "mlp", "c_fc c_proj"),
        "mlp.act",
        attention="attn.attention",
        mixes="_attn",
        positions="transformer.wpe",
        models="GPT-Neo",
    ),
    "gptj": Family(
        "GPTJ",
        "transformer.h",
        _roles("attn", "q_proj k_proj v_proj out_proj", "mlp", "fc_in fc_out"),
        "mlp.act",
        attention="attn",
        mixes="_attn",
        models="GPT-J",
    ),
    "falcon": Family(
        "Falcon",
        "transformer.h",
        _roles("self_attention", _BY_HEAD, "mlp", "dense_h_to_4h dense_4h_to_h"),
        "mlp.act",
        fused={"self_attention.query_key_value": "q, k, v by head"},
        attention="self_attention",
        splits="_split_heads",
        key_value_heads=_falcon_key_value_heads,
        models="Falcon 7B, 40B, RW",
    ),
    "bloom": Family(
        "Bloom",
        "transformer.h",
        _roles("self_attention", _BY_HEAD, "mlp", "dense_h_to_4h dense_4h_to_h"),
        "mlp.gelu_impl",
        fused={"self_attention.query_key_value": "q, k, v by head"},
        attention="self_attention",
        splits="_reshape",
        refused={"slow_but_exact": "linear maps cut into slices"},
        models="BLOOM, BLOOMZ",
    ),
}
"""model_type of the configuration → Family."""


def require_family(config: Any, what: str) -> Family:
    """The row for a configuration. Raises UnsupportedModel if there is none, or for a flag without a rule."""
    if config.model_type not in FAMILIES:
        # Of a model for images and text, whose text model alone may be supported, the message names both.
        text = config.get_text_config().model_type
        detail = f" with the text model '{text}'" if text != config.model_type else ""
        raise UnsupportedModel(
            f"{what}: architecture '{config.model_type}'{detail} is not supported, because it has no row in "
            f"sparc3.models.families.FAMILIES; supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[config.model_type]
    for flag, meaning in family.refused.items():
        if getattr(config, flag, None):
            raise UnsupportedModel(
                f"{what}: {flag} is set in its configuration, but there is no LRP rule for {meaning}"
            )
    for name in family.needed:
        if getattr(config, name, None) is None:
            raise UnsupportedModel(
                f"{what}: its configuration has no {name}, without which transformers cannot build a "
                f"{config.model_type}; add it"
            )
    return family
