"""Units that are weakened by a share: exactly so, in memory, in files and in runs; a circuit of strength 1 is what it always was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import test_tune, unchanged
from tests.test_checkpoint import logits, saved
from tests.tiny import tiny

from sparc3 import Circuit, Scores, UserError, ablate_, ablated, export, load_model, load_recipe, run, select
from sparc3.checkpoints.shrink import plan_shrinking
from sparc3.circuits.algebra import difference, intersection, overlap, union
from sparc3.circuits.select import random_like
from sparc3.errors import DamagedFile
from sparc3.models.sites import down_sites, sites_of
from sparc3.plan.plan import plan
from sparc3.storage import read_json

MODEL = {"id": "m", "architecture": "llama", "fingerprint": "f"}


def some_of(model: Any, unit: str, strength: float) -> Circuit:
    """Two units of the first site; of neurons also two of mlp.down, which meet those of mlp.up in some weights; as
    "own" each of these has its own strength."""
    first = sites_of(model, ["attn.o" if unit == "head" else "mlp.up"])[0]
    if unit == "weight":
        picked = torch.rand(first.out, first.inp, generator=torch.Generator().manual_seed(0)) < 0.3
        return Circuit(unit, {first.name: picked}, strength=strength)
    if unit == "own":
        down = sites_of(model, ["mlp.down"])[0].name
        own = {first.name: (1.0, -1.0, strength), down: (strength, 0.75)}
        return Circuit("neuron", {first.name: (1, 2, 5), down: (0, 3)}, strengths=own)
    more = {sites_of(model, ["mlp.down"])[0].name: (0, 3)} if unit == "neuron" else {}
    return Circuit(unit, {first.name: (1, 2), **more}, strength=strength)


@pytest.mark.parametrize("name", ["llama-bias", "opt", "gpt2", "phi3", "mixtral"])
def test_a_halved_neuron_writes_half(name: str) -> None:
    """What enters mlp.down's output from the neuron is halved, also behind a non-linearity: the activation itself is as it was."""
    model = tiny(name).double()
    up = sites_of(model, ["mlp.up"])[0]
    down = down_sites(model)[up.mlp]
    before, rows, rest = (
        down.stored_weight[:, 1].clone(),
        up.stored_weight.clone(),
        unchanged.fingerprint(model),
    )
    with ablated(model, Circuit("neuron", {up.name: (1,)}, strength=0.75)):
        assert torch.equal(down.stored_weight[:, 1], before / 4)
        assert torch.equal(up.stored_weight, rows)
    unchanged.require_same(unchanged.fingerprint(model), rest)


