"""The fingerprints: whatever figure of a configuration changes a logit, and whatever in a tokenizer changes a token, gives another."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny
from tokenizers.normalizers import Lowercase

from sparc3 import Scores, attribute, contrast, load_model
from sparc3.errors import UserError
from sparc3.models.fingerprint import HARMLESS, _config_figures, model_fingerprint, tokenizer_fingerprint
from sparc3.models.load import DEMO, load_tokenizer

IDS = torch.randint(3, 40, (1, 24), generator=torch.Generator().manual_seed(0))
KINDS = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
NAMES = {
    **{**KINDS, "global": "local", "local": "global"},
    **{"silu": "relu", "relu": "silu", "gelu": "relu", "gelu_new": "relu", "gelu_pytorch_tanh": "relu"},
    **{"relu2": "silu", "default": "linear", "llama3": "default"},
}
TOLD = {
    **{"smollm3": {"no_rope_layers"}, "gemma2": {"layer_types"}, "gptj": {"rotary_dim"}},
    **{"gpt-neo": {"attention_layers", "window_size"}, "bloom": {"apply_residual_connection_post_layernorm"}},
    **{"gpt2": {"scale_attn_weights", "scale_attn_by_inverse_layer_idx"}, "phi3": {"sliding_window"}},
}
"""Figures that change logits and no shape, by model; that the search finds these shows that it looks."""


KEPT = ("dtype", "num_experts", "num_local_experts", "pad_token_id", "return_dict", "summary_activation")
"""Harmless keys whose other values transformers does not take, or that change shapes."""


def flips(value: Any) -> Iterator[Any]:
    """Other values of a figure, one change at a time, as they could stand in a config.json."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from {value // 2, value * 2} - {value}
    elif isinstance(value, float):
        yield value * 1.5 + 0.25
    elif isinstance(value, str):
        yield from (NAMES[value],) if value in NAMES else ()
    elif isinstance(value, list):
        for place, one in enumerate(value):
            for other in flips(one):
                yield [*value[:place], other, *value[place + 1 :]]
    elif isinstance(value, dict):
        for name, one in value.items():
            for other in flips(one):
                more = {"factor": 2.0} if other == "linear" else {}
                yield {**value, **more, name: other}
    elif value is None:
        yield from (True, 2)


def rebuild(base: Any, **changes: Any) -> Any:
    """(model, logits) with the same weights under a changed configuration; None where it cannot be built, or has other shapes."""
    from transformers import AutoModelForCausalLM

    try:
        config = type(base.config).from_dict({**base.config.to_dict(), **changes})
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config).state_dict()
        if {key: part.shape for key, part in shapes.items()} != {
            key: part.shape for key, part in base.state_dict().items()
        }:
            return None
        model = AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(base.state_dict())
        with torch.inference_mode():
            return model, model(input_ids=IDS, use_cache=False, return_dict=True).logits
    except Exception:
        return None


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logits_or_another_fingerprint(name: str) -> None:
    base = tiny(name, dtype=torch.float32)
    written = base.config.to_dict()
    changes = {
        key: next(flips(value), None) for key, value in written.items() if key in HARMLESS and key not in KEPT
    }
    again = rebuild(base, **{key: other for key, other in changes.items() if other is not None})
    assert again
    assert model_fingerprint(again[0]) == (whole := model_fingerprint(base))
    with torch.inference_mode():
        plain = base(input_ids=IDS, use_cache=False).logits
    assert torch.equal(again[1], plain)
    told = set()
    for key, value in written.items():
        for other in flips(value) if key not in HARMLESS else ():
            made = rebuild(base, **{key: other})
            if made is not None and not torch.allclose(made[1], plain, rtol=0, atol=1e-6):
                assert model_fingerprint(made[0]) != whole, (key, other)
                told.add(key)
    assert len(told) >= 2
    assert told >= TOLD.get(name, set())


def test_a_configuration_read_again_is_the_same(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for name in CONFIGS:
        config = tiny(name).config
        config.save_pretrained(tmp_path / name)
        assert _config_figures(AutoConfig.from_pretrained(tmp_path / name)) == _config_figures(config), name


def test_a_changed_tokenizer_has_another_fingerprint(tmp_path: Path) -> None:
    whole = tokenizer_fingerprint(load_tokenizer("demo"))
    used = load_tokenizer("demo")
    used(["a text", "another, longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(used) == whole
    shutil.copytree(DEMO, folder := tmp_path / "m")
    raw = json.loads((folder / "tokenizer.json").read_text())
    found = {whole}
    first, second = list(raw["model"]["vocab"])[-2:]
    for changes in (
        {
            "model": {
                "vocab": {
                    **raw["model"]["vocab"],
                    first: raw["model"]["vocab"][second],
                    second: raw["model"]["vocab"][first],
                }
            }
        },
        {"model": {"merges": raw["model"]["merges"][:-1]}},
        {"normalizer": {"type": "Lowercase"}},
    ):
        changed = copy.deepcopy(raw)
        for key, value in changes.items():
            changed[key] = {**raw[key], **value} if key == "model" else value
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        found.add(tokenizer_fingerprint(load_tokenizer(folder)))
    assert len(found) == 4


def test_scores_by_two_tokenizers_are_not_contrasted(tmp_path: Path) -> None:
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    other = load_tokenizer("demo")
    other.backend_tokenizer.normalizer = Lowercase()

    def score(samples: list[Any], tokenizer: Any) -> Scores:
        return attribute(model, samples, tokenizer=tokenizer, neuron="signed", progress=False)

    one, two = score(["Tom went home."], tokenizer), score(["Tom went home."], other)
    assert one.provenance["tokenizer"] == tokenizer_fingerprint(tokenizer) != two.provenance["tokenizer"]
    with pytest.raises(UserError, match="tokenizer"):
        contrast(one, two)
    by_ids = score([tokenizer("Tom went home.")["input_ids"]], tokenizer)
    assert "tokenizer" not in by_ids.provenance
    contrast(one, by_ids)
