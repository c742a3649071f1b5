"""Weight scores: another implementation, numbers on paper, laws between units, streaming, refusals."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import paper_model, samples, tiny
from torch import Tensor
from unchanged import fingerprint, require_same

from sparc3 import UserError, attribute
from sparc3.attribution import relevance as weights
from sparc3.attribution.patching import lrp_rules
from sparc3.errors import NonFinite
from sparc3.models.families import ROLES
from sparc3.models.sites import Site, family_of, sites_of

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
STORED_ALL_WAYS = ("llama", "opt", "gpt2", "phi3", "pythia", "falcon-40b")
"""Plain, transposed, slices of a fused matrix, scattered rows of one, and several key heads in it."""


def roles_of(model: Any) -> tuple[str, ...]:
    return tuple(role for role in ROLES if role in family_of(model).roles)


def distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖, and 0 for two zeros."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-300))


def by_autograd(model: Any, ids: list[list[int]], method: str) -> dict[str, Tensor]:
    """[samples, out, in] of W ⊙ ∂y/∂W of each sample apart, with a gradient for every weight."""
    sites = sites_of(model, roles_of(model))
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for one in ids:
        model.zero_grad()
        if method == "gradient":
            model(torch.tensor([one])).logits[0, -1].max().backward()
        else:
            with lrp_rules(model, cp=method == "cp-lrp"):
                model(torch.tensor([one])).logits[0, -1].max().backward()
        for site in sites:
            found[site.name].append(site.weight.detach() * as_rows(site, site.module.weight.grad))
    model.zero_grad()
    return {name: torch.stack(parts) for name, parts in found.items()}


def as_rows(site: Site, stored: Any) -> Tensor:
    """What belongs to the site, [out, in], of a tensor stored as its module's weight is."""
    if stored is None:
        return torch.zeros(site.out, site.inp)
    return site.select_features(stored if site.transposed else stored.T).T


@pytest.mark.parametrize("batch_tokens", [1, 1000])
@pytest.mark.parametrize(("reduce", "key"), [("mean_abs", "mean_abs"), ("mean", "mean_signed")])
@pytest.mark.parametrize("name", ["stories260k", "gpt2", "qwen3"])
def test_every_weight_agrees_with_lxt(name: str, reduce: str, key: str, batch_tokens: int) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    stories = name == "stories260k"
    model_folder, beside = (
        (SHARED / "models" / name, SHARED / "oracles/lxt_stories260k")
        if stories
        else (SHARED / "oracles" / name,) * 2
    )
    if not model_folder.is_dir() or not (SHARED / "oracles").is_dir():
        pytest.skip("no folder ../shared/oracles here: the relevance that LXT computed")
    files = [
        beside.with_suffix(f".{kind}") if stories else beside / f"oracle.{kind}"
        for kind in ("json", "safetensors")
    ]
    model, oracle = AutoModelForCausalLM.from_pretrained(model_folder).eval(), load_file(files[1])
    scores = attribute(
        model,
        json.loads(files[0].read_text())["input_ids"],
        unit="weight",
        reduce=reduce,
        sites=roles_of(model),
        batch_tokens=batch_tokens,
    )
    for site in sites_of(model, roles_of(model)):
        expected = as_rows(site, oracle[f"{site.name.partition('#')[0]}.{key}"])
        assert scores[site.name].shape == (site.out, site.inp)
        assert distance(scores[site.name], expected) < 1e-5, site.name


@pytest.mark.parametrize(
    ("method", "role", "expected"),
    [
        # y reaches the product through W_d: (6, −3); ½ of it passes to up through the gate (1, 2), ½ to the gate through up (3, 2); h = (1, 1).
        ("lrp", "mlp.up", [[3, 6], [-9, 3]]),
        ("lrp", "mlp.gate", [[9, 0], [-3, -3]]),
        ("lrp", "mlp.down", [[12, -12], [6, 0]]),
        ("cp-lrp", "mlp.up", [[6, 12], [-18, 6]]),
        ("cp-lrp", "mlp.gate", [[0, 0], [0, 0]]),
        ("wanda", "mlp.up", [[1, 2], [3, 1]]),
        ("wanda", "mlp.down", [[12, 12], [6, 0]]),
        ("magnitude", "mlp.down", [[4, 3], [2, 0]]),
    ],
)
def test_numbers_on_paper(method: str, role: str, expected: list[list[float]]) -> None:
    scores = attribute(paper_model(), [[3]], method=method, unit="weight", sites=[role], target="predicted")
    assert torch.allclose(next(iter(scores.values())), torch.tensor(expected).float())


