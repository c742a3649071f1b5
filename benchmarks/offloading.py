"""LLaMA-3-8B on a GPU that is too small for it, by numbers alone; no GPU is needed. The figures of docs/cluster.md.

    python benchmarks/offloading.py

First how many layers stay on the CPU for some sizes of free GPU memory, as transformers and accelerate place them in the room that sparc3
gives them. Then what a layer would have to move over PCIe to keep its activations on the CPU, and what it costs to compute it again.
"""

import logging
from typing import Any

import torch
from attribution import SHAPES
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.accelerate import _get_device_map

from sparc3 import attribute
from sparc3.models.offloading import gpu_room

GIB, TOKENS, PCIE = 2**30, 2048, 25e9
SHAPE = SHAPES["llama3-8b"]


def random_model(**changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SHAPE | changes), dtype=torch.bfloat16
    ).eval()


def places() -> None:
    with torch.device("meta"):
        model = random_model()
    needed = sum(weight.nbytes for weight in model.parameters())
    for free in (7.5, 11.3, 15.2, 23.2):
        room = gpu_room({0: int(free * GIB), "cpu": 64 * GIB}, needed, "llama3-8b")
        away = [part for part, place in _get_device_map(model, "auto", room, None).items() if place == "cpu"]
        layers = sum(".layers." in part for part in away)
        print(
            f"{free:5} GiB free: {layers:2} of {len(model.model.layers)} layers on the CPU{', and the head' if 'lm_head' in away else ''}"
        )


def saved(layers: int, width: int, tokens: int) -> int:
    """Bytes of activations that autograd saves while a sample is attributed to a model of LLaMA-3-8B's proportions."""
    model = random_model(
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        vocab_size=256,
    )
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        attribute(model, [list(range(3, 203)) * (tokens // 200)], gradient_checkpointing=False)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def activations(width: int = 512, tokens: int = 600) -> None:
    bytes_each = (saved(6, width, tokens) - saved(3, width, tokens)) / 3 / width / tokens
    layer = bytes_each * SHAPE["hidden_size"] * TOKENS
    keys = SHAPE["hidden_size"] // (SHAPE["num_attention_heads"] // SHAPE["num_key_value_heads"])
    weights = SHAPE["hidden_size"] * (2 * SHAPE["hidden_size"] + 2 * keys + 3 * SHAPE["intermediate_size"])
    work = TOKENS * (
        2 * weights + 2 * TOKENS * SHAPE["hidden_size"]
    )  # of attention half the positions, for scores and for values
    moved = 2 * layer / PCIE
    print(
        f"a layer saves {layer / 2**20:.0f} MiB for {TOKENS} tokens ({bytes_each:.1f} bytes a token and feature), its input is "
        f"{2 * SHAPE['hidden_size'] * TOKENS / 2**20:.0f} MiB; all layers {layer * 32 / GIB:.1f} GiB"
    )
    print(
        f"out and in again at {PCIE / 1e9:.0f} GB/s: {1e3 * moved:.1f} ms; computed again, {work / 1e12:.2f} TFLOP: "
        f"{work / 100e9:.1f} ms at 100 TFLOP/s, {work / 400e9:.1f} ms at 400; the same at {work / moved / 1e12:.0f} TFLOP/s"
    )
    inputs = 2 * SHAPE["hidden_size"]
    print(
        f"the inputs alone, out and in again: {2e3 * inputs * TOKENS / PCIE:.1f} ms a layer; of all layers for 65,536 tokens "
        f"{inputs * 65536 * SHAPE['num_hidden_layers'] / GIB:.0f} GiB"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    places()
    activations()
