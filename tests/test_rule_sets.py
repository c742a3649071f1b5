"""ε, and the methods that are other rules over the same engine, each against an independent computation in float64."""

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from test_attribution import distance, exact_scores, roles_of
from tiny import paper_model, samples, tiny
from torch import Tensor, nn

from sparc3.attribution import rules
from sparc3.attribution.attribute import attribute
from sparc3.attribution.options import AttributionOptions
from sparc3.attribution.partial_sums import Task
from sparc3.attribution.patching import freeze, lrp_rules
from sparc3.attribution.sums import Settings
from sparc3.circuits.select import contrast
from sparc3.errors import UnsupportedModel, UserError
from sparc3.models.sites import sites_of
from sparc3.recipe.schema import CorrectRecipe
from sparc3.scores import Scores

UP = "model.layers.0.mlp.up_proj"


def explicit(model: Any, ids: list[int], **how: Any) -> reference.Relevance:
    return (reference.opt if model.config.model_type == "opt" else reference.llama)(model, ids, **how)


def require_equal(model: Any, method: str, epsilon: float = 0.0, **how: Any) -> None:
    """Neurons, heads and weights of all sites are those of explicit propagation."""
    ids = samples()
    found = [explicit(model, one, epsilon=epsilon, **how) for one in ids]
    expected = {
        ("neuron", "signed"): lambda one, site: one.outputs[site],
        ("neuron", "abs"): lambda one, site: one.weights[site].abs().sum(1),
        ("head", "abs"): lambda one, site: one.heads[site],
        ("weight", "abs"): lambda one, site: one.weights[site],
    }
    for (unit, neuron), part in expected.items():
        scores = exact_scores(model, ids, method=method, unit=unit, neuron=neuron, tokens=20, epsilon=epsilon)
        for site, value in scores.items():
            mean = torch.stack([part(one, site) for one in found]).mean(0)
            assert distance(value, mean) < 1e-8, (unit, neuron, site)


@pytest.mark.parametrize("method", ["lrp", "cp-lrp"])
@pytest.mark.parametrize("name", ["llama-bias", "opt", "mixtral"])
def test_epsilon_agrees_with_explicit_propagation(name: str, method: str) -> None:
    model = tiny(name)
    require_equal(model, method, epsilon=0.05, cp=method == "cp-lrp")
    require_equal(model, method, epsilon=1e-6, cp=method == "cp-lrp")
    plain, other = (exact_scores(model, samples(), method=method, epsilon=e) for e in (0.0, 0.05))
    assert min(distance(other[site], plain[site]) for site in plain if plain[site].any()) > 1e-3


def test_files_say_an_epsilon_where_there_is_one() -> None:
    """Scores, shards and fingerprints of before there was an ε stay valid."""
    model, ids = tiny("llama"), samples()
    plain, other = attribute(model, ids), attribute(model, ids, epsilon=1e-6)
    assert "epsilon" not in plain.provenance
    assert other.provenance["epsilon"] == 1e-6
    assert "epsilon" not in AttributionOptions().model_dump()
    assert AttributionOptions(epsilon=1e-6).model_dump()["epsilon"] == 1e-6
    task = Task(Settings("lrp", "neuron", "predicted", "abs", "mean"), {}, "", "", 1, ())
    assert "epsilon" not in task.to_plain()["settings"]
    with pytest.raises(UserError, match="epsilon"):
        contrast(plain, other)
    with pytest.raises(UserError, match="epsilon"):
        attribute(model, ids, epsilon=-1)


@pytest.mark.parametrize("name", ["llama-bias", "opt", "mixtral"])
def test_relp_agrees_with_explicit_propagation(name: str) -> None:
    require_equal(tiny(name), "relp", cp=True, gate=0.5)


def test_gim_on_paper() -> None:
    """As `test_the_model_on_paper`, with nothing halved: ĝ = (6, −3) at the product, up's ĝ = gate · ĝ = (6, −6)."""
    model = paper_model()
    for neuron, values in (("signed", [18, -12]), ("abs", [18, 24])):
        found = attribute(model, [[3]], method="gim", neuron=neuron)[UP]
        assert found.tolist() == pytest.approx(values, abs=1e-5)


