"""Adapters are merged whatever is installed, and of a model of text and images the text model is loaded."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

from sparc3 import Circuit, ablated
from sparc3.checkpoints.export import export
from sparc3.errors import UnsupportedModel, UserError
from sparc3.models.fingerprint import describe
from sparc3.models.load import DEMO, load_model, load_tokenizer, load_weights, require_loadable
from sparc3.models.sites import sites_of

IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """base: a model with a tokenizer; alone: an adapter of it; whole: both in one folder."""
    peft = pytest.importorskip("peft")
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO) / name, tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM")
    changed = peft.get_peft_model(tiny("llama", dtype=torch.float32), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in changed.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    save_file({"logits": logits(changed)}, tmp_path / "wanted.safetensors")
    changed.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    changed.save_pretrained(tmp_path / "alone")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    shutil.copytree(tmp_path / "alone", tmp_path / "whole", dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("name", ["alone", "whole"])
def test_an_adapter_is_merged_and_exported_so(folders: Path, name: str) -> None:
    model, tokenizer = load_model(folders / name, device="cpu")
    base = load_weights(folders / "base", device="cpu")
    wanted = load_file(folders / "wanted.safetensors")["logits"]
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert (logits(model) - logits(base)).abs().max() > 0.1
    assert describe(model)["id"] == name
    assert describe(model)["fingerprint"] != describe(base)["fingerprint"]
    circuit = Circuit("neuron", {sites_of(model, ["mlp.up"])[0].name: (1,)}, describe(model), {})
    out = export(model, tokenizer, circuit, folders / "out")
    assert not (out / "adapter_config.json").exists()
    with ablated(model, circuit):
        torch.testing.assert_close(logits(load_weights(out, device="cpu")), logits(model), rtol=0, atol=1e-6)


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_work(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders / "none").mkdir()
    shutil.copytree(folders / "base", folders / "left")
    for name in ("left", "none"):
        shutil.copy(folders / "alone/adapter_config.json", folders / name)
    told = json.loads((folders / "alone/adapter_config.json").read_text())
    shutil.copytree(folders / "alone", folders / "orphan")
    (folders / "orphan/adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": None}))
    shutil.copytree(folders / "alone", folders / "broken")
    (folders / "broken/adapter_config.json").write_text("[1")
    for name in ("left", "none", "orphan", "broken"):
        with pytest.raises(UserError, match="adapter"):
            require_loadable(folders / name)
    monkeypatch.setattr("sparc3.models.adapters.find_spec", lambda _: None)
    for name in ("alone", "whole"):
        with pytest.raises(UserError, match="pip install peft"):
            load_weights(folders / name)


TEXT = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 2},
}
SIGHT = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}


def wrapper(name: str) -> Any:
    import transformers as t

    if name == "gemma3":
        sizes = t.Gemma3Config(text_config={**TEXT, "sliding_window": 4}, vision_config=SIGHT)
        return t.Gemma3ForConditionalGeneration(sizes)
    if name == "mistral3":
        sight = t.PixtralVisionConfig(**SIGHT, head_dim=8)
        return t.Mistral3ForConditionalGeneration(
            t.Mistral3Config(text_config=t.MistralConfig(**TEXT), vision_config=sight)
        )
    text = t.LlamaConfig(**TEXT, tie_word_embeddings=False)
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(text_config=text, vision_config=t.CLIPVisionConfig(**SIGHT))
    )


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llava"])
def test_the_text_model_of_a_wrapper(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    whole = wrapper(name).eval()
    whole.save_pretrained(tmp_path / name)
    model = load_weights(tmp_path / name, device="cpu")
    assert torch.equal(logits(model), logits(whole))
    circuit = Circuit("neuron", {sites_of(model, ["mlp.up"])[0].name: (1,)}, describe(model), {})
    again = load_weights(export(model, None, circuit, tmp_path / "out"), device="cpu")
    assert again.config.model_type == model.config.model_type != name
    with ablated(model, circuit):
        assert torch.equal(logits(again), logits(model))


def test_a_wrapper_of_a_text_model_without_a_family_is_refused(tmp_path: Path) -> None:
    import transformers

    transformers.Llama4Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="llama4_text"):
        require_loadable(tmp_path)


def test_names_that_are_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe")
    for name in ("a" * 250, "a" * 300, "a" * 5000, "a\0b", tmp_path / "pipe.gguf", tmp_path / "pipe"):
        with pytest.raises(UserError):
            require_loadable(name)


def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    shutil.copy(Path(DEMO) / "tokenizer_config.json", tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)
