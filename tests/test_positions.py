"""`skip_positions`: the first positions of each sample stay out of every sum over positions, and only out of that."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_attribution import distance
from tiny import samples, tiny
from torch import Tensor

from sparc3 import Scores, UserError, attribute, run
from sparc3.attribution.patching import lrp_rules
from sparc3.models.sites import sites_of

SKIP = 2


def flows(model: Any, ids: list[int], role: str) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """At each site, [T, ...]: input a, its modified gradient, output z, its modified gradient; by autograd, with every position in."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    sites = sites_of(model, (role,))
    hooks = [
        site.module.register_forward_hook(lambda _, args, out, n=site.name: kept.update({n: (args[0], out)}))
        for site in sites
    ]
    with lrp_rules(model):
        y = model(torch.tensor([ids])).logits[0, -1].max()
        grads = torch.autograd.grad(y, [x for pair in kept.values() for x in pair])
    for hook in hooks:
        hook.remove()
    rows = iter(grad.reshape(len(ids), -1) for grad in grads)
    return {
        n: (a.detach().reshape(len(ids), -1), next(rows), z.detach().reshape(len(ids), -1), next(rows))
        for n, (a, z) in kept.items()
    }


def expected(model: Any, site: Any, flow: tuple[Tensor, ...], method: str, unit: str, neuron: str) -> Tensor:
    a, of_a, z, of_z = (x[SKIP:] for x in flow)
    if method == "wanda":
        return a.square().sum(0)
    if unit == "head":
        return (a * of_a).sum(0).view(site.heads, -1).sum(1)
    relevance = site.weight.detach() * (of_z.T @ a)
    if unit == "weight":
        return relevance
    return (of_z * z).sum(0) if neuron == "signed" else relevance.abs().sum(1)


@pytest.mark.parametrize("name", ["llama-bias", "opt"])
@pytest.mark.parametrize(
    ("method", "unit", "neuron", "role"),
    [
        ("lrp", "neuron", "signed", "mlp.up"),
        ("lrp", "neuron", "abs", "mlp.up"),
        ("lrp", "head", "abs", "attn.o"),
        ("lrp", "weight", "abs", "mlp.down"),
        ("wanda", "weight", "abs", "attn.v"),
    ],
)
def test_first_positions_stay_out_of_the_sum(
    name: str, method: str, unit: str, neuron: str, role: str
) -> None:
    model, ids = tiny(name), samples(3)
    by_sample = [flows(model, one, role) for one in ids]
    for batch_tokens in (1, 1000):
        scores = attribute(
            model,
            ids,
            method=method,
            unit=unit,
            neuron=neuron,
            sites=(role,),
            skip_positions=SKIP,
            batch_tokens=batch_tokens,
        )
        for site in sites_of(model, (role,)):
            total = sum(expected(model, site, flow[site.name], method, unit, neuron) for flow in by_sample)
            wanted = site.weight.detach().abs() * total.sqrt() if method == "wanda" else total / len(ids)
            assert distance(scores[site.name], wanted) < 1e-6, site.name


def test_activation_is_the_mean_over_the_positions_that_are_left() -> None:
    model, ids = tiny("llama"), samples(3)
    down = sites_of(model, ("mlp.down",))[0]
    inputs = torch.cat([flows(model, one, "mlp.down")[down.name][0][SKIP:] for one in ids])
    scores = attribute(model, ids, method="activation", skip_positions=SKIP)
    assert distance(next(iter(scores.values())), inputs.abs().mean(0)) < 1e-6
    assert scores.provenance["tokens"] == len(inputs)


def test_skipping_is_recorded_and_none_is_the_default(tmp_path: Path) -> None:
    model, ids = tiny("llama"), samples(3)
    attribute(model, ids, skip_positions=1).save(tmp_path / "s.safetensors")
    assert Scores.load(tmp_path / "s.safetensors").provenance["skip_positions"] == 1
    plain = attribute(model, ids)
    assert plain.provenance["skip_positions"] == 0
    assert all(
        torch.equal(plain[site], value) for site, value in attribute(model, ids, skip_positions=0).items()
    )


def test_nothing_left_of_a_sample_is_the_users_mistake(mistake: Any, jsonl: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match=r"sample 1 .*\b2 tokens.*skip_positions 2"):
        attribute(model, [[3, 4, 5], [3, 4]], skip_positions=2)
    with pytest.raises(UserError, match=r"skip_positions .*-1"):
        attribute(model, [[3, 4, 5]], skip_positions=-1)
    path = jsonl("s.jsonl", [{"text": "Tom was happy."}])
    assert "skip_positions 500" in mistake(
        "attribute", "demo", "--samples", path, "--skip-positions", "500", "--out", tmp_path / "x.safetensors"
    )


def test_a_recipe_says_it_too_and_every_set_of_the_run_keeps_to_it(tmp_path: Path) -> None:
    recipe = {
        "name": "x",
        "model": {"id": "demo", "device": "cpu"},
        "attribution": {"neuron": "signed", "skip_positions": 2},
        "references": {
            "general": {"source": "demo-general", "count": 3},
            "undesired": {"source": "demo-angry", "count": 3},
        },
        "selection": {"count": 5},
        "evaluation": {"perplexity": {"source": "demo-general", "count": 2}},
    }
    run(recipe, tmp_path / "run")
    for name in ("general", "undesired"):
        assert Scores.load(tmp_path / f"run/scores/{name}.safetensors").provenance["skip_positions"] == 2
    with pytest.raises(UserError, match="skip_positions"):
        run({**recipe, "attribution": {"skip_positions": -1}}, tmp_path / "other")
