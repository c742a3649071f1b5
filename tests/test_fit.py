"""Strengths fitted to scores: the least of an effect at a damage, on paper and on a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import test_tune
from tests.tiny import samples, tiny

from sparc3 import Circuit, Scores, UserError, ablated, attribute, load_recipe, run
from sparc3.circuits.fit import FLOOR, SENSITIVITY, SLOPE, fit, gain_by_damage
from sparc3.errors import NonFinite
from sparc3.plan.plan import plan
from sparc3.storage import read_json

MODEL = {"id": "m", "architecture": "llama", "fingerprint": "f"}
WORDS = (3, 11, 17)


def scores(values: dict[str, list[float]], **more: Any) -> Scores:
    return Scores(
        {name: torch.tensor(some) for name, some in values.items()},
        {"unit": "neuron", "neuron": "signed", "model": MODEL, **more},
    )


EFFECT = scores({"a": [0.4, -0.1, 0.0, 0.02], "b": [0.3, -0.2]}, target="words", reduce="mean", method="lrp")
GENERAL = scores({"a": [1.0, 1.0, 1.0, 1.0], "b": [3.0, 0.5]}, **SENSITIVITY)
SLOPES = scores({"a": [0.01, -0.02, 0.05, 0.0], "b": [-0.03, 0.0]}, **SLOPE)
C = -torch.tensor([0.01, -0.02, 0.05, 0.0, -0.03, 0.0], dtype=torch.float64)
H = torch.tensor([1, 1, 1, 1, 9, 0.25], dtype=torch.float64) + FLOOR * 13.25 / 6
E_ = torch.tensor([0.4, -0.1, 0.0, 0.02, 0.3, -0.2], dtype=torch.float64)


def flat(circuit: Circuit) -> torch.Tensor:
    """Strengths of the six neurons."""
    found = torch.zeros(6, dtype=torch.float64)
    for name, first in (("a", 0), ("b", 4)):
        for unit, strength in zip(
            circuit.members.get(name, ()), circuit.strengths.get(name, ()), strict=True
        ):
            found[first + unit] = strength
    return found


def test_strengths_are_effect_by_curvature_at_the_damage() -> None:
    found = flat(fit(EFFECT, GENERAL, count=5, damage=0.01))
    assert float((0.5 * H * found.square()).sum()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(found / found[0], E_ / H / (E_ / H)[0], rtol=2e-3, atol=1e-6)
    # No other strengths of the same damage lower the effect more.
    drawn = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn *= (0.01 / (0.5 * H * drawn.square()).sum(1, keepdim=True)).sqrt()
    assert float((drawn @ E_).max()) < float(found @ E_)


def test_the_strongest_are_taken_and_cut_to_one() -> None:
    circuit = fit(EFFECT, GENERAL, count=2, damage=0.01)
    assert circuit.members == {"a": (0,), "b": (1,)}  # the largest e² / h
    assert circuit.provenance["selection"] == {"count": 2, "damage": 0.01}
    wide = flat(fit(EFFECT, GENERAL, count=5, damage=1e9))
    assert wide.tolist() == [1, -1, 0, 1, 1, -1]
    some = flat(fit(EFFECT, GENERAL, count=5, damage=1.0))
    assert some.abs().max() == 1  # cut, and the others take what damage is left
    assert float((0.5 * H * some.square()).sum()) == pytest.approx(1.0, rel=1e-3)
    left = fit(EFFECT, GENERAL, count=2, damage=0.01, without=Circuit("neuron", {"a": (0,)}))
    assert 0 not in left.members.get("a", ())
    order = gain_by_damage(EFFECT, GENERAL)
    torch.testing.assert_close(torch.cat(list(order.values())).double(), -E_.square() / H, rtol=1e-5, atol=0)


def test_a_repair_also_takes_a_share_of_the_step_against_the_loss() -> None:
    found = flat(fit(EFFECT, GENERAL, count=5, damage=0.01, slope=SLOPES, repair=0.5))
    used = E_ != 0  # the third has no effect, and stays as it is
    cost = float((0.5 * H * found.square() - 0.5 * C * found)[used].sum())
    assert cost == pytest.approx(0.01, rel=1e-3)
    mu = float(((found * H - 0.5 * C) / E_)[0])
    torch.testing.assert_close(found[used], ((mu * E_ + 0.5 * C) / H)[used], rtol=2e-3, atol=1e-6)
    # No other strengths of the same cost lower the effect more.
    drawn = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * used
    drawn = 0.5 * C * used / H + drawn * 0.1
    cheap = (0.5 * H * drawn.square() - 0.5 * C * drawn).sum(1) <= 0.01
    assert cheap.sum() > 100
    assert float((drawn[cheap] @ E_).max()) < float(found @ E_)
    circuit = fit(EFFECT, GENERAL, count=5, damage=0.01, slope=SLOPES, repair=0.5)
    assert circuit.provenance["selection"] == {"count": 5, "damage": 0.01, "repair": 0.5}
    assert circuit.provenance["slope"] == SLOPES.fingerprint
    plain = fit(EFFECT, GENERAL, count=5, damage=0.01, slope=SLOPES)
    assert plain.strengths == fit(EFFECT, GENERAL, count=5, damage=0.01).strengths


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 6}, "of 5 "),
        ({"count": 0}, "0 neurons"),
        ({"damage": 0.0}, "damage"),
        (
            {"sensitivity": scores({"a": [1.0] * 4, "b": [1.0] * 2}, **{**SENSITIVITY, "reduce": "mean"})},
            "reduce",
        ),
        (
            {"sensitivity": scores({"a": [1.0] * 4, "b": [1.0] * 2}, **{**SENSITIVITY, "method": "lrp"})},
            "method",
        ),
        ({"sensitivity": scores({"a": [1.0] * 4}, **SENSITIVITY)}, "sites"),
        ({"slope": scores({"a": [1.0] * 4}, **SLOPE), "repair": 0.1}, "sites"),
        ({"slope": GENERAL, "repair": 0.1}, "reduce"),
        ({"repair": 0.1}, "slope"),
        ({"slope": SLOPES, "repair": 1.5}, "repair"),
        ({"effect": scores({"a": [1.0] * 4, "b": [1.0] * 2}, neuron="abs")}, "abs"),
        ({"effect": scores({"a": [1.0] * 4, "b": [1.0] * 2}, unit="head")}, "head"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, Any], said: str) -> None:
    asked: dict[str, Any] = {"effect": EFFECT, "sensitivity": GENERAL, "count": 2, "damage": 0.01, **change}
    with pytest.raises(UserError, match=said):
        fit(asked.pop("effect"), asked.pop("sensitivity"), **asked)


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(NonFinite, match="undesired"):
        fit(scores({"a": [1.0, float("nan")]}), scores({"a": [1.0, 1.0]}, **SENSITIVITY), count=1, damage=0.1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_effect_falls_as_it_says(name: str) -> None:
    """On a model, for a small damage: the fall of the words' mean probability is Σ e s to first order."""
    model, ids = tiny(name), samples(6)
    how: dict[str, Any] = {"method": "gradient", "neuron": "signed"}
    effect = attribute(model, ids, target="words", words=WORDS, **how)
    if name == "opt":  # of a plain MLP the derivative by a gain is taken behind the non-linearity
        effect = gains_of(model, ids, effect)
    general = attribute(model, ids, target="logprob", reduce="rms", **how)
    circuit = fit(effect, general, count=20, damage=1e-7)
    before = chance(model, ids)
    with ablated(model, circuit):
        after = chance(model, ids)
    own = {key: dict(zip(circuit.members[key], some, strict=True)) for key, some in circuit.strengths.items()}
    expected = sum(float(effect[key][i]) * s for key, some in own.items() for i, s in some.items())
    assert before - after == pytest.approx(expected, rel=0.02)
    assert expected > 0


