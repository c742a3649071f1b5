"""What a recipe asks for is checked before any work, by `run` and by `plan`; whatever passes runs."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparc3 import UserError, run
from sparc3.experiment import run as running
from sparc3.plan.plan import plan
from sparc3.storage import claim_file

Write = Callable[[str, Sequence[dict[str, Any]]], Path]
ANGRY = ("Tom was angry and yelled,", "Anna was angry and said,", "Sam was very angry and said,")


def _recipe(**changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "checked",
        "model": {"id": "demo"},
        "references": {
            "general": {"source": "demo-general", "count": 2, "target": "next"},
            "undesired": {"source": "demo-angry", "count": 3},
        },
        "attribution": {"target": "completion", "neuron": "signed"},
        "selection": {"count": 10, "protect": False},
        "evaluation": {
            "perplexity": {"source": "demo-general", "count": 2, "max_length": 64, "stride": 32},
            "toxicity": {
                "source": "demo-angry",
                "count": 2,
                "scorer": "lexicon",
                "generations": 1,
                "max_new_tokens": 4,
            },
        },
        "compare": {"random_draws": 1},
        "cards": {"most": 0},
    }
    for path, value in changed.items():
        *sections, key = path.split("__")
        inner = made
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return made


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins to score fails the test."""
    for name in ("protect_units", "find_circuit", "search_circuit"):
        monkeypatch.setattr(running, name, lambda *_: pytest.fail("work has begun"))


LATE = {
    "count": ({"selection__count": 5000}, ["selection.count", "5000"]),
    "count of a site": ({"selection__count": 600, "selection__scope": "site"}, ["selection.count", "600"]),
    "compare": ({"compare__counts": [10, 5000]}, ["compare.counts", "5000"]),
    "negative": ({"compare__counts": [-1]}, ["compare.counts", "-1"]),
    "scope": ({"selection": {"scope": "2:4", "protect": False}}, ["selection.scope", "2:4"]),
    "stride": ({"evaluation__perplexity__stride": 64}, ["evaluation.perplexity", "stride 64"]),
    "room": ({"evaluation__toxicity__max_new_tokens": 5000}, ["evaluation.toxicity", "max_new_tokens 5000"]),
    "tune": (
        {"selection": {"tune": {"counts": [5, 5000]}, "protect": False}},
        ["selection.tune.counts", "5000"],
    ),
    "cut": ({"references__general__seq_len": 600}, ["references.general.seq_len", "600", "512"]),
    "skip": ({"attribution__skip_positions": 400}, ["references.general", "skip_positions"]),
}


@pytest.mark.parametrize("case", LATE)
def test_what_cannot_work_is_told_before_any_work(idle: None, tmp_path: Path, case: str) -> None:
    changed, named = LATE[case]
    for refuse in (
        lambda: run(_recipe(**changed), tmp_path / "out"),
        lambda: plan(_recipe(**changed), hardware="h100"),
    ):
        with pytest.raises(UserError) as refused:
            refuse()
        assert all(part in str(refused.value) for part in named), refused.value


SAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "no completion": ({"text": ANGRY[0]}, {}, ["references.undesired", "attribution.target", "completion"]),
    "empty completion": (
        {"text": ANGRY[0], "completion": ""},
        {},
        ["references.undesired", "attribution.target", "completion"],
    ),
    "long": ({"text": "Tom was angry. " * 400, "completion": " no"}, {}, ["references.undesired", "longer"]),
    "long completion": (
        {"text": "Tom", "completion": " was angry." * 400},
        {},
        ["references.undesired", "longer"],
    ),
    "ids": ({"input_ids": [1, 999_999], "completion": " no"}, {}, ["references.undesired", "999999"]),
    "label": (
        {"text": ANGRY[0], "target": " Tom Anna", "completion": " no"},
        {"references__undesired__target": "label"},
        ["references.undesired.target", "Tom Anna"],
    ),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_a_sample_that_cannot_work_is_named_by_set_line_and_key(
    idle: None, tmp_path: Path, jsonl: Write, case: str
) -> None:
    row, changed, named = SAMPLES[case]
    fine = [{"text": text, "completion": " no!", "target": " Tom"} for text in ANGRY]
    source = jsonl("undesired.jsonl", [*fine[:2], row, fine[2]])
    recipe = _recipe(references__undesired__source=str(source), references__undesired__count=4, **changed)
    for refuse in (lambda: run(recipe, tmp_path / "out"), lambda: plan(recipe, hardware="h100")):
        with pytest.raises(UserError) as refused:
            refuse()
        assert all(part in str(refused.value) for part in [*named, "undesired.jsonl, line 3"]), refused.value


