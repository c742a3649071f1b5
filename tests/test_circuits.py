"""Circuits of weights: exact selection, files, ablation, set operations, compression."""

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import samples, tiny
from torch import Tensor

from sparc3 import (
    Circuit,
    Scores,
    UserError,
    ablate_,
    ablated,
    attribute,
    evaluate,
    export,
    load_model,
    prune_sequentially,
    select,
)
from sparc3.circuits.algebra import difference, intersection, overlap, union
from sparc3.circuits.select import exclude, lowest, lowest_in_rows, random_like
from sparc3.errors import DamagedFile
from sparc3.evaluation import harness
from sparc3.evaluation.metrics import parse_metrics
from sparc3.models.families import ROLES
from sparc3.models.sites import family_of, sites_of

MODEL = {"id": "m", "architecture": "llama", "fingerprint": "f"}


def weight_scores(values: dict[str, Any], **provenance: Any) -> Scores:
    given = {"unit": "weight", "method": "lrp", "neuron": "abs", "model": MODEL, **provenance}
    return Scores({name: torch.as_tensor(v, dtype=torch.float32) for name, v in values.items()}, given)


def mask(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def weights(members: dict[str, list[list[int]]], model: dict[str, str] = MODEL, **sizes: int) -> Circuit:
    return Circuit(
        "weight",
        {name: mask(rows) for name, rows in members.items()},
        model,
        {"sizes": sizes} if sizes else {},
    )


def roles_of(model: Any) -> list[str]:
    return [role for role in ROLES if role in family_of(model).roles]


def some_weights(model: Any, seed: int = 0) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    return Circuit(
        "weight",
        {
            site.name: torch.rand(site.out, site.inp, generator=generator) < 0.4
            for site in sites_of(model, roles_of(model))
        },
    )


# Selection ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("highest", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_lowest_are_those_of_a_stable_sort(
    dtype: torch.dtype, highest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparc3.circuits.select.PIECE", 7)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat(
        [
            torch.randn(40, generator=generator),
            torch.randn(20, generator=generator) * 1e-30,
            torch.tensor([0.0, -0.0, 0.0, -0.0, 3e38, -3e38]),
        ]
    )
    numbers = torch.cat([numbers, numbers[:20]]).to(dtype)
    order = torch.sort(numbers, stable=True, descending=highest).indices
    tensors = [numbers[:30].view(5, 6), numbers[30:31], numbers[31:]]
    for count in range(len(numbers) + 1):
        found = torch.cat([part.reshape(-1) for part in lowest(tensors, count, highest=highest)])
        assert found.nonzero()[:, 0].tolist() == sorted(order[:count].tolist()), count


