"""Where the units of a Hugging Face model are in a GGUF: names of its tensors, and the order of their
rows."""

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
"""model_type of a family → general.architecture of its GGUF files, where they are not the same word."""
AS_THEY_ARE = "gemma gemma2 gemma3 qwen2 qwen3 qwen2moe qwen3moe starcoder2 gpt2 phi3".split()
"""Architectures whose files keep the rows of query and key in Hugging Face's order; llama's come in pairs
for its rotary positions."""


@dataclass(frozen=True)
class Location:
    """The tensor that holds a site.

    Attributes:
        tensor: its name, without ".weight".
        role: the site's role.
        part: which matrix of several in one it is ("up" of "gate, up"); empty where the tensor is the site.
        layout: how they are laid out, a key of LAYOUTS.
        expert: which expert of a tensor [experts, out, in]; None where the tensor is one matrix.
    """

    tensor: str
    role: str
    part: str = ""
    layout: str = ""
    expert: int | None = None


def architecture_of(model_type: str) -> str:
    """What a GGUF calls the architecture that transformers calls `model_type`."""
    return ARCHITECTURES.get(model_type, model_type)


def require_same_architecture(model_type: str | None, architecture: str, path: Any) -> str:
    """The family of a circuit's model, or the file's. Raises UserError where the file is another's."""
    known = [family for family in FAMILIES if architecture_of(family) == architecture]
    if model_type is None and known:
        return known[0]
    if model_type is None or model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{path}: architecture '{model_type or architecture}' has no row in the family table; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if model_type not in known:
        raise UserError(
            f"the circuit was found on a model of architecture {model_type}, and {path} is of architecture "
            f"{architecture}; use the model it was made on"
        )
    return model_type


def locate(name: str, family: Family, architecture: str, layers: int) -> Location:
    """Where the site `name` is. Raises UserError where such a file has no tensor for it."""
    there = re.fullmatch(re.escape(family.layers) + r"\.(\d+)\.(.+)", name)
    number, rest = (int(there[1]), there[2]) if there else (0, "")
    found = _in_layer(rest, family)
    if found is None:
        raise UserError(f"the circuit names {name}, which is no site of this architecture; use its model")
    if number >= layers:
        raise UserError(f"the circuit names {name}, and the file has {layers} layers; use its model")
    path, location = found
    tensor = _names(architecture, layers).get_name(f"{family.layers}.{number}.{path}")
    if tensor is None:
        raise UserError(f"gguf knows no tensor of {architecture} for {name}; ablate the Hugging Face model")
    return Location(tensor, location.role, location.part, location.layout, location.expert)


@lru_cache(maxsize=2)
def _names(architecture: str, layers: int) -> Any:
    """gguf's table of the names of an architecture's tensors."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map({word: key for key, word in MODEL_ARCH_NAMES.items()}[architecture], layers)


def _in_layer(rest: str, family: Family) -> tuple[str, Location] | None:
    """(path of the module or an expert's matrix, what it is) of a site's name after the layer's number."""
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


def rows_of(
    where: Location, units: Any, shape: tuple[int, ...], heads: int, key_value_heads: int, architecture: str
) -> Any:
    """Which rows of the tensor [out, in], or [experts · out, in], hold these neurons.

    Args:
        units: neurons of the site, numpy int64.
        shape: of the tensor, as Hugging Face has it: ([experts,] out, in).

    Raises:
        UserError: neurons that the tensor does not have, or an order of rows that is not known.
    """
    import numpy

    out = shape[-2]
    if where.expert is not None:
        _require(where.expert < (shape[0] if len(shape) == 3 else 0), where, f"expert {where.expert}", shape)
        start, stop = where.expert * out, (where.expert + 1) * out
    elif where.part:
        found = LAYOUTS[where.layout](out, heads, key_value_heads)[where.part]
        if not isinstance(found, slice) or (architecture not in AS_THEY_ARE and where.role in QUERY_KEY):
            raise _unknown_order(where, architecture)
        start, stop = found.start, found.stop
    else:
        start, stop = 0, out
    _require(int(units.max(initial=0)) < stop - start, where, f"neuron {units.max(initial=0)}", shape)
    if where.role in QUERY_KEY and not where.part and architecture not in AS_THEY_ARE:
        if architecture != "llama":
            raise _unknown_order(where, architecture)
        # llama.cpp rotates neighbours, transformers the two halves of a head: row (head, half, j) is stored
        # as (head, j, half).
        width = out // (heads if where.role == "attn.q" else key_value_heads)
        head, half, place = units // width, units % width // (width // 2), units % (width // 2)
        units = head * width + 2 * place + half
    return numpy.sort(start + units)


QUERY_KEY = ("attn.q", "attn.k")


def _require(fits: bool, where: Location, unit: str, shape: tuple[int, ...]) -> None:
    if not fits:
        raise UserError(
            f"the circuit names {unit} of {where.tensor}, whose shape is {shape}; use the model it was made "
            "on"
        )


def _unknown_order(where: Location, architecture: str) -> UserError:
    return UserError(
        f"the order of the rows of {where.tensor} is not known for GGUF files of {architecture}; ablate the "
        "Hugging Face model"
    )
