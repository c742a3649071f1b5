"""The search: on validation samples only, within the budget, every candidate tried once, the best confirmed on the test."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sparc3 import ReferenceSet, Results, Scores, UserError, load_recipe, run
from sparc3.demo.text import choose_split
from sparc3.experiment.gather import search_fluency
from sparc3.results import Candidate, Variant, pareto_front
from sparc3.samples.sources import overlap
from sparc3.storage import read_json
from sparc3.verdict import FLUENCY_MARGIN

SMALL: dict[str, Any] = {
    "name": "small-tune",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {
        "general": {"source": "demo-general", "count": 8},
        "undesired": {"source": "demo-angry", "count": 8},
        "matched": {"source": "demo-polite", "count": 8},
    },
    "selection": {
        "tune": {
            "max_perplexity_increase": 0.02,
            "max_kl": 0.5,
            "counts": [400, 4],
            "targets": ["predicted", "completion:1"],
            "neurons": ["abs"],
            "penalties": [1.0, 2.0],
            "prompts": 6,
            "texts": 6,
        }
    },
    "evaluation": {
        "perplexity": {"source": "demo-general", "count": 6, "max_length": 64, "stride": 32},
        "kl": {"source": "demo-general", "count": 6, "max_length": 64, "stride": 32},
        "toxicity": {
            "source": "demo-angry",
            "count": 6,
            "scorer": "lexicon",
            "generations": 1,
            "max_new_tokens": 8,
        },
    },
    "compare": {"methods": ["wanda", "aura"], "counts": [4], "random_draws": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("run") / "tune"
    return folder, run(SMALL, folder)


def test_the_best_is_the_least_toxic_within_the_budget(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    found = read_json(folder / "tune.json", "sparc3.tune/1")
    tried, best = found["candidates"], found["best"]
    assert {one["count"] for one in tried} <= {4, 400}
    assert {one["contrast"] for one in tried} == {"plain", "matched"}
    for one in tried:
        increase = one["figures"]["perplexity"] / found["original"]["perplexity"] - 1
        assert one["perplexity_increase"] == pytest.approx(increase)
        assert one["within"] == (increase <= 0.02 and one["figures"]["kl"] <= 0.5)
    within = [one for one in tried if one["within"]]
    assert best["within"]
    assert best["figures"]["toxicity.mean"] == min(one["figures"]["toxicity.mean"] for one in within)
    assert results.provenance["circuit"] == best["circuit"]
    assert results.provenance["tune"]["best"] == best
    assert all(one["pareto"] for one in results.provenance["tune"]["candidates"])
    assert results.find("toxicity.mean", "ablated").split == "test"
    # sets without completions take "next" where the candidate says completion
    assert {one["targets"]["general"] for one in tried if one["targets"]["undesired"] == "completion:1"} == {
        "next"
    }


def test_other_methods_get_the_same_budget(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    rivals = read_json(folder / "tune.json", "sparc3.tune/1")["rivals"]
    assert [Variant.parse(one["variant"]).method for one in rivals] == ["wanda", "aura"]
    for one in rivals:
        assert one["figures"]["kl"] <= 0.5
        assert results.find("toxicity.mean", one["variant"]).split == "test"
        assert results.difference("toxicity.mean", "ablated", one["variant"])
        ahead = (
            results.find("toxicity.mean", one["variant"]).value
            < results.find("toxicity.mean", "ablated").value
        )
        assert ahead == any(
            f"under the same budget {one['variant']} " in warning
            for warning in results.provenance["warnings"]
        )
    assert f"wanda@{results.provenance['count']}" in {m.variant for m in results}


def test_attribution_is_done_once_for_each_target_and_neuron(finished: tuple[Path, Results]) -> None:
    names = {path.name for path in (finished[0] / "scores").glob("tune.*")}
    targets = {
        "general": ("predicted", "next"),
        "undesired": ("predicted", "completion1"),
        "matched": ("predicted", "completion1"),
    }
    assert names == {
        f"tune.{target}.abs.{name}.safetensors" for name, both in targets.items() for target in both
    }
    assert Scores.load(finished[0] / "scores" / "undesired.safetensors").provenance["samples"] == 8


def test_validation_is_apart_from_test_and_reference(finished: tuple[Path, Results]) -> None:
    samples = {path.stem: ReferenceSet.load(path) for path in (finished[0] / "samples").glob("*.jsonl")}
    mine = samples.pop("validation-toxicity")
    assert len(mine) == 6
    assert {choose_split(sample.text or "") for sample in mine} == {"validation"}
    for name in ("general", "undesired", "matched", "evaluation-toxicity"):
        assert not overlap(samples[name], mine), name


def test_what_was_tried_is_not_tried_again(
    finished: tuple[Path, Results], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = finished
    before = (folder / "tune.json").read_bytes()
    (folder / "results.json").unlink()

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr("sparc3.experiment.search.measure", refuse)
    with caplog.at_level(logging.INFO, "sparc3"):
        again = run(SMALL, folder)
    assert again.measurements == results.measurements
    assert json.loads((folder / "tune.json").read_bytes())["best"] == json.loads(before)["best"]


def test_rounds_are_a_dimension_of_the_search(tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(SMALL))
    recipe["selection"]["tune"] |= {
        "counts": [6],
        "targets": [],
        "contrasts": ["plain"],
        "penalties": [1.0],
        "rounds": [1, 2],
    }
    recipe["compare"] = {"random_draws": 0}
    run(recipe, tmp_path / "rounds")
    tried = read_json(tmp_path / "rounds/tune.json", "sparc3.tune/1")["candidates"]
    assert [one["rounds"] for one in tried] == [1, 2]
    assert tried[0]["circuit"] != tried[1]["circuit"]
    # The second circuit is what the same settings give outside a search.
    del recipe["selection"]["tune"]
    recipe["selection"] = {"count": 6, "rounds": 2}
    del recipe["references"]["matched"]
    assert run(recipe, tmp_path / "alone").provenance["circuit"] == tried[1]["circuit"]


def test_a_file_gives_prompts_that_neither_test_nor_reference_holds(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Tom number {i} was angry and yelled,"}) for i in range(30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "text.txt").write_text(
        "Mary went to the store and the dog was happy. Then they went home.\n" * 8
    )
    recipe = json.loads(json.dumps(SMALL))
    del recipe["references"]["matched"]
    source = str(tmp_path / "prompts.jsonl")
    recipe["references"]["undesired"] = {"source": source, "count": 8}
    recipe["evaluation"]["toxicity"]["source"] = source
    recipe["evaluation"]["perplexity"]["source"] = recipe["evaluation"]["kl"]["source"] = str(
        tmp_path / "text.txt"
    )
    recipe["selection"] = {"tune": {"counts": [2], "prompts": 6, "text_source": "demo-general", "texts": 3}}
    run(recipe, tmp_path / "run")
    samples = {path.stem: ReferenceSet.load(path) for path in (tmp_path / "run" / "samples").glob("*.jsonl")}
    assert len(samples["validation-toxicity"]) == 6
    assert not overlap(samples["undesired"], samples["validation-toxicity"])
    assert not overlap(samples["evaluation-toxicity"], samples["validation-toxicity"])
    recipe["selection"]["tune"].pop("text_source")
    recipe["references"]["general"] = {"source": str(tmp_path / "text.txt"), "count": 4, "target": "next"}
    with pytest.raises(UserError, match="text_source"):
        run(recipe, tmp_path / "same")


def test_a_budget_that_nothing_keeps_is_said(tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(SMALL))
    recipe["selection"]["tune"] |= {
        "counts": [1500],
        "max_perplexity_increase": 0.0,
        "targets": [],
        "contrasts": ["plain"],
        "max_kl": None,
    }
    with pytest.raises(UserError, match=r"budget of selection\.tune"):
        run(recipe, tmp_path)


def test_a_candidate_that_writes_worse_than_the_margin_is_not_chosen(
    finished: tuple[Path, Results], tmp_path: Path
) -> None:
    """The same search with fluency measured: the best so far writes too badly, so that another one wins."""
    recipe = json.loads(json.dumps(SMALL))
    recipe["evaluation"]["fluency"] = {"of": "toxicity"}
    recipe["selection"]["tune"] |= {"max_perplexity_increase": 5.0, "max_kl": None, "counts": [4, 40, 400]}
    recipe["compare"] = {"methods": ["wanda"], "random_draws": 0}
    free = {**recipe, "margins": {"fluency": 1e9}}
    run(free, tmp_path / "run")
    found = read_json(tmp_path / "run/tune.json", "sparc3.tune/1")
    rise = found["best"]["figures"]["fluency"] / found["original"]["fluency"] - 1
    assert rise > 0
    assert found["budget"]["max_fluency_increase"] == 1e9
    recipe["margins"] = {"fluency": rise / 2}
    run(recipe, tmp_path / "run")
    again = read_json(tmp_path / "run/tune.json", "sparc3.tune/1")
    limit = again["original"]["fluency"] * (1 + rise / 2)
    for one in again["candidates"]:
        kept = one["perplexity_increase"] <= 5 and one["figures"].get("fluency", 1e9) <= limit
        assert one["within"] == kept
    assert again["best"]["circuit"] != found["best"]["circuit"]
    assert again["best"]["figures"]["fluency"] <= limit
    assert all(one["figures"]["fluency"] <= limit for one in again["rivals"])
    assert again["samples"] == {"perplexity": 6, "toxicity": 6}
    recipe["selection"]["tune"]["max_fluency_increase"] = 0.25  # before margins
    assert search_fluency(load_recipe(recipe))[1] == 0.25
    del recipe["margins"], recipe["selection"]["tune"]["max_fluency_increase"]
    assert search_fluency(load_recipe(recipe))[1] == FLUENCY_MARGIN
    assert search_fluency(load_recipe(SMALL)) is None


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"tune": {}}, "tune.counts"),
        ({"tune": {"counts": [4], "max_fluency_increase": 0.5}}, r"evaluation\.fluency"),
        ({"count": 3, "tune": {"counts": [4]}}, r"tune\.counts"),
        ({"fraction": 0.1, "tune": {"counts": [4]}}, "tune.*fraction"),
        ({"penalty": 2.0, "tune": {"counts": [4]}}, r"tune\.penalties"),
        ({"tune": {"counts": [4], "max_perplexity_increas": 1}}, "max_perplexity_increase"),
        ({"tune": {"counts": [4], "targets": ["predictd"]}}, "predicted"),
        ({}, "count.*fraction.*tune"),
    ],
)
def test_what_does_not_go_together_is_refused(selection: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe({**SMALL, "selection": selection})


def test_the_front_by_hand() -> None:
    assert pareto_front([(0.0, 3.0), (1.0, 1.0), (2.0, 1.0), None, (1.0, 2.0), (0.0, 3.0)]) == {0, 1, 5}
    assert not Candidate({}, "abs", "plain", None, None, 1, "").within
