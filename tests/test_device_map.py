"""Models that accelerate has spread over devices: its hooks and ours on the same modules. Devices of several kinds need GPUs."""

from typing import Any

import pytest
import torch
from tiny import samples, tiny
from unchanged import fingerprint, require_same

from sparc3 import UserError, ablated, attribute, load_model, select
from sparc3.evaluation.perplexity import negative_log_likelihoods
from sparc3.models.families import ROLES
from sparc3.models.offloading import copy_model
from sparc3.models.sites import family_of

accelerate = pytest.importorskip("accelerate")


def spread(model: Any) -> Any:
    """The model with accelerate's hooks on every part of its map, as on several GPUs, each part on the CPU."""
    parts = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    return accelerate.dispatch_model(model, {**parts, "lm_head": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    "ask",
    [
        {"neuron": "signed"},
        {"neuron": "abs"},
        {"unit": "head", "sites": ("attn.o",)},
        {"unit": "weight"},
        {"method": "cp-lrp"},
        {"method": "wanda"},
    ],
)
def test_a_spread_model_has_the_same_scores(ask: dict[str, Any], twice: bool) -> None:
    plain, model, ids = tiny("llama"), spread(tiny("llama")), samples(4)
    assert hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    before = fingerprint(model)
    asked = {"sites": tuple(role for role in ROLES if role in family_of(plain).roles), **ask}
    found, expected = (
        attribute(model, ids, **asked, gradient_checkpointing=twice),
        attribute(plain, ids, **asked),
    )
    require_same(fingerprint(model), before)
    assert found.provenance["model"] == expected.provenance["model"]
    for site in expected:
        assert (found[site] - expected[site]).abs().max() <= 1e-6 * expected[site].abs().max()


def test_a_spread_model_is_ablated_and_evaluated_as_any_other() -> None:
    plain, model, ids = tiny("llama"), spread(tiny("llama")), samples(4)
    circuit = select(attribute(plain, ids), count=5)
    windows = [(tuple(one), len(one) - 1) for one in ids]
    whole, values = negative_log_likelihoods(plain, windows, False), []
    for each in (plain, model):
        with ablated(each, circuit):
            values.append(negative_log_likelihoods(each, windows, False))
    assert values[0] != pytest.approx(whole, rel=1e-3)
    assert values[1] == pytest.approx(values[0], rel=1e-12)


def test_a_copy_of_a_spread_model_leaves_the_original_alone() -> None:
    """accelerate shadows `to` with a function that moves the model it was made for, whoever has it."""
    model, ids = spread(tiny("llama")), samples(3)
    before = fingerprint(model)
    twin = copy_model(model).to(torch.bfloat16)
    assert twin is not model
    assert twin.dtype == torch.bfloat16
    require_same(fingerprint(model), before)
    assert set(attribute(twin, ids)) == set(attribute(model, ids))


def test_the_front_door_maps_a_model() -> None:
    model, tokenizer = load_model("demo", device="map")
    assert not model.training
    plain, _ = load_model("demo", device="cpu")
    found, expected = (attribute(each, ["Tom was glad"], tokenizer=tokenizer) for each in (model, plain))
    assert all(torch.allclose(found[site], expected[site], rtol=1e-4, atol=1e-6) for site in expected)


def test_a_map_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="process"):
        load_model("demo", device="map")
