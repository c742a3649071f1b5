"""What other libraries take for the same work; each runs in an environment of its own (see peers.sh) and knows nothing of sparc3.

    python benchmarks/peers.py lxt|wanda SAMPLES.json REPEATS

Prints one JSON object: seconds of every repeat, of the library's work and of a plain forward of the same samples one by one.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch


def build(layers: int) -> Any:
    """The random Llama of weights.py."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4096,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def forward(model: Any, samples: list[list[int]]) -> None:
    with torch.inference_mode():
        for ids in samples:
            model(input_ids=torch.tensor([ids]), use_cache=False)


def lxt(layers: int, samples: list[list[int]]) -> tuple[Any, Callable[[], None]]:
    """Σ_j |W_ij ∂y/∂W_ij| of every neuron of mlp.up, one sample at a time, gradients for those weights only."""
    from transformers.models.llama import modeling_llama

    # lxt imports torchvision for its vision transformer, which is not used here; PyPI's build of it needs CUDA.
    for name in ("torchvision", "torchvision.models", "torchvision.models.vision_transformer"):
        sys.modules[name] = MagicMock()
    from lxt.efficient import monkey_patch

    plain = build(layers)
    monkey_patch(modeling_llama)
    patched = build(layers)
    for name, parameter in patched.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    weights = [parameter for parameter in patched.parameters() if parameter.requires_grad]

    def work() -> None:
        totals = [torch.zeros(weight.shape[0]) for weight in weights]
        for ids in samples:
            for weight in weights:
                weight.grad = None
            embedded = patched.get_input_embeddings()(torch.tensor([ids])).requires_grad_()
            patched(inputs_embeds=embedded, use_cache=False).logits[0, -1].max().backward()
            for total, weight in zip(totals, weights, strict=True):
                assert weight.grad is not None
                total += (weight * weight.grad).abs().sum(1).detach()

    return plain, work


def wanda(layers: int, samples: list[list[int]]) -> tuple[Any, Callable[[], None]]:
    """One-shot Wanda pruning of half of every row of all linear maps in the layers."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # The samples are token ids already; oneshot wants a tokenizer all the same.
    unused = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a"
    )
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})

    # oneshot reads the configuration again from where the model says it is from.
    place = tempfile.mkdtemp()
    plain = build(layers)
    plain.config.save_pretrained(place)

    def work() -> None:
        recipe = WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"])
        model = build(layers)
        model.config._name_or_path = model.name_or_path = place
        oneshot(
            model=model,
            processor=unused,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(samples),
            max_seq_length=512,
        )

    return plain, work


def main() -> None:
    what, path, repeats = sys.argv[1:]
    asked = json.loads(Path(path).read_text())
    torch.set_num_threads(asked["threads"])
    model, work = {"lxt": lxt, "wanda": wanda}[what](asked["layers"], asked["samples"])
    seconds: dict[str, list[float]] = {"forward": [], "work": [], "build": []}
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(model, asked["samples"]),
        "work": work,
        "build": lambda: build(asked["layers"]),
    }
    for turn in range(int(repeats) + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    print("\n" + json.dumps(seconds))


if __name__ == "__main__":
    main()
