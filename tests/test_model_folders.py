"""Model folders as people have them: loaded with the right figures, or refused in a line that names the thing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparc3 import UserError, attribute, load_model
from sparc3.models.fingerprint import describe
from sparc3.models.load import DEMO
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