@pytest.mark.parametrize("highest", [False, True])
def test_rows_are_those_of_a_stable_sort(highest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparc3.circuits.select.PIECE", 30)
    matrix = (
        torch.randint(-3, 4, (11, 9), generator=torch.Generator().manual_seed(0)).float() * -0.0
        + torch.randint(-3, 4, (11, 9)).float()
    )
    for count in range(10):
        found = lowest_in_rows(matrix, count, highest=highest)
        for row, kept in zip(matrix, found, strict=True):
            assert kept.nonzero()[:, 0].tolist() == sorted(
                torch.sort(row, stable=True, descending=highest).indices[:count].tolist()
            )


def test_scopes_on_paper() -> None:
    some = weight_scores({"a": [[4, 1, 1, 1], [9, 8, 7, 6]], "b": [[0, 5, 5, 0]]})
    expected: dict[tuple[Any, ...], dict[str, list[list[int]]]] = {
        (("fraction", 0.5), ("scope", "row")): {"a": [[0, 1, 1, 0], [0, 0, 1, 1]], "b": [[1, 0, 0, 1]]},
        (("count", 1), ("scope", "row")): {"a": [[0, 1, 0, 0], [0, 0, 0, 1]], "b": [[1, 0, 0, 0]]},
        (("scope", "1:2"),): {"a": [[0, 1, 1, 0], [0, 1, 0, 1]], "b": [[1, 0, 0, 1]]},
        (("scope", "3:4"),): {"a": [[0, 1, 1, 1], [0, 1, 1, 1]], "b": [[1, 1, 0, 1]]},
        (("fraction", 0.5), ("scope", "site")): {"a": [[1, 1, 1, 1], [0, 0, 0, 0]], "b": [[1, 0, 0, 1]]},
        (("count", 4), ("scope", "global")): {"a": [[0, 1, 1, 0], [0, 0, 0, 0]], "b": [[1, 0, 0, 1]]},
        (("count", 1), ("order", "highest")): {"a": [[0, 0, 0, 0], [1, 0, 0, 0]]},
    }
    for asked, members in expected.items():
        found = select(some, **dict(asked))
        assert {name: units.int().tolist() for name, units in found.members.items()} == members, asked


def test_every_row_is_exactly_at_its_sparsity() -> None:
    some = weight_scores({"a": torch.randn(40, 100), "b": torch.zeros(7, 10)})
    for fraction, in_a, in_b in ((0.29, 29, 2), (0.5, 50, 5), (0.999, 99, 9), (0.0, 0, 0)):
        found = select(some, fraction=fraction, scope="row")
        counts = {name: set(units.sum(1).tolist()) for name, units in found.members.items()}
        assert counts == ({"a": {in_a}, "b": {in_b}} if fraction else {})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"scope": "2:3"}, r"2:3 .*\ba\b.* 4 "),
        ({"scope": "4:4"}, "scope 4:4"),
        ({"scope": "0:4"}, "scope 0:4"),
        ({"scope": "2:4", "fraction": 0.5}, "2:4.*count.*fraction"),
        ({"scope": "2-4"}, "scope '2-4'"),
        ({"scope": "row"}, "count.*fraction"),
        ({"scope": "row", "fraction": 1.0}, r"fraction.* 1\.0"),
        ({"scope": "row", "count": 5}, r"\b5 .*\ba\b.* 4\b"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        select(weight_scores({"a": [[1, 2, 3, 4]]}), **asked)


def test_rows_are_for_weights_and_for_plain_contrasts() -> None:
    neurons = Scores({"a": torch.zeros(4)}, {"unit": "neuron"})
    with pytest.raises(UserError, match=r"scope row .*neurons"):
        select(neurons, fraction=0.5, scope="row")
    with pytest.raises(UserError, match=r"1:2 .*matched"):
        select(weight_scores({"a": [[1, 2]]}, contrast="matched"), scope="1:2")


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_circuit_of_weights_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    made = select(weight_scores({"z": torch.randn(5, 7), "a#q": torch.randn(3, 3)}, samples=3), count=11)
    made.save(tmp_path / "c.safetensors")
    back = Circuit.load(tmp_path / "c.safetensors")
    assert back == made
    assert len(back) == 11
    assert list(back.members) == list(made.members)
    assert all(torch.equal(back.members[name], units) for name, units in made.members.items())
    assert (tmp_path / "c.safetensors").stat().st_size < 3000
    assert weights({"a": [[1, 0]]}).fingerprint not in (
        weights({"a": [[1], [0]]}).fingerprint,
        weights({"a": [[0, 1]]}).fingerprint,
    )


def test_files_are_named_by_their_unit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"c\.json.*\.safetensors"):
        weights({"a": [[1]]}).save(tmp_path / "c.json")
    with pytest.raises(UserError, match=r"c\.safetensors.*\.json"):
        Circuit("neuron", {"a": (0,)}).save(tmp_path / "c.safetensors")
    weight_scores({"a": [[1, 2]]}).save(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=r"s\.safetensors.*sparc3\.circuit/1"):
        Circuit.load(tmp_path / "s.safetensors")