def test_the_loss_of_general_text_falls_as_a_repair_says() -> None:
    """On a model, for small strengths: the loss changes by −Σ c s to first order."""
    model, ids = tiny("llama"), samples(6)
    how: dict[str, Any] = {"method": "gradient", "neuron": "signed"}
    effect = attribute(model, ids, target="words", words=WORDS, **how)
    general = attribute(model, ids, **SENSITIVITY)
    slope = attribute(model, ids, **SLOPE)
    circuit = fit(effect, general, count=20, damage=1e-9, slope=slope, repair=1e-3)
    before = loss(model, ids)
    with ablated(model, circuit):
        after = loss(model, ids)
    own = {key: dict(zip(circuit.members[key], some, strict=True)) for key, some in circuit.strengths.items()}
    expected = sum(float(slope[key][i]) * s for key, some in own.items() for i, s in some.items())
    assert expected < 0
    assert after - before == pytest.approx(expected, rel=0.05)


def loss(model: Any, ids: list[list[int]]) -> float:
    """The mean loss of a token, of all samples together."""
    with torch.no_grad():
        found = [
            torch.nn.functional.cross_entropy(
                model(torch.tensor([one])).logits[0, :-1].double(), torch.tensor(one[1:]), reduction="none"
            )
            for one in ids
        ]
    return float(torch.cat(found).mean())


