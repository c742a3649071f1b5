"""Model folders as people have them: loaded with the right figures, or refused in a line that names the thing."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparc3 import UserError, attribute, load_model
from sparc3.models.fingerprint import describe
from sparc3.models.load import DEMO, load_weights, require_loadable
from sparc3.models.sites import sites_of

TEXTS = ["Tom was glad and said,", "It was a sunny day and"]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "model")


def change_config(folder, **values):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    "value", ["flash_attention_2", "kernels-community/flash-attn2", {"": "flex_attention"}, 3]
)
def test_the_attention_that_a_configuration_asks_for_is_computed_by_pytorch(folder, key, value):
    change_config(folder, **{key: value})
    (plain, tokenizer), (model, _) = load_model("demo"), load_model(folder)
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert describe(model)["fingerprint"] == describe(plain)["fingerprint"]
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_compiled_model_is_refused_with_its_way_out(demo):
    model, tokenizer = demo
    with pytest.raises(UserError, match="_orig_mod"):
        attribute(torch.compile(model), TEXTS, tokenizer=tokenizer)


@pytest.mark.parametrize("path", ["", "model.layers.1"])
def test_a_model_compiled_in_place_is_refused_with_its_way_out(path):
    model, _ = load_model("demo")
    model.get_submodule(path).compile()
    with pytest.raises(UserError, match=f"{path}.*_compiled_call_impl"):
        sites_of(model, ["mlp.up"])
    model.get_submodule(path)._compiled_call_impl = None
    assert sites_of(model, ["mlp.up"])


def test_a_compiled_layer_is_named():
    model, _ = load_model("demo")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    with pytest.raises(UserError, match=r"model\.layers\.1 .*_orig_mod"):
        sites_of(model, ["mlp.up"])


WEIGHTS = load_file(Path(DEMO) / "model.safetensors")
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
UP = "model.layers.0.mlp.up_proj"


def save(folder, weights):
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def split(folder):
    """The weights in two files and an index; the one file stays where it is."""
    keys = sorted(WEIGHTS)
    for n, file in enumerate(SHARDS):
        save_file({key: WEIGHTS[key] for key in keys[n::2]}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: SHARDS[n % 2] for n, key in enumerate(keys)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def remove(*paths):
    for path in paths:
        path.unlink()


ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
MISTAKES = {
    "a shard that was not downloaded": (lambda f: remove(split(f) / ONE, f / SHARDS[1]), SHARDS[1]),
    "shards without their index": (lambda f: remove(split(f) / ONE, f / INDEX), INDEX),
    "an index of nothing": (lambda f: (remove(split(f) / ONE), (f / INDEX).write_text("{}")), INDEX),
    "an index that is cut off": (lambda f: (remove(split(f) / ONE), (f / INDEX).write_text("{")), INDEX),
    "two sets of weights": (lambda f: split(f), f"{ONE} .*{INDEX}"),
    "weights of another name": (lambda f: (f / ONE).rename(f / "consolidated.safetensors"), "consolidated"),
    "a pointer of Git LFS": (lambda f: (f / ONE).write_text("version https://git-lfs.github.com/spec/v1\n"), ONE),
    "settings of generation that are a list": (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config"),
    "rotary positions of an unknown kind": (lambda f: change_config(f, rope_scaling={"rope_type": "yam"}), "yam"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_files_that_are_missing_or_two_are_told_before_a_weight_is_read(folder, mistake):
    make, named = mistake
    make(folder)
    with pytest.raises(UserError, match=named):
        require_loadable(folder)


WRONG = {
    "a bias that config.json does not know": ({f"{UP}.bias": torch.ones(4)}, f"{UP}.bias"),
    "norms of another architecture": ({"model.layers.3.self_attn.q_norm.weight": torch.ones(4)}, "q_norm"),
    "an adapter beside its matrix": ({f"{UP}.lora_A.weight": torch.ones(2, 2)}, "lora_A"),
    "scales of a quantisation": ({f"{UP}.weight_scale_inv": torch.ones(1)}, "weight_scale_inv"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_weights_that_the_configuration_does_not_use_are_refused(folder, wrong):
    extra, named = wrong
    save(folder, {**WEIGHTS, **extra})
    with pytest.raises(UserError, match=named):
        load_model(folder)


def test_what_is_no_weight_of_the_model_may_be_beside_them(folder):
    extra = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.k_scale",
        "value_head.weight",
    )
    save(folder, {**WEIGHTS, **{key: torch.ones(4) for key in extra}})
    assert describe(load_model(folder)[0])["fingerprint"] == describe(load_model("demo")[0])["fingerprint"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_the_names_of_a_wrapper_are_told(folder, prefix):
    save(folder, {prefix + key: value for key, value in WEIGHTS.items()})
    with pytest.raises(UserError, match=f" {prefix}"):
        load_model(folder)


def test_a_head_that_is_missing_is_told_with_its_key(folder):
    change_config(folder, tie_word_embeddings=False)
    save(folder, {key: value for key, value in WEIGHTS.items() if key != "lm_head.weight"})
    with pytest.raises(UserError, match=r"lm_head\.weight.*tie_word_embeddings"):
        load_model(folder)


def test_a_padding_token_beyond_the_embeddings_changes_nothing(folder):
    change_config(folder, pad_token_id=10**6)
    (plain, tokenizer), (model, _) = load_model("demo"), load_model(folder)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert describe(model)["fingerprint"] == describe(plain)["fingerprint"]


def test_a_name_that_is_not_utf8_is_told(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match="UTF-8"):
        load_model(folder)


def test_a_configuration_alone_and_a_gguf_beside_it_are_told(folder):
    with pytest.raises(UserError, match=r"config\.json is a configuration"):
        load_weights(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(UserError, match=r"model\.gguf"):
        load_weights(folder)


@pytest.mark.parametrize("inside", ["checkpoint-100", "snapshots/0123abcd"])
def test_a_folder_around_the_checkpoint_is_told_with_the_one_inside(tmp_path, inside):
    """A run of a trainer, and a repository's folder in the hub's cache."""
    shutil.copytree(DEMO, tmp_path / "outer" / inside)
    with pytest.raises(UserError, match=f"outer/{inside} "):
        load_weights(tmp_path / "outer")


@pytest.mark.parametrize(
    "head",
    [
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
        "ForMaskedLM",
    ],
)
def test_a_checkpoint_with_another_head_is_refused_though_its_embeddings_are_tied(folder, head):
    change_config(folder, architectures=[f"Llama{head}"])
    with pytest.raises(UserError, match=f"Llama{head}"):
        require_loadable(folder)


@pytest.mark.parametrize(
    "said", [None, [], ["LlamaForCausalLM"], ["LlamaModel"], ["SomeForConditionalGeneration"]]
)
def test_other_names_of_the_architecture_load_as_before(folder, said):
    change_config(folder, architectures=said)
    assert describe(load_weights(folder))["fingerprint"] == describe(load_model("demo")[0])["fingerprint"]