def test_damaged_masks_are_refused(tmp_path: Path) -> None:
    weights({"a": [[1, 0, 1], [0, 0, 1]]}).save(tmp_path / "c.safetensors")
    raw = (tmp_path / "c.safetensors").read_bytes()
    damaged = {
        "flipped": raw[:-1] + bytes([raw[-1] ^ 64]),
        "short": raw[:-1],
        "empty": b"",
        "shape": raw.replace(b"[2, 3]", b"[3, 2]"),
        "model": raw.replace(b'"fingerprint\\\\": \\\\"f', b'"fingerprint\\\\": \\\\"g').replace(
            b'fingerprint\\": \\"f', b'fingerprint\\": \\"g'
        ),
    }
    for name, content in damaged.items():
        assert content != raw, name
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(DamagedFile, match=name):
            Circuit.load(tmp_path / f"{name}.safetensors")


# Ablation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3", "pythia", "falcon-40b"])
def test_exactly_these_weights_are_zero_and_come_back_bit_for_bit(name: str) -> None:
    model = tiny(name)
    circuit, other = some_weights(model), some_weights(model, seed=1)
    sites = sites_of(model, roles_of(model))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    values = {site.name: site.weight.detach().clone() for site in sites}
    with ablated(model, circuit):
        for site in sites:
            assert torch.equal(site.weight, values[site.name].masked_fill(circuit.members[site.name], 0)), (
                site.name
            )
    with pytest.raises(RuntimeError, match="stop"), ablated(model, circuit), ablated(model, other):
        raise RuntimeError("stop")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    ablate_(model, circuit)
    assert all(torch.count_nonzero(site.weight[circuit.members[site.name]]) == 0 for site in sites)


def test_masks_of_another_shape_are_named_and_nothing_is_touched() -> None:
    model = tiny("llama")
    site = sites_of(model, ["mlp.up"])[0]
    before = site.weight.clone()
    bad = Circuit(
        "weight",
        {
            site.name: torch.ones(site.out, site.inp, dtype=torch.bool),
            "model.layers.1.mlp.up_proj": mask([[1]]),
        },
    )
    with (
        pytest.raises(UserError, match=r"shape \(1, 1\) at model\.layers\.1\.mlp\.up_proj"),
        ablated(model, bad),
    ):
        pass
    assert torch.equal(site.weight, before)


