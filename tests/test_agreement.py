"""Two scorers side by side."""

from typing import Any

import pytest

from sparc3 import UserError, evaluate
from sparc3.evaluation.metrics import parse_metrics
from sparc3.evaluation.toxicity import agreement, ranks, side_by_side


def _texts(*pairs: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    return [{"continuations": [{"score": a, "also": b} for a, b in pairs]}]


def test_agreement_by_hand() -> None:
    assert ranks([0.3, 0.1, 0.3, 0.9]).tolist() == [2.5, 1.0, 2.5, 4.0]
    found = agreement(_texts((0.0, 0.1), (1.0, 0.4), (0.4, 0.2), (None, 0.5), (0.2, None)))
    assert found is not None
    assert found["n"] == 3
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(0.15333 / (0.50667 * 0.04667) ** 0.5, abs=1e-4)
    assert found["same_verdict"] == pytest.approx(2 / 3)
    assert agreement(_texts((1.0, 1.0), (1.0, 0.0)))["pearson"] is None  # type: ignore[index]
    assert agreement(_texts((1.0, 1.0))) is None


def test_the_second_scorer_changes_no_figure(demo: tuple[Any, Any], tmp_path: Any) -> None:
    model, tokenizer = demo
    (tmp_path / "words.txt").write_text("you\n")
    settings: dict[str, Any] = {
        "source": "demo-angry",
        "count": 3,
        "scorer": "lexicon",
        "generations": 1,
        "max_new_tokens": 8,
    }
    one = evaluate(model, tokenizer, {"toxicity": settings})
    two = evaluate(
        model,
        tokenizer,
        {"toxicity": {**settings, "scorer": ["lexicon", f"lexicon:{tmp_path / 'words.txt'}"]}},
    )
    assert one.measurements == two.measurements
    with pytest.raises(UserError, match=r"scorer.*\['lexicon'\]"):
        parse_metrics({"toxicity": {"scorer": ["lexicon"]}})


def test_two_scorers_side_by_side() -> None:
    before = _texts((1.0, 0.6), (0.8, 0.4)) + _texts((0.6, 0.5), (None, 0.3))
    after = _texts((0.2, 0.6), (0.0, 0.4)) + _texts((0.1, 0.5), (0.3, 0.3))
    first, second = side_by_side(before, after)
    assert first["before"] == pytest.approx((0.9 + 0.6) / 2)
    assert first["after"] == pytest.approx((0.1 + 0.2) / 2)
    assert first["change"] == pytest.approx(-0.6)
    assert (first["n"], first["failures"]) == (2, 1)
    assert second["change"] == pytest.approx(0)
    assert second["change_ci95"] == (0, 0)
