"""A sample's figures are its own beside any other, also where the model's positions change with the length."""

from typing import Any

import pytest
import torch
from tiny import ROPE_3, Words, tiny

from sparc3 import ReferenceSet, attribute
from sparc3.evaluation.generate import complete
from sparc3.evaluation.perplexity import negative_log_likelihoods
from sparc3.models.load import rope_switches
from sparc3.samples.batches import run_longest_first

SHORT, LONG, CROSSING = [5, 9, 7, 30, 12], list(range(3, 15)), [6, 3, 9, 20, 11, 8, 17]


@pytest.fixture(scope="module")
def model() -> Any:
    rope = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8},
        **{"short_factor": [1.0, 1.0], "long_factor": [4.0, 9.0]},
    }
    return tiny("phi3", rope_parameters=rope, original_max_position_embeddings=8)


class Ids(Words):
    pad_token_id, eos_token_id = 0, None

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(f"w{int(i)}" for i in ids if i > 2)


def test_where_positions_change(model: Any) -> None:
    assert rope_switches(model) == (8,)
    assert rope_switches(tiny("llama", rope_parameters=ROPE_3)) == ()


def test_scores_alone_and_beside_a_long_sample(model: Any) -> None:
    def score(*samples: list[int]) -> dict[str, torch.Tensor]:
        settings: dict[str, Any] = {"neuron": "signed", "batch_tokens": 1000}
        return dict(attribute(model, ReferenceSet.of(list(samples)), progress=False, **settings))

    short, long, both = score(SHORT), score(LONG), score(SHORT, LONG)
    for name, values in both.items():
        torch.testing.assert_close(values, (short[name] + long[name]) / 2, rtol=1e-5, atol=1e-7)


def test_perplexity_alone_and_beside_a_long_sample(model: Any) -> None:
    windows = [(tuple(ids), len(ids) - 1) for ids in (SHORT, LONG, CROSSING)]
    alone = [negative_log_likelihoods(model, [window], False)[0] for window in windows]
    assert negative_log_likelihoods(model, windows, False) == pytest.approx(alone, rel=1e-6)


def test_continuations_alone_and_beside_others(model: Any) -> None:
    prompts = [tuple(ids) for ids in (SHORT, LONG, CROSSING, CROSSING[::-1], LONG[3:])]
    alone = [complete(model, Ids(), [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert complete(model, Ids(), prompts, max_new_tokens=6) == alone


def test_items_apart_share_no_batch_and_keep_their_order() -> None:
    seen: list[list[int]] = []

    def work(some: list[int]) -> list[int]:
        seen.append(some)
        return [10 * item for item in some]

    holder = tiny("llama")
    found = run_longest_first(
        [3, 8, 1, 6, 5],
        int,
        work,
        size=2,
        memory_key=(holder, "x"),
        label="",
        unit="",
        progress=False,
        separate_by=lambda i: i > 4,
    )
    assert found == [30, 80, 10, 60, 50]
    assert seen == [[8, 6], [5], [3, 1]]
