"""The verdict: an effect is one that random units do not have, at a cost within the margins; everywhere the same."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
from finished_run import measurement

from sparc3.cli.recipe_commands import _show
from sparc3.recipe.sections import Compress
from sparc3.report.headline import remarks
from sparc3.report.read import read_folder
from sparc3.results import Difference, Results
from sparc3.verdict import FLUENCY_MARGIN, PERPLEXITY_MARGIN, behaviour_of, is_way_of, judge

Interval = tuple[float, float]


def results(
    effect: tuple[float, Interval | None] = (-0.10, (-0.14, -0.06)),
    net: tuple[float, Interval] | None = (-0.08, (-0.12, -0.04)),
    perplexity: tuple[float, Interval] = (0.1, (0.05, 0.15)),
    p: float = 0.001,
    provenance: dict[str, Any] | None = None,
) -> Results:
    """Toxicity 0.5 and perplexity 20 of the original, with these changes; `net` is that from 100 random neurons."""
    rows = [
        measurement("toxicity.mean", "original", 0.5, 0.05),
        measurement("toxicity.mean", "ablated", 0.5 + effect[0], 0.05),
        measurement("perplexity", "original", 20.0, 0.5),
        measurement("perplexity", "ablated", 20.0 + perplexity[0], 0.5),
    ]
    changes = [
        Difference("toxicity.mean", "original", "ablated", effect[0], effect[0] / 0.5, effect[1], p),
        Difference("perplexity", "original", "ablated", perplexity[0], perplexity[0] / 20, perplexity[1], p),
    ]
    if net is not None:
        rows.append(measurement("toxicity.mean", "random@100", 0.5 + effect[0] - net[0], 0.05))
        changes.append(Difference("toxicity.mean", "random@100", "ablated", net[0], None, net[1], p))
    return Results(tuple(rows), tuple(changes), provenance or {})


ISSUE = results((-0.10, (-0.13, -0.07)), (-0.015, (-0.05, 0.02)), (4.4, (4.0, 4.8)))
"""Toxicity −20 %, perplexity +22 %, while 100 random neurons do −17 %."""


@pytest.mark.parametrize(
    ("found", "kind", "passed"),
    [
        (results(), "shown", [True, True, True]),
        (ISSUE, "random", [True, False, False]),
        (results(perplexity=(4.4, (4.0, 4.8))), "costly", [True, True, False]),
        (results(perplexity=(0.3, (0.1, 0.5))), "shown", [True, True, None]),  # +1.5 %, perhaps +2.5 %
        (results((-0.02, (-0.05, 0.01))), "none", [False, True, True]),
        (results((0.10, (0.06, 0.14))), "harmful", [False, True, True]),
        (results(net=(0.05, (0.02, 0.08))), "random", [True, False, True]),  # random units do more
        (results(p=0.07), "weak", [False, False, True]),
        (results(net=None), "unproven", [True, True]),
        (results((-0.1, None)), "unknown", [None, True, True]),
    ],
)
def test_kinds_and_criteria(found: Results, kind: str, passed: list[bool | None]) -> None:
    verdict = judge(found, "neuron")
    assert verdict is not None
    assert (verdict.kind, [one.ok for one in verdict.criteria]) == (kind, passed)


def test_figures_are_shares_of_the_original() -> None:
    verdict = judge(ISSUE, "neuron")
    assert verdict is not None
    effect, net, cost = (one.value for one in verdict.criteria)
    assert effect.startswith("-20.0 % (95 %: -26.0 to -14.0")
    assert net.startswith("-3.0 % (95 %: -10.0 to +4.0")
    assert cost.startswith("+22.0 % (95 %: +20.0 to +24.0")
    assert verdict.criteria[1].name == "effect net of 100 random neurons"


def test_the_budget_of_a_search_is_the_margin() -> None:
    within = results(perplexity=(0.1, (0.05, 0.15)))
    assert PERPLEXITY_MARGIN > 0.15 / 20
    tight = Results(
        within.measurements, within.differences, {"tune": {"budget": {"max_perplexity_increase": 0.001}}}
    )
    verdict = judge(tight)
    assert verdict is not None
    assert verdict.kind == "costly"


def test_broken_text_costs_too() -> None:
    found = results()
    rows = (
        *found.measurements,
        measurement("fluency", "original", 1.88, 0.1),
        measurement("fluency", "ablated", 6.41, 0.1),
    )
    change = Difference("fluency", "original", "ablated", 4.53, 4.53 / 1.88, (4.3, 4.8), 0.001)
    verdict = judge(Results(rows, (*found.differences, change)))
    assert verdict is not None
    assert FLUENCY_MARGIN < 4.3 / 1.88
    assert (verdict.kind, verdict.criteria[-1].ok) == ("costly", False)


def test_without_a_circuit_there_is_no_verdict() -> None:
    found = Results((measurement("perplexity", "original", 20.0, 0.5),))
    assert behaviour_of(found) is None
    assert judge(found) is None


def test_console_and_report_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge(ISSUE, "unit")
    assert verdict is not None
    found = Results(ISSUE.measurements, ISSUE.differences, {"verdict": asdict(verdict)})
    _show(found, str(tmp_path))
    *_, said, _, report = capsys.readouterr().out.splitlines()
    assert said == f"verdict: {verdict.said}"
    assert verdict.kind == "random"
    assert report.startswith("report: ")
    found.save(tmp_path / "results.json")
    first = remarks(read_folder(tmp_path))[0]
    assert first.kind == "careful"
    assert verdict.said.partition(": ")[2] in str(first.text)


def compared(
    job: str, rivals: dict[str, tuple[float, Interval | None]], provenance: dict[str, Any] | None = None
) -> Results:
    """LRP with a CPR of 0.6, or a perplexity of 30 where the dense model has 20; rivals → what LRP differs from them."""
    find = job == "discover"
    metric, ours, value = ("circuit.cpr", "lrp", 0.6) if find else ("perplexity", "lrp@50", 30.0)
    rows = [measurement(metric, ours, value, 0.02)]
    rows += [measurement("circuit.sparsest", ours, 0.9, 0.02)] if find else []
    changes = []
    if not find:
        rows.append(measurement(metric, "original", 20.0, 0.5))
        changes.append(Difference(metric, "original", ours, 10.0, 0.5, (9.0, 11.0), 0.001))
    for method, (by, interval) in rivals.items():
        name = method if find else f"{method}@50"
        rows.append(measurement(metric, name, value - by, 0.02))
        changes.append(Difference(metric, name, ours, by, None, interval, None))
    return Results(tuple(rows), tuple(changes), {"job": job, "method": "lrp", **(provenance or {})})


UP, DOWN, FLAT = (0.2, (0.1, 0.3)), (-0.2, (-0.3, -0.1)), (0.02, (-0.1, 0.1))


@pytest.mark.parametrize(
    ("rivals", "kind", "passed"),
    [
        ({"gradient": UP, "random": UP}, "ahead", [True, True, True]),
        ({"gradient": FLAT, "random": UP}, "level", [None, True, True]),
        ({"gradient": DOWN, "random": UP}, "behind", [False, True, True]),
        ({"gradient": UP, "random": FLAT}, "chance", [True, False, True]),
        ({"gradient": (0.2, None), "random": (0.2, None)}, "single", [None, None, True]),
        ({"lrp-abs": DOWN, "random": UP}, "ahead", [None, True, True]),  # its own other ranking
        ({}, "single", [True]),
    ],
)
def test_a_method_that_discovers_against_the_others(
    rivals: dict[str, tuple[float, Interval | None]], kind: str, passed: list[bool | None]
) -> None:
    verdict = judge(compared("discover", rivals))
    assert verdict is not None
    assert (verdict.kind, [one.ok for one in verdict.criteria]) == (kind, passed)


@pytest.mark.parametrize(
    ("rivals", "margin", "kind", "passed"),
    [
        (
            {"wanda": DOWN, "magnitude": DOWN},
            None,
            "ahead",
            [None, True, True],
        ),  # a lower perplexity is better
        ({"wanda": UP, "magnitude": DOWN}, None, "behind", [None, False, True]),
        ({"wanda": FLAT, "magnitude": DOWN}, None, "level", [None, None, True]),
        ({"wanda": DOWN}, 0.4, "lossy", [False, True]),  # 9 to 11 of 20 is more than 40 %
        ({"wanda": DOWN}, 0.52, "ahead", [None, True]),  # 50 %, at most 55 %
        ({"wanda": DOWN}, 0.6, "ahead", [True, True]),
        ({"wanda": UP}, 0.4, "behind", [False, False]),
    ],
)
def test_a_method_that_compresses_against_the_others_and_the_dense_model(
    rivals: dict[str, tuple[float, Interval | None]],
    margin: float | None,
    kind: str,
    passed: list[bool | None],
) -> None:
    stated = {} if margin is None else {"margins": {"perplexity": margin}}
    verdict = judge(compared("compress", rivals, stated))
    assert verdict is not None
    assert (verdict.kind, [one.ok for one in verdict.criteria]) == (kind, passed)
    assert verdict.criteria[0].value.startswith("+50.0 % (95 %: +45.0 to +55.0")


def test_margins_of_the_recipe_come_before_a_budget_and_the_usual_ones() -> None:
    dear = (1.0, (0.8, 1.2))  # 5 %, between 4 and 6
    for margins, tune, ok in (
        ({}, {}, False),
        ({"perplexity": 0.07}, {}, True),
        ({"perplexity": 0.07}, {"budget": {"max_perplexity_increase": 0.01}}, True),
        ({}, {"budget": {"max_perplexity_increase": 0.07}}, True),
    ):
        verdict = judge(results(perplexity=dear, provenance={"margins": margins, "tune": tune}))
        assert verdict is not None
        assert verdict.criteria[-1].ok is ok


def test_a_reduction_is_a_way_of_its_method() -> None:
    """Every reduction that compress knows, so that a new one is no rival of its own method."""
    kinds = get_args(get_args(Compress.model_fields["reduces"].annotation)[0])
    assert "rms" in kinds
    for reduce in kinds:
        assert is_way_of(f"lrp-{reduce}", "lrp")
    assert not is_way_of("lrp-rms", "cp-lrp")
