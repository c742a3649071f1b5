"""Whether a checkpoint of others can be trusted to be what it says: no pickle, every weight there, each of its shape, none NaN or Inf.

Their files carry no checksums. What this cannot see, a changed weight that is still a number, gives the model another fingerprint.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import UserError
from .files import parse_json, read_text
from .offloading import named_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONVERT = "convert them: load it with transformers where you trust it, and save_pretrained writes safetensors"


def require_safe(name: str) -> None:
    """Raise UserError where a folder holds its weights as pickle alone, which can run code when it is read.

    Also where its generation_config.json cannot be read: transformers would go on without it, and the model would write on past its end.
    """
    folder = Path(name)
    if (said := folder / "generation_config.json").is_file():
        try:
            parse_json(read_text(said))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{said} cannot be read ({error}); download it again, or remove it") from None
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if old := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")):
        raise UserError(f"{name} holds its weights as pickle ({old[0]}), which sparc3 does not read; {CONVERT}")


def require_whole(name: str, model: "PreTrainedModel", found: dict[str, Any], layers: str) -> None:
    """Raise UserError where transformers filled in what a checkpoint lacks or left out layers that it has, or where a weight is not finite.

    Args:
        found: what from_pretrained gives with output_loading_info.
        layers: name of the model's list of layers.
    """
    remedy = "the checkpoint is damaged, or config.json is of another model; download it again"
    if found["mismatched_keys"]:
        key, there, wanted = min(found["mismatched_keys"])
        raise UserError(f"'{name}': {key} is {tuple(there)} in the weights and {tuple(wanted)} by config.json; {remedy}")
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"'{name}' lacks {len(missing)} weights, the first {missing[0]}; {remedy}")
    blocks = model.get_submodule(layers)
    assert isinstance(blocks, nn.ModuleList)
    beyond = [key for key in found["unexpected_keys"] if _layer_of(key, layers) >= len(blocks)]
    if beyond:
        raise UserError(f"'{name}' has weights of more than the {len(blocks)} layers that config.json says ({min(beyond)}); {remedy}")
    for key, weight in named_values(model):
        if weight.is_floating_point() and weight.numel() and not all(bound.isfinite() for bound in weight.detach().aminmax()):
            small = "" if weight.dtype == torch.float32 else f", or load it in float32: {weight.dtype} may be too small for it"
            raise UserError(f"'{name}': {key} holds a NaN or Inf; {remedy}{small}")


def _layer_of(key: str, layers: str) -> int:
    """The number of the layer that a weight belongs to by its name, with or without the prefix of the whole model; -1 for none."""
    digits = re.match(rf"(?:.*\.)?{re.escape(layers.rpartition('.')[2])}\.(\d+)\.", key)
    return int(digits[1]) if digits else -1