def test_an_exported_checkpoint_keeps_exact_zeros(demo: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    scores = attribute(model, [], method="magnitude", unit="weight", sites=roles_of(model))
    circuit = select(scores, fraction=0.5, scope="row")
    folder = export(model, tokenizer, circuit, tmp_path / "out")
    loaded, _ = load_model(folder)
    results = evaluate(loaded, tokenizer, ["sparsity"])
    assert [results.find(f"sparsity{end}").value for end in ("", ".row_min", ".row_max")] == [0.5, 0.5, 0.5]
    assert Circuit.load(folder / "circuit.safetensors").fingerprint == circuit.fingerprint
    card = (folder / "README.md").read_text()
    assert "(50.0%)" in card
    assert len(card) < 20_000
    trial = evaluate(
        model, tokenizer, {"sparsity": {"sites": ["mlp.up"]}}, variants={"ablated": ablated(model, circuit)}
    )
    assert trial.find("sparsity").value == pytest.approx(0.0, abs=1e-4)
    assert trial.find("sparsity", "ablated").value == 0.5


# Sets -----------------------------------------------------------------------------------------------------------------


def test_sets_of_weights_on_paper() -> None:
    one, other = weights({"a": [[1, 1, 0, 0]], "b": [[1, 0]]}), weights({"a": [[0, 1, 1, 0]], "c": [[1]]})
    shown: Callable[[Circuit], Any] = lambda circuit: {  # noqa: E731
        name: units.int().tolist() for name, units in circuit.members.items()
    }
    assert shown(union(one, other)) == {"a": [[1, 1, 1, 0]], "b": [[1, 0]], "c": [[1]]}
    assert shown(intersection(one, other)) == {"a": [[0, 1, 0, 0]]}
    assert shown(difference(one, other)) == {"a": [[1, 0, 0, 0]], "b": [[1, 0]]}
    assert union(one, other).provenance["of"][0]["fingerprint"] == one.fingerprint


def test_sets_of_neurons_on_paper() -> None:
    one, other = Circuit("neuron", {"a": (0, 3), "b": (1,)}, MODEL), Circuit("neuron", {"a": (3, 4)}, MODEL)
    assert union(one, other).members == {"a": (0, 3, 4), "b": (1,)}
    assert intersection(one, other).members == {"a": (3,)}
    assert difference(one, other).members == {"a": (0,), "b": (1,)}
    assert difference(one, one).members == {}


def test_overlap_stands_beside_chance() -> None:
    sizes = {"a": 50, "b": 50}
    one = Circuit("neuron", {"a": tuple(range(10))}, MODEL, {"sizes": sizes})
    other = Circuit("neuron", {"a": tuple(range(5, 15)), "b": tuple(range(10))}, MODEL, {"sizes": sizes})
    found = overlap(one, other)
    assert (found.first, found.second, found.both, found.either, found.units) == (10, 20, 5, 25, 100)
    assert (found.jaccard, found.expected, found.enrichment) == (0.2, 2.0, 2.5)
    assert found.enrichment_in_sites == 5 / (10 * 10 / 50)
    bare = overlap(Circuit("neuron", {"a": (1,)}), Circuit("neuron", {"a": (1,)}))
    assert (bare.jaccard, bare.expected, bare.enrichment) == (1.0, None, None)
    with pytest.raises(UserError, match=r"sites.* b\b"):
        overlap(one, Circuit("neuron", {}, MODEL, {"sizes": {"a": 50}}))


def test_selection_says_what_there_was_to_choose_from() -> None:
    some = weight_scores({"a": torch.randn(10, 10), "b": torch.randn(5, 20)})
    one, other = select(some, count=20), select(some, count=50)
    assert overlap(one, other).enrichment == 20 / (20 * 50 / 200)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Circuit("neuron", {"a": (0,)}, MODEL), "weights .*neurons"),
        (weights({"a": [[1, 1]]}, {**MODEL, "id": "n", "fingerprint": "g"}), r"m \(f\) and n \(g\)"),
        (weights({"a": [[1], [1]]}), r"^a .*\(1, 2\) and \(2, 1\)"),
    ],
)
def test_circuits_that_do_not_go_together_are_refused(other: Circuit, said: str) -> None:
    for combine in (union, intersection, difference, overlap):
        with pytest.raises(UserError, match=said):
            combine(weights({"a": [[1, 0]]}), other)


def test_the_null_of_weights_has_as_many_in_each_site() -> None:
    circuit = select(weight_scores({"a": torch.randn(9, 9), "b": torch.randn(4, 4)}), count=30)
    draws = [random_like(circuit, {}, seed) for seed in range(3)]
    assert all(draw.counts == circuit.counts for draw in draws)
    assert len({draw.fingerprint for draw in draws}) == 3
    assert random_like(circuit, {}, 0) == draws[0]


def test_rounds_do_not_choose_a_weight_twice() -> None:
    some = weight_scores({"a": [[-3, -2], [1, 5]]})
    first = select(some, count=1)
    second = select(exclude(some, first), count=1)
    assert union(first, second).members["a"].int().tolist() == [[1, 1], [0, 0]]