def chance(model: Any, ids: list[list[int]]) -> float:
    """The words' mean probability over all positions."""
    with torch.no_grad():
        found = [model(torch.tensor([one])).logits[0].softmax(-1)[:, list(WORDS)].sum(-1) for one in ids]
    return float(torch.cat(found).mean())


def gains_of(model: Any, ids: list[list[int]], like: Scores) -> Scores:
    """∂ chance / ∂ gain of each neuron, by finite differences."""
    values = {}
    for name, tensor in like.items():
        values[name] = torch.zeros_like(tensor)
        for unit in range(len(tensor)):
            with ablated(model, Circuit("neuron", {name: (unit,)}, strengths={name: (1e-4,)})):
                low = chance(model, ids)
            with ablated(model, Circuit("neuron", {name: (unit,)}, strengths={name: (-1e-4,)})):
                values[name][unit] = (chance(model, ids) - low) / 2e-4
    return Scores(values, like.provenance)


def recipe_of(**tune: Any) -> dict[str, Any]:
    """A search at two damages on the demo, for the words of its own scorer."""
    recipe = json.loads(json.dumps(test_tune.SMALL))
    del recipe["references"]["matched"]
    words = {"scorer": "lexicon", "min_score": 1}
    recipe["attribution"] = {"method": "gradient", "neuron": "signed", "target": "words", "words": words}
    small = {"prompts": 6, "texts": 6, "max_kl": 9.0, "max_perplexity_increase": 9.0}
    recipe["selection"] = {
        "protect": False,
        "tune": {"counts": [30], "damages": [1e-6, 1e-5], **small, **tune},
    }
    recipe["compare"] = {"methods": ["aura"], "random_draws": 1}
    return recipe


def test_a_search_chooses_the_damage(tmp_path: Path) -> None:
    results = run(recipe_of(), tmp_path / "run")
    assert "attribution.words" not in (tmp_path / "run/log.txt").read_text()  # it is not another recipe
    found = read_json(tmp_path / "run/tune.json", "sparc3.tune/1")
    assert [one["damage"] for one in found["candidates"]] == [1e-6, 1e-5]
    assert {one["contrast"] for one in found["candidates"]} == {"fitted"}
    small, large = (one["figures"]["kl"] for one in found["candidates"])
    assert 0 < small < large
    circuit = Circuit.load(tmp_path / "run")
    assert circuit.fingerprint == found["best"]["circuit"] == results.provenance["circuit"]
    assert circuit.provenance["selection"] == {"count": 30, "damage": found["best"]["damage"]}
    # The same by hand, of the scores that the run left.
    parts = [Scores.load(tmp_path / f"run/scores/{name}.safetensors") for name in ("undesired", "general")]
    assert parts[1].provenance["reduce"] == "rms"
    again = fit(*parts, count=30, damage=found["best"]["damage"])
    assert again.strengths == circuit.strengths
    assert "random@30" in {m.variant.partition(".")[0] for m in results}
    cards = read_json(tmp_path / "run/cards.json", "sparc3.cards/1")["cards"]
    first = cards[0]
    place = circuit.members[first["module"]].index(first["index"])
    assert first["strength"] == circuit.strengths[first["module"]][place]
    page = (tmp_path / "run/report.html").read_text()
    assert "a share of its own of each of 30" in page
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/scores").glob("tune.*")}
    run(recipe_of(), tmp_path / "run")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run/scores").glob("tune.*")} == before
    assert len(before) == 2
    counted = {stage.name: stage for stage in plan(load_recipe(recipe_of())).stages}
    assert "search, perplexity" in counted