def test_prompts_without_room_and_labels_of_several_tokens_in_the_evaluation(
    idle: None, tmp_path: Path, jsonl: Write
) -> None:
    prompts = jsonl("prompts.jsonl", [{"text": "Tom was cross."}, {"text": "Tom was cross and" * 120}])
    labels = jsonl(
        "labels.jsonl", [{"text": "Anna gave a book to", "target": " Tom", "contrast": " Quizzical"}] * 2
    )
    for changed, named in (
        (
            {"evaluation__toxicity__source": str(prompts)},
            ["evaluation.toxicity", "prompts.jsonl, line 2", "max_new_tokens"],
        ),
        (
            {"evaluation__ioi": {"source": str(labels), "count": 2}},
            ["evaluation.ioi", "labels.jsonl, line 1", "Quizzical"],
        ),
    ):
        with pytest.raises(UserError) as refused:
            run(_recipe(**changed), tmp_path / "out")
        assert all(part in str(refused.value) for part in named), refused.value


def test_validation_prompts_of_a_search_are_in_the_check(idle: None, tmp_path: Path, jsonl: Write) -> None:
    """Of four prompts two are the test's and two the search's: whichever is too long is told before work."""
    told = []
    for place in range(4):
        rows = [{"text": f"Tom {name}"} for name in ("shouted,", "said,", "cried,", "yelled,")]
        rows[place]["text"] += " and Anna was very cross" * 120
        tune = {"counts": [5], "prompts": 2, "texts": 2}
        changed = {"selection": {"tune": tune, "protect": False}}
        source = str(jsonl(f"prompts{place}.jsonl", rows))
        recipe = _recipe(evaluation__toxicity__source=source, **changed)
        for refuse in (lambda: run(recipe, tmp_path / f"out{place}"), lambda: plan(recipe, hardware="h100")):  # noqa: B023
            with pytest.raises(UserError, match=f"prompts{place}.jsonl") as refused:
                refuse()
            told.append(str(refused.value).partition("evaluation.toxicity")[0])
    assert sorted(told) == [""] * 4 + ["validation of "] * 4


def test_a_refused_run_leaves_the_folder_to_a_better_one(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(_recipe(selection__count=5000), tmp_path / "out")
    assert run(_recipe(), tmp_path / "out").find("perplexity").value > 1


def test_a_foreign_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(UserError, match="letters"):
        run(_recipe(), tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["dear.txt"]


TEXTS = st.sampled_from([*ANGRY, "Tom", "was cross ", "Then Anna said", ""])
ROWS = st.lists(
    st.fixed_dictionaries(
        {"text": TEXTS},
        optional={
            "completion": st.sampled_from([" you are a fool.", "fool", " ", "", " no"]),
            "target": st.sampled_from([" Tom", "Tom", " Tom Anna"]),
        },
    ),
    min_size=3,
    max_size=3,
)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=ROWS,
    target=st.sampled_from(["predicted", "completion", "completion:1", "label", "next"]),
    count=st.sampled_from([0, 3, 512, 2048, 2049]),
    scope=st.sampled_from(["global", "site", "row"]),
    unit=st.sampled_from(["neuron", "weight"]),
    compared=st.sampled_from([[], [5], [4000]]),
    stride=st.sampled_from([8, 64]),
)
def test_whatever_passes_runs(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn["rows"]))
    recipe = _recipe(
        references__undesired__source=str(folder / "u.jsonl"),
        attribution__target=drawn["target"],
        attribution__unit=drawn["unit"],
        selection__count=drawn["count"],
        selection__scope=drawn["scope"],
        compare__counts=drawn["compared"],
        evaluation__perplexity__stride=drawn["stride"],
    )
    try:
        plan(recipe, hardware="h100")
    except UserError:
        with pytest.raises(UserError):
            run(recipe, folder / "out")
    else:
        assert run(recipe, folder / "out").find("perplexity", "ablated").value > 0
    shutil.rmtree(folder)


def test_two_attributions_into_one_file(tmp_path: Path, mistake: Callable[..., str]) -> None:
    (tmp_path / "s.jsonl").write_text('{"text": "Tom was angry"}\n')
    out = tmp_path / "scores.safetensors"
    ask = ("attribute", "demo", "--samples", tmp_path / "s.jsonl", "--out", out)
    with claim_file(out):
        assert str(out) in mistake(*ask)
    assert not out.exists()
    with claim_file(out):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "s.jsonl"]


@pytest.mark.parametrize(("command", "resumes"), [("evaluate", False), ("attribute", True)])
def test_an_interruption_promises_what_the_command_does(
    sparc3: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    resumes: bool,
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparc3.models.load.load_weights", interrupt)
    (tmp_path / "s.jsonl").write_text('{"text": "Tom was angry"}\n')
    asked = ("--samples", tmp_path / "s.jsonl") if command == "attribute" else ("--metrics", "sparsity")
    code, _, said = sparc3(command, "demo", *asked, "--out", tmp_path / "out")
    assert code == 130
    assert ("starts again" in said) != resumes
