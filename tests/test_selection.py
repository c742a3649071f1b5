"""Contrast, selection, circuits and ablation: arithmetic on paper, refusals by name, restoration."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny

from sparc3 import Circuit, Scores, UserError, ablate_, ablated, contrast, select
from sparc3.circuits.algebra import union
from sparc3.circuits.select import count_candidates, exclude, random_like
from sparc3.errors import DamagedFile, NonFinite

MODEL = {"id": "m", "architecture": "llama", "fingerprint": "f"}


def scores(values: dict[str, list[float]], **provenance: Any) -> Scores:
    given = {"unit": "neuron", "method": "lrp", "neuron": "abs", "model": MODEL, **provenance}
    return Scores({name: torch.tensor(v) for name, v in values.items()}, given)


def test_plain_contrast_is_general_less_undesired() -> None:
    made = contrast(scores({"a": [1.0, 2.0]}), scores({"a": [3.0, 0.5]}))
    assert made["a"].tolist() == [-2.0, 1.5]


def test_matched_contrast_takes_the_larger_use_and_only_what_is_below_zero() -> None:
    general, undesired, matched = (
        scores({"a": [0.5, -1.0, 0.0]}),
        scores({"a": [2.0, 2.0, 1.0]}),
        scores({"a": [-0.75, 0.2, 2.0]}),
    )
    made = contrast(general, undesired, matched=matched, penalty=2.0)
    assert made["a"].tolist() == [2 * 0.75 - 2.0, 2 * 1.0 - 2.0, 2 * 2.0 - 1.0]
    assert count_candidates(made) == 1
    assert select(made, count=1).members == {"a": (0,)}
    with pytest.raises(UserError, match=r"\b2 neurons.*\b1 candidates"):
        select(made, count=2)


def test_l1_makes_sets_of_different_size_compare() -> None:
    made = contrast(scores({"a": [10.0, 30.0]}), scores({"a": [1.0, 3.0]}), normalize="l1")
    assert torch.allclose(made["a"], torch.zeros(2))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (scores({"a": [1.0, 2.0]}, model={**MODEL, "id": "n", "fingerprint": "g"}), r"model n \(g\)"),
        (scores({"a": [1.0]}), r"^a .*\(1,\)"),
        (scores({"b": [1.0, 2.0]}), r"\bsites .*\ba\b"),
        (scores({"a": [1.0, 2.0]}, unit="head"), "unit 'head'"),
        (scores({"a": [1.0, 2.0]}, method="wanda"), "method 'wanda'"),
    ],
)
def test_scores_that_do_not_fit_are_named(other: Scores, said: str) -> None:
    with pytest.raises(UserError, match=said):
        contrast(other, scores({"a": [1.0, 2.0]}))


def test_selection_is_deterministic_with_ties_by_site_then_index() -> None:
    tied = scores({"z": [1.0, 0.0, 0.0], "a": [0.0, 2.0]})
    assert select(tied, count=2).members == {"z": (1, 2)}
    assert select(tied, count=3).members == {"z": (1, 2), "a": (0,)}
    assert select(tied, count=1, order="highest").members == {"a": (1,)}
    assert select(tied, count=1, scope="site").members == {"z": (1,), "a": (0,)}
    assert len(select(tied, fraction=0.4)) == 2


def test_selection_refuses_what_makes_no_sense() -> None:
    some = scores({"a": [1.0, 2.0]})
    for bad in (
        {},
        {"count": 1, "fraction": 0.5},
        {"fraction": 1.0},
        {"fraction": -0.1},
        {"count": -1},
        {"count": 3},
        {"count": 1, "scope": "globl"},
    ):
        with pytest.raises(UserError):
            select(some, **bad)
    for value in (math.nan, math.inf):
        with pytest.raises(NonFinite, match=r"scores of a .*NaN or Inf"):
            select(scores({"a": [0.0, value]}), count=1)


def test_random_circuits_have_as_many_units_in_each_site() -> None:
    circuit = Circuit("neuron", {"a": (0, 3), "b": (1,)})
    draws = [random_like(circuit, {"a": 50, "b": 50}, seed) for seed in range(3)]
    assert all({k: len(v) for k, v in d.members.items()} == {"a": 2, "b": 1} for d in draws)
    assert len({d.fingerprint for d in draws}) == 3
    assert random_like(circuit, {"a": 50, "b": 50}, 0) == draws[0]


def test_every_layer_draws_its_own_random_units() -> None:
    """Names whose characters add up to the same sum once drew the same places: layers 11 and 20, 12 and 21 and 30."""
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(32)]
    circuit = Circuit("neuron", {name: tuple(range(20)) for name in names})
    drawn = random_like(circuit, dict.fromkeys(names, 1000), seed=0).members
    assert len(set(drawn.values())) == len(names)


def test_rounds_do_not_choose_a_unit_twice() -> None:
    some = scores({"a": [-3.0, -2.0, 1.0]})
    first = select(some, count=1)
    second = select(exclude(some, first), count=1)
    assert union(first, second).members == {"a": (0, 1)}


def test_scores_and_circuits_come_back_as_they_were_saved(tmp_path: Path) -> None:
    made = scores({"z": [1.0, 2.0], "a": [0.5]}, samples=3)
    made.save(tmp_path / "s.safetensors")
    back = Scores.load(tmp_path / "s.safetensors")
    assert list(back) == ["z", "a"]
    assert back.fingerprint == made.fingerprint
    circuit = select(made, count=2)
    circuit.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json") == circuit


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    made = scores({"a": [1.0, 2.0]})
    made.save(tmp_path / "s.safetensors")
    raw = bytearray((tmp_path / "s.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(bytes(raw))
    (tmp_path / "short.safetensors").write_bytes(bytes(raw[:-3]))
    select(made, count=1).save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    (tmp_path / "changed.json").write_text(text.replace("\n   0\n", "\n   1\n"))
    (tmp_path / "short.json").write_text(text[:-9])
    for name, load in (
        ("flipped.safetensors", Scores.load),
        ("short.safetensors", Scores.load),
        ("changed.json", Circuit.load),
        ("short.json", Circuit.load),
    ):
        with pytest.raises(DamagedFile, match=name):
            load(tmp_path / name)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_ablating_a_neuron_silences_exactly_it(name: str) -> None:
    """The input of mlp.down is zero at the ablated neurons (at a ReLU or gate of zero input), and unchanged elsewhere."""
    model = tiny(name)
    from sparc3.models.sites import sites_of

    up, down = sites_of(model, ["mlp.up"])[1], sites_of(model, ["mlp.down"])[1]
    seen: list[torch.Tensor] = []
    handle = down.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, down.inp)))
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids)
    with ablated(model, Circuit("neuron", {up.name: (0, 5)})):
        model(ids)
    handle.remove()
    before, inside = seen
    others = [i for i in range(up.out) if i not in (0, 5)]
    assert torch.count_nonzero(inside[:, [0, 5]]) == 0
    assert torch.count_nonzero(before[:, [0, 5]]) > 0 or name == "opt"
    assert torch.equal(before[:, others], inside[:, others])


def test_ablating_a_head_removes_what_it_writes() -> None:
    model = tiny("llama")
    from sparc3.models.sites import sites_of

    site = sites_of(model, ["attn.o"])[0]
    with ablated(model, Circuit("head", {site.name: (1,)})):
        weight = site.weight.clone()
    width = site.inp // site.heads
    assert torch.count_nonzero(weight[:, width : 2 * width]) == 0
    assert torch.count_nonzero(weight[:, :width]) > 0


def test_ablation_restores_bit_for_bit_after_errors_and_when_nested() -> None:
    model = tiny("opt")
    from sparc3.models.sites import sites_of

    one, two = (site.name for site in sites_of(model, ["mlp.up"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        ablated(model, Circuit("neuron", {one: (0, 1)})),
        ablated(model, Circuit("neuron", {one: (1, 2), two: (3,)})),
    ):
        raise RuntimeError("stop")
    with pytest.raises(UserError, match="has 24"), ablated(model, Circuit("neuron", {one: (0, 99)})):
        pass
    with pytest.raises(UserError, match="nowhere"), ablated(model, Circuit("neuron", {"nowhere": (0,)})):
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_for_good_means_for_good() -> None:
    model = tiny("llama")
    from sparc3.models.sites import sites_of

    site = sites_of(model, ["mlp.up"])[0]
    ablate_(model, Circuit("neuron", {site.name: (2,)}))
    assert torch.count_nonzero(site.weight[2]) == 0
