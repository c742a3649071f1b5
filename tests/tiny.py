"""Tiny random models, one of each family, whose every parameter matters: biases, gains and positions are not what they start as."""

import re
import types
from typing import Any

import torch
from torch import Tensor, nn

from sparc3.models.families import FAMILIES

torch.set_num_threads(1)  # on matrices this small, threads wait for each other far longer than they work

COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
SWIGLU: dict[str, Any] = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**SWIGLU, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROPE_3: dict[str, Any] = {
    **{
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "original_max_position_embeddings": 8,
}
GPT2: dict[str, Any] = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "n_inner": 24,
}
GPT_NEO: dict[str, Any] = {
    **{
        "vocab_size": 40,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 32,
        "intermediate_size": 24,
    },
    **{"attention_types": [[["global", "local"], 1]], "window_size": 4},
}
FALCON: dict[str, Any] = {**COMMON, "ffn_hidden_size": 24}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SWIGLU),
    "llama-bias": (
        "llama",
        {**SWIGLU, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-3": ("llama", {**SWIGLU, "rope_parameters": ROPE_3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**SWIGLU, "sliding_window": 4}),
    "qwen2": ("qwen2", SWIGLU),
    "qwen3": ("qwen3", {**SWIGLU, "head_dim": 8}),
    "smollm3": ("smollm3", {**SWIGLU, "no_rope_layers": [1, 0]}),
    "ministral": ("ministral", {**SWIGLU, "head_dim": 8, "sliding_window": 4}),
    "ministral3": ("ministral3", SWIGLU),
    "olmo2": ("olmo2", SWIGLU),
    "olmo3": ("olmo3", {**SWIGLU, "sliding_window": 4}),
    "exaone4": ("exaone4", {**SWIGLU, "sliding_window": 4, "sliding_window_pattern": 2}),
    "ernie4_5": ("ernie4_5", {**SWIGLU, "head_dim": 4, "use_bias": True}),
    "hunyuan": ("hunyuan_v1_dense", {**SWIGLU, "head_dim": 4}),
    "seed-oss": ("seed_oss", {**SWIGLU, "head_dim": 4}),
    "helium": ("helium", {**SWIGLU, "head_dim": 4}),
    "stablelm": ("stablelm", SWIGLU),
    "stablelm-2": (
        "stablelm",
        {**SWIGLU, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "glm": ("glm", {**SWIGLU, "head_dim": 4}),
    "glm4": ("glm4", {**SWIGLU, "head_dim": 4}),
    "arcee": ("arcee", SWIGLU),
    "granite": (
        "granite",
        {
            **SWIGLU,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
    ),
    "cohere": ("cohere", {**SWIGLU, "use_qk_norm": True, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**SWIGLU, "logit_scale": 0.25, "sliding_window": 4}),
    "gemma": ("gemma", {**SWIGLU, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            **SWIGLU,
            "head_dim": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **SWIGLU,
            "head_dim": 8,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 3.0,
        },
    ),
    "mixtral": ("mixtral", {**SWIGLU, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 1}),
    "qwen2-moe-mixed": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    ),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**SWIGLU, "num_experts": 5, "num_experts_per_tok": 2}),
    "flex-olmo": ("flex_olmo", {**SWIGLU, "num_experts": 5, "num_experts_per_tok": 2}),
    "phi3": ("phi3", {**SWIGLU, "sliding_window": None}),
    "phi": ("phi", {**COMMON, "intermediate_size": 24, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {**SWIGLU, "use_bias": True}),
    "opt": ("opt", {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt-350m": ("opt", {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-scaled": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "pythia": ("gpt_neox", {**COMMON, "intermediate_size": 24, "rotary_pct": 0.5}),
    "gpt-neox-serial": (
        "gpt_neox",
        {**COMMON, "intermediate_size": 24, "use_parallel_residual": False, "hidden_act": "gelu_new"},
    ),
    "gpt-neo": ("gpt_neo", GPT_NEO),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 2}),
    "falcon": ("falcon", FALCON),
    "falcon-40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (
        "falcon",
        {**FALCON, "alibi": True, "bias": True, "parallel_attn": False, "multi_query": False},
    ),
    "bloom": ("bloom", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "bloom-post": (
        "bloom",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
}
"""Name of a tiny model → (model_type, what its configuration is told)."""


def tiny(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode; float64 ones compute their norms in float64 too (see `exact_norms_`)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CONFIGS[name]
    config = AutoConfig.for_model(
        kind, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **settings, **changes}
    )
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    randomise_(model, seed)
    if dtype == torch.float64:
        exact_norms_(model)
        if FAMILIES[kind].experts:
            model.set_experts_implementation("eager")  # transformers' default for experts knows no float64
    return model


@torch.no_grad()
def randomise_(model: nn.Module, seed: int) -> None:
    """Matrices of spectral size about one, biases and gains away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


def exact_norms_(model: nn.Module) -> None:
    """Let norms compute in float64: transformers rounds to float32 in its own, which would hide what the tests look for."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or (kind.startswith("Cohere") and kind.endswith("LayerNorm")):
            module.forward = types.MethodType(_norm, module)


def _norm(module: Any, x: Tensor) -> Tensor:
    kind = type(module).__name__
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    gain = 1.0 + module.weight if kind.startswith("Gemma") else module.weight
    centred = x if kind.endswith("RMSNorm") else x - x.mean(-1, keepdim=True)
    return gain * centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)  # type: ignore[no-any-return]


def samples(count: int = 4, vocabulary: int = 40, seed: int = 0) -> list[list[int]]:
    """Token-id lists of unequal length, the first the longest."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocabulary, (9 - 2 * (index % 4),), generator=generator).tolist()
        for index in range(count)
    ]


def paper_model() -> Any:
    """A Llama of one layer and width 2 whose every number is checked on paper in test_attribution.py.

    Token 3 only:  x = (1, −1), already of RMS 1.  Attention of one token: v = W_v x = (0, 2), o = W_o v = (0, 2), h = x + o = (1, 1).
    MLP: gate = W_g h = (1, 2), up = W_u h = (3, 2), ReLU(gate) · up = (3, 4), down = (0, 6), h + down = (1, 7), of RMS 5.
    Logits: token 0: (5, 5) · (1, 7) / 5 = 8; token 1: 7/5; others 0.
    """
    model = tiny(
        "llama",
        vocab_size=4,
        hidden_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=2,
        hidden_act="relu",
        rms_norm_eps=0.0,
    )
    layer = model.model.layers[0]
    matrices = {
        layer.self_attn.v_proj: [[1, 1], [1, -1]],
        layer.self_attn.o_proj: [[0, 0], [0, 1]],
        layer.mlp.gate_proj: [[1, 0], [1, 1]],
        layer.mlp.up_proj: [[1, 2], [3, -1]],
        layer.mlp.down_proj: [[4, -3], [2, 0]],
        model.model.embed_tokens: [[1, 0], [0, 1], [1, 1], [1, -1]],
        model.lm_head: [[5, 5], [0, 1], [0, 0], [0, 0]],
    }
    with torch.no_grad():
        for module, values in matrices.items():
            module.weight.copy_(torch.tensor(values))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(1)
    return model


class Words:
    """A tokenizer that reads "w5 w7" as tokens 5 and 7."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in re.findall(r"w(\d+)", text)]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(f"w{token}" for token in ids)