# Compression ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m", "gemma3", "falcon", "bloom"])
@pytest.mark.parametrize("asked", [{"fraction": 0.5}, {"scope": "2:4"}])
def test_sequential_pruning_scores_each_layer_behind_the_pruned_ones(
    name: str, asked: dict[str, Any]
) -> None:
    model, ids = tiny(name), samples()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = prune_sequentially(model, ids, batch_tokens=18, **asked)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    removed = Circuit("weight", {})
    for layer in range(2):
        names = [site.name for site in sites_of(model, roles_of(model)) if site.layer == layer]
        with ablated(model, removed):
            scores = attribute(model, ids, method="wanda", unit="weight", sites=roles_of(model))
        part = select(
            Scores({name: scores[name] for name in names}, {"unit": "weight"}), **{"scope": "row", **asked}
        )
        removed = union(removed, part)
    assert found.fingerprint == removed.fingerprint
    assert (
        found.fingerprint
        != select(
            attribute(model, ids, method="wanda", unit="weight", sites=roles_of(model)),
            **{"scope": "row", **asked},
        ).fingerprint
    )


def test_sequential_pruning_refuses_what_it_cannot_do() -> None:
    model = tiny("llama")
    for asked, said in (
        ({"scope": "global", "fraction": 0.5}, "global"),
        ({}, "count.*fraction"),
        ({"fraction": 0.5, "sites": ["mlp.upp"]}, "mlp.up"),
    ):
        with pytest.raises(UserError, match=said):
            prune_sequentially(model, samples(), **asked)


def test_the_command_line_prunes_rows_and_combines(
    sparc3: Any, mistake: Any, jsonl: Any, tmp_path: Path
) -> None:
    text = jsonl("t.jsonl", [{"text": "Tom went home."}, {"text": "Mary had a small book."}])
    common = (
        "attribute",
        "demo",
        "--samples",
        text,
        "--unit",
        "weight",
        "--sites",
        "mlp.up,mlp.down",
        "--out",
    )
    assert sparc3(*common, tmp_path / "w.safetensors", "--method", "wanda")[0] == 0
    assert sparc3(*common, tmp_path / "l.safetensors", "--reduce", "mean_abs")[0] == 0
    for name in ("w", "l"):
        picked = (
            "select",
            "--scores",
            tmp_path / f"{name}.safetensors",
            "--out",
            tmp_path / f"c{name}.safetensors",
        )
        assert sparc3(*picked, "--scope", "2:4")[0] == 0
    pair = (tmp_path / "cw.safetensors", tmp_path / "cl.safetensors")
    code, out, _ = sparc3("circuits", "overlap", *pair)
    assert code == 0
    assert "Jaccard" in out
    assert "enrichment" in out
    assert sparc3("circuits", "intersection", *pair, "--out", tmp_path / "both.safetensors")[0] == 0
    ask = (
        "evaluate",
        "demo",
        "--circuit",
        pair[0],
        "--metrics",
        "sparsity",
        "--set",
        "sparsity.sites=[mlp.up]",
        "--out",
        tmp_path / "r.json",
    )
    assert sparc3(*ask)[0] == 0
    found = {
        (m["metric"], m["variant"]): m["value"]
        for m in json.loads((tmp_path / "r.json").read_text())["measurements"]
    }
    assert (found["sparsity.row_min", "ablated"], found["sparsity.row_max", "ablated"]) == (0.5, 0.5)
    assert re.search("union.*--out", mistake("circuits", "union", *pair))
    assert re.search("overlap.*--out", mistake("circuits", "overlap", *pair, "--out", "x"))
    assert ".safetensors" in mistake("circuits", "union", *pair, "--out", tmp_path / "u.json")
    assert "'union'" in mistake("circuits", "unoin", *pair)
    assert "scope 2:7" in mistake(
        "select",
        "--scores",
        tmp_path / "w.safetensors",
        "--scope",
        "2:7",
        "--out",
        tmp_path / "x.safetensors",
    )
    assert re.search(
        "wanda.*'head'",
        mistake(
            "attribute",
            "demo",
            "--samples",
            text,
            "--unit",
            "head",
            "--sites",
            "attn.o",
            "--method",
            "wanda",
            "--out",
            "x",
        ),
    )


