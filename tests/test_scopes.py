"""Scopes of a comparison: every variant's units against a selection done by hand, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparc3 import Circuit, Scores, UserError, contrast, load_recipe, run
from sparc3.circuits.ablate import Damping

SMALL: dict[str, Any] = {
    "name": "scopes",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {
        "general": {"source": "demo-general", "count": 4},
        "undesired": {"source": "demo-angry", "count": 4},
    },
    "attribution": {"neuron": "signed"},
    "selection": {"count": 2, "scope": "site", "protect": False},
    "evaluation": {"perplexity": {"source": "demo-general", "count": 2, "max_length": 64, "stride": 32}},
    "compare": {"methods": ["wanda", "det0", "aura", "random"], "counts": [2, 3], "random_draws": 1},
    "cards": {"most": 0},
}
WEIGHTS = {"unit": "weight", "sites": ["attn.v"]}
TASK: dict[str, Any] = {
    "name": "task-scopes",
    "job": "discover",
    "model": SMALL["model"],
    "references": {"task": {"source": "demo-ioi", "count": 4}},
    "attribution": {**WEIGHTS, "target": "contrast"},
    "discover": {"methods": ["lrp", "wanda"], "sparsities": [0.29, 0.9], "scopes": {"wanda": "row"}},
    "evaluation": {"ioi": {"source": "demo-ioi", "count": 4}},
}


def changed(content: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(content)), **sections}


def lowest(values: Tensor, count: int) -> list[int]:
    """Indices of the `count` lowest, ascending, the first of those that are equal."""
    return sorted(sorted(range(len(values)), key=lambda i: (float(values[i]), i))[:count])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Variant → the circuit or damping that was measured, of every run while the test lasts."""
    from sparc3.experiment import discover, measure

    seen: dict[str, Any] = {}
    evaluate = measure.load_or_make_evaluation

    def watched(work: Any, variant: str, change: Any) -> Any:
        seen[variant] = change
        return evaluate(work, variant, change)

    for module in (measure, discover):
        monkeypatch.setattr(module, "load_or_make_evaluation", watched)
    return seen


def contrast_of(folder: Path, method: str = "") -> Scores:
    parts = [Scores.load(folder / f"scores/{method}{name}.safetensors") for name in ("general", "undesired")]
    return contrast(*parts, normalize="l1" if method == "wanda." else None)