class Softmax(torch.autograd.Function):
    """With the derivative, in full, of the softmax at twice the temperature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp() / x.exp().sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = (x / 2).exp() / (x / 2).exp().sum(-1, keepdim=True)
        jacobian = torch.diag_embed(s) - s[..., :, None] * s[..., None, :]
        return (jacobian @ grads[0][..., None])[..., 0]


def outputs_and_gradients(model: Any, sites: Any, forward: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Each site's output and the gradient of what `forward` returns."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        site.module.register_forward_hook(
            lambda _, __, z, name=site.name: outputs.update({name: z}), prepend=True
        )
        for site in sites
    ]
    y = forward()
    grads = torch.autograd.grad(y, list(outputs.values()))
    for hook in hooks:
        hook.remove()
    return {name: (z.detach(), g) for (name, z), g in zip(outputs.items(), grads, strict=True)}


def test_gim_is_a_softmax_of_twice_the_temperature_norms_that_are_constant_and_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny("llama", seed=3), samples()[0]
    model.set_attn_implementation("eager")
    sites = sites_of(model, ("mlp.up", "attn.q", "attn.v"))
    scored = exact_scores(model, [ids], method="gim", neuron="signed")

    def norm(module: Any, args: tuple[Tensor], _: Tensor) -> Tensor:
        x = args[0]
        return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt().detach()

    hooks = [m.register_forward_hook(norm) for m in model.modules() if "RMSNorm" in type(m).__name__]
    for layer in model.model.layers:
        for part, share in (("q", 0.25), ("k", 0.25), ("v", 0.5)):
            scale = lambda _, __, z, share=share: z * share + z.detach() * (1 - share)  # noqa: E731
            hooks.append(layer.self_attn.get_submodule(f"{part}_proj").register_forward_hook(scale))
    monkeypatch.setattr(nn.functional, "softmax", lambda x, **_: Softmax.apply(x))
    found = outputs_and_gradients(model, sites, lambda: model(torch.tensor([ids])).logits[0, -1].max())
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()
    for site in sites:
        z, grad = found[site.name]
        assert distance(scored[site.name], (z * grad)[0].sum(0)) < 1e-8, site.name


def test_gim_agrees_with_its_package() -> None:
    """The package covers torch's LayerNorm; the softmax in eager attention; the shares in sdpa, whose softmax it leaves."""
    package, model, ids = pytest.importorskip("gim"), tiny("gpt2"), torch.tensor([samples()[0]])
    for implementation, ours, theirs in (
        (
            "eager",
            {"shares": (1.0, 1.0, 1.0), "temperature": 2.0},
            {"q_scale": None, "k_scale": None, "v_scale": None},
        ),
        ("sdpa", {}, {"softmax_temperature": None}),
    ):
        model.set_attn_implementation(implementation)
        weights = [block.mlp.c_fc.weight for block in model.transformer.h]
        asked = rules.RuleSet(**{"identity": False, **ours})  # type: ignore[arg-type]
        with freeze(model), lrp_rules(model, rule_set=asked):
            for weight in weights:
                weight.requires_grad_()
            mine = torch.autograd.grad(model(ids).logits[0, -1].max(), weights)
        with package.GIM(model, **theirs):
            others = torch.autograd.grad(model(ids).logits[0, -1].max(), weights)
        # The package rounds the norms' gains to float32.
        assert max(distance(one, other) for one, other in zip(mine, others, strict=True)) < 1e-6


def test_gim_has_no_rule_for_attention_that_cannot_be_reached() -> None:
    model = tiny("bloom")
    with pytest.raises(UnsupportedModel, match="softmax"):
        attribute(model, samples(), method="gim")


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("steps", [1, 5])
def test_integrated_gradients_are_the_mean_gradient_times_the_difference(name: str, steps: int) -> None:
    """Written out: the model is run from interpolated embeddings that are given to it, and torch differentiates."""
    model, ids = tiny(name), samples()[1]
    method = "ig" if steps == 5 else f"ig:{steps}"
    sites = sites_of(model, roles_of(model))
    embeddings = model.get_input_embeddings().weight.detach()
    base = embeddings.mean(0)
    with torch.no_grad():
        target = int(model(torch.tensor([ids])).logits[0, -1].argmax())

    def run(share: float) -> dict[str, tuple[Tensor, Tensor]]:
        given = (base + share * (embeddings[ids] - base))[None]
        return outputs_and_gradients(model, sites, lambda: model(inputs_embeds=given).logits[0, -1, target])

    along = [run(step / steps) for step in range(1, steps + 1)]
    last, first = along[-1], run(0.0)
    scored = exact_scores(model, [ids], method=method, neuron="signed")
    for site in sites:
        mean = sum(one[site.name][1] for one in along) / steps
        expected = (mean * (last[site.name][0] - first[site.name][0])).reshape(len(ids), -1).sum(0)
        assert distance(scored[site.name], expected) < 1e-6, site.name


def test_integrated_gradients_of_weights_neurons_and_heads_fit_each_other() -> None:
    """Without biases z − z₀ = W (a − a₀), so that the weights of a row add up to its neuron, and, at attn.o, those of a head's columns
    to the head."""
    model, ids = tiny("llama"), samples()
    weights = exact_scores(model, ids, method="ig", unit="weight", tokens=20)
    neurons = exact_scores(model, ids, method="ig", neuron="signed", tokens=20)
    heads = exact_scores(model, ids, method="ig", unit="head", tokens=20)
    for site, value in neurons.items():
        assert distance(weights[site].sum(1), value) < 1e-6, site
    for site, value in heads.items():
        assert distance(weights[site].sum(0).view(len(value), -1).sum(1), value) < 1e-6, site


def test_the_rivals_are_names_in_recipes(tmp_path: Path) -> None:
    attribution = {"method": "ig:3", "neuron": "signed"}
    recipe = {
        "model": {"id": "demo"},
        "references": {name: {"source": "demo-general", "count": 4} for name in ("general", "undesired")},
        "attribution": attribution,
        "selection": {"count": 3},
        "compare": {"methods": ["gim", "relp", "ig", "ig:2"], "counts": [3]},
    }
    asked = CorrectRecipe.model_validate({"name": "rivals", "evaluation": {}, **recipe})
    assert asked.attribution.method == "ig:3"
    with pytest.raises(UserError, match="gim:2"):
        attribute(tiny("llama"), [], method="gim:2")
    scores = attribute(tiny("llama"), samples(), method="ig:2")
    scores.save(tmp_path / "s.safetensors")
    assert Scores.load(tmp_path / "s.safetensors").provenance["method"] == "ig:2"
