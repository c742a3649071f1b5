"""The places of a Hugging Face model's units in a GGUF: names of tensors, and the order of their rows."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UnsupportedModel, UserError
from ..models.families import FAMILIES, Family
from ..models.sites import LAYOUTS

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "ministral": "llama",
    "ministral3": "mistral3",
    "olmo3": "olmo2",
    "hunyuan_v1_dense": "hunyuan-dense",
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "glm": "chatglm",
    "phi": "phi2",
    "gpt_neox": "gptneox",
}
"""model_type of a family → general.architecture of its GGUF files, if they differ."""
AS_THEY_ARE = "gemma gemma2 gemma3 qwen2 qwen3 qwen2moe qwen3moe starcoder2 gpt2 phi3".split()
"""Architectures whose files keep the rows of query and key in Hugging Face's order; llama's are permuted
for its rotary position embedding."""


@dataclass(frozen=True)
class Location:
    """The tensor that contains a site.

    Attributes:
        tensor: its name, without ".weight".
        role: the site's role.
        part: the matrix inside a fused tensor ("up" of "gate, up"); empty if the tensor is not fused.
        layout: the layout of a fused tensor, a key of LAYOUTS.
        expert: index of the expert in a tensor [experts, out, in]; None if the tensor is one matrix.
    """

    tensor: str
    role: str
    part: str = ""
    layout: str = ""
    expert: int | None = None


def gguf_architecture(model_type: str) -> str:
    """GGUF's name for the architecture that transformers calls `model_type`."""
    return ARCHITECTURES.get(model_type, model_type)


def require_same_architecture(model_type: str | None, architecture: str, path: Any) -> str:
    """The family of the circuit's model, or of the file if the circuit has none. Raises UserError if they
    differ."""
    families = [family for family in FAMILIES if gguf_architecture(family) == architecture]
    if model_type is None and families:
        return families[0]
    if model_type is None or model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{path}: architecture '{model_type or architecture}' has no row in the family table; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if model_type not in families:
        raise UserError(
            f"the circuit was found on a model of architecture {model_type}, but {path} has architecture "
            f"{architecture}; use the model it was made on"
        )
    return model_type


def locate(name: str, family: Family, architecture: str, layers: int) -> Location:
    """The location of the site `name`. Raises UserError if such a file has no tensor for it."""
    match = re.fullmatch(re.escape(family.layers) + r"\.(\d+)\.(.+)", name)
    number, rest = (int(match[1]), match[2]) if match else (0, "")
    located = _locate_in_layer(rest, family)
    if located is None:
        raise UserError(
            f"the circuit names {name}, which is not a site of this architecture; use the model it was made "
            "on"
        )
    if number >= layers:
        raise UserError(
            f"the circuit names {name}, but the file has {layers} layers; use the model it was made on"
        )
    path, location = located
    tensor = _load_name_table(architecture, layers).get_name(f"{family.layers}.{number}.{path}")
    if tensor is None:
        raise UserError(
            f"gguf has no name for {name} in architecture {architecture}; ablate the Hugging Face model"
        )
    return Location(tensor, location.role, location.part, location.layout, location.expert)


@lru_cache(maxsize=2)
def _load_name_table(architecture: str, layers: int) -> Any:
    """gguf's table of tensor names for an architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map({word: key for key, word in MODEL_ARCH_NAMES.items()}[architecture], layers)


def _locate_in_layer(rest: str, family: Family) -> tuple[str, Location] | None:
    """(path of the module or of an expert's matrix, location without tensor) for a site's name after the
    layer's number; None if there is no such site."""
    expert = re.fullmatch(r"(.+)\.(?:gate_up_proj#(\d+)\.(gate|up)|down_proj#(\d+))", rest)
    if expert and family.experts == expert[1]:
        matrix = expert[3] or "down"
        return f"{family.experts}.{matrix}_proj", Location(
            "", f"mlp.{matrix}", expert=int(expert[2] or expert[4])
        )
    for role, path in family.roles.items():
        shared = path.replace(family.gated, family.shared, 1) if family.gated and family.shared else path
        if rest in (path, shared):
            module, _, part = rest.partition("#")
            return module, Location("", role, part, family.fused[module] if part else "")
    return None


def find_rows(
    location: Location,
    units: Any,
    shape: tuple[int, ...],
    heads: int,
    key_value_heads: int,
    architecture: str,
) -> Any:
    """The rows of these neurons in the tensor [out, in], or [experts · out, in].

    Args:
        units: neurons of the site, numpy int64.
        shape: the tensor's shape in Hugging Face's order: ([experts,] out, in).

    Raises:
        UserError: neurons that the tensor does not have, or an unknown order of rows.
    """
    import numpy

    out = shape[-2]
    if location.expert is not None:
        _require(
            location.expert < (shape[0] if len(shape) == 3 else 0),
            location,
            f"expert {location.expert}",
            shape,
        )
        start, stop = location.expert * out, (location.expert + 1) * out
    elif location.part:
        part_rows = LAYOUTS[location.layout](out, heads, key_value_heads)[location.part]
        if not isinstance(part_rows, slice) or (
            architecture not in AS_THEY_ARE and location.role in QUERY_KEY
        ):
            raise _unknown_order(location, architecture)
        start, stop = part_rows.start, part_rows.stop
    else:
        start, stop = 0, out
    _require(int(units.max(initial=0)) < stop - start, location, f"neuron {units.max(initial=0)}", shape)
    if location.role in QUERY_KEY and not location.part and architecture not in AS_THEY_ARE:
        if architecture != "llama":
            raise _unknown_order(location, architecture)
        # llama.cpp rotates adjacent rows, transformers the two halves of a head, so row (head, half, j) is
        # stored as (head, j, half).
        width = out // (heads if location.role == "attn.q" else key_value_heads)
        head, half, offset = units // width, units % width // (width // 2), units % (width // 2)
        units = head * width + 2 * offset + half
    return numpy.sort(start + units)


QUERY_KEY = ("attn.q", "attn.k")


def _require(fits: bool, location: Location, unit: str, shape: tuple[int, ...]) -> None:
    if not fits:
        raise UserError(
            f"the circuit names {unit} of {location.tensor}, whose shape is {shape}; use the model it was "
            "made on"
        )


def _unknown_order(location: Location, architecture: str) -> UserError:
    return UserError(
        f"the order of the rows of {location.tensor} is not known for GGUF files of {architecture}; ablate "
        "the Hugging Face model"
    )