@pytest.mark.parametrize("method", ["lrp", "cp-lrp", "gradient"])
@pytest.mark.parametrize("name", STORED_ALL_WAYS)
def test_streamed_sums_are_those_of_whole_gradients(name: str, method: str) -> None:
    model, ids = tiny(name), samples()
    each = by_autograd(model, ids, method)
    expected = {
        "mean": lambda r: r.mean(0),
        "mean_abs": lambda r: r.abs().mean(0),
        "abs_mean": lambda r: r.mean(0).abs(),
    }
    for reduce, of in expected.items():
        for tokens in (1, 20):
            options: Any = {
                "method": method,
                "unit": "weight",
                "sites": roles_of(model),
                "reduce": reduce,
                "batch_tokens": tokens,
            }
            scores = attribute(model, ids, **options, sums_dtype="float64")
            assert all(distance(scores[site], of(each[site])) < 1e-6 for site in scores), (reduce, tokens)
            rounded = attribute(model, ids, **options)
            assert all(distance(rounded[site], of(each[site])) < 1e-5 for site in scores), (reduce, tokens)


@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_rms_is_over_the_tokens_of_log_probabilities(method: str) -> None:
    """Against one backward pass with everything kept, and a loop over tokens in float64."""
    model, ids = tiny("llama").double(), samples()
    sites = sites_of(model, roles_of(model))
    squares = {site.name: torch.zeros(site.out, site.inp, dtype=torch.float64) for site in sites}
    for one in ids:
        kept: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(site: Site, args: tuple[Tensor, ...], output: Tensor, kept: Any = kept) -> None:
            output.retain_grad()
            kept[site.name] = (args[0].detach()[0], output)

        hooks = [
            site.module.register_forward_hook(lambda _, a, z, site=site: keep(site, a, z)) for site in sites
        ]
        with lrp_rules(model) if method == "lrp" else nullcontext():
            logits = model(torch.tensor([one])).logits[0]
            ends = logits.exp() / logits.exp().sum(-1, keepdim=True)
            sum(ends[place, token].log() for place, token in enumerate(one[1:])).backward()
        for hook in hooks:
            hook.remove()
        for site in sites:
            a, z = kept[site.name]
            for x, g in zip(a, z.grad[0], strict=True):
                squares[site.name] += (site.weight.detach() * torch.outer(g, x)) ** 2
    tokens = sum(map(len, ids))
    for batch in (1, 20):
        options: Any = {"unit": "weight", "sites": roles_of(model), "target": "logprob", "reduce": "rms"}
        scores = attribute(model, ids, method=method, **options, batch_tokens=batch)
        for site in sites:
            assert distance(scores[site.name], (squares[site.name] / tokens).sqrt()) < 1e-5, site.name


def test_rms_is_for_weights_and_signed_neurons() -> None:
    with pytest.raises(UserError, match="rms"):
        attribute(tiny("llama"), samples(), reduce="rms")
    attribute(tiny("llama"), samples(), method="activation", reduce="rms")  # has no relevance to reduce


def test_the_scale_of_a_log_probability_is_a_tokens() -> None:
    model, ids = tiny("llama"), samples()
    once = attribute(model, ids, target="logprob", neuron="signed")
    assert once.provenance["targets"] == sum(len(one) - 1 for one in ids)
    again = attribute(model, ids * 2, target="logprob", neuron="signed")
    assert all(distance(again[site], once[site]) < 1e-6 for site in once)
    with pytest.raises(UserError, match="logprob"):
        attribute(model, [[3]], target="logprob")


@pytest.mark.parametrize("name", STORED_ALL_WAYS)
def test_a_neuron_is_the_sum_of_its_weights(name: str) -> None:
    model, ids = tiny(name), samples()
    for method, reduce in (
        ("lrp", "mean_abs"),
        ("gradient", "mean_abs"),
        ("wanda", "mean"),
        ("magnitude", "mean"),
    ):
        rows = attribute(model, ids, method=method, sites=roles_of(model))
        single = attribute(model, ids, method=method, unit="weight", sites=roles_of(model), reduce=reduce)
        assert all(distance(single[site].sum(1), rows[site]) < 1e-5 for site in rows), method


def test_wanda_grows_with_the_root_of_the_tokens() -> None:
    model, ids = tiny("llama"), samples()
    once, twice = (
        attribute(model, ids * times, method="wanda", unit="weight", sites=roles_of(model))
        for times in (1, 2)
    )
    assert all(distance(twice[site], once[site] * 2**0.5) < 1e-6 for site in once)


