"""A run folder and a changed recipe: what the change touches is made anew, the rest used again, and nothing of two runs is mixed."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparc3 import Circuit, Results, UserError, load_model, load_recipe, run
from sparc3.experiment import measure
from sparc3.experiment.run_folder import list_changed_keys

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {
        "general": {"source": "demo-general", "count": 8},
        "undesired": {"source": "demo-angry", "count": 8},
        "matched": {"source": "demo-polite", "count": 8},
    },
    "selection": {"count": 6, "rounds": 2},
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
    "compare": {"methods": ["wanda", "random"], "counts": [3], "random_draws": 1},
    "cards": {"most": 2, "alone": 1},
}
Change = Callable[[dict[str, Any]], None]


def changed(change: Change) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(json.dumps(SMALL))
    change(recipe)
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    run(SMALL, folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def stamps(folder: Path) -> dict[str, int]:
    """What stages made, by name → when it was written. The contrast and the circuit are written by every run."""
    names = ("samples", "scores", "evaluation")
    files = [path for name in names for path in (folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files} | {
        "cards.json": (folder / "cards.json").stat().st_mtime_ns
    }


def made_anew(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name, when in after.items() if before.get(name) != when} - {
        "scores/contrast.safetensors"
    }


def stages(names: set[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def test_a_changed_evaluation_measures_anew_and_nothing_else(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, circuit = stamps(folder), Circuit.load(folder / "circuit.json")
    earlier = (folder / "results.json").read_bytes()
    recipe = changed(lambda r: r["evaluation"]["toxicity"].update(max_new_tokens=6))
    with caplog.at_level(logging.INFO, "sparc3"):
        results = run(recipe, folder)
    after = stamps(folder)
    anew = made_anew(before, after)
    assert {name for name in after if name.startswith("evaluation/")} <= anew
    # the test's samples name the settings they were gathered for
    assert stages(anew) == {"evaluation", "samples", "cards.json"}
    assert {name for name in anew if name.startswith("samples/")} == {
        "samples/evaluation-toxicity.jsonl",
        "samples/evaluation-toxicity.source.json",
    }
    assert Circuit.load(folder / "circuit.json").fingerprint == circuit.fingerprint
    assert "evaluation.toxicity.max_new_tokens" in caplog.text
    assert results.measurements == run(recipe, tmp_path / "fresh").measurements
    [aside] = (folder / "earlier").iterdir()
    assert aside.name == load_recipe(SMALL).fingerprint
    assert (aside / "results.json").read_bytes() == earlier
    assert (aside / "report.html").is_file()


def test_a_changed_count_uses_the_scores_again(folder: Path, tmp_path: Path) -> None:
    before = stamps(folder)
    recipe = changed(lambda r: r["selection"].update(count=5))
    results = run(recipe, folder)
    anew = made_anew(before, stamps(folder))
    # a second round sees the model without the units of the first, which are others now
    assert {name for name in anew if name.startswith("scores/")} == {
        f"scores/round2.{name}.safetensors" for name in ("general", "undesired", "matched")
    }
    assert not any(name.startswith("samples/") for name in anew)
    assert not {"evaluation/original.json", "evaluation/wanda@3.json"} & anew
    assert "evaluation/ablated.json" in anew
    assert results.measurements == run(recipe, tmp_path / "fresh").measurements
    assert not (folder / "evaluation/random@6.json").exists()


def test_changed_references_are_scored_anew(folder: Path) -> None:
    before = stamps(folder)
    run(changed(lambda r: r["references"]["undesired"].update(count=6)), folder)
    anew = made_anew(before, stamps(folder))
    assert {"scores/undesired.safetensors", "scores/wanda.undesired.safetensors"} <= anew
    assert not {"scores/general.safetensors", "scores/matched.safetensors", "samples/general.jsonl"} & anew


def test_a_target_of_a_reference_set_gathers_no_samples(folder: Path) -> None:
    before = stamps(folder)
    run(changed(lambda r: r["references"]["general"].update(target="next")), folder)
    anew = made_anew(before, stamps(folder))
    assert "scores/general.safetensors" in anew
    assert "scores/undesired.safetensors" not in anew
    assert not any(name.startswith("samples/") for name in anew)


def test_what_no_longer_belongs_is_removed_and_the_users_files_stay(folder: Path) -> None:
    own = [
        folder / "scores/mine.safetensors",
        folder / "samples/notes.jsonl",
        folder / "evaluation/mine.json",
    ]
    own[0].write_bytes(b"not a tensor")
    own[1].write_text('{"text": "mine"}\n')
    own[2].write_text('{"mine": 1}')

    def leave_out(recipe: dict[str, Any]) -> None:
        del recipe["references"]["matched"]
        recipe["compare"]["methods"] = ["random"]
        recipe["cards"] = {"most": 0}

    run(changed(leave_out), folder)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not {name for name in left if ("matched" in name or "wanda" in name or "alone" in name)}
    assert "cards.json" not in left
    assert all(path.is_file() for path in own)


def test_killed_in_the_middle_either_recipe_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {name: when for name, when in stamps(folder).items() if name.startswith("scores/")}
    recipe = changed(lambda r: r["evaluation"]["toxicity"].update(max_new_tokens=6))
    real, calls = measure.measure, []

    def killed(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(measure, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder)
    monkeypatch.undo()
    # no results beside a recipe that did not make them
    assert not (folder / "results.json").exists()
    assert not (folder / "report.html").exists()
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert run(recipe, folder).measurements == run(recipe, tmp_path / "fresh").measurements
    assert run(SMALL, other).measurements == (
        Results.load(next((folder / "earlier").iterdir()) / "results.json").measurements
    )
    after = stamps(folder)
    del scores["scores/contrast.safetensors"]
    assert {name: after[name] for name in scores} == scores


def test_another_model_makes_all_anew_and_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    with_noise = tmp_path / "other-model"
    model.get_input_embeddings().weight.data[5] += 0.1
    model.save_pretrained(with_noise)
    tokenizer.save_pretrained(with_noise)
    before = stamps(folder)
    with caplog.at_level(logging.WARNING, "sparc3"):
        run(changed(lambda r: r["model"].update(id=str(with_noise))), folder)
    assert "model.id" in caplog.text
    after = stamps(folder)
    assert made_anew(before, after) >= set(after) - {"scores/contrast.safetensors"}


def test_no_resume_refuses_a_changed_recipe_too(folder: Path) -> None:
    before = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match="--no-resume"):
        run(changed(lambda r: r["selection"].update(count=5)), folder, resume=False)
    assert (folder / "recipe.yaml").read_bytes() == before
    assert (folder / "results.json").is_file()


def test_keys_that_changed() -> None:
    one = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    other = {"a": {"b": 1, "c": [1]}, "e": 1}
    assert list(list_changed_keys(one, other)) == ["a.c", "d", "e"]


def test_a_recipe_that_is_refused_leaves_a_finished_run_as_it_was(folder: Path, tmp_path: Path) -> None:
    """Whether the units or the samples are at fault; what the check cannot pass puts nothing aside."""
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": f"Tom {n} was" + " angry" * 600}) + "\n" for n in range(8)))

    def files() -> dict[str, bytes]:
        left = {".lock", "log.txt"}
        return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in left}

    before = files()
    too_many = changed(lambda r: r["selection"].update(count=99_999, rounds=1))
    too_long = changed(lambda r: r["references"]["undesired"].update(source=str(long)))
    for bad, named in ((too_many, "99999"), (too_long, "long.jsonl, line 1")):
        with pytest.raises(UserError, match=named):
            run(bad, folder)
        assert files() == before
    assert run(SMALL, folder).measurements == Results.load(folder / "results.json").measurements
    assert not (folder / "earlier").exists()
