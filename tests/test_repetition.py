"""Prompts chosen because this model repeats itself on them: what is chosen, where it is refused, and what the run warns of."""

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparc3 import ReferenceSet, UserError, load_recipe, run
from sparc3.evaluation.tasks import response_scores, uniqueness
from sparc3.samples.sources import Request, gather

SMALL: dict[str, Any] = {
    "name": "small-repetition",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {
        "general": {"source": "demo-general", "count": 6, "target": "next"},
        "undesired": {
            "source": "demo-loop",
            "count": 4,
            "choose_by": "repetition",
            "max_rur": 0.5,
            "max_new_tokens": 24,
        },
    },
    "selection": {"count": 3},
    "evaluation": {
        "perplexity": {"source": "demo-general", "count": 6, "max_length": 64, "stride": 32},
        "repetition": {"source": "demo-loop", "count": 5, "choose_by": "repetition", "max_new_tokens": 24},
    },
    "compare": {"methods": ["random"], "random_draws": 2},
}


def responder(prompts: list[str]) -> list[tuple[str, float | None]]:
    """Loops on every third prompt, fails on every fifth."""
    numbers = [int(prompt.split()[1]) for prompt in prompts]
    return [("la la la", None if n % 5 == 0 else 1 / 3 if n % 3 == 0 else 0.9) for n in numbers]


def test_only_prompts_with_repetitive_responses_are_chosen(jsonl: Callable[..., Path]) -> None:
    path = str(jsonl("prompts.jsonl", [{"text": f"Prompt {n} here"} for n in range(40)]))
    asked = Request(path, 6, choose_by="repetition", taken=frozenset({"Prompt 9 here"}))
    chosen = gather(asked, None, responder)
    numbers = [int((sample.text or "").split()[1]) for sample in chosen]
    assert len(set(numbers)) == 6
    assert all(n % 3 == 0 and n % 5 and n != 9 for n in numbers)
    assert {sample.completion for sample in chosen} == {"la la la"}
    assert gather(asked, None, responder).fingerprint == chosen.fingerprint
    with pytest.raises(UserError, match=r"\b10 samples.* 11\b"):
        gather(Request(path, 11, choose_by="repetition", taken=frozenset({"Prompt 9 here"})), None, responder)
    with pytest.raises(UserError, match="choose_by: repetition"):
        gather(asked)


def test_the_response_is_the_models_own(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    [(response, rur)] = response_scores(model, tokenizer, 24)(["Tom sang la la"])
    assert rur == uniqueness(list(tokenizer(response, add_special_tokens=False)["input_ids"]))


def test_a_run_by_the_papers_protocol_warns_and_has_its_null(tmp_path: Path, demo: tuple[Any, Any]) -> None:
    results = run(SMALL, tmp_path / "run")
    chosen = ReferenceSet.load(tmp_path / "run/samples/undesired.jsonl")
    scored = response_scores(*demo, 24)([sample.text or "" for sample in chosen])
    assert all(rur is not None and rur <= 0.5 for _, rur in scored)
    assert results.find("rur.mean").value <= 0.5
    assert results.difference("rur.mean", "ablated", "random@3").ci95
    [warning] = [one for one in results.provenance["warnings"] if "prompts of repetition" in one]
    assert warning.partition(":")[0] in html.unescape((tmp_path / "run/report.html").read_text())


def test_the_bundled_recipe_tests_on_prompts_chosen_without_looking() -> None:
    recipe = load_recipe("demo-repetition")
    assert recipe.references["undesired"].choose_by == "repetition"
    assert recipe.metrics()["repetition"].model_dump()["choose_by"] is None
    assert (
        load_recipe("demo-repetition", ["evaluation.repetition.choose_by=repetition"])
        .metrics()["repetition"]
        .model_dump()["max_rur"]
        == 0.5
    )


def test_toxicity_prompts_are_not_chosen_by_repetition() -> None:
    wrong = {
        **json.loads(json.dumps(SMALL)),
        "evaluation": {"toxicity": {"source": "demo-angry", "choose_by": "repetition"}},
    }
    with pytest.raises(UserError, match=r"evaluation\.toxicity.*repetition"):
        load_recipe(wrong)
