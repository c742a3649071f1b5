"""Side effects beside the original: KL of next-token distributions, fluency of continuations, power, effects net of the null."""

import math
from typing import Any

import pytest
import torch
from unchanged import fingerprint, require_same

from sparc3 import Circuit, UserError, ablated, evaluate
from sparc3.evaluation.evaluate import make_results
from sparc3.evaluation.perplexity import kl_per_token
from sparc3.evaluation.statistics import Evaluation, Observations, detectable_change

METRICS = {
    "kl": {"source": "demo-general", "count": 4, "protocol": "blocks", "seq_len": 32},
    "fluency": {},
    "toxicity": {
        "source": "demo-angry",
        "count": 4,
        "scorer": "lexicon",
        "generations": 2,
        "max_new_tokens": 8,
    },
}
SITE = "model.layers.0.mlp.up_proj"


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert float(kl_per_token(p.log(), q.log())) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6
    )


def test_kl_is_zero_of_the_original_and_grows_with_the_circuit(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    few, many = (Circuit("neuron", {SITE: tuple(range(n))}) for n in (5, 200))
    before = fingerprint(model)
    results = evaluate(
        model,
        tokenizer,
        METRICS,
        variants={"few": lambda: ablated(model, few), "many": lambda: ablated(model, many)},
    )
    require_same(before, fingerprint(model))
    values = [results.find("kl", name).value for name in ("original", "few", "many")]
    assert values[0] == 0
    assert 0 < values[1] < values[2]
    fluent = [results.find("fluency", name) for name in ("original", "many")]
    assert all(m.value > 1 and m.n == 4 and m.split == "test" for m in fluent)
    with pytest.raises(UserError, match=r"metric kl .*'few'"):
        evaluate(model, tokenizer, {"kl": METRICS["kl"]}, variants={"few": ablated(model, few)})
    with pytest.raises(UserError, match=r"fluency.*toxicity"):
        evaluate(model, tokenizer, ["fluency"])


def _seen(variant: str, *sums: float) -> Evaluation:
    return Evaluation(
        variant, (Observations("toxicity.mean", "test", "score", "lower", sums, (1.0,) * len(sums)),)
    )


def test_power_by_hand() -> None:
    before, after = _seen("original", 1.0, 0.0, 1.0, 0.0), _seen("ablated", 0.0, 0.0, 1.0, 1.0)
    n, x = detectable_change(before.observations[0], after.observations[0]) or (0, 0.0)
    assert n == 4
    assert x == pytest.approx(2.801585 * math.sqrt(2 / 3) / 2)  # changes −1, 0, 0, 1


def test_the_effect_net_of_the_null_is_a_difference() -> None:
    evaluations = [_seen("original", 1.0, 1.0), _seen("random@3", 1.0, 0.5), _seen("ablated", 0.0, 0.5)]
    found = make_results(evaluations, {}, baselines=["random@3"]).difference(
        "toxicity.mean", "ablated", "random@3"
    )
    assert found.value == pytest.approx(-0.5)
