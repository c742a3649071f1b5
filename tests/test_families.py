"""Every row of the family table: the ledger balances, parts are what they are called, nothing changes and nothing is left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attribution import SHARED, distance, exact_scores, roles_of
from tiny import CONFIGS, samples, tiny
from torch import Tensor
from unchanged import fingerprint, require_same

from sparc3.attribution import patching
from sparc3.attribution.attribute import attribute
from sparc3.attribution.patching import freeze, lrp_rules
from sparc3.circuits.ablate import ablated
from sparc3.circuits.circuit import Circuit
from sparc3.doctor.checks import relevance_ledger
from sparc3.doctor.second_opinion import record_flows
from sparc3.errors import UnsupportedModel
from sparc3.models.experts import arrange_by_position, tokens_of
from sparc3.models.families import FAMILIES
from sparc3.models.fingerprint import describe
from sparc3.models.load import load_model
from sparc3.models.sites import Site, family_of, open_experts, sites_of

every = pytest.mark.parametrize("name", CONFIGS)


def test_every_row_has_a_tiny_model() -> None:
    assert {kind for kind, _ in CONFIGS.values()} == set(FAMILIES)


@every
def test_the_ledger_balances(name: str) -> None:
    model = tiny(name)
    for ids in samples():
        book = relevance_ledger(model, ids)
        assert book.target == pytest.approx(
            float(model(torch.tensor([ids])).logits[0, -1].max().detach()), rel=1e-12
        )
        # transformers' BLOOM writes √(2/π) with eight digits in its GELU, so there the closed form f(x)/x is off by that much.
        assert book.gap < (1e-8 if name.startswith("bloom") else 1e-12)
        assert (book.positions != 0) == (family_of(model).positions is not None)
    assert relevance_ledger(model, samples()[0], cp=False).gap > 1e-3


@every
def test_forward_values_are_the_same_and_nothing_is_left_behind(name: str) -> None:
    model, ids = tiny(name), torch.tensor(samples()[:1])
    before, values = fingerprint(model), model(ids).logits
    for cp in (False, True):
        with lrp_rules(model, cp=cp):
            assert same_forward(model, model(ids).logits, values)
        require_same(fingerprint(model), before)
        with lrp_rules(model, cp=cp), lrp_rules(model, cp=not cp), freeze(model):
            assert same_forward(model, model(ids).logits, values)
        with pytest.raises(ZeroDivisionError), lrp_rules(model, cp=cp), lrp_rules(model, cp=not cp):
            raise ZeroDivisionError
        require_same(fingerprint(model), before)
    attribute(model, samples(), sites=roles_of(model))
    require_same(fingerprint(model), before)


def same_forward(model: Any, values: Tensor, plain: Tensor) -> bool:
    """Bit for bit, but for what the order of a sum over experts does."""
    return (
        torch.allclose(values, plain, rtol=0, atol=1e-14)
        if family_of(model).experts
        else torch.equal(values, plain)
    )


@every
def test_padding_and_batches_change_nothing(name: str) -> None:
    model, ids = tiny(name), samples()
    for unit, neuron in (("neuron", "signed"), ("neuron", "abs"), ("head", "abs")):
        alone = exact_scores(model, ids, unit=unit, neuron=neuron, tokens=1)
        batched = exact_scores(model, ids, unit=unit, neuron=neuron, tokens=1000)
        assert max(distance(batched[site], alone[site]) for site in alone) < (
            1e-6 if name in FLOAT32_INSIDE else 1e-12
        ), (unit, neuron)


FLOAT32_INSIDE = {
    name
    for name, (kind, _) in CONFIGS.items()
    if kind in ("bloom", "gptj", "gpt_neo", "gemma2", "cohere", "cohere2", "ernie4_5")
}
"""Where transformers computes attention weights or rotations in float32 even in a float64 model."""


@every
def test_relevance_is_shared_out_by_the_rules(name: str) -> None:
    """What each rule says of sums of relevance, which no wrong slice, share or order of parts survives.

    AttnLRP: queries get what keys get, values half of the heads'; gate and up get the same, neuron by neuron.
    CP-LRP: queries, keys and gates get nothing, values all of the heads'.
    """
    model, ids = tiny(name), samples()
    close = 1e-6 if name in FLOAT32_INSIDE else 1e-9
    both = {
        method: by_layer(model, exact_scores(model, ids, method=method, neuron="signed", tokens=1000))
        for method in ("lrp", "cp-lrp")
    }
    heads = {
        method: list(exact_scores(model, ids, method=method, unit="head").values())
        for method in ("lrp", "cp-lrp")
    }
    for layer, (site, of_heads) in enumerate(zip(both["lrp"], heads["lrp"], strict=True)):
        assert same_sum(site["attn.q"], site["attn.k"], close)
        assert same_sum(site["attn.v"], of_heads / 2, close)
        assert site["attn.q"].abs().max() > 1e-4, layer
        if "mlp.gate" in site:
            assert distance(site["mlp.gate"], site["mlp.up"]) < 1e-12
    for site, of_heads in zip(both["cp-lrp"], heads["cp-lrp"], strict=True):
        assert not site["attn.q"].any()
        assert not site["attn.k"].any()
        assert not site.get("mlp.gate", torch.zeros(1)).any()
        assert same_sum(site["attn.v"], of_heads, close)
        assert (site["attn.v"] != 0).all()
        assert (site["mlp.up"] != 0).any()


def same_sum(one: Tensor, other: Tensor, close: float) -> bool:
    return float((one.sum() - other.sum()).abs() / one.abs().sum()) < close


def by_layer(model: Any, scores: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    layers: list[dict[str, Tensor]] = [{} for _ in range(model.config.num_hidden_layers)]
    for site in sites_of(model, roles_of(model)):
        earlier = layers[site.layer].get(site.role, scores[site.name][:0])  # of the experts before this one
        layers[site.layer][site.role] = torch.cat([earlier, scores[site.name]])
    return layers


@every
def test_attnlrp_agrees_with_the_rules_on_torch_functions(name: str) -> None:
    model, ids = tiny(name), samples()[0]
    sites = {site.name: site for site in sites_of(model, roles_of(model))}
    seen = record_flows(model, ids, list(sites.values()))
    close = 1e-5 if name in FLOAT32_INSIDE else 1e-8
    for site, value in exact_scores(model, [ids], neuron="signed").items():
        assert distance(value, seen[site].signed_relevance) < close, site
    for site, value in exact_scores(model, [ids], neuron="abs").items():
        flow = seen[site]
        absolute = (sites[site].weight.detach() * (flow.of_z.T @ flow.a)).abs().sum(1)  # Σ_j |R_W,ij|
        assert distance(value, absolute) < close, site
    for site, value in exact_scores(model, [ids], unit="head").items():
        assert distance(value, seen[site].heads(sites[site].heads)) < close, site


@pytest.mark.parametrize("name", ["gpt2", "phi3", "pythia", "falcon", "falcon-40b", "falcon-rw", "bloom"])
def test_parts_of_a_fused_matrix_are_what_attention_calls_query_key_and_value(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, outputs = tiny(name), [], {}
    plain = patching._share_out

    def recorded(query_key_value: Any, asked: Any) -> Any:
        seen.append(query_key_value)
        return plain(query_key_value, asked)

    monkeypatch.setattr(patching, "_share_out", recorded)
    sites = sites_of(model, ("attn.q", "attn.k", "attn.v"))[:3]
    hooks = [
        site.module.register_forward_hook(
            lambda _, args, out, site=site: outputs.update({site.role: site.select_features(out)})
        )
        for site in sites
    ]
    with lrp_rules(model):
        model(torch.tensor(samples()[:1]))
    for site, inside in zip(sites, seen[0], strict=True):
        # At the first position, which no rotation turns; Falcon's heads stand after time, and its new design repeats keys for each query.
        first = inside[0, 0] if name.startswith("falcon") else inside[0, :, 0]
        distinct = first if len(first) == site.heads else first[:: len(first) // site.heads]
        assert torch.equal(distinct.reshape(-1), outputs[site.role][0, 0]), site.role
    for hook in hooks:
        hook.remove()


@every
def test_a_site_alone_gets_what_it_gets_among_all_sites(name: str) -> None:
    """Alone, the lowest site is where the graph begins; and a model may write into a site's output in place."""
    model, ids = tiny(name), samples()
    for method, neuron in (
        ("lrp", "signed"),
        ("lrp", "abs"),
        ("cp-lrp", "signed"),
        ("wanda", "abs"),
        ("magnitude", "abs"),
        ("random", "abs"),
    ):
        together = attribute(model, ids, method=method, neuron=neuron, sites=roles_of(model))
        for role in roles_of(model):
            alone = attribute(model, ids, method=method, neuron=neuron, sites=(role,))
            assert [site.name for site in sites_of(model, (role,))] == list(alone)
            for site in alone:
                assert alone[site].shape == together[site].shape
                assert distance(alone[site], together[site]) < 1e-6, (method, neuron, site)
    neurons = sites_of(model, ("mlp.up",))
    active = attribute(model, ids, method="activation")
    assert list(active) == [site.name for site in neurons]
    expected = sum(
        _input_of(model, sites_of(model, ("mlp.down",))[0], torch.tensor([one]))
        .reshape(len(one), -1)
        .abs()
        .sum(0)
        for one in ids
    )
    assert distance(active[neurons[0].name], expected / sum(map(len, ids))) < 1e-6


