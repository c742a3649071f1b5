"""Names and fingerprints of models and tokenizers. A fingerprint covers everything that affects computed
values."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .gguf import repository_of
from .hub import looks_local
from .offloading import first_out_of_reach, named_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def describe(model: "PreTrainedModel") -> dict[str, str]:
    """id, architecture and fingerprint of the model, as scores and circuits record them."""
    return {
        "id": model_id(model),
        "architecture": model.config.model_type,
        "fingerprint": model_fingerprint(model),
    }


def model_id(model: "PreTrainedModel") -> str:
    """The hub id, or the name of the local folder, but never its path, which may name the user."""
    name = str(getattr(model, "name_or_path", "") or model.config.model_type)
    return Path(name).resolve().name if looks_local(name) and not repository_of(name) else name


_BY_REASON = {
    "names and versions": ("_name_or_path", "architectures", "auto_map", "transformers_version"),
    "marks of other tools": ("unsloth_fixed", "unsloth_version", "transformers.js_config"),
    "how it is stored": ("dtype", "torch_dtype"),
    "how it is run": ("use_cache", "pretraining_tp", "chunk_size_feed_forward"),
    "what is returned": ("output_hidden_states", "output_router_logits", "return_dict"),
    "what it is not": ("is_decoder", "is_encoder_decoder"),
    "ids of special tokens": ("bos_token_id", "eos_token_id", "pad_token_id", "eod_token_id"),
    "dropout": ("attention_dropout", "attn_pdrop", "dropout", "embd_pdrop", "embed_dropout"),
    "more dropout": ("embedding_dropout", "hidden_dropout", "layerdrop", "resid_dropout", "resid_pdrop"),
    "still more": ("residual_dropout", "summary_first_dropout", "classifier_dropout"),
    "training": ("initializer_range", "init_std", "router_aux_loss_coef", "router_jitter_noise"),
    "other tasks": ("id2label", "label2id", "num_labels", "problem_type"),
    "a summary": ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    "what shapes say": ("num_experts", "num_local_experts"),  # the name depends on the version
    "what layer_types says": ("_sliding_window_pattern",),
}
HARMLESS = frozenset(key for keys in _BY_REASON.values() for key in keys)
"""Keys of a configuration that change no logit; tests/test_fingerprint.py verifies it."""


def _config_figures(config: Any) -> dict[str, Any]:
    """A configuration without HARMLESS keys, in a normal form: 1 becomes 1.0; None and False are left out."""
    figures: dict[str, Any] = _normalize(config.get_text_config().to_dict())
    # Since transformers 5.1 this figure is only in rope_parameters.
    if figures.get("partial_rotary_factor") == figures.get("rope_parameters", {}).get(
        "partial_rotary_factor"
    ):
        figures.pop("partial_rotary_factor", None)
    return figures


def _normalize(value: Any) -> Any:
    if isinstance(value, dict):
        parts = {str(key): _normalize(part) for key, part in value.items() if key not in HARMLESS}
        if kind := parts.get("rope_type") or parts.pop("type", None):  # older files have "type", or both
            parts["rope_type"] = None if kind == "default" else kind
            parts.pop("type", None)
        return {
            key: part for key, part in parts.items() if part is not False and part not in (None, [], {}, "")
        }
    if isinstance(value, list | tuple):
        return [_normalize(part) for part in value]
    if value is None or isinstance(value, bool | str):
        return value
    return float(value) if isinstance(value, int | float) else str(value)


def require_present(model: "PreTrainedModel") -> None:
    """Raise UserError if accelerate left weights on the disk, where they cannot be changed."""
    if parameter := first_out_of_reach(model):
        raise UserError(
            f"{parameter} of '{model_id(model)}' is offloaded to the disk, and attribution and ablation need "
            "it in memory; use a machine with more of it, or load the model in bfloat16"
        )


@torch.no_grad()
def model_fingerprint(model: "PreTrainedModel") -> str:
    """A hash of the weights' values and of the configuration without HARMLESS keys: 16 hex digits.

    Each matrix contributes the exact integer sums over its rows and columns, after rounding to bfloat16. So a
    checkpoint has the same fingerprint in float32 and bfloat16, on CPU and GPU, and one changed weight
    changes it.
    """
    require_present(model)
    digest = hashlib.sha256(model.config.model_type.encode())
    digest.update(json.dumps(_config_figures(model.config), sort_keys=True).encode())
    parts = ((name, part) for name, value in named_values(model) for part in plain_parts(value.detach()))
    for name, parameter in parts:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        rows = parameter.reshape(parameter.shape[0] if parameter.dim() > 1 else 1, -1)
        columns = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
        for piece in rows.split(
            EXACT * max(1, 2**20 // (EXACT * rows.shape[1]))
        ):  # pieces that fit into a cache
            is_integer = not piece.is_floating_point()
            bits = piece if is_integer else piece.to(torch.bfloat16).contiguous().view(torch.int16).float()
            digest.update(_exact_sum(bits, 1).cpu().numpy().tobytes())
            columns += _exact_sum(bits, 0)
        digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


EXACT = 512
"""This many 16-bit integers add up exactly in float32 (24 bits), which is many times faster than int64."""


def _exact_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The exact sum of integers in int64; float32 values are 16-bit integers."""
    if not values.is_floating_point():
        return values.sum(dim, dtype=torch.int64)
    exact_length = values.shape[dim] // EXACT * EXACT
    rest: torch.Tensor = values.narrow(dim, exact_length, values.shape[dim] - exact_length).sum(dim).long()
    if not exact_length:
        return rest
    partial_sums = values.narrow(dim, 0, exact_length).unflatten(dim, (-1, EXACT)).sum(dim + 1)
    return rest.add_(partial_sums.sum(dim, dtype=torch.int64))


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself, or the plain tensors inside a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain_parts(getattr(tensor, name))]


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of everything that determines the tokens of a text: 16 hex digits.

    For a fast tokenizer this is the whole pipeline, without the padding and truncation of its last call; for
    others, class, vocabulary and options.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {"chat_template": str(getattr(tokenizer, "chat_template", None))}
    if backend is not None:
        content["pipeline"] = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    else:
        options = getattr(tokenizer, "init_kwargs", {})
        keys = [key for key in options if "file" not in key and "path" not in key]
        content["class"] = type(tokenizer).__name__
        content["options"] = {key: str(options[key]) for key in keys}
        content["vocabulary"] = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    special = getattr(tokenizer, "special_tokens_map", {})
    content["special"] = {key: str(value) for key, value in special.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
