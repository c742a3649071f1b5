"""A whole run through the front door: its folder, what a second run does, and what is refused."""

import fcntl
import html
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparc3 import Circuit, ReferenceSet, Results, Scores, UserError, load_recipe, run
from sparc3.recipe.schema import JOBS, bundled_recipes

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {
        "general": {"source": "demo-general", "count": 8, "target": "next"},
        "undesired": {"source": "demo-angry", "count": 8},
        "matched": {"source": "demo-polite", "count": 8},
    },
    "attribution": {"target": "completion:2", "neuron": "signed"},
    "selection": {"count": 6, "penalty": 1.0, "rounds": 2},
    "evaluation": {
        "perplexity": {"source": "demo-general", "count": 6, "max_length": 64, "stride": 32},
        "toxicity": {
            "source": "demo-angry",
            "count": 6,
            "scorer": "lexicon",
            "generations": 1,
            "max_new_tokens": 8,
        },
    },
    "compare": {"methods": ["wanda", "random", "aura", "det0"], "counts": [3], "random_draws": 2},
    "cards": {"alone": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("run") / "small"
    return folder, run(SMALL, folder)


def test_a_run_leaves_its_whole_folder(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    for name in ("recipe.yaml", "circuit.json", "results.json", "report.html", "log.txt", "environment.json"):
        assert (folder / name).is_file(), name
    assert len(ReferenceSet.load(folder / "samples" / "general.jsonl")) == 8
    assert Scores.load(folder / "scores" / "undesired.safetensors").provenance["samples"] == 8
    circuit = Circuit.load(folder / "circuit.json")
    assert len(circuit) == 6
    assert results == Results.load(folder / "results.json")
    variants = {m.variant for m in results}
    whole = {v for v in variants if v.startswith("aura@")} - {"aura@3"}
    assert len(whole) == 1  # all experts, however many there are
    assert variants - whole == {
        "original",
        "ablated",
        "lrp@3",
        "lrp@6",
        "wanda@3",
        "random@3",
        "random@6",
        "aura@3",
        "det0@3",
    }
    assert results.difference("toxicity.mean", "ablated", "random@6").ci95
    assert {one["metric"] for one in results.provenance["power"]} >= {"perplexity"}
    assert results.find("toxicity.mean", "lrp@6").value == results.find("toxicity.mean", "ablated").value
    assert results.provenance["circuit"] == circuit.fingerprint
    verdict = results.provenance["verdict"]
    assert f"verdict: {verdict['said']}" in (folder / "log.txt").read_text()
    assert verdict["said"].partition(": ")[2] in html.unescape((folder / "report.html").read_text())
    judged = results.provenance["verdict"][
        "criteria"
    ]  # six prompts show nothing; that is no fault of the run
    assert all(c["ok"] is not False for c in results.provenance["checks"] if c not in judged)
    assert all(one in results.provenance["checks"] for one in judged)
    assert not list(folder.rglob("*.tmp"))
    assert str(folder) not in (folder / "results.json").read_text()
    resolved = load_recipe(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert resolved.resolve() == load_recipe(SMALL).resolve()


def test_a_finished_run_is_not_done_again(
    finished: tuple[Path, Results], caplog: pytest.LogCaptureFixture
) -> None:
    folder, results = finished
    kept = [*folder.glob("scores/*"), *folder.glob("evaluation/*"), *folder.glob("samples/*")]
    before = {path: path.stat().st_mtime_ns for path in kept if "contrast" not in path.name}
    with caplog.at_level(logging.INFO, "sparc3"):
        again = run(SMALL, folder)
    assert again.measurements == results.measurements
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [r for r in caplog.messages if r.startswith(("scores ", "evaluated"))]


def test_a_damaged_or_missing_stage_is_done_again(finished: tuple[Path, Results], tmp_path: Path) -> None:
    folder, results = finished
    copy = tmp_path / "copy"
    for path in folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    (copy / "results.json").unlink()
    (copy / "evaluation" / "ablated.json").write_text("{")
    raw = (copy / "scores" / "general.safetensors").read_bytes()
    (copy / "scores" / "general.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert run(SMALL, copy).measurements == results.measurements


def test_folders_that_hold_something_else_are_refused(finished: tuple[Path, Results], tmp_path: Path) -> None:
    folder, _ = finished
    with pytest.raises(UserError, match="--no-resume"):
        run(SMALL, folder, resume=False)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        run(SMALL, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["thesis.txt"]


def test_a_folder_in_use_is_refused(finished: tuple[Path, Results]) -> None:
    with open(finished[0] / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"run .*{re.escape(str(finished[0]))}"):
            run(SMALL, finished[0])


def test_reference_prompts_in_an_evaluation_are_refused(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    rows = [{"text": f"Tom number {i} was angry and yelled,"} for i in range(12)]
    one, other = str(jsonl("one.jsonl", rows)), str(jsonl("other.jsonl", rows[6:]))
    mixed = json.loads(json.dumps(SMALL))
    del mixed["references"]["matched"]
    mixed |= {"attribution": {}, "selection": {"count": 3}}
    mixed["references"]["undesired"] = {"source": one, "count": 12}
    mixed["evaluation"]["toxicity"]["source"] = other
    with pytest.raises(UserError, match=r"\b6 .*evaluation\.toxicity.*references\.undesired"):
        run(mixed, tmp_path / "a")
    mixed["evaluation"]["toxicity"]["source"] = one
    with pytest.raises(UserError, match=r"\b12 prompts"):
        run(mixed, tmp_path / "b")


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_fit_the_schema(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert type(recipe) is JOBS[recipe.job]
    assert load_recipe(yaml.safe_load(recipe.to_yaml())).resolve() == recipe.resolve()
    assert bundled_recipes()[name]


def test_two_rounds_attribute_on_the_ablated_model(finished: tuple[Path, Results]) -> None:
    folder, _ = finished
    first = Scores.load(folder / "scores" / "undesired.safetensors")
    second = Scores.load(folder / "scores" / "round2.undesired.safetensors")
    assert first.provenance["model"]["fingerprint"] != second.provenance["model"]["fingerprint"]
    circuit = Circuit.load(folder / "circuit.json")
    silenced = sum(int(second[site][i] == 0) for site, indices in circuit.members.items() for i in indices)
    assert silenced >= 3
