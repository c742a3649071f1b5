"""Quantised weights: what needs no value of a weight works and is right; what does says so in one line."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attribution import distance, roles_of
from tiny import samples, tiny
from torch import nn

from sparc3 import UserError, ablated, attribute, load_recipe
from sparc3.circuits.circuit import Circuit
from sparc3.doctor.checks import relevance_ledger
from sparc3.doctor.examine import examine
from sparc3.experiment.check_recipe import check_sizes
from sparc3.models.fingerprint import describe
from sparc3.models.load import load_weights
from sparc3.models.sites import sites_of


@torch.no_grad()
def quantise_(module: nn.Linear) -> nn.Linear:
    """The module's weight as int8 rows with one scale each, rounded in place; returns a plain linear map with the same values."""
    scale = module.weight.abs().amax(1, keepdim=True) / 127
    rounded = (module.weight / scale).round()
    plain = nn.Linear(
        module.in_features, module.out_features, bias=module.bias is not None, dtype=module.weight.dtype
    )
    plain.load_state_dict(
        {"weight": rounded * scale, **({"bias": module.bias} if module.bias is not None else {})}
    )
    module.weight = nn.Parameter(rounded.to(torch.int8), requires_grad=False)
    module.forward = lambda x: nn.functional.linear(x, module.weight.to(x.dtype) * scale, module.bias)
    return plain


@pytest.fixture(params=["llama-bias", "opt"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model whose sites are all int8, and one of the same function in float64."""
    quantised, plain = tiny(request.param), tiny(request.param)
    for one, other in zip(
        sites_of(quantised, roles_of(quantised)), sites_of(plain, roles_of(plain)), strict=True
    ):
        assert isinstance(one.module, nn.Linear)
        other.module.load_state_dict(quantise_(one.module).state_dict())
    return quantised, plain


@pytest.mark.parametrize(
    "asked",
    [
        {"neuron": "signed"},
        {"neuron": "signed", "method": "cp-lrp"},
        {"unit": "head", "sites": ("attn.o",)},
        {"method": "activation"},
    ],
)
def test_what_needs_no_weight_is_what_the_same_weights_give_unquantised(
    pair: tuple[Any, Any], asked: dict[str, Any]
) -> None:
    found, wanted = (attribute(model, samples(), **asked) for model in pair)
    for site in wanted:
        assert wanted[site].any()
        assert distance(found[site], wanted[site]) < 1e-6
    assert relevance_ledger(pair[0], samples()[0]).gap < 1e-12


@pytest.mark.parametrize(
    "asked",
    [
        {"neuron": "abs"},
        {"unit": "weight"},
        {"method": "wanda"},
        {"method": "wanda", "unit": "weight"},
        {"method": "magnitude"},
    ],
)
def test_what_needs_the_weight_is_refused_at_once_and_names_the_way_out(
    pair: tuple[Any, Any], asked: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"layers\.0\.\S+ .*quantised .*neuron signed") as error:
        attribute(pair[0], [[999]], **asked)  # a sample that would fail later
    assert "\n" not in str(error.value)


def test_a_quantised_neuron_is_not_ablated_in_place(pair: tuple[Any, Any]) -> None:
    site = sites_of(pair[0], ("mlp.up",))[0]
    with (
        pytest.raises(UserError, match=re.escape(site.name)),
        ablated(pair[0], Circuit("neuron", {site.name: (1,)}, describe(pair[0]), {})),
    ):
        pass


@pytest.mark.parametrize("recipe", ["demo", "demo-ioi", "demo-compress"])
def test_a_run_on_quantised_weights_is_refused_before_its_samples(pair: tuple[Any, Any], recipe: str) -> None:
    sites = sites_of(pair[0], ("mlp.up",))
    with pytest.raises(UserError, match=re.escape(sites[0].name)):
        check_sizes(load_recipe(recipe), sites)


def test_torchao_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny("llama", dtype=torch.float32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert sites_of(model, ("mlp.up",))[0].is_quantised
    scores = attribute(model, samples(), neuron="signed")
    assert all(value.any() for value in scores.values())
    assert len(scores.provenance["model"]["fingerprint"]) == 16
    with pytest.raises(UserError, match="Int8Tensor"):
        attribute(model, samples(), neuron="abs")
    assert relevance_ledger(model, samples()[0]).gap < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_attributed_and_examined(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "whole")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    made.save_pretrained(tmp_path / "quantised")
    model = load_weights(tmp_path / "quantised", device="cpu")
    assert all(site.is_quantised for site in sites_of(model, roles_of(model)))
    for asked in ({"neuron": "signed"}, {"unit": "head", "sites": ("attn.o",)}, {"method": "activation"}):
        assert all(value.any() for value in attribute(model, samples(), **asked).values())
    with pytest.raises(UserError, match=r"Params4bit|Int8Params"):
        attribute(model, samples(), neuron="abs")
    found = examine(str(tmp_path / "quantised"), device="cpu")
    assert not found.failures
    passed = {finding.name: finding.value for finding in found.findings if finding.is_passed}
    assert len(passed) == 5, "16 bits are not tried on weights that are computed with otherwise"
    assert passed["CP-LRP's ledger adds up to the logit"] < (1e-4 if bits == 4 else 0.05)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors"),
        ("gptq", "optimum"),
        ("awq", "gptqmodel"),
    ],
)
def test_a_quantised_model_without_its_package_names_it(method: str, package: str, tmp_path: Path) -> None:
    if find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
    if method == "bitsandbytes":
        settings["load_in_8bit"] = True
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(UserError, match=rf"\b{package}\b"):
        load_weights(tmp_path, device="cpu")
