"""selection.seeds apart: a circuit a seed, each as a run with this seed alone finds and measures it."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from sparc3 import Circuit, Results, Scores, UserError, load_recipe, run
from sparc3.report.read import read_folder

SEEDS = (3, 5, 8)
SMALL: dict[str, Any] = {
    "name": "apart",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {
        "general": {"source": "demo-general", "count": 6, "target": "next"},
        "undesired": {"source": "demo-angry", "count": 6},
    },
    "attribution": {"target": "predicted", "neuron": "signed"},
    "selection": {"count": 6, "rounds": 2, "protect": False},
    "evaluation": {
        "perplexity": {"source": "demo-general", "count": 4, "max_length": 64, "stride": 32},
        "toxicity": {
            "source": "demo-angry",
            "count": 4,
            "scorer": "lexicon",
            "also": "lexicon",
            "generations": 1,
            "max_new_tokens": 8,
        },
    },
    "compare": {"methods": ["gradient", "aura", "random"], "counts": [3], "random_draws": 2},
}


def recipe(*seeds: int, apart: bool = True, undesired: tuple[int, ...] = (0,)) -> dict[str, Any]:
    made = json.loads(json.dumps(SMALL))
    made["references"]["general"]["seeds"] = list(seeds)
    made["references"]["undesired"]["seeds"] = list(undesired)
    return made if not apart else {**made, "selection": {**made["selection"], "seeds": "apart"}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, list[tuple[Path, Results]]]:
    """The run with its seeds apart, and the runs of each seed alone."""
    folder = tmp_path_factory.mktemp("seeds")
    alone = [
        (folder / f"seed{s}", run(recipe(s, apart=False, undesired=(s,)), folder / f"seed{s}")) for s in SEEDS
    ]
    return folder / "apart", run(recipe(*SEEDS, undesired=SEEDS), folder / "apart"), alone


def test_each_seed_is_as_a_run_of_its_own(finished: tuple[Path, Results, list[tuple[Path, Results]]]) -> None:
    folder, results, alone = finished
    circuits = []
    for place, (own, _) in enumerate(alone):
        circuits.append(Circuit.load(folder / f"circuits/seed{place}.json"))
        assert circuits[-1].fingerprint == Circuit.load(own / "circuit.json").fingerprint
        ending = f".{place}" if place else ""
        for name in ("general", "undesired", "contrast", "gradient.general", "aura"):
            one, two = (
                Scores.load(path)
                for path in (
                    folder / f"scores/{name}{ending}.safetensors",
                    own / f"scores/{name}.safetensors",
                )
            )
            assert one.fingerprint == two.fingerprint, name
    assert Circuit.load(folder / "circuit.json").fingerprint == circuits[0].fingerprint
    assert len({one.fingerprint for one in circuits}) > 1
    rows = {(row["variant"], row["metric"]): row for row in results.provenance["by_seed"]}
    variants = {m.variant for m in results} - {"original"}
    assert {"ablated", "lrp@3", "lrp@6", "gradient@3", "random@6"} <= variants
    for variant, metric in {(variant, m.metric) for variant in variants for m in alone[0][1]}:
        if variant not in {m.variant for m in alone[0][1]}:
            continue  # the number of all experts differs by seed
        values = [one.find(metric, variant).value for _, one in alone]
        row = rows[variant, metric]
        assert row["values"] == pytest.approx(values, rel=1e-12)
        assert row["mean"] == pytest.approx(sum(values) / 3)
        spread = sum((value - sum(values) / 3) ** 2 for value in values) / 2
        assert row["sem"] == pytest.approx((spread / 3) ** 0.5)
        if metric.startswith("toxicity"):
            assert results.find(metric, variant).value == pytest.approx(row["mean"])
    for metric in ("perplexity", "toxicity.mean"):
        assert results.find(metric).value == alone[0][1].find(metric).value


def test_the_circuits_overlap_is_that_of_their_units(
    finished: tuple[Path, Results, list[tuple[Path, Results]]],
) -> None:
    folder, results, _ = finished
    units = [
        {(name, index) for name, members in one.members.items() for index in members}
        for one in (Circuit.load(folder / f"circuits/seed{place}.json") for place in range(3))
    ]
    shares = [len(one & two) / len(one | two) for one, two in combinations(units, 2)]
    assert 0 < sum(shares) / 3 < 1
    assert results.find("circuit.jaccard", "ablated").value == pytest.approx(sum(shares) / 3)


def test_report_log_and_scorers_tell_of_all_seeds(
    finished: tuple[Path, Results, list[tuple[Path, Results]]],
) -> None:
    folder, results, _ = finished
    assert "±" in (folder / "report.html").read_text()
    assert "±" in (folder / "log.txt").read_text()
    assert results.provenance["verdict"]["kind"]
    seen = read_folder(folder)
    assert {"original", "ablated"} <= seen.texts.keys()
    assert {"gradient@3", "random@6"} <= seen.rival_texts.keys()
    before, after = (
        results.provenance["scorers"]["means"][0]["before"],
        results.find("toxicity.mean", "ablated"),
    )
    assert before == pytest.approx(results.find("toxicity.mean").value)
    assert results.provenance["scorers"]["means"][0]["after"] == pytest.approx(after.value)


def test_it_resumes_and_makes_way_for_a_pooled_run(
    finished: tuple[Path, Results, list[tuple[Path, Results]]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    (copy / "results.json").unlink()
    (copy / "evaluation/ablated.seed1.json").unlink()
    (copy / "scores/seed1.round2.undesired.1.safetensors").unlink()
    again = run(recipe(*SEEDS, undesired=SEEDS), copy)
    assert again.measurements == finished[1].measurements
    log = (copy / "log.txt").read_text().rpartition("reused:")[2]
    assert "ablated.seed1" in log
    assert "seed1.round2.undesired.1" in log
    assert "seed2" not in log
    pooled = run(recipe(*SEEDS, apart=False), copy)
    assert "by_seed" not in pooled.provenance
    assert not list(copy.glob("circuits/*"))
    assert not list(copy.glob("*/*seed1*"))
    assert len(list(copy.glob("earlier/*/results.json"))) == 1


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (recipe(0), "general.seeds"),
        (recipe(0, 1, undesired=(0, 1, 2)), "selection.seeds"),
        ({**recipe(0, 1), "selection": {"seeds": "apart", "tune": {"counts": [3]}}}, "tune"),
    ],
)
def test_what_has_no_seeds_to_keep_apart_is_refused(made: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(made)
    assert "\n" not in str(caught.value)


def test_a_set_with_one_seed_is_shared(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    run(recipe(0, 1), folder)
    assert {path.stem for path in (folder / "samples").glob("*.jsonl")} >= {
        "general",
        "general.1",
        "undesired",
    }
    assert not (folder / "samples/undesired.1.jsonl").exists()
    assert not (folder / "scores/undesired.1.safetensors").exists()
    assert (folder / "scores/seed1.round2.undesired.safetensors").is_file()
