"""The job compress: every row at its sparsity, sequential Wanda among the methods, exact zeros in the exported checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparc3 import Circuit, Results, UserError, load_model, load_recipe, run
from sparc3.models.families import ROLES
from sparc3.models.sites import family_of, sites_of

SMALL: dict[str, Any] = {
    "name": "small-compress",
    "job": "compress",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {"general": {"source": "demo-general", "count": 8, "target": "next"}},
    "attribution": {"unit": "weight", "sites": ["attn.o", "mlp.up"]},
    "compress": {
        "methods": ["magnitude", "wanda-sequential", "lrp"],
        "reduces": ["mean_abs", "abs_mean"],
        "fractions": [0.3, 0.5],
    },
    "evaluation": {
        "perplexity": {"source": "demo-general", "count": 6, "protocol": "blocks", "seq_len": 64},
        "sparsity": {},
    },
}
WEIGHTS = 4 * (128 * 128 + 512 * 128)
"""Of attn.o and mlp.up in the embedded model's four layers."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("compress") / "small"
    return folder, run(SMALL, folder)


def changed(**sections: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(SMALL)), **sections}


def test_every_row_is_at_its_sparsity(finished: tuple[Path, Results]) -> None:
    _, results = finished
    methods = ("magnitude", "wanda-sequential", "lrp-mean_abs", "lrp-abs_mean")
    counts = {38 / 128: WEIGHTS * 38 // 128, 0.5: WEIGHTS // 2}  # 0.3 of 128 inputs are 38
    assert {m.variant for m in results} == {
        "original",
        *(f"{method}@{count}" for method in methods for count in counts.values()),
    }
    for method in methods:
        for share, count in counts.items():
            for metric in ("sparsity", "sparsity.row_min", "sparsity.row_max"):
                assert results.find(metric, f"{method}@{count}").value == pytest.approx(share, abs=1e-9), (
                    method,
                    metric,
                )
    counted = [c for c in results.provenance["checks"] if c["name"].startswith("zeros in a row")]
    assert len(counted) == 8
    assert all(check["ok"] for check in counted)
    before, after = (results.find("perplexity", v).value for v in ("original", f"magnitude@{WEIGHTS // 2}"))
    assert before < after
    assert results.difference("perplexity", f"magnitude@{WEIGHTS // 2}").ci95


def test_the_verdict_is_by_pairs_of_windows_at_each_number_of_weights(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    verdict = results.provenance["verdict"]
    rivals = ("magnitude", "wanda-sequential", "lrp-abs_mean")
    for count in (WEIGHTS * 38 // 128, WEIGHTS // 2):
        ours = results.find("perplexity", f"lrp-mean_abs@{count}").value
        for rival in rivals:
            d = results.difference("perplexity", f"lrp-mean_abs@{count}", f"{rival}@{count}")
            assert d.value == pytest.approx(ours - results.find("perplexity", d.from_).value)
            assert d.ci95[0] <= d.value <= d.ci95[1]
    judged = {c["name"]: c["ok"] for c in verdict["criteria"]}
    assert len(judged) == 8  # the dense model and three rivals, at each of two numbers
    assert judged[f"lrp-mean_abs@{WEIGHTS // 2} against lrp-abs_mean"] is None
    assert results.provenance["checks"][: len(verdict["criteria"])] == verdict["criteria"]
    assert verdict["said"] in (folder / "log.txt").read_text()
    assert verdict["said"].partition(":")[0] in (folder / "report.html").read_text()


def test_seeds_apart_are_mean_and_standard_error_of_runs_of_their_own(
    tmp_path: Path, finished: tuple[Path, Results]
) -> None:
    """Each seed's circuit and figure are those of a run with this seed alone; the pooled variant is their mean."""
    asked = {"methods": ["magnitude", "lrp"], "fractions": [0.5]}

    def general(*seeds: int) -> dict[str, Any]:
        return {"general": {**SMALL["references"]["general"], "seeds": list(seeds)}}

    apart = changed(references=general(0, 1), compress={**asked, "seeds": "apart"})
    found = run(apart, tmp_path / "apart")
    alone = [
        run(changed(references=general(s), compress=asked), tmp_path / f"seed{s}").find(
            "perplexity", f"lrp@{WEIGHTS // 2}"
        )
        for s in (0, 1)
    ]
    (row,) = (r for r in found.provenance["by_seed"] if r["metric"] == "perplexity")
    assert row["variant"] == f"lrp@{WEIGHTS // 2}"
    assert row["values"] == [one.value for one in alone]
    assert row["mean"] == pytest.approx(sum(row["values"]) / 2)
    assert row["sem"] == pytest.approx(abs(row["values"][0] - row["values"][1]) / 2)
    circuits = [Circuit.load(tmp_path / f"apart/circuits/lrp-0.5.seed{s}.safetensors") for s in (0, 1)]
    for seed, circuit in enumerate(circuits):
        single = Circuit.load(tmp_path / f"seed{seed}/circuits/lrp-0.5.safetensors")
        assert circuit.fingerprint == single.fingerprint
    kept = [{name: ~mask for name, mask in c.members.items()} for c in circuits]
    shared = sum(int((kept[0][name] & kept[1][name]).sum()) for name in kept[0])
    either = sum(int((kept[0][name] | kept[1][name]).sum()) for name in kept[0])
    assert 0.2 < shared / either < 1
    assert found.find("circuit.jaccard", row["variant"]).value == pytest.approx(shared / either)
    assert "±" in (tmp_path / "apart/report.html").read_text()
    assert not (tmp_path / "apart/circuits/magnitude-0.5.seed0.safetensors").exists()
    with pytest.raises(UserError, match="seeds"):
        load_recipe(changed(compress={**asked, "samples": [2], "seeds": "apart"}))


def test_the_report_says_it(finished: tuple[Path, Results]) -> None:
    page = (finished[0] / "report.html").read_text()
    headline = page.partition("<h1>")[2].partition("</h1>")[0]
    assert "50.0" in headline
    assert "row" in headline
    assert "perplexity" in headline
    most = max(int(m.variant.partition("@")[2]) for m in finished[1] if "@" in m.variant)
    best = min(m.value for m in finished[1] if m.metric == "perplexity" and m.variant.endswith(f"@{most}"))
    assert f'<b class="figure after">{best:.3f}</b>' in headline
    assert 'class="passed"' in page
    assert 'class="failed"' not in page


def test_a_finished_run_is_not_done_again(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    before = {
        path: path.stat().st_mtime_ns
        for place in ("circuits", "scores", "evaluation")
        for path in folder.glob(f"{place}/*")
    }
    assert len(before) > 12
    assert run(SMALL, folder).measurements == results.measurements
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_ablate_keeps_exact_zeros(
    finished: tuple[Path, Results], sparc3: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = finished[0] / "circuits/lrp-mean_abs-0.5.safetensors"
    code, _, err = sparc3(
        "ablate",
        "demo",
        "--circuit",
        path,
        "--out",
        tmp_path / "half",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    )
    assert code == 0, err
    model, _ = load_model(str(tmp_path / "half"), dtype="float32", device="cpu")
    circuit = Circuit.load(path)
    for site in sites_of(model, [role for role in ROLES if role in family_of(model).roles]):
        zeros = site.weight == 0
        if site.name in circuit.members:
            assert bool((zeros | ~circuit.members[site.name]).all())
            assert zeros.sum(1).tolist() == [64] * site.out
        else:
            assert float(zeros.float().mean()) < 1e-3


def test_groups_of_four(tmp_path: Path) -> None:
    groups = changed(compress={"methods": ["magnitude"], "scope": "2:4"})
    results = run(groups, tmp_path / "groups")
    assert results.find("sparsity.row_min", f"magnitude@{WEIGHTS // 2}").value == 0.5
    assert results.provenance["checks"][0]["ok"]


def test_a_scope_without_quotes_is_text_and_not_a_time(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(
        json.dumps(changed(compress={"methods": ["magnitude"], "scope": "@"})).replace('"@"', "2:4")
    )
    by_override = load_recipe(changed(compress={"methods": ["magnitude"]}), ["compress.scope=4:8"])
    assert by_override.compress.scope == "4:8"
    by_file = load_recipe(path)
    assert by_file.compress.scope == "2:4"
    path.write_text(by_file.to_yaml())
    assert load_recipe(path).fingerprint == by_file.fingerprint
    numbers = load_recipe("demo", ["references.general.count=1_0", "selection.strength=0.5"])
    assert (numbers.references["general"].count, numbers.selection.strength) == (10, 0.5)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"compress": {"methods": ["magnitude"]}}, "fractions"),
        ({"compress": {"scope": "2:4", "fractions": [0.5]}}, "2:4 .*fractions"),
        ({"compress": {"fractions": [1.0]}}, "fractions"),
        ({"compress": {"methods": ["wandb"], "fractions": [0.5]}}, "wanda"),
        (
            {"compress": {"methods": ["wanda-sequential"], "scope": "global", "fractions": [0.5]}},
            "wanda-sequential.*global",
        ),
        ({"attribution": {"unit": "neuron"}}, r"attribution\.unit.*'neuron'"),
        ({"evaluation": {"perplexity": {}}}, r"evaluation\.sparsity"),
        ({"selection": {"fraction": 0.5, "scope": "row"}}, "compress.*selection"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(changed(**sections))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tinyllama-compress", "llama2-7b-compress", "llama3-8b-compress"])
def test_the_papers_protocol_is_in_its_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.compress.scope, recipe.compress.fractions) == ("row", (0.5,))
    assert recipe.metrics()["perplexity"].model_dump()["protocol"] == "blocks"
    assert recipe.metrics()["perplexity"].model_dump()["seq_len"] == 2048
    assert recipe.metrics()["sparsity"].model_dump()["sites"] == recipe.attribution.sites == ROLES or set(
        recipe.attribution.sites
    ) == set(ROLES)
