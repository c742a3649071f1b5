"""Mixtures of experts beyond what every family is held to: routing, hands on single experts, ablation and export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_attribution import distance
from tiny import samples, tiny
from torch import Tensor
from unchanged import fingerprint, require_same

from sparc3.attribution.attribute import attribute
from sparc3.attribution.patching import lrp_rules
from sparc3.checkpoints.export import export
from sparc3.circuits.ablate import Damping, ablate_, ablated, damp
from sparc3.circuits.circuit import Circuit
from sparc3.circuits.select import select
from sparc3.errors import UserError
from sparc3.experiment.prune_sequentially import prune_sequentially
from sparc3.models.fingerprint import describe
from sparc3.models.load import load_weights
from sparc3.models.sites import open_experts, sites_of

NAMES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "flex-olmo")
named = pytest.mark.parametrize("name", NAMES)
UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj#{}.up", "model.layers.1.mlp.experts.down_proj#{}"


def by_hand(experts: Any, silent: tuple[int, int] | None = None) -> Any:
    """The experts' forward with every token through every expert, and one neuron's activation set to zero."""

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, (fused, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = (x @ fused.T).chunk(2, -1)
            a = gate * torch.sigmoid(gate) * up
            if silent and silent[0] == expert:
                a = a.index_fill(1, torch.tensor([silent[1]]), 0)
            out = out + (weights * (chosen == expert)).sum(-1, keepdim=True) * (a @ down.T)
        return out

    return forward


@named
def test_an_ablated_neuron_is_one_whose_activation_is_zero(name: str) -> None:
    model, ids = tiny(name), torch.tensor(samples()[:1])
    experts, plain = model.model.layers[1].mlp.experts, model(ids).logits
    expert = _seen_experts(model, ids)[0]
    circuit = Circuit("neuron", {UP.format(expert): (3,)}, describe(model), {})
    with ablated(model, circuit):
        removed = model(ids).logits
    assert (removed - plain).abs().max() > 1e-6
    experts.forward = by_hand(experts)
    assert torch.allclose(model(ids).logits, plain, rtol=0, atol=1e-12)
    experts.forward = by_hand(experts, (expert, 3))
    assert torch.allclose(model(ids).logits, removed, rtol=0, atol=1e-12)


def _seen_experts(model: Any, ids: Tensor) -> list[int]:
    """Experts of layer 1 that the last token is sent to."""
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda _, args, out: seen.append(out[2]))
    model(ids)
    hook.remove()
    return list(seen[0][-1].tolist())


@named
def test_no_relevance_enters_the_router_and_a_plain_gradient_does(name: str) -> None:
    model, ids = tiny(name), torch.tensor(samples()[:1])
    router = model.model.layers[0].mlp.gate.weight
    with lrp_rules(model):
        assert torch.autograd.grad(model(ids).logits[0, -1].max(), router, allow_unused=True)[0] is None
    with open_experts(model):
        opened = torch.autograd.grad(model(ids).logits[0, -1].max(), router)[0]
    assert opened.abs().max() > 1e-6
    assert distance(opened, torch.autograd.grad(model(ids).logits[0, -1].max(), router)[0]) < 1e-10


@named
def test_the_plain_gradient_of_an_experts_weights_is_autograds(name: str) -> None:
    model, ids = tiny(name), samples()
    sites = [site for site in sites_of(model, ("mlp.gate", "mlp.up", "mlp.down")) if site.expert is not None]
    expected = {site.name: torch.zeros(site.out, site.inp, dtype=torch.float64) for site in sites}
    for one in ids:
        grads = torch.autograd.grad(
            model(torch.tensor([one])).logits[0, -1].max(),
            [getattr(site.module, site.parameter) for site in sites],
        )
        for site, grad in zip(sites, grads, strict=True):
            expected[site.name] += (site.weight * site.select_features(grad[site.expert].T).T).detach() / len(
                ids
            )
    for tokens in (1, 1000):
        found = attribute(
            model,
            ids,
            method="gradient",
            unit="weight",
            sites=("mlp.gate", "mlp.up", "mlp.down"),
            sums_dtype="float64",
            batch_tokens=tokens,
        )
        for site, value in expected.items():
            assert distance(found[site], value) < 1e-6, site


def test_an_expert_that_no_token_is_sent_to_has_zeros() -> None:
    model, ids = tiny("mixtral", num_experts_per_tok=1), samples()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0])[:, None])  # 0 or 1 is the largest
    for method, unit in (("lrp", "neuron"), ("lrp", "weight"), ("wanda", "weight"), ("activation", "neuron")):
        scores = attribute(model, ids, method=method, unit=unit, sites=("mlp.up",))
        assert not scores[UP.format(2)].any()
        assert scores[UP.format(2)].shape == scores[UP.format(0)].shape


@named
def test_wanda_and_activation_see_an_experts_own_tokens(name: str) -> None:
    model, ids = tiny(name), samples()[:2]
    routed: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[1].mlp.experts
    for one in ids:
        hook = experts.register_forward_pre_hook(lambda _, args: routed.append((args[0].detach(), args[1])))
        model(torch.tensor([one]))
        hook.remove()
    wanda = attribute(model, ids, method="wanda", unit="weight", sites=("mlp.up", "mlp.down"))
    active = attribute(model, ids, method="activation")
    for expert in range(len(experts.down_proj)):
        x = torch.cat([x[(chosen == expert).any(-1)] for x, chosen in routed])
        gate, up = (x @ experts.gate_up_proj[expert].detach().T).chunk(2, -1)
        a = gate * torch.sigmoid(gate) * up
        matrices = experts.gate_up_proj[expert].chunk(2)[1], experts.down_proj[expert]
        for site, weight, inputs in zip((UP, DOWN), matrices, (x, a), strict=True):
            assert distance(wanda[site.format(expert)], weight.detach().abs() * inputs.norm(dim=0)) < 1e-6
        assert distance(active[UP.format(expert)], a.abs().sum(0) / sum(map(len, ids))) < 1e-6


@named
def test_an_export_loads_as_an_ordinary_checkpoint_with_the_same_logits(name: str, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            pass

    model, ids = tiny(name, dtype=torch.float32), torch.tensor(samples()[:1])
    circuit = select(attribute(model, samples(), neuron="signed"), count=9)
    assert len(circuit) == 9
    before = fingerprint(model)
    export(model, Tokenizer(), circuit, tmp_path / "out")  # type: ignore[arg-type]
    after = fingerprint(model)
    require_same(
        {**after, "config": None}, {**before, "config": None}
    )  # save_pretrained writes the class and dtype into it
    ablate_(model, circuit)
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json").members == circuit.members
    assert torch.equal(load_weights(tmp_path / "out", device="cpu")(ids).logits, model(ids).logits)
    assert torch.allclose(
        load_weights(tmp_path / "out", dtype="float64", device="cpu")(ids).logits.float(),
        model(ids).logits,
        atol=1e-4,
    )


def test_damping_pruning_and_masks_reach_single_experts() -> None:
    model, ids = tiny("qwen2-moe"), samples()
    before, plain = fingerprint(model), model(torch.tensor(ids[:1])).logits
    expert = _seen_experts(model, torch.tensor(ids[:1]))[0]
    factors = torch.ones(8)
    factors[3] = 0
    with damp(model, Damping({UP.format(expert): factors})):
        quiet = model(torch.tensor(ids[:1])).logits
    with ablated(model, Circuit("neuron", {UP.format(expert): (3,)}, describe(model), {})):
        assert torch.allclose(model(torch.tensor(ids[:1])).logits, quiet, rtol=0, atol=1e-12)
    pruned = prune_sequentially(model, ids, fraction=0.5, scope="row")
    masks = {site.name: pruned.members[site.name] for site in sites_of(model, ("mlp.up", "mlp.down"))}
    assert all(mask.sum(1).eq(mask.shape[1] // 2).all() for mask in masks.values())
    with ablated(model, pruned):
        assert not sites_of(model, ("mlp.down",))[-2].weight[masks[DOWN.format(5)]].any()
        assert (model(torch.tensor(ids[:1])).logits - plain).abs().max() > 1e-3
    require_same(fingerprint(model), before)


def test_a_neuron_that_is_not_there_is_refused_by_name() -> None:
    model = tiny("olmoe")
    with (
        pytest.raises(UserError, match=r"gate_up_proj#9\.up"),
        ablated(model, Circuit("neuron", {UP.format(9): (0,)}, describe(model), {})),
    ):
        pass


def test_computing_layers_again_changes_nothing() -> None:
    model, ids = tiny("olmoe"), samples()
    for unit, neuron in (("neuron", "signed"), ("neuron", "abs"), ("weight", "abs")):
        plain, again = (
            attribute(model, ids, unit=unit, neuron=neuron, gradient_checkpointing=kept)
            for kept in (False, True)
        )
        assert all(torch.equal(again[site], value) for site, value in plain.items())