def test_every_variant_of_a_site_circuit_has_its_units_of_each_site(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    results = run(SMALL, tmp_path)
    own, wanda = contrast_of(tmp_path), contrast_of(tmp_path, "wanda.")
    expertise = Scores.load(tmp_path / "scores/aura.safetensors")
    two, three = 2 * len(own), 3 * len(own)
    expected = {
        "ablated": {name: lowest(values, 2) for name, values in own.items()},
        f"lrp@{three}": {name: lowest(values, 3) for name, values in own.items()},
        f"wanda@{two}": {name: lowest(values, 2) for name, values in wanda.items()},
        f"wanda@{three}": {name: lowest(values, 3) for name, values in wanda.items()},
        f"det0@{two}": {name: lowest(-values, 2) for name, values in expertise.items()},
        f"det0@{three}": {name: lowest(-values, 3) for name, values in expertise.items()},
    }
    assert {name: {n: list(i) for n, i in measured[name].members.items()} for name in expected} == expected
    damped = measured[f"aura@{two}"]
    assert isinstance(damped, Damping)
    for name, auc in expertise.items():
        factors = torch.ones(len(auc))
        best = lowest(-auc, 2)
        factors[best] = (1 - 2 * (auc[best] - 0.5)).clamp(0, 1)
        assert torch.equal(damped.factors[name], factors)
    for variant in (f"random@{two}", f"random@{three}"):
        assert set(measured[variant].counts.values()) == {int(variant.partition("@")[2]) // len(own)}
    assert {f"lrp@{two}", f"lrp@{three}", f"aura@{three}"} <= {m.variant for m in results}
    assert results.find("perplexity", f"lrp@{two}").value == results.find("perplexity", "ablated").value


def test_rows_of_weights_beside_a_global_circuit(measured: dict[str, Any], tmp_path: Path) -> None:
    asked = changed(
        SMALL,
        attribution=WEIGHTS,
        selection={"fraction": 0.25},
        compare={"methods": ["wanda", "gradient", "random"], "random_draws": 1, "scopes": {"wanda": "row"}},
    )
    run(asked, tmp_path)
    wanda, units = contrast_of(tmp_path, "wanda."), contrast_of(tmp_path).units
    quarter = units // 4
    assert {f"wanda@{quarter}", f"gradient@{quarter}", f"random@{quarter}"} < set(measured)
    rows = measured[f"wanda@{quarter}"].members
    for name, values in wanda.items():
        for row, mask in zip(values, rows[name], strict=True):
            assert mask.nonzero().flatten().tolist() == lowest(row, len(row) // 4)
    everywhere = measured[f"gradient@{quarter}"].members
    assert len({int(mask.sum()) for mask in everywhere.values()}) > 1
    assert measured[f"random@{quarter}"].counts == measured["ablated"].counts


def test_groups_have_one_size(measured: dict[str, Any], tmp_path: Path) -> None:
    compare = {"methods": ["wanda"], "random_draws": 1}
    asked = changed(SMALL, attribution=WEIGHTS, selection={"scope": "2:4"}, compare=compare)
    run(asked, tmp_path)
    half = contrast_of(tmp_path).units // 2
    assert set(measured) == {"original", "ablated", f"wanda@{half}", f"random@{half}"}
    for mask in measured[f"wanda@{half}"].members.values():
        assert (mask.view(-1, 4).sum(1) == 2).all()


def test_too_few_candidates_of_one_site_leave_a_variant_out(tmp_path: Path) -> None:
    references = {**SMALL["references"], "matched": {"source": "demo-polite", "count": 4}}
    asked = changed(
        SMALL, references=references, compare={"methods": ["wanda"], "counts": [1, 500], "random_draws": 0}
    )
    results = run(asked, tmp_path)
    parts = [
        Scores.load(tmp_path / f"scores/{name}.safetensors") for name in ("general", "undesired", "matched")
    ]
    made = contrast(*parts[:2], matched=parts[2])
    assert len(made) * 500 < made.units  # as many in all there are
    said = [w for w in results.provenance["warnings"] if f"lrp@{500 * len(made)} " in w]
    assert len(said) == 1
    assert f"lrp@{len(made)}" in {m.variant for m in results}


def test_rows_for_wanda_beside_global_lrp_in_a_tasks_circuits(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    results = run(TASK, tmp_path)
    lrp, wanda = (Scores.load(tmp_path / f"scores/{name}task.0.safetensors") for name in ("", "wanda."))
    for share in (0.29, 0.9):
        rows = sum(values.shape[0] * int(values.shape[1] * share + 1e-9) for values in wanda.values())
        removed = measured[f"wanda@{rows}.seed0"]
        for name, values in wanda.items():
            for row, mask in zip(values, removed.members[name], strict=True):
                assert mask.nonzero().flatten().tolist() == lowest(row, int(len(row) * share + 1e-9))
        assert results.find("ioi.accuracy", f"lrp@{int(lrp.units * share + 1e-9)}").value is not None
        assert rows < lrp.units * share  # rounded down in each of the rows
    overlaps = [one["variant"] for one in results.provenance["overlaps"]]
    assert overlaps == [m.variant for m in results if m.metric == "ioi.accuracy" and "wanda@" in m.variant]


@pytest.mark.parametrize(
    ("content", "sections", "said"),
    [
        (SMALL, {"selection": {"count": 2, "scope": "row"}}, r"selection\.scope row .*neuron"),
        (
            SMALL,
            {"compare": {"methods": ["wanda"], "scopes": {"wanda": "row"}}},
            r"compare\.scopes\.wanda row",
        ),
        (SMALL, {"compare": {"methods": ["wanda"], "scopes": {"wnda": "site"}}}, "wnda.*wanda"),
        (SMALL, {"compare": {"methods": ["random"], "scopes": {"random": "site"}}}, r"compare\.scopes"),
        (SMALL, {"compare": {"methods": ["lrp"], "scopes": {"lrp": "site"}}}, r"compare\.scopes lrp"),
        (SMALL, {"compare": {"methods": ["wanda"], "scopes": {"wanda": "2:4"}}}, "2:4"),
        (
            SMALL,
            {"attribution": WEIGHTS, "selection": {"scope": "2:4"}, "compare": {"counts": [3]}},
            r"compare\.counts",
        ),
        (TASK, {"discover": {"methods": ["lrp"], "scopes": {"wanda": "row"}}}, r"discover\.scopes.*wanda"),
        (TASK, {"attribution": {"target": "contrast"}}, r"discover\.scopes\.wanda row .*neuron"),
    ],
)
def test_scopes_that_do_not_fit_are_refused(
    content: dict[str, Any], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(changed(content, **sections))


def test_rows_and_a_matched_contrast_do_not_go_together() -> None:
    references = {**SMALL["references"], "matched": {"source": "demo-polite", "count": 4}}
    with pytest.raises(UserError, match=r"selection\.scope row.*matched"):
        load_recipe(
            changed(
                SMALL,
                references=references,
                attribution=WEIGHTS,
                selection={"count": 1, "scope": "row"},
                compare={"methods": ["wanda"]},
            )
        )


def test_a_plain_circuit_is_never_selected_again(measured: dict[str, Any], tmp_path: Path) -> None:
    """Two rounds find other units than one selection: what stands at the circuit's count is the circuit."""
    asked = changed(
        SMALL,
        selection={"count": 40, "rounds": 2, "protect": False},
        compare={"counts": [40], "random_draws": 0},
    )
    results = run(asked, tmp_path)
    assert set(measured) == {"original", "ablated"}
    assert isinstance(measured["ablated"], Circuit)
    assert results.find("perplexity", "lrp@40").value == results.find("perplexity", "ablated").value