def test_recipes_say_rows_and_groups(tmp_path: Path) -> None:
    from sparc3.recipe.schema import load_recipe

    def scope(*sets: str) -> Any:
        return load_recipe(
            "demo",
            [
                "attribution.unit=weight",
                "selection.count=null",
                "compare.counts=[]",
                *(f"selection.{one}" for one in sets),
            ],
        ).selection.scope

    assert [
        scope("scope=2:4"),
        scope("scope='4:8'"),
        scope("scope=16:32"),
        scope("scope=row", "fraction=0.5"),
    ] == ["2:4", "4:8", "16:32", "row"]
    for sets, said in (
        (("scope=2:4", "fraction=0.5"), "2:4.*count.*fraction"),
        (("scope=rwo", "fraction=0.5"), "'row'"),
        (("scope=4:2",), "4:2"),
    ):
        with pytest.raises(UserError, match=said):
            scope(*sets)


def test_a_run_can_be_about_weights(tmp_path: Path, sparc3: Any) -> None:
    (tmp_path / "w.yaml").write_text(
        json.dumps(
            {
                "name": "w",
                "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
                "references": {
                    "general": {"source": "demo-general", "count": 4},
                    "undesired": {"source": "demo-angry", "count": 4},
                },
                "attribution": {
                    "unit": "weight",
                    "sites": ["mlp.up"],
                    "reduce": "mean_abs",
                    "sums_dtype": "float64",
                },
                "selection": {"scope": "2:4"},
                "evaluation": {"sparsity": {"sites": ["mlp.up"]}},
                "compare": {"random_draws": 1},
            }
        )
    )
    code, _, err = sparc3("run", tmp_path / "w.yaml", "--out", tmp_path / "run")
    assert code == 0, err
    measured = {
        (m["metric"], m["variant"]): m["value"]
        for m in json.loads((tmp_path / "run/results.json").read_text())["measurements"]
    }
    assert measured["sparsity.row_min", "ablated"] == measured["sparsity.row_max", "ablated"] == 0.5
    circuit = tmp_path / "run/circuit.safetensors"
    assert len(Circuit.load(circuit)) == 4 * 512 * 128 / 2
    assert circuit.stat().st_mode & 0o777 == (tmp_path / "run/results.json").stat().st_mode & 0o777


# The harness ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """lm_eval with two tasks; what it was asked, and what it is to raise."""
    seen: dict[str, Any] = {}

    class Manager:
        all_tasks = ("boolq", "rte")

        def __init__(self, include_path: str | None = None) -> None:
            seen["include_path"] = include_path

        def load(self, names: list[str]) -> None:
            if "unreachable" in seen:
                raise seen["unreachable"]

    def simple_evaluate(**asked: Any) -> dict[str, Any]:
        seen.update(asked)
        answers = {"boolq": [1.0, 0.0, 1.0, 1.0], "rte": [0.0, 1.0]}
        return {
            "samples": {
                task: [{"doc_id": i, "acc": acc} for i, acc in enumerate(answers[task])]
                for task in asked["tasks"]
            }
        }

    modules = {
        name: types.ModuleType(name)
        for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    }
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval.models.huggingface"].HFLM = lambda **given: given  # type: ignore[attr-defined]
    modules["lm_eval.tasks"].TaskManager = Manager  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_the_harness_measures_the_model_in_memory(
    fake_harness: dict[str, Any], demo: tuple[Any, Any]
) -> None:
    model, tokenizer = demo
    results = evaluate(model, tokenizer, {"harness": {"tasks": ["boolq", "rte"], "limit": 4}})
    assert [results.find(f"harness.{name}").value for name in ("boolq", "rte", "mean")] == pytest.approx(
        [0.75, 0.5, 0.625]
    )
    assert fake_harness["model"]["pretrained"] is model
    assert (fake_harness["limit"], fake_harness["num_fewshot"]) == (4, 0)