@every
def test_an_ablated_neuron_is_silent_and_comes_back(name: str) -> None:
    model, ids = tiny(name), torch.tensor(samples()[:1])
    before = fingerprint(model)
    inputs = {site.mlp: _input_of(model, site, ids) for site in sites_of(model, ("mlp.down",))}
    mlp, plain = next(
        (mlp, a) for mlp, a in inputs.items() if a[..., 5].any() and a[..., 7].any()
    )  # an expert may get no token
    up, down = (
        next(site for site in sites_of(model, (role,)) if site.mlp == mlp) for role in ("mlp.up", "mlp.down")
    )
    circuit = Circuit("neuron", {up.name: (5, 7)}, describe(model), {})
    with ablated(model, circuit):
        silent = _input_of(model, down, ids)
        assert not silent[..., [5, 7]].any()
        rest = [i for i in range(plain.shape[-1]) if i not in (5, 7)]
        assert torch.equal(silent[..., rest], plain[..., rest])
        assert not up.weight[[5, 7]].any()
        assert up.weight[rest].any(1).all()
    require_same(fingerprint(model), before)


def _input_of(model: Any, site: Site, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with open_experts(model):
        hook = site.hook_module.register_forward_pre_hook(
            lambda _, args: seen.append(arrange_by_position(args[0].detach(), tokens_of(args), ids.shape))
        )
        model(ids)
        hook.remove()
    return seen[0]


# Another implementation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_weights_neurons_and_tokens_agree_with_lxt(name: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = SHARED / "oracles" / name
    if not folder.is_dir():
        pytest.skip(f"no folder ../shared/oracles/{name} here: the relevance that LXT computed")
    model, oracle = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        load_file(folder / "oracle.safetensors"),
    )
    ids = json.loads((folder / "oracle.json").read_text())["input_ids"]
    sites = sites_of(model, roles_of(model))

    def expected(site: Site, key: str) -> Tensor:
        stored = oracle[f"{site.name.partition('#')[0]}.{key}"]
        return site.select_features(stored if site.transposed else stored.T).T  # [out, in]

    for batch_tokens in (1, 1000):
        for neuron, key in (("abs", "mean_abs"), ("signed", "mean_signed")):
            scores = attribute(model, ids, neuron=neuron, sites=roles_of(model), batch_tokens=batch_tokens)
            for site in sites:
                bias = (
                    _bias_relevance(model, ids, site) if neuron == "signed" else 0
                )  # Σ ĝ z counts the bias, Σ_j R_W does not
                assert distance(scores[site.name] - bias, expected(site, key).double().sum(1)) < 1e-5, (
                    site.name,
                    neuron,
                )
    totals = [torch.zeros(2, site.out, site.inp) for site in sites]
    for index, one in enumerate(ids):
        with lrp_rules(model):
            grads = torch.autograd.grad(
                model(torch.tensor([one])).logits[0, -1].max(), [site.module.weight for site in sites]
            )
        for total, site, grad in zip(totals, sites, grads, strict=True):
            relevance = site.weight.detach() * site.select_features(grad if site.transposed else grad.T).T
            total += torch.stack([relevance, relevance.abs()]) / len(ids)
        found = relevance_ledger(model, one, cp=False)
        if family_of(model).positions is None:
            assert distance(found.tokens, oracle[f"token_relevance.{index}"]) < 1e-5
    for total, site in zip(totals, sites, strict=True):
        assert distance(total[0], expected(site, "mean_signed")) < 1e-5, site.name
        assert distance(total[1], expected(site, "mean_abs")) < 1e-5, site.name