def test_parts_of_a_reference_set_add_up() -> None:
    model, ids = tiny("llama"), samples(5)
    options: Any = {"unit": "weight", "sites": roles_of(model), "reduce": "mean_abs"}
    whole, some, others = (attribute(model, part, **options) for part in (ids, ids[:2], ids[2:]))
    assert all(distance((2 * some[site] + 3 * others[site]) / 5, whole[site]) < 1e-5 for site in whole)


def test_many_targets_divide_by_their_number() -> None:
    model, ids = tiny("llama"), samples(2)
    scores = attribute(model, ids, unit="weight", target="next")
    totals = {site.name: torch.zeros(site.out, site.inp) for site in sites_of(model, ["mlp.up"])}
    for one in ids:
        model.zero_grad()
        with lrp_rules(model):
            logits = model(torch.tensor([one])).logits[0]
            logits[range(len(one) - 1), one[1:]].sum().backward()
        for site in sites_of(model, ["mlp.up"]):
            totals[site.name] += (site.weight * site.module.weight.grad).detach() / sum(
                len(one) - 1 for one in ids
            )
    assert all(distance(scores[name], total) < 1e-5 for name, total in totals.items())


@pytest.mark.parametrize("method", ["lrp", "cp-lrp", "gradient", "wanda", "magnitude", "random"])
def test_nothing_is_left_behind(method: str) -> None:
    model = tiny("gpt2")
    before = fingerprint(model)
    scores = attribute(model, samples(), method=method, unit="weight", sites=roles_of(model))
    require_same(fingerprint(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in scores.values())


def test_random_scores_differ_by_site_and_seed() -> None:
    one, again, other = (
        attribute(tiny("llama"), [], method=m, unit="weight") for m in ("random", "random:0", "random:1")
    )
    a, b = one.values()
    assert not torch.equal(a, b)
    assert all(
        torch.equal(one[site], again[site]) and not torch.equal(one[site], other[site]) for site in one
    )


def test_sums_in_bfloat16_are_rough_but_right() -> None:
    model, ids = tiny("llama"), samples()
    exact, rough = (
        attribute(model, ids, unit="weight", sums_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert all(0 < distance(rough[site], exact[site]) < 2e-2 for site in exact)


@pytest.mark.parametrize("reduce", ["mean", "mean_abs"])
def test_memory_that_runs_out_in_the_backward_pass_adds_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, reduce: str
) -> None:
    model, ids = tiny("llama"), samples()
    options: Any = {"unit": "weight", "sites": roles_of(model), "reduce": reduce}
    expected = attribute(model, ids, **options)
    name = "add_absolute_" if reduce == "mean_abs" else "add_signed_"
    plain, calls = getattr(weights, name), []

    def short_of_memory(total: Tensor, pairs: Any) -> None:
        calls.append(len(pairs))
        if len(calls) in (5, 20):
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(total, pairs)

    monkeypatch.setattr(weights, name, short_of_memory)
    found = attribute(model, ids, **options, batch_tokens=1000)
    assert len(set(calls)) > 1
    assert found.provenance["samples"] == len(ids)
    assert all(distance(found[site], expected[site]) < 1e-5 for site in expected)


def test_a_nan_names_its_sample_and_a_site() -> None:
    model, ids = tiny("llama"), samples(4, vocabulary=39)
    ids[2][0] = 39
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = float("nan")
    for method in ("lrp", "wanda"):
        with pytest.raises(NonFinite, match=r"sample 2 .*model\.layers\.\d\.mlp\.up_proj"):
            attribute(model, ids, method=method, unit="weight")
    with pytest.raises(UserError, match=r"unit weight .*non_finite skip"):
        attribute(model, ids, unit="weight", non_finite="skip")
    assert attribute(model, ids, method="wanda", unit="weight", non_finite="skip").provenance["skipped"] == [
        2
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "activation"}, "activation.*'weight'"),
        ({"sums_dtype": "float8"}, "sums_dtype 'float8'"),
        ({"sums_device": "nowhere"}, "sums_device 'nowhere'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        attribute(tiny("llama"), samples(), **{"unit": "weight", **options})  # type: ignore[arg-type]


@pytest.mark.slow
def test_memory_is_not_above_that_of_a_full_backward() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/weights.py"), "--layers", "3", "--only"]
    plain, lrp = (
        float(subprocess.run([*command, what], capture_output=True, text=True, check=True).stdout)
        for what in ("plain", "lrp")
    )
    assert lrp / plain < 1.02
