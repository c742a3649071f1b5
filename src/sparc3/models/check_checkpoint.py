"""Check that a checkpoint is complete and consistent: no pickle, no missing or unused weight, no wrong
shape, no NaN or Inf.

Checkpoints have no checksums. A changed weight that is still finite changes the model's fingerprint.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..storage import parse_json, read_text
from .fingerprint import plain_parts
from .hub import CONVERT
from .offloading import named_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ALONE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
_BUFFERS = re.compile(
    r"(rotary_emb\..*|attn\.(masked_)?bias|attention\.(masked_)?bias|[kv]_(proj\.)?(output_)?scale)$"
)
"""Entries of checkpoints that are not weights: rotary angles, causal masks, scales of a key-value cache."""


def require_downloaded(name: str) -> None:
    """Raise UserError if a folder has Git LFS pointers instead of files."""
    for path in sorted(Path(name).iterdir()) if Path(name).is_dir() else []:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
            raise UserError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in its folder")


def require_readable(name: str) -> None:
    """Raise UserError if a folder has no weights, incomplete weights, two sets of weights, or only pickle,
    which is unsafe."""
    folder = Path(name)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        return
    _read_settings(
        folder / "generation_config.json", ", or remove it"
    )  # transformers would ignore a broken one
    index = _read_settings(folder / INDEX).get("weight_map")
    if (folder / INDEX).is_file() and (not isinstance(index, dict) or not index):
        raise UserError(f"{folder / INDEX} has no weight_map; download it again")
    parts = sorted(set(map(str, (index or {}).values())) - {ALONE})
    present = [
        part for part in parts if os.path.isfile(folder / part)
    ]  # isfile, as it is False for invalid names
    if (folder / ALONE).is_file():
        if present:
            raise UserError(
                f"{name} has {ALONE} and the {len(present)} parts of {INDEX}; remove those that are not the "
                "model"
            )
        return
    if len(present) < len(parts):
        missing = next(part for part in parts if part not in present)[:80]
        raise UserError(
            f"{name} lacks {len(parts) - len(present)} of {len(parts)} files of weights ({missing}); "
            "download them"
        )
    if parts:
        return
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if pickles := [file for file in names if file.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]:
        raise UserError(f"{name} has pickle weights ({pickles[0]}), which sparc3 does not read; {CONVERT}")
    if others := [file for file in names if file.endswith((".safetensors", ".gguf"))]:
        raise UserError(
            f"{name} has {others[0]}, but neither {ALONE} nor {INDEX}; download the missing files, or rename "
            "the weights to one of these"
        )


def _read_settings(path: Path, remedy: str = "") -> dict[str, Any]:
    """The content of a JSON file of settings; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(read_text(path))
        if isinstance(content, dict):
            return content
        error: Exception = ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as cause:
        error = cause
    raise UserError(f"{path} cannot be read ({error}); download it again{remedy}")


def require_whole(name: str, model: "PreTrainedModel", report: dict[str, Any], layers: str) -> None:
    """Raise UserError if transformers filled in missing weights or ignored existing ones, or if a weight
    is not finite.

    Args:
        report: the loading info of from_pretrained (output_loading_info).
        layers: name of the model's list of layers.
    """
    remedy = "the checkpoint is damaged, or config.json belongs to another model; download it again"
    if report["mismatched_keys"]:
        key, actual, expected = min(report["mismatched_keys"])
        raise UserError(
            f"'{name}': {key} is {tuple(actual)} in the weights and {tuple(expected)} by config.json; "
            f"{remedy}"
        )
    unexpected = sorted(report["unexpected_keys"])
    if missing := sorted(report["missing_keys"]):
        if renamed := [key for key in unexpected if key.endswith(f".{missing[-1]}")]:
            remedy = f"it has {renamed[0]} instead; save the model inside the wrapper"
        elif missing == ["lm_head.weight"]:
            remedy = "if the embeddings serve as lm_head, set tie_word_embeddings: true in config.json"
        raise UserError(f"'{name}' lacks {len(missing)} weights, the first {missing[0]}; {remedy}")
    blocks = model.get_submodule(layers)
    assert isinstance(blocks, nn.ModuleList)
    if extra := [key for key in unexpected if _layer_index(key, layers) >= len(blocks)]:
        raise UserError(
            f"'{name}' has weights of more layers than the {len(blocks)} in config.json ({extra[0]}); "
            f"{remedy}"
        )
    prefixes = (f"{layers}.", f"{layers.partition('.')[2]}.")
    unused = [key for key in unexpected if key.startswith(prefixes) and not _BUFFERS.search(key)]
    if unused and not getattr(model.config, "quantization_config", None):
        raise UserError(
            f"'{name}' has {len(unused)} weights in its layers that a {model.config.model_type} with this "
            f"config.json does not use, such as {unused[0]}, so its figures would be wrong; {remedy}"
        )
    for key, value in named_values(model):
        for weight in plain_parts(value.detach()):
            if not weight.is_floating_point() or not weight.numel():
                continue
            if not all(bound.isfinite() for bound in weight.aminmax()):
                hint = f", or load it in float32, as {weight.dtype} may overflow"
                raise UserError(
                    f"'{name}': {key} contains a NaN or Inf; "
                    f"{remedy}{'' if weight.dtype == torch.float32 else hint}"
                )


def _layer_index(key: str, layers: str) -> int:
    """The layer index in a weight's name, with or without the model's prefix; -1 if there is none."""
    digits = re.match(rf"(?:.*\.)?{re.escape(layers.rpartition('.')[2])}\.(\d+)\.", key)
    return int(digits[1]) if digits else -1
