"""Whether a checkpoint of others can be trusted to be what it says: no pickle, every file and every weight
there, each of its shape, none left out, none NaN or Inf.

Checkpoints carry no checksums. A changed weight that is still a number gives the model another fingerprint.
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
"""What checkpoints have in their layers besides weights: rotary angles, causal masks, scales of a key-value
cache."""


def require_downloaded(name: str) -> None:
    """Raise UserError where a folder has Git LFS's pointers in place of files."""
    for path in sorted(Path(name).iterdir()) if Path(name).is_dir() else []:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
            raise UserError(f"{path} is a pointer of Git LFS, not the file; run `git lfs pull` in its folder")


def require_readable(name: str) -> None:
    """Raise UserError where a folder has no weights, not all, two sets of them, or (unsafe) pickle alone."""
    folder = Path(name)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        return
    _read_settings(folder / "generation_config.json", ", or remove it")  # transformers would go on without
    index = _read_settings(folder / INDEX).get("weight_map")
    if (folder / INDEX).is_file() and (not isinstance(index, dict) or not index):
        raise UserError(f"{folder / INDEX} has no weight_map; download it again")
    parts = sorted(set(map(str, (index or {}).values())) - {ALONE})
    there = [part for part in parts if os.path.isfile(folder / part)]  # False for what no name can be
    if (folder / ALONE).is_file():
        if there:
            raise UserError(
                f"{name} has {ALONE} and the {len(there)} parts of {INDEX}; remove which is not the model"
            )
        return
    if len(there) < len(parts):
        missing = next(part for part in parts if part not in there)[:80]
        raise UserError(
            f"{name} lacks {len(parts) - len(there)} of {len(parts)} files of weights ({missing}); download "
            "them"
        )
    if parts:
        return
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    if old := [file for file in found if file.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]:
        raise UserError(f"{name} has pickle weights ({old[0]}), which sparc3 does not read; {CONVERT}")
    if others := [file for file in found if file.endswith((".safetensors", ".gguf"))]:
        raise UserError(
            f"{name} has {others[0]}, but neither {ALONE} nor {INDEX}; download what is missing, or give the "
            "weights that name"
        )


def _read_settings(path: Path, remedy: str = "") -> dict[str, Any]:
    """What a file of settings says; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        said = parse_json(read_text(path))
        if isinstance(said, dict):
            return said
        error: Exception = ValueError("it is no list of settings")
    except (ValueError, RecursionError) as raised:
        error = raised
    raise UserError(f"{path} cannot be read ({error}); download it again{remedy}")


def require_whole(name: str, model: "PreTrainedModel", found: dict[str, Any], layers: str) -> None:
    """Raise UserError where transformers filled in what a checkpoint lacks or left out weights that it has,
    or where a weight is not finite.

    Args:
        found: what from_pretrained gives with output_loading_info.
        layers: name of the model's list of layers.
    """
    remedy = "the checkpoint is damaged, or config.json is of another model; download it again"
    if found["mismatched_keys"]:
        key, there, wanted = min(found["mismatched_keys"])
        raise UserError(
            f"'{name}': {key} is {tuple(there)} in the weights and {tuple(wanted)} by config.json; {remedy}"
        )
    unexpected = sorted(found["unexpected_keys"])
    if missing := sorted(found["missing_keys"]):
        if wrapped := [key for key in unexpected if key.endswith(f".{missing[-1]}")]:
            remedy = f"they are called {wrapped[0]} there; save the model that is inside the wrapper"
        elif missing == ["lm_head.weight"]:
            remedy = "if it is the embeddings, say so in config.json by tie_word_embeddings: true"
        raise UserError(f"'{name}' lacks {len(missing)} weights, the first {missing[0]}; {remedy}")
    blocks = model.get_submodule(layers)
    assert isinstance(blocks, nn.ModuleList)
    if beyond := [key for key in unexpected if _layer_of(key, layers) >= len(blocks)]:
        raise UserError(
            f"'{name}' has weights of more than the {len(blocks)} layers that config.json says "
            f"({beyond[0]}); {remedy}"
        )
    inside = (f"{layers}.", f"{layers.partition('.')[2]}.")
    unused = [key for key in unexpected if key.startswith(inside) and not _BUFFERS.search(key)]
    if unused and not getattr(model.config, "quantization_config", None):
        raise UserError(
            f"'{name}' has {len(unused)} weights in its layers that a {model.config.model_type} of its "
            f"config.json does not use, the first {unused[0]}, so its figures would be wrong; {remedy}"
        )
    for key, whole in named_values(model):
        for weight in plain_parts(whole.detach()):
            if not weight.is_floating_point() or not weight.numel():
                continue
            if not all(bound.isfinite() for bound in weight.aminmax()):
                wider = f", or load it in float32: {weight.dtype} may be too small for it"
                raise UserError(
                    f"'{name}': {key} contains a NaN or Inf; "
                    f"{remedy}{'' if weight.dtype == torch.float32 else wider}"
                )


def _layer_of(key: str, layers: str) -> int:
    """The number of a weight's layer by its name, with or without the whole model's prefix; -1 for none."""
    digits = re.match(rf"(?:.*\.)?{re.escape(layers.rpartition('.')[2])}\.(\d+)\.", key)
    return int(digits[1]) if digits else -1
