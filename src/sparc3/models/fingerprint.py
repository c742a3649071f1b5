"""Which model and which tokenizer these are: names, and fingerprints of what decides what is computed."""

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
    """Which model this is: id, architecture and fingerprint, as scores and circuits record them."""
    return {
        "id": model_id(model),
        "architecture": model.config.model_type,
        "fingerprint": model_fingerprint(model),
    }


def model_id(model: "PreTrainedModel") -> str:
    """The hub id, or the name of the local folder (never its whole path, which is nobody else's business)."""
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
    "what shapes say": ("num_experts", "num_local_experts"),  # one figure, named otherwise by version
    "what layer_types says": ("_sliding_window_pattern",),
}
HARMLESS = frozenset(key for keys in _BY_REASON.values() for key in keys)
"""Keys of a configuration that change no logit, as tests/test_fingerprint.py has it."""


def _figures(config: Any) -> dict[str, Any]:
    """What a configuration says, but for HARMLESS, in one form: 1 is 1.0; None and False are as no key."""
    found: dict[str, Any] = _plain(config.get_text_config().to_dict())
    # Since transformers 5.1 this figure stands among the rotary positions alone.
    if found.get("partial_rotary_factor") == found.get("rope_parameters", {}).get("partial_rotary_factor"):
        found.pop("partial_rotary_factor", None)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        parts = {str(key): _plain(part) for key, part in value.items() if key not in HARMLESS}
        if kind := parts.get("rope_type") or parts.pop("type", None):  # older files have "type", or both
            parts["rope_type"] = None if kind == "default" else kind
            parts.pop("type", None)
        return {
            key: part for key, part in parts.items() if part is not False and part not in (None, [], {}, "")
        }
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | str):
        return value
    return float(value) if isinstance(value, int | float) else str(value)


def require_present(model: "PreTrainedModel") -> None:
    """Raise UserError where accelerate left weights on the disk, where they cannot be changed."""
    if away := first_out_of_reach(model):
        raise UserError(
            f"{away} of '{model_id(model)}' is offloaded to the disk, and attribution and ablation need it "
            "in memory; use a machine with more of it, or load the model in bfloat16"
        )


@torch.no_grad()
def model_fingerprint(model: "PreTrainedModel") -> str:
    """A short name of the weights' values and of the configuration but for HARMLESS: 16 hex digits.

    Each matrix enters by the exact integer sums of its rows and columns, after rounding to bfloat16, so that
    one checkpoint has one fingerprint whether it is loaded in float32 or bfloat16, on CPU or GPU, and one
    changed weight gives another.
    """
    require_present(model)
    digest = hashlib.sha256(model.config.model_type.encode())
    digest.update(json.dumps(_figures(model.config), sort_keys=True).encode())
    parts = ((name, part) for name, value in named_values(model) for part in plain_parts(value.detach()))
    for name, parameter in parts:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        rows = parameter.reshape(parameter.shape[0] if parameter.dim() > 1 else 1, -1)
        columns = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
        for piece in rows.split(EXACT * max(1, 2**20 // (EXACT * rows.shape[1]))):  # some fit into a cache
            whole = not piece.is_floating_point()
            bits = piece if whole else piece.to(torch.bfloat16).contiguous().view(torch.int16).float()
            digest.update(_exact_sum(bits, 1).cpu().numpy().tobytes())
            columns += _exact_sum(bits, 0)
        digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


EXACT = 512
"""So many 16-bit integers add up exactly in float32, which adds many times faster than int64 does."""


def _exact_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum of integers in int64; those in float32 have 16 bits."""
    if not values.is_floating_point():
        return values.sum(dim, dtype=torch.int64)
    whole = values.shape[dim] // EXACT * EXACT
    rest: torch.Tensor = values.narrow(dim, whole, values.shape[dim] - whole).sum(dim).long()
    if not whole:
        return rest
    many = values.narrow(dim, 0, whole).unflatten(dim, (-1, EXACT)).sum(dim + 1)
    return rest.add_(many.sum(dim, dtype=torch.int64))


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself, or the ones that a quantised tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain_parts(getattr(tensor, name))]


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A short name of what decides which tokens a text becomes: 16 hex digits.

    The whole pipeline of a fast tokenizer, but for the padding and truncation of its last call; of another
    the class, the vocabulary and the options.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about: dict[str, Any] = {"chat_template": str(getattr(tokenizer, "chat_template", None))}
    if backend is not None:
        about["pipeline"] = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    else:
        options = getattr(tokenizer, "init_kwargs", {})
        named = [key for key in options if "file" not in key and "path" not in key]
        about["class"] = type(tokenizer).__name__
        about["options"] = {key: str(options[key]) for key in named}
        about["vocabulary"] = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    special = getattr(tokenizer, "special_tokens_map", {})
    about["special"] = {key: str(value) for key, value in special.items()}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