def _bias_relevance(model: Any, ids: list[list[int]], site: Site) -> Tensor:
    """Mean over inputs of b ⊙ Σ_t ĝ_t."""
    bias = getattr(site.module, "bias", None)
    if bias is None:
        return torch.zeros(site.out)
    with lrp_rules(model):
        grads = [torch.autograd.grad(model(torch.tensor([one])).logits[0, -1].max(), bias)[0] for one in ids]
    return site.select_features(bias.detach() * torch.stack(grads).mean(0))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bert", "mamba", "deepseek_v3"])
def test_other_architectures_are_refused_by_name_before_any_weight_is_read(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"'{kind}'"):
        load_model(tmp_path)


def test_code_from_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    config = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(UnsupportedModel, match="Python code"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("bloom", {"slow_but_exact": True}, "slow_but_exact"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_a_setting_without_a_rule_is_refused_by_name(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        attribute(tiny(name, **changes), samples())


def test_an_unknown_module_is_refused_by_its_place_and_class_and_nothing_is_touched() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Mish()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\b.*Mish"):
        attribute(model, samples())
    require_same(fingerprint(model), before)
    model = tiny("llama")
    model.model.norm = torch.nn.Softsign()
    with pytest.raises(UnsupportedModel, match=r"model\.norm\b.*Softsign"):
        attribute(model, samples())
    model = tiny("opt")
    model.model.decoder.layers[0].activation_fn = torch.nn.Mish()
    with pytest.raises(UnsupportedModel, match=r"model\.decoder\.layers\.0\.activation_fn\b.*Mish"):
        attribute(model, samples())


def test_a_class_of_the_same_name_from_elsewhere_is_refused() -> None:
    class Linear(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = Linear(16, 24, dtype=torch.float64)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp\.up_proj\b.*Linear.*test_families"):
        attribute(model, samples())


def test_an_attention_implementation_without_a_rule_is_refused_by_name() -> None:
    model = tiny("llama")
    model.config._attn_implementation_internal = "someones_own"
    with pytest.raises(UnsupportedModel, match="someones_own"):
        attribute(model, samples())


@pytest.mark.parametrize("chosen", ["flash_attention_2", "flash_attention_3", "flex_attention"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "mixtral"])
def test_in_the_place_of_fused_attention_stands_one_with_rules(name: str, chosen: str) -> None:
    model = tiny(name)
    if name == "gemma2":
        model.config._attn_implementation_internal = "eager"  # sdpa has no soft-capping
    wanted = attribute(model, samples(), neuron="signed", sites=roles_of(model))
    model.config._attn_implementation_internal = chosen
    before = fingerprint(model)
    found = attribute(model, samples(), neuron="signed", sites=roles_of(model))
    require_same(fingerprint(model), before)
    assert all(torch.equal(found[site], value) for site, value in wanted.items())


def test_flash_attention_in_a_class_of_its_own_is_refused_with_the_remedy() -> None:
    model = tiny("gptj")
    own = type(
        "GPTJFlashAttention2", (type(model.transformer.h[0].attn),), {"__module__": type(model).__module__}
    )
    model.transformer.h[0].attn.__class__ = own
    with pytest.raises(UnsupportedModel, match=r'GPTJFlashAttention2.*attn_implementation="eager"'):
        attribute(model, samples())
