"""Mean ablation: a model whose numbers are checked on paper, explicit loops over positions, every kind of family, a run, and what is
refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_discovery import changed
from tests.tiny import paper_model, samples, tiny
from torch import Tensor

from sparc3 import Circuit, Results, UserError, ablated, export, load_recipe, run
from sparc3.attribution.activations import mean_outputs
from sparc3.circuits.algebra import union
from sparc3.circuits.mean_ablation import MeanAblation, replace_by_means
from sparc3.experiment.check_recipe import check_sizes
from sparc3.models.sites import down_sites, sites_of
from sparc3.samples.batches import encode, pad_right
from sparc3.samples.reference_set import ReferenceSet

UP, OUT = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj"
FAMILIES = ("llama", "llama-bias", "opt", "gpt2", "phi3", "pythia", "falcon-40b", "gemma2", "bloom")


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]  # type: ignore[no-any-return]


def mean_of_samples(model: Any, ids: list[list[int]], *roles: str) -> dict[str, Tensor]:
    return mean_outputs(model, ReferenceSet.of(ids), roles)


def test_a_neuron_on_paper() -> None:
    """Token 3 has neurons (3, 4), token 1 = (0, 1) has, by the same steps: normed (0, √2), v = (√2, −√2), h = (0, 1 − √2), normed
    (0, −√2), gate (0, −√2), so no neuron at all: the mean of neuron 0 is 1.5."""
    model = paper_model()
    means = mean_of_samples(model, [[3], [1]], "mlp.up")
    torch.testing.assert_close(means[UP][0], torch.tensor([1.5, 2.0], dtype=torch.float64))
    with replace_by_means(model, MeanAblation(Circuit("neuron", {UP: (0,)}), means)):
        # Neurons (1.5, 4): down = (6 − 12, 3), h + down = (−5, 4).
        found = logits(model, [3])
    rms = math.sqrt((25 + 16) / 2)
    assert found[:2].tolist() == pytest.approx([-5 / rms, 4 / rms])
    assert logits(model, [3])[:2].tolist() == pytest.approx([8, 1.4])


def test_a_head_on_paper() -> None:
    """v of token 3 is (0, 2), of token 2 = (1, 1) it is (2, 0): the mean is (1, 1), and o = (0, 1), h = (1, 0), normed (√2, 0)."""
    model = paper_model()
    means = mean_of_samples(model, [[3], [2]], "attn.o")
    torch.testing.assert_close(means[OUT][0], torch.ones(2, dtype=torch.float64))
    with replace_by_means(model, MeanAblation(Circuit("head", {OUT: (0,)}), means)):
        # gate (√2, √2), up (√2, 3√2), neurons (2, 6): down = (8 − 18, 4), h + down = (−9, 4).
        found = logits(model, [3])
    rms = math.sqrt((81 + 16) / 2)
    assert found[:2].tolist() == pytest.approx([-25 / rms, 4 / rms])


@pytest.mark.parametrize("role", ["mlp.up", "attn.o"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_means_are_over_the_first_tokens_and_over_all_others(name: str, role: str) -> None:
    model, texts = tiny(name), samples(4)
    downs = down_sites(model)
    for site in sites_of(model, [role]):
        reader, seen = downs[site.mlp] if role == "mlp.up" else site, list[Tensor]()
        handle = reader.module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for ids in texts:  # one by one, so that there is no padding
            logits(model, ids)
        handle.remove()
        others = torch.cat([one[1:] for one in seen])
        expected = torch.stack([torch.stack([one[0] for one in seen]).mean(0), others.mean(0)])
        found = mean_of_samples(model, texts, role)[site.name]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unit", ["neuron", "head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_means_of_zero_are_zero_ablation(name: str, unit: str) -> None:
    model, texts = tiny(name), samples(3)
    sites = sites_of(model, ["mlp.up" if unit == "neuron" else "attn.o"])
    circuit = Circuit(unit, {site.name: (0, 2) for site in sites})
    readers = {site.mlp: site.inp for site in sites_of(model, ["mlp.down"])}
    means = {s.name: torch.zeros(2, readers[s.mlp] if unit == "neuron" else s.inp) for s in sites}
    ids = pad_right([tuple(one) for one in texts], torch.device("cpu"))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with ablated(model, circuit):
            expected = model(input_ids=ids).logits
        with replace_by_means(model, MeanAblation(circuit, means)):
            found = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, before)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("unit", ["neuron", "head"])
def test_a_text_of_two_tokens_is_its_own_mean(unit: str) -> None:
    """Each position of the reference text has a mean of its own here, so everything replaced is nothing changed."""
    model, ids = tiny("llama"), [5, 9]
    role = "mlp.up" if unit == "neuron" else "attn.o"
    sites, means = sites_of(model, [role]), mean_of_samples(model, [ids], role)
    everything = Circuit(unit, {s.name: tuple(range(s.out if unit == "neuron" else s.heads)) for s in sites})
    before, other = logits(model, ids), logits(model, [5, 9, 4])
    with replace_by_means(model, MeanAblation(everything, means)):
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(logits(model, [5, 9, 4]), other)


def test_no_hook_is_left_where_it_fails() -> None:
    model, ids = tiny("llama"), [5, 9, 4]
    before, means = logits(model, ids), mean_of_samples(model, [[7, 8]], "mlp.up")
    change = MeanAblation(Circuit("neuron", {UP: (0, 1)}), means)
    with pytest.raises(KeyError), replace_by_means(model, change):
        raise KeyError(float((logits(model, ids) - before).abs().max()))
    assert torch.equal(logits(model, ids), before)


def test_what_has_no_mean_is_refused_and_nothing_is_touched() -> None:
    model, ids = tiny("llama"), [5, 9, 4]
    before, means = logits(model, ids), mean_of_samples(model, [[7, 8]], "mlp.up")
    weights = Circuit("weight", {UP: torch.ones(24, 16, dtype=torch.bool)})
    gate = Circuit("neuron", {"model.layers.0.mlp.gate_proj": (0,)})
    for circuit, given, said in (
        (weights, means, "weight"),
        (gate, means, "gate_proj"),
        (Circuit("neuron", {UP: (0,)}), {}, UP),
        (Circuit("neuron", {UP: (24,)}), means, "24"),
    ):
        with pytest.raises(UserError, match=said), replace_by_means(model, MeanAblation(circuit, given)):
            raise AssertionError
        assert torch.equal(logits(model, ids), before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Results]]:
    """Heads of the demo, removed by both ablations in one folder, zero first."""
    folder, found = tmp_path_factory.mktemp("mean") / "heads", {}
    for ablation in ("zero", "mean"):
        recipe = changed(
            attribution={"unit": "head", "sites": ["attn.o"], "target": "contrast"},
            discover={"methods": ["lrp", "random"], "sparsities": [0.25, 0.5], "ablation": ablation},
        )
        found[ablation] = folder, run(recipe, folder)
        (folder / f"{ablation}.log").write_text((folder / "log.txt").read_text())
    return found


def test_a_run_by_means_uses_the_scores_again(finished: dict[str, tuple[Path, Results]]) -> None:
    folder, results = finished["mean"]
    assert results.provenance["ablation"] == "mean"
    assert "ablation" not in finished["zero"][1].provenance
    later = (folder / "mean.log").read_text().removeprefix((folder / "zero.log").read_text())
    assert "scores/task.0.safetensors exists and fits" in later
    assert "evaluation/original.json exists and fits" in later
    before = finished["zero"][1]
    assert results.find("ioi.logit_difference").value == before.find("ioi.logit_difference").value
    for variant in ("empty", "lrp@8"):
        theirs, ours = (one.find("ioi.logit_difference", variant).value for one in (before, results))
        assert ours != pytest.approx(theirs)
    assert "their means" in (folder / "report.html").read_text()


def test_the_empty_circuit_is_that_of_the_references_means(
    finished: dict[str, tuple[Path, Results]], demo: tuple[Any, Any]
) -> None:
    folder, results = finished["mean"]
    model, tokenizer = demo
    texts = [one.text for n in (0, 1) for one in ReferenceSet.load(folder / f"samples/task.{n}.jsonl")]
    means = mean_outputs(model, ReferenceSet.of(texts), ["attn.o"], tokenizer=tokenizer)
    heads = Circuit("head", {s.name: tuple(range(s.heads)) for s in sites_of(model, ["attn.o"])})
    tests = ReferenceSet.load(folder / "samples/evaluation-ioi.jsonl")
    differences = []
    with replace_by_means(model, MeanAblation(heads, means)):
        for one in encode(tests, tokenizer, "contrast", context=512, vocabulary=model.config.vocab_size):
            assert one.tokens is not None
            assert one.against is not None
            found = logits(model, list(one.ids))
            differences.append(float(found[one.tokens[0]] - found[one.against[0]]))
    told = results.find("ioi.logit_difference", "empty").value
    assert told == pytest.approx(sum(differences) / len(differences), rel=1e-4)


def test_what_was_measured_by_means_is_not_exported(
    finished: dict[str, tuple[Path, Results]],
    demo: tuple[Any, Any],
    mistake: Callable[..., str],
    tmp_path: Path,
) -> None:
    path = next((finished["mean"][0] / "circuits").glob("lrp@*.json"))
    circuit = Circuit.load(path)
    assert circuit.provenance["ablation"] == "mean"
    for one in (circuit, union(circuit, circuit)):
        with pytest.raises(UserError, match=r"discover\.ablation"):
            export(*demo, one, tmp_path / "out")
    for out in ("out", "out.gguf"):
        said = mistake("ablate", "demo", "--circuit", path, "--out", tmp_path / out)
        assert "discover.ablation" in said
    assert "discover.ablation" in mistake("push", path, "someone/something")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"attribution": {"unit": "weight", "target": "contrast"}}, "weight"),
        ({"attribution": {"sites": ["mlp.up", "mlp.gate"], "target": "contrast"}}, r"mlp\.gate"),
        (
            {"evaluation": {"ioi": {"source": "demo-ioi"}, "perplexity": {"source": "demo-general"}}},
            "perplexity",
        ),
        ({"discover": {"methods": ["lrp"], "ablation": "resample"}}, "ablation"),
    ],
)
def test_recipes_without_means_are_refused(sections: dict[str, Any], said: str) -> None:
    by_means = {"discover": {"methods": ["lrp"], "sparsities": [0.5], "ablation": "mean"}, **sections}
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(changed(**by_means))
    assert "\n" not in str(caught.value)


def test_zero_is_the_recipe_without_a_choice() -> None:
    asked = {"methods": ["lrp"], "sparsities": [0.5]}
    plain, zero, mean = (
        load_recipe(changed(discover={**asked, **more})).fingerprint
        for more in ({}, {"ablation": "zero"}, {"ablation": "mean"})
    )
    assert plain == zero != mean


def test_experts_are_refused_before_the_work() -> None:
    sites = sites_of(tiny("qwen3-moe"), ["mlp.up"])
    recipe = load_recipe(changed(discover={"methods": ["lrp"], "sparsities": [0.5], "ablation": "mean"}))
    with pytest.raises(UserError, match="expert"):
        check_sizes(recipe, sites)