def test_half_a_neuron_is_half_of_its_effect_on_paper() -> None:
    """In a plain MLP y = W_down · relu(x): halving neuron 0 takes half of what removing it takes."""
    model = tiny("opt").double()
    up = sites_of(model, ["mlp.up"])[-1]
    mlp, x = (
        down_sites(model)[up.mlp].module,
        torch.rand(3, up.out, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    whole = mlp(x)
    with ablated(model, Circuit("neuron", {up.name: (0,)}, strength=0.5)):
        halved = mlp(x)
    with torch.no_grad():
        x[:, 0] /= 2
    assert torch.allclose(halved, mlp(x))
    assert not torch.allclose(halved, whole)


@pytest.mark.parametrize("unit", ["neuron", "own", "head", "weight"])
@pytest.mark.parametrize(
    ("name", "dtype", "strength"),
    [
        ("llama-bias", torch.bfloat16, 0.3),
        ("gpt2", torch.float32, 0.3),
        ("opt", torch.float32, 0.3),
        ("phi3", torch.float32, 0.3),
        (
            "phi3",
            torch.float16,
            0.5,
        ),  # computed in float32 on a CPU, where the file's float16 holds exactly half
    ],
)
def test_an_export_has_the_trials_logits(
    unit: str, name: str, dtype: torch.dtype, strength: float, tmp_path: Path
) -> None:
    model, tokenizer = load_model(saved(tmp_path / "source", name, dtype))
    circuit, rest, original = some_of(model, unit, strength), unchanged.fingerprint(model), logits(model)
    with ablated(model, circuit):
        halved = logits(model)
    unchanged.require_same(unchanged.fingerprint(model), rest)
    assert not torch.equal(halved, original)
    out = export(model, tokenizer, circuit, tmp_path / "out")
    assert torch.equal(logits(load_model(out)[0]), halved)
    card = (out / "README.md").read_text()
    assert ("strengths -1 to 1" if unit == "own" else f"strength {strength}") in card
    assert ("| 1 (1), 2 (-1), 5 (" in card) == (unit == "own")
    assert Circuit.load(out).fingerprint == circuit.fingerprint
    ablate_(model, circuit)
    assert torch.equal(logits(model), halved)
    model.config._name_or_path = model.name_or_path = ""
    unchanged_files = export(model, tokenizer, Circuit("neuron", {}), tmp_path / "memory")
    assert torch.equal(logits(load_model(unchanged_files)[0]), halved)


@pytest.mark.parametrize("name", ["llama-bias", "opt", "gpt2", "phi3", "mixtral"])
def test_each_neuron_writes_the_rest_of_its_own_strength(name: str) -> None:
    model = tiny(name).double()
    up = sites_of(model, ["mlp.up"])[0]
    down = down_sites(model)[up.mlp]
    before, rest = down.stored_weight.clone(), unchanged.fingerprint(model)
    circuit = Circuit("neuron", {up.name: (0, 1, 4)}, strengths={up.name: (-1.0, 0.25, 1.0)})
    with ablated(model, circuit):
        left = torch.ones(before.shape[1], dtype=torch.float64)
        left[[0, 1, 4]] = torch.tensor([2.0, 0.75, 0.0], dtype=torch.float64)
        assert torch.equal(down.stored_weight, before * left)
    unchanged.require_same(unchanged.fingerprint(model), rest)


OWN = Circuit("neuron", {"a": (0, 2), "b": (1,)}, MODEL, strengths={"a": (0.5, -1.0), "b": (1.0,)})


def test_strengths_of_their_own_are_in_the_file_and_the_fingerprint(tmp_path: Path) -> None:
    OWN.save(tmp_path / "own.json")
    again = Circuit.load(tmp_path / "own.json")
    assert again == OWN
    assert again.strengths == OWN.strengths
    plain = Circuit("neuron", OWN.members, MODEL)
    assert OWN.fingerprint != plain.fingerprint == "d8086e39fac72248"
    assert OWN.at_full_strength.fingerprint == plain.fingerprint
    assert (OWN.zeroes, plain.zeroes) == (False, True)
    assert list(OWN.by_strength("a")) == [(0.5, (0,)), (-1.0, (2,))]
    written = {"format": "sparc3.circuit/1", "unit": "neuron", "model": MODEL, "provenance": {}}
    written |= {"members": {"a": [2, 0], "b": [1]}, "strengths": {"a": [-1, 0.5], "b": [1]}}
    (tmp_path / "hand.json").write_text(json.dumps(written))  # in another order
    assert Circuit.load(tmp_path / "hand.json") == OWN
    for odd in (
        {"unit": "head"},
        {"strength": 0.5},
        {"strengths": {"a": [-1, 0.5]}},
        {"strengths": {"a": [-1], "b": [1]}},
        {"strengths": {"a": [-1, 0.5], "b": [0]}},
        {"strengths": {"a": [-1, 0.5], "b": [1.5]}},
        {"strengths": {"a": [-1, 0.5], "b": ["1"]}},
        {"strengths": [1, 2, 3]},
    ):
        (tmp_path / "odd.json").write_text(json.dumps(written | odd))
        with pytest.raises(DamagedFile, match="strength"):
            Circuit.load(tmp_path / "odd.json")
    for own in ({"a": (0.5, -1.0)}, {"a": (0.5, 2.0), "b": (1.0,)}, {"a": (0.5, float("nan")), "b": (1.0,)}):
        with pytest.raises(UserError, match="strength"):
            Circuit("neuron", OWN.members, strengths=own)
    with pytest.raises(UserError, match="strength"):
        Circuit("head", {"a": (0,)}, strengths={"a": (0.5,)})


def test_operations_keep_strengths_of_their_own() -> None:
    same = Circuit("neuron", {"a": (2, 3), "c": (0,)}, MODEL, strengths={"a": (-1.0, 0.5), "c": (0.1,)})
    both = union(OWN, same)
    assert both.members == {"a": (0, 2, 3), "b": (1,), "c": (0,)}
    assert both.strengths == {"a": (0.5, -1.0, 0.5), "b": (1.0,), "c": (0.1,)}
    assert intersection(OWN, same).strengths == {"a": (-1.0,)}
    assert difference(OWN, same).strengths == {"a": (0.5,), "b": (1.0,)}
    zeroed = Circuit("neuron", {"b": (1,), "c": (4,)}, MODEL)
    assert union(OWN, zeroed).strengths == {"a": (0.5, -1.0), "b": (1.0,), "c": (1.0,)}
    for operation in (union, intersection, difference):
        with pytest.raises(UserError, match=r"neuron 2 of a has strength -1 .* 1 "):
            operation(OWN, Circuit("neuron", {"a": (2,)}, MODEL))
    assert overlap(OWN, Circuit("neuron", {"a": (2,)}, MODEL)).both == 1
    drawn = random_like(OWN, {"a": 50, "b": 50}, 0)
    assert drawn.strengths == OWN.strengths
    assert drawn.members != OWN.members
    assert OWN.with_units({"a": (2,)}).strengths == {"a": (-1.0,)}


@pytest.mark.parametrize("unit", ["neuron", "weight"])
def test_files_say_the_strength_where_it_is_not_one(unit: str, tmp_path: Path) -> None:
    members = {"a": torch.tensor([[True, False]]) if unit == "weight" else (0, 2)}
    whole, half = (Circuit(unit, members, MODEL, {}, strength) for strength in (1.0, 0.5))
    for circuit in (whole, half):
        path = tmp_path / f"{circuit.strength}{circuit.suffix}"
        circuit.save(path)
        assert (b"strength" in path.read_bytes()) == (circuit is half)
        again = Circuit.load(path)
        assert again == circuit
        assert again.strength == circuit.strength
    assert whole.fingerprint != half.fingerprint
    assert "strength=0.5" in repr(half)
    if unit == "neuron":
        assert whole.fingerprint == Circuit(unit, {"a": (0, 2)}).fingerprint
        (tmp_path / "odd.json").write_text(
            json.dumps(
                {"format": "sparc3.circuit/1", "unit": unit, "strength": 2, "model": MODEL, "members": {}}
            )
        )
        with pytest.raises(DamagedFile, match="strength"):
            Circuit.load(tmp_path / "odd.json")


def test_selection_and_its_null_have_the_strength() -> None:
    scores = Scores({"a": torch.arange(8.0)}, {"unit": "neuron", "model": MODEL})
    half = select(scores, count=3, strength=0.5)
    assert (half.strength, half.provenance["selection"]["strength"]) == (0.5, 0.5)
    assert random_like(half, {"a": 8}, 0).strength == 0.5
    assert "strength" not in select(scores, count=3).provenance["selection"]
    for operation in (union, intersection, difference):
        assert operation(half, half).strength == 0.5
        with pytest.raises(UserError, match=r"strength 0\.5 and 1\b"):
            operation(half, select(scores, count=3))
    assert overlap(half, select(scores, count=3)).jaccard == 1
    for strength in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"strength .*{strength}"):
            select(scores, count=3, strength=strength)


def test_what_cannot_be_weakened_is_refused() -> None:
    model = tiny("llama")
    members = {site.name: (0,) for site in sites_of(model, ["mlp.up"])}
    with pytest.raises(UserError, match=r"--shrink .* strength 0\.5"):
        plan_shrinking(model, Circuit("neuron", members, strength=0.5))
    with pytest.raises(UserError, match=r"--shrink .* strengths"):
        plan_shrinking(model, Circuit("neuron", members, strengths=dict.fromkeys(members, (0.5,))))
    down = sites_of(model, ["mlp.down"])[0]
    down.module.weight = torch.nn.Parameter(down.module.weight.to(torch.int8), requires_grad=False)
    with (
        pytest.raises(UserError, match=rf"{down.name} .*quantised"),
        ablated(model, Circuit("neuron", members, strength=0.5)),
    ):
        pass
    for change in (
        {"tune": {"counts": [1], "strengths": [0.0]}},
        {"count": 1, "strength": 1.5},
        {"strength": 0.5, "tune": {"counts": [1]}},
    ):
        with pytest.raises(UserError, match="strength"):
            load_recipe({**test_tune.SMALL, "selection": change})


def test_strengths_are_a_dimension_of_the_search(tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(test_tune.SMALL))
    del recipe["references"]["matched"]
    recipe["selection"]["tune"] |= {
        "counts": [6],
        "targets": [],
        "penalties": [1.0],
        "strengths": [0.5, 1],
        "rounds": [1, 2],
        "max_kl": None,
    }
    recipe["selection"]["tune"]["max_perplexity_increase"] = 9.0
    recipe["compare"] = {"methods": ["wanda"], "counts": [4], "random_draws": 1}
    results = run(recipe, tmp_path / "tune")
    found = read_json(tmp_path / "tune/tune.json", "sparc3.tune/1")
    assert [(one["rounds"], one["strength"]) for one in found["candidates"]] == [
        (1, 0.5),
        (1, 1),
        (2, 0.5),
        (2, 1),
    ]
    assert len({one["circuit"] for one in found["candidates"]}) == 4
    assert (
        len(list((tmp_path / "tune/scores").glob("round2.*.safetensors"))) == 4
    )  # two strengths, two reference sets
    best = found["best"]
    assert results.provenance["circuit"] == best["circuit"]
    assert Circuit.load(tmp_path / "tune").strength == best["strength"]
    # The halved one is what the same settings give outside a search.
    recipe["selection"] = {"count": 6, "strength": 0.5}
    alone = run(recipe, tmp_path / "alone")
    assert alone.provenance["circuit"] == found["candidates"][0]["circuit"]
    assert "50 % of each of 6" in (tmp_path / "alone/report.html").read_text()


def test_the_plan_counts_strengths_and_rounds() -> None:
    """In the first round all candidates share the scores; in a second one each attributes again."""
    recipe = json.loads(json.dumps(test_tune.SMALL))
    del recipe["references"]["matched"]
    recipe["selection"] = {"tune": {"counts": [4, 6]}}
    one = {stage.name: stage.tokens for stage in plan(load_recipe(recipe)).stages}
    recipe["selection"]["tune"] |= {"strengths": [1, 0.5], "rounds": [1, 2]}
    many = {stage.name: stage.tokens for stage in plan(load_recipe(recipe)).stages}
    # The original, and each of Wanda and AurA at two counts, AurA also whole: six circuits beside the candidates, of which there are 2, then 8.
    assert many["search, perplexity"] / one["search, perplexity"] == (6 + 8) / (6 + 2)
    assert many["scores, lrp"] == (1 + 2 * 2) * one["scores, lrp"]
    assert many["perplexity"] == one["perplexity"]


def test_the_command_line_selects_at_a_strength(sparc3: Any, mistake: Any, tmp_path: Path) -> None:
    Scores({"a": torch.arange(8.0)}, {"unit": "neuron", "model": MODEL}).save(tmp_path / "s.safetensors")
    asked = (
        "select",
        "--scores",
        tmp_path / "s.safetensors",
        "--count",
        2,
        "--out",
        tmp_path / "c.json",
        "--strength",
    )
    code, out, _ = sparc3(*asked, 0.5)
    assert (code, "2 of 8 neurons at strength 0.5" in out) == (0, True)
    assert Circuit.load(tmp_path / "c.json").strength == 0.5
    assert "strength" in mistake(*asked, 0)
