"""A circuit as masks and hooks, and the page that shows them in other tools."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import blocks
from tiny import samples, tiny

from sparc3 import Circuit, ablated
from sparc3.errors import UserError
from sparc3.models.sites import sites_of

PAGE = Path(__file__).parents[1] / "docs" / "tools.md"
TOOLS = ("nnsight", "pyvene", "transformer_lens")


@pytest.mark.parametrize("tool", ["torch", *TOOLS])
def test_the_page_runs(tool: str) -> None:
    namespace: dict[str, Any] = {}
    if not importlib.util.find_spec(tool):
        pytest.skip(f"{tool} is not installed")
    for code, line in blocks(PAGE, "python"):
        needs = re.match(r"# needs: (\w+)", code)
        if not needs or needs[1] == tool:
            exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)
    assert "found" in namespace or "output" in namespace


CIRCUITS = {
    "neuron": ("mlp.up", (0, 3)),
    "neuron of down": ("mlp.down", (1,)),
    "head": ("attn.o", (1, 2)),
    "weight": ("mlp.down", None),
    "weight of q": ("attn.q", None),
}


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.4])
@pytest.mark.parametrize("kind", CIRCUITS)
@pytest.mark.parametrize("name", ["llama-bias", "opt", "gpt2", "phi3", "pythia"])
def test_hooks_do_what_ablation_does(name: str, kind: str, strength: float) -> None:
    model, (role, units) = tiny(name), CIRCUITS[kind]
    members: dict[str, Any] = {}
    for site in sites_of(model, (role,)):
        mask = torch.zeros(site.out, site.inp, dtype=torch.bool)
        mask[1, 2:5] = mask[3, 0] = True
        members[site.name] = mask if units is None else units
    if strength < 0 and not kind.startswith("neuron"):
        pytest.skip("of neurons alone each has its own strength")
    if strength < 0:
        own = {site: (strength, 0.5)[: len(units)] for site, units in members.items()}
        circuit = Circuit("neuron", members, strengths=own)
    else:
        circuit = Circuit(kind.split()[0], members, strength=strength)
    ids = torch.tensor([samples()[0]])
    plain = model(ids).logits
    with ablated(model, circuit):
        expected = model(ids).logits
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in circuit.hooks(model)]
    found = model(ids).logits
    for handle in handles:
        handle.remove()
    assert (expected - plain).abs().max() > 1e-4
    assert (found - expected).abs().max() < 1e-6 * plain.abs().max()
    assert torch.equal(model(ids).logits, plain)


def test_masks_are_true_at_the_members() -> None:
    model = tiny("llama")
    up, o = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"
    mask = Circuit("neuron", {up: (2, 5)}).masks(model)[up]
    assert (len(mask), mask.nonzero()[:, 0].tolist()) == (24, [2, 5])
    assert Circuit("head", {o: (3,)}).masks(model)[o].tolist() == [False, False, False, True]
    weights = torch.rand(24, 16) > 0.5
    assert Circuit("weight", {up: weights}).masks(model)[up] is weights


def test_a_circuit_of_another_model_is_refused() -> None:
    model = tiny("llama")
    for circuit in (
        Circuit("neuron", {"model.layers.9.mlp.up_proj": (0,)}),
        Circuit("neuron", {"model.layers.0.mlp.up_proj": (24,)}),
        Circuit("weight", {"model.layers.0.mlp.up_proj": torch.ones(2, 2, dtype=torch.bool)}),
    ):
        for ask in (circuit.masks, circuit.hooks):
            with pytest.raises(UserError, match=r"model\.layers"):
                ask(model)


def test_experts_have_no_place_for_a_hook() -> None:
    model = tiny("mixtral")
    name = sites_of(model, ("mlp.up",))[0].name
    circuit = Circuit("neuron", {name: (1,)})
    assert circuit.masks(model)[name].sum() == 1
    with pytest.raises(UserError, match="expert"):
        circuit.hooks(model)