def test_a_search_tries_repairs(tmp_path: Path) -> None:
    results = run(recipe_of(damages=[1e-5], repairs=[0.0, 0.5]), tmp_path / "run")
    found = read_json(tmp_path / "run/tune.json", "sparc3.tune/1")
    assert [(one["damage"], one["repair"]) for one in found["candidates"]] == [(1e-5, 0.0), (1e-5, 0.5)]
    circuit = Circuit.load(tmp_path / "run")
    (slope_path,) = (tmp_path / "run/scores").glob("tune.*slope.safetensors")
    names = ("undesired", "general")
    parts = [Scores.load(tmp_path / f"run/scores/{name}.safetensors") for name in names]
    slope = Scores.load(slope_path)
    assert (slope.provenance["reduce"], slope.provenance["target"]) == ("mean", "logprob")
    candidates = [fit(*parts, count=30, damage=1e-5, slope=slope, repair=r) for r in (0.0, 0.5)]
    assert [one["circuit"] for one in found["candidates"]] == [one.fingerprint for one in candidates]
    assert circuit.fingerprint == found["best"]["circuit"] == results.provenance["circuit"]
    stages = {stage.name: stage for stage in plan(load_recipe(recipe_of(repairs=[0.5]))).stages}
    fewer = {stage.name: stage for stage in plan(load_recipe(recipe_of())).stages}
    assert stages["scores, gradient"].tokens > fewer["scores, gradient"].tokens
    with pytest.raises(UserError, match="repairs"):
        load_recipe(recipe_of(repairs=[0.5], damages=[]))


@pytest.mark.parametrize("mode", ["python", "json"])
def test_a_search_without_strengths_is_described_as_it_was(mode: str) -> None:
    for tune, present in (
        ({"damages": []}, set()),
        ({}, {"damages"}),
        ({"repairs": [0.5]}, {"damages", "repairs"}),
    ):
        described = load_recipe(recipe_of(**tune)).model_dump(mode=mode)["selection"]["tune"]
        assert described.keys() & {"damages", "repairs"} == present


@pytest.mark.parametrize(
    "change",
    [
        {"selection": {"tune": {"counts": [3], "damages": [0.1], "rounds": [2]}}},
        {"selection": {"tune": {"counts": [3], "damages": [0.1], "strengths": [0.5]}}},
        {"selection": {"tune": {"counts": [3], "damages": [0.1]}, "scope": "site"}},
        {"selection": {"tune": {"counts": [3], "damages": [0.0]}}},
        {"compare": {"counts": [3]}},
        {"attribution": {"method": "gradient", "neuron": "abs"}},
    ],
)
def test_recipes_that_cannot_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="damages"):
        load_recipe(recipe_of() | change)


def test_the_command_line_fits(sparc3: Any, mistake: Any, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("general", "undesired")]
    GENERAL.save(files[0])
    EFFECT.save(files[1])
    asked = ("select", "--general", files[0], "--undesired", files[1], "--out", tmp_path / "c.json")
    code, out, err = sparc3(*asked, "--count", 3, "--damage", 0.01)
    assert (code, "3 of 6 neurons at strengths" in out) == (0, True), err
    assert Circuit.load(tmp_path / "c.json").strengths == fit(EFFECT, GENERAL, count=3, damage=0.01).strengths
    SLOPES.save(tmp_path / "slope.safetensors")
    repaired = ("--count", 3, "--damage", 0.01, "--repair", 0.5)
    assert sparc3(*asked, *repaired, "--slope", tmp_path / "slope.safetensors")[0] == 0
    assert Circuit.load(tmp_path / "c.json").provenance["selection"]["repair"] == 0.5
    assert "slope" in mistake(*asked, *repaired)
    unread = ("--slope", tmp_path / "slope.safetensors")
    assert "--repair" in mistake(*asked, "--count", 3, "--damage", 0.01, *unread)
    assert "--damage" in mistake(*asked, "--count", 3, "--repair", 0.5)
    assert "--count" in mistake(*asked, "--damage", 0.01)
    assert "--strength" in mistake(*asked, "--count", 3, "--damage", 0.01, "--strength", 0.5)