def test_a_folder_of_tasks_is_read_and_a_changed_task_is_another_measurement(
    fake_harness: dict[str, Any], demo: tuple[Any, Any], tmp_path: Path, mistake: Any
) -> None:
    (tmp_path / "rte.yaml").write_text("task: rte\n")
    asked = {"harness": {"tasks": ["rte"], "tasks_dir": str(tmp_path)}}
    evaluate(*demo, asked)
    assert fake_harness["include_path"] == str(tmp_path)
    assert fake_harness["task_manager"] is not None
    (settings,) = parse_metrics(asked).values()
    before = settings.describe()
    (tmp_path / "rte.yaml").write_text("task: rte\nnum_fewshot: 1\n")
    assert settings.describe() != before
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/rte.yaml").write_text("task: rte\n")
    (elsewhere,) = parse_metrics(
        {"harness": {"tasks": ["rte"], "tasks_dir": str(tmp_path / "moved")}}
    ).values()
    assert elsewhere.describe() == before, "the place of the folder does not matter"
    (plain,) = parse_metrics({"harness": {"tasks": ["rte"]}}).values()
    assert "tasks_dir" not in plain.describe(), "as it was before there were folders: old runs resume"
    nowhere = tmp_path / "nowhere"
    said = mistake(
        *("evaluate", "demo", "--metrics", "harness", "--out", tmp_path / "r.json"),
        *("--set", f"harness.tasks_dir={nowhere}"),
    )
    assert str(nowhere) in said


def test_the_real_harness_runs_a_task_of_files_without_the_hub(
    demo: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.models.huggingface")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": "Tom was glad and", "choices": [" said", " zzzz"], "answer": 0}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    results = evaluate(*demo, {"harness": {"tasks": ["own"], "tasks_dir": str(tmp_path)}})
    assert (results.find("harness.own").value, results.find("harness.own").n) == (1.0, 4)


def test_a_harness_that_cannot_measure_says_so_at_once(
    fake_harness: dict[str, Any], demo: tuple[Any, Any]
) -> None:
    with pytest.raises(UserError, match=r"'boolk'.*'boolq'"):
        evaluate(*demo, {"harness": {"tasks": ["boolk"]}})
    fake_harness["unreachable"] = ConnectionError("Couldn't reach the hub")
    with pytest.raises(UserError, match=r"boolq.*Couldn't reach the hub"):
        evaluate(*demo, {"harness": {"tasks": ["boolq"]}})
    assert "model" not in fake_harness


def test_a_harness_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, mistake: Any, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = mistake("evaluate", "demo", "--metrics", "harness", "--out", tmp_path / "r.json")
    assert "pip install 'lm-eval[hf]'" in said


def test_a_task_without_accuracy_is_named() -> None:
    from sparc3 import Sparc3Error

    with pytest.raises(Sparc3Error, match="gsm8k"):
        harness.observations({"gsm8k": [{"doc_id": 0, "exact_match": 1.0}]}, ["gsm8k"])


def test_scores_and_circuits_are_tables_in_a_notebook() -> None:
    scores = Scores(
        {"a.<b>up": torch.tensor([0.5, -2.0, 1.0]), "c.up": torch.zeros(20)},
        {"unit": "neuron", "method": "lrp"},
    )
    page = scores._repr_html_()
    assert "a.&lt;b&gt;up" in page
    assert "<b>" not in page
    assert all(f">{figure}<" in page for figure in ("3", "20", "2", "3.5"))
    page = Circuit(
        "neuron", {"a.<b>up": (1,), "c.up": tuple(range(20))}, {"id": "<i>"}, {}, 0.5
    )._repr_html_()
    assert "21 neurons at strength 0.5 of &lt;i&gt;" in page
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 8 more" in page
    mask = torch.eye(3, dtype=torch.bool)
    assert ">3<" in Circuit("weight", {"w": mask}, {}, {})._repr_html_()
    assert Scores({}, {})._repr_html_()
    assert Circuit("neuron", {})._repr_html_()
