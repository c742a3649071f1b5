"""compress.samples: the same pruning from fewer samples, the spread of the scores, and the report's figures of both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparc3 import (
    ReferenceSet,
    Results,
    Scores,
    UserError,
    ablated,
    attribute,
    evaluate,
    load_recipe,
    run,
    select,
)
from sparc3.experiment.compress import distribution
from sparc3.plan.plan import plan

SMALL: dict[str, Any] = {
    "name": "small-samples",
    "job": "compress",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {"general": {"source": "demo-general", "count": 6, "seeds": [0, 1], "target": "next"}},
    "attribution": {"unit": "weight", "sites": ["attn.o", "mlp.up"]},
    "compress": {"methods": ["magnitude", "wanda", "lrp"], "fractions": [0.5], "samples": [1, 6]},
    "evaluation": {
        "perplexity": {"source": "demo-general", "count": 4, "protocol": "blocks", "seq_len": 64},
        "sparsity": {},
    },
}
COUNT = 4 * (128 * 128 + 512 * 128) // 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("samples") / "small"
    return folder, run(SMALL, folder)


def test_every_number_of_samples_is_a_variant(finished: tuple[Path, Results]) -> None:
    _, results = finished
    names = {f"magnitude@{COUNT}", f"wanda@{COUNT}", f"lrp@{COUNT}", "wanda, 1 sample", "lrp, 1 sample"}
    assert {m.variant for m in results} == {"original", *names}
    assert all(
        results.find("sparsity.row_min", name).value == results.find("sparsity.row_max", name).value == 0.5
        for name in names
    )
    rows = results.provenance["by_samples"]
    assert {(row["method"], row["samples"], row["seed"]) for row in rows} == {
        (m, n, s) for m in ("wanda", "lrp") for n in (1, 6) for s in (0, 1)
    }


def test_a_figure_is_that_of_the_first_samples_of_its_seed(
    finished: tuple[Path, Results], demo: tuple[Any, Any]
) -> None:
    model, tokenizer = demo
    folder, results = finished
    samples = ReferenceSet.load(folder / "samples/general.1.jsonl").samples[:1]
    assert samples != ReferenceSet.load(folder / "samples/general.jsonl").samples[:1]
    scores = attribute(
        model,
        ReferenceSet(samples),
        tokenizer=tokenizer,
        unit="weight",
        sites=("attn.o", "mlp.up"),
        target="next",
    )
    again = evaluate(
        model,
        tokenizer,
        {"perplexity": SMALL["evaluation"]["perplexity"]},
        variants={
            "lrp": lambda: ablated(
                model,
                select(
                    Scores({n: t.abs() for n, t in scores.items()}, scores.provenance),
                    fraction=0.5,
                    scope="row",
                ),
            )
        },
    )
    row = next(
        r
        for r in results.provenance["by_samples"]
        if (r["method"], r["samples"], r["seed"], r["metric"]) == ("lrp", 1, 1, "perplexity")
    )
    assert row["value"] == pytest.approx(again.find("perplexity", "lrp").value, rel=1e-6)


def test_distribution_by_hand() -> None:
    scores = Scores(
        {"a": torch.tensor([[100.0, -10.0], [1.0, 0.0]]), "b": torch.tensor([[5e-5, 2.0]])},
        {"unit": "weight"},
    )
    found = distribution(scores)
    assert found["largest"] == 100.0
    assert [len(counts) for counts in found["sites"].values()] == [49, 49]
    assert found["sites"]["a"][0] == 1  # the zero
    assert found["sites"]["b"][0] == 1  # half a millionth of the largest
    above = {at: sum(found["sites"]["a"][1 + found["exponents"].index(at) :]) for at in (-6, -3, -0.75)}
    assert above == {-6: 3, -3: 3, -0.75: 1}
    assert found["sites"]["a"][-1] == 1  # the largest itself


def test_the_report_draws_it_and_the_plan_counts_it(finished: tuple[Path, Results]) -> None:
    folder, _ = finished
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "reference samples" in page
    assert "Histogram" in page
    assert "threshold" in page
    kept = json.loads((folder / "distributions/lrp.json").read_text())
    assert sum(map(sum, kept["sites"].values())) == 2 * COUNT
    expected = plan(load_recipe(SMALL))
    assert len(list((folder / "scores").glob("*.safetensors"))) * expected.scores == expected.disk
    stage = next(stage for stage in expected.stages if stage.name == "perplexity")
    assert stage.tokens % len(list((folder / "evaluation").glob("*.json"))) == 0


def test_it_is_not_done_again(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    before = {
        path: path.stat().st_mtime_ns
        for place in ("evaluation", "distributions")
        for path in folder.glob(f"{place}/*")
    }
    assert len(before) == 2 + 2 * 2 * 2 + 2
    assert run(SMALL, folder).measurements == results.measurements
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("compress", "said"),
    [
        ({"methods": ["lrp"], "fractions": [0.5], "samples": [7]}, r"references\.general\.count"),
        ({"methods": ["lrp"], "fractions": [0.4, 0.5], "samples": [1]}, "samples.*fraction"),
        ({"methods": ["wanda-sequential"], "fractions": [0.5], "samples": [1]}, "wanda-sequential"),
        ({"methods": ["lrp"], "fractions": [0.5], "samples": [0]}, "samples"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(compress: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_recipe({**SMALL, "compress": compress})
    assert "\n" not in str(caught.value)
