"""The job discover: the areas against hand arithmetic, a whole small run, its report, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparc3 import Circuit, Results, Sparc3Error, UserError, ablated, load_recipe, run
from sparc3.evaluation.statistics import Evaluation, Observations
from sparc3.experiment.discover import curve_areas, mean_metric, measure_stability
from sparc3.results import find_sparsest
from sparc3.samples import agreement_sentences
from sparc3.samples.ioi_sentences import choose_split, sentences
from sparc3.samples.reference_set import ReferenceSet
from sparc3.samples.sources import Request, gather

SMALL: dict[str, Any] = {
    "name": "small-ioi",
    "job": "discover",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {"task": {"source": "demo-ioi", "count": 16, "seeds": [0, 1]}},
    "attribution": {"target": "contrast", "neuron": "signed"},
    "discover": {"methods": ["lrp", "random"], "ranks": ["signed", "abs"], "sparsities": [0.3, 0.9]},
    "evaluation": {"ioi": {"source": "demo-ioi", "count": 24}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("discover") / "small"
    return folder, run(SMALL, folder)


def changed(**sections: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(SMALL)), **sections}


def test_a_failed_prompt_counts_in_no_mean() -> None:
    seen = Observations(
        "ioi.accuracy", "test", "share", "higher", (1.0, None, 1.0, 0.0), (1.0,) * 4, failures=1
    )
    assert mean_metric(Evaluation("lrp@1", (seen,)), "ioi.accuracy") == pytest.approx(2 / 3)
    with pytest.raises(Sparc3Error):
        mean_metric(Evaluation("lrp@1", (replace(seen, sums=(None,) * 4),)), "ioi.accuracy")


def test_areas_by_hand() -> None:
    # f = k is the line from nothing to everything: half the square below it, half above.
    assert curve_areas([0.5], [0.5]) == pytest.approx((0.5, 0.5))
    # Half of the units do it all: a triangle of ½ · ½, then a square of ½.
    assert curve_areas([0.5], [1.0]) == pytest.approx((0.75, 0.25))
    # A circuit that overshoots counts for CPR and against CMD: ½ · ½ · 3 twice less the triangle under 1.
    assert curve_areas([0.5], [3.0])[0] == pytest.approx(0.5 * (0 + 3) / 2 + 0.5 * (3 + 1) / 2)
    assert curve_areas([0.5], [3.0])[1] == pytest.approx(0.5 * (1 + 2) / 2 + 0.5 * (2 + 0) / 2)
    assert curve_areas([0.2, 0.8], [0.1, 0.9]) == pytest.approx(curve_areas([0.8, 0.2], [0.9, 0.1]))


def test_stability_is_the_overlap_of_what_is_kept() -> None:
    # Of units 0 … 4, {3, 4} and {2, 4} are kept: one in both, three in either.
    one, other = Circuit("neuron", {"m": (0, 1, 2)}), Circuit("neuron", {"m": (0, 1, 3)})
    assert measure_stability([one, other], 5) == pytest.approx(1 / 3)
    assert measure_stability([one, one, one], 5) == 1


def test_a_run_gives_curves_areas_and_stability(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    # Random scores have no sign, so they are ranked once.
    methods = ("lrp", "lrp-abs", "random")
    assert {m.variant for m in results} == {
        "original",
        "empty",
        *methods,
        *(f"{method}@{count}" for method in methods for count in (614, 1843)),
    }
    assert results.find("ioi.accuracy").value == 1
    full, empty, kept = (
        results.find("ioi.logit_difference", v).value for v in ("original", "empty", "lrp@614")
    )
    assert results.find("ioi.faithfulness", "lrp@614").value == pytest.approx((kept - empty) / (full - empty))
    faithful = [results.find("ioi.faithfulness", f"lrp@{count}").value for count in (614, 1843)]
    assert results.find("circuit.cpr", "lrp").value == pytest.approx(
        curve_areas([1 - 614 / 2048, 1 - 1843 / 2048], faithful)[0]
    )
    assert results.find("circuit.cpr", "lrp").value > results.find("circuit.cpr", "random").value
    assert (
        0.05
        < results.find("circuit.jaccard", "random@1843").value + 0.05
        < results.find("circuit.jaccard", "lrp@1843").value
    )
    references = [
        sample.text for path in folder.glob("samples/task.*.jsonl") for sample in ReferenceSet.load(path)
    ]
    test = [sample.text for sample in ReferenceSet.load(folder / "samples/evaluation-ioi.jsonl")]
    assert len(references) == 32
    assert not set(references) & set(test)


def test_the_sparsest_circuit_has_no_worse_one_below_it() -> None:
    assert find_sparsest([0.3, 0.6, 0.8, 0.9], [1.0, 0.9, 0.7, 0.95], 0.9) == 0.6
    assert find_sparsest([0.3, 0.6], [0.8, 1.0], 0.9) == 0


def test_rankings_differ_and_methods_are_paired_by_seed(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    signed, size = (
        json.loads((folder / f"evaluation/{name}@1843.seed0.json").read_text())["made_from"]
        for name in ("lrp", "lrp-abs")
    )
    assert signed != size
    assert results.find("circuit.sparsest", "lrp").n == 2
    ahead = results.difference("circuit.sparsest", "lrp", "random")
    assert ahead.value == pytest.approx(
        results.find("circuit.sparsest", "lrp").value - results.find("circuit.sparsest", "random").value
    )
    page = (folder / "report.html").read_text()
    assert "LRP (abs)" in page


def test_the_saved_circuit_is_what_was_kept(finished: tuple[Path, Results], demo: tuple[Any, Any]) -> None:
    circuit = Circuit.load(finished[0] / "circuits/lrp@205.json")
    circuit.require_model(demo[0])
    assert len(circuit) == 2048 - 1843
    with ablated(demo[0], circuit):
        assert all(
            float(demo[0].get_submodule(name).weight.detach()[list(rows)].abs().max()) == 0
            for name, rows in circuit.members.items()
            if rows
        )


def test_the_report_says_how_sparse(finished: tuple[Path, Results]) -> None:
    page = (finished[0] / "report.html").read_text()
    headline = page.partition("<h1>")[2].partition("</h1>")[0]
    assert "2,048 neurons" in headline or "LRP circuit" in headline
    for named in ("CPR", "test prompts"):
        assert named in page


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"selection": {"count": 3}}, "discover .*selection"),
        ({"compare": {"methods": ["random"]}}, "discover .*compare"),
        ({"discover": None}, "^discover "),
        ({"discover": {"methods": ["lrp"], "sparsities": [1.0]}}, "sparsities"),
        ({"discover": {"methods": ["random"]}}, r"discover\.methods.*lrp"),
        (
            {"attribution": {"unit": "head", "sites": ["attn.o"]}, "discover": {"methods": ["lrp", "wanda"]}},
            "wanda.*'head'",
        ),
        ({"references": {"general": {"source": "demo-general", "count": 2}}}, "general"),
        ({"evaluation": {}}, r"evaluation\.ioi"),
        ({"job": "correct"}, "task"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(changed(**sections))
    assert "\n" not in str(caught.value)


def test_a_task_without_contrast_is_one_line(
    mistake: Callable[..., str], jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    import yaml

    rows = [
        {"text": f"{name} gave a ball to", "target": " Mary"}
        for name in ("Tom", "Ben", "Sam", "Leo", "Max", "Paul")
    ]
    path = str(jsonl("task.jsonl", rows))
    content = changed(
        references={"task": {"source": path, "count": 3}}, evaluation={"ioi": {"source": path, "count": 2}}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert '"contrast"' in mistake("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")


def test_heads_and_weights_can_be_asked_for(tmp_path: Path) -> None:
    heads = changed(
        attribution={"unit": "head", "sites": ["attn.o"], "target": "contrast"},
        discover={"methods": ["lrp"], "sparsities": [0.5]},
    )
    assert run(heads, tmp_path / "heads").find("ioi.faithfulness", "lrp@8").n == 2
    weights = changed(
        attribution={"unit": "weight", "sites": ["mlp.up"], "target": "contrast", "reduce": "mean_abs"},
        discover={"methods": ["lrp"], "sparsities": [0.5]},
    )
    results = run(weights, tmp_path / "weights")
    assert results.find("ioi.accuracy", "lrp@131072").value > 0.9
    assert list((tmp_path / "weights/circuits").glob("*.safetensors"))


class Letters:
    """A tokenizer to which every word but the long ones is one token, with its leading space."""

    def __init__(self, longest: int) -> None:
        self.longest, self.known = longest, {}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        words = (
            [(" " if i else "") + word for i, word in enumerate(text.split(" "))]
            if text[:1] != " "
            else [text]
        )
        pieces = [p for word in words for p in ([word] if len(word.strip()) <= self.longest else list(word))]
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces]}


def test_ioi_sentences_keep_splits_apart_and_name_the_receiver() -> None:
    made = {
        split: gather(Request("ioi", 128, split, seeds=(3,)), Letters(10)) for split in ("reference", "test")
    }
    for split, samples in made.items():
        for sample in samples:
            assert choose_split(sample.text) == split
            giver = sample.text.split(" gave ")[0].split()[-1]
            assert sample.contrast == f" {giver}"
            assert sample.target.strip() in sample.text.removesuffix("to")
            assert sample.target != sample.contrast
    texts = [{s.text for s in samples} for samples in made.values()]
    assert [len(t) for t in texts] == [128, 128]
    assert not texts[0] & texts[1]
    first = [next(sentences(Letters(10), "test", seed)) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_ioi_refuses_a_tokenizer_with_too_few_names() -> None:
    with pytest.raises(UserError, match=r"\b8 names.* 4 of 32 \(Tom, Dan, Amy, Ben\)"):
        gather(Request("ioi", 4), Letters(3))
    with pytest.raises(UserError, match=r"'ioi'.*tokenizer"):
        gather(Request("ioi", 4))


def test_agreement_sentences_ask_for_the_verb_of_the_subjects_number() -> None:
    made = {split: gather(Request("agreement", 96, split), Letters(6)) for split in ("reference", "test")}
    for split, samples in made.items():
        verbs = [(sample.target, sample.contrast) for sample in samples]
        assert {verb for pair in verbs for verb in pair} == {
            f" {verb}" for pair in agreement_sentences.VERBS for verb in pair
        }
        for number, (sample, (target, contrast)) in enumerate(zip(samples, verbs, strict=True)):
            assert agreement_sentences.choose_split(sample.text) == split
            words = sample.text.split()
            subject = next(w for w in words if w.removesuffix("s") in agreement_sentences.SUBJECTS)
            plural = subject.endswith("s")
            assert plural == number % 2
            assert (target.strip(), contrast.strip())[:: -1 if plural else 1] in agreement_sentences.VERBS
            attractor = words[-1]
            assert (attractor in agreement_sentences.ATTRACTORS) == plural  # its number is the other one
            assert "belong" not in words or plural
            assert "belongs" not in words or not plural
    texts = [{s.text for s in samples} for samples in made.values()]
    assert [len(t) for t in texts] == [96, 96]
    assert not texts[0] & texts[1]


def test_agreement_takes_the_pairs_of_verbs_that_are_single_tokens() -> None:
    assert len({s.target for s in gather(Request("agreement", 64), Letters(4))}) == 8
    assert {s.target for s in gather(Request("agreement", 64), Letters(3))} == {" is", " are"}
    with pytest.raises(UserError, match="agreement"):
        gather(Request("agreement", 4), Letters(2))
    with pytest.raises(UserError, match="agreement"):
        gather(Request("agreement", 4))
