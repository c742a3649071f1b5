"""What is no number is counted and told, never averaged in: NaN and Inf, scorers that fail, samples at the edge; through the front door."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from sparc3 import ReferenceSet, Sample, UserError, attribute, evaluate, load_model
from sparc3.errors import NonFinite, Sparc3Error
from sparc3.evaluation import scorers
from sparc3.evaluation.generate import complete
from sparc3.evaluation.scorers import _count_failures

Pair = tuple[Any, Any]
BAD = 5
"""The token at which the broken model breaks."""


@contextmanager
def broken(model: Any, value: float = math.nan) -> Iterator[None]:
    """Inside, the embedding of token BAD is not finite, so that every text with that token in it is lost and no other."""
    weight = model.get_input_embeddings().weight
    kept = weight[BAD].clone()
    with torch.no_grad():
        weight[BAD] = value
    try:
        yield
    finally:
        with torch.no_grad():
            weight[BAD] = kept


@pytest.fixture(scope="module")
def demo_untied() -> Pair:
    """The demo model with its unembedding apart, so that an embedding that is NaN does not reach every logit."""
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model, tokenizer


def words(tokenizer: Any) -> tuple[str, str]:
    """A prompt that holds the broken token, and one that does not."""
    bad = "Tom was angry and yelled, " + tokenizer.decode([BAD])
    good = "Tom was"
    assert BAD in tokenizer(bad)["input_ids"]
    assert BAD not in tokenizer(good)["input_ids"]
    return bad, good


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("unit", ["neuron", "head", "weight"])
def test_a_sample_that_is_not_finite_is_named_or_left_out(demo_untied: Pair, value: float, unit: str) -> None:
    model, tokenizer = demo_untied
    bad, good = words(tokenizer)
    asked: dict[str, Any] = {
        "tokenizer": tokenizer,
        "unit": unit,
        "sites": ("attn.o",) if unit == "head" else ("mlp.up",),
    }
    alone = attribute(model, [good, good + " a"], **asked)
    with broken(model, value):
        with pytest.raises(NonFinite, match=r"sample 1 .*model\.layers"):
            attribute(model, [good, bad, good + " a"], **asked)
        if unit != "weight":
            left = attribute(model, [good, bad, good + " a"], **asked, non_finite="skip")
            assert (left.provenance["samples"], left.provenance["skipped"]) == (2, [1])
            assert all(torch.allclose(left[name], alone[name], rtol=1e-4, atol=1e-8) for name in alone)
            with pytest.raises(Sparc3Error, match=r"\b2 samples.*bfloat16"):
                attribute(model, [bad, bad], **asked, non_finite="skip")


def test_windows_and_prompts_that_are_not_finite_are_failures(
    demo_untied: Pair, tmp_path: Path, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = demo_untied
    bad, good = words(tokenizer)
    text = jsonl("text.jsonl", [{"text": good + " " + bad}] + [{"text": "Tom was a"}] * 6)
    prompts = jsonl(
        "p.jsonl",
        [
            {"text": bad, "target": " Tom", "contrast": " Anna"},
            {"text": good, "target": " Tom", "contrast": " Anna"},
        ],
    )
    metrics: dict[str, Any] = {
        "perplexity": {"source": str(text), "protocol": "blocks", "seq_len": 8},
        "kl": {"source": str(text), "protocol": "blocks", "seq_len": 8},
        "ioi": {"source": str(prompts), "count": 2},
        "toxicity": {
            "source": str(prompts),
            "count": 2,
            "scorer": "lexicon",
            "generations": 2,
            "max_new_tokens": 4,
        },
        "repetition": {"source": str(prompts), "count": 2, "max_new_tokens": 4},
        "fluency": {},
    }
    before = evaluate(model, tokenizer, metrics)
    assert all(m.failures == 0 or m.metric == "fluency" for m in before)
    results = evaluate(model, tokenizer, metrics, variants={"ablated": lambda: broken(model)})
    for metric in ("ioi.accuracy", "ioi.logit_difference", "toxicity.mean", "toxicity.rate", "rur.mean"):
        whole, part = results.find(metric), results.find(metric, "ablated")
        assert whole.failures == 0
        assert part.n == 1, metric
        assert part.failures == (2 if metric.startswith("toxicity") else 1), metric
    for metric in ("perplexity", "kl"):
        part = results.find(metric, "ablated")
        assert part.failures == 1
        assert part.n == results.find(metric).n - 1
        assert part.value is not None
        assert math.isfinite(part.value)
    assert abs(results.find("kl", "ablated").value or 0) < 1e-6, "the windows that are left are untouched"
    assert re.search(r"perplexity.*ablated.*\b1 failures", caplog.text)
    results.save(tmp_path / "r.json")


def test_an_overflow_in_low_precision_is_a_failure_and_no_figure(demo: Pair) -> None:
    model = load_model("demo", dtype="bfloat16", device="cpu")[0]
    with torch.no_grad():
        for matrix in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj):
            matrix.weight.mul_(1e20)
    found = evaluate(
        model, demo[1], {"perplexity": {"source": "demo-general", "count": 4, "max_length": 32, "stride": 16}}
    )
    only = found.find("perplexity")
    assert (only.value, only.ci95, only.n) == (None, None, 0)
    assert only.failures > 0
    with pytest.raises(NonFinite, match=r"sample 0 .*model\.layers"):
        attribute(model, ["Tom was angry"], tokenizer=demo[1])


class Stubborn:
    def __getitem__(self, place: int) -> float:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([0.25, math.nan, math.inf, -0.1], [0.25, None, None, None]),
        ([True, numpy.float32(0.5), 1.01, None], [1.0, 0.5, None, None]),
        (["0.5", "toxic", b"1", {}], [None] * 4),
        ([0.5], [None] * 4),
        ([0.5] * 9, [None] * 4),
        (None, [None] * 4),
        (0.5, [None] * 4),
        (Stubborn(), [None] * 4),
        ([[0.5]] * 4, [None] * 4),
        ({0: 1.0}, [None] * 4),
        ([10**400, 0.5, 0.5, 0.5], [None, 0.5, 0.5, 0.5]),
    ],
)
def test_rubbish_from_a_scorer_is_a_failure(
    demo: Pair, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, answers: Any, expected: list[Any]
) -> None:
    def rubbish(texts: Sequence[str]) -> Any:
        return answers if len(texts) == 4 else []

    monkeypatch.setattr(scorers, "lexicon_scorer", lambda words: rubbish)
    scorers.make_scorer.cache_clear()
    prompts = jsonl("p.jsonl", [{"text": f"Tom was angry {i}"} for i in range(4)])
    found = evaluate(
        demo[0],
        demo[1],
        {
            "toxicity": {
                "source": str(prompts),
                "count": 4,
                "scorer": "lexicon",
                "generations": 1,
                "max_new_tokens": 4,
            }
        },
    )
    scorers.make_scorer.cache_clear()
    mean, kept = found.find("toxicity.mean"), [value for value in expected if value is not None]
    assert (mean.n, mean.failures) == (len(kept), 4 - len(kept))
    assert mean.value == (pytest.approx(sum(kept) / len(kept)) if kept else None)


def test_a_scorer_that_raises_loses_only_what_it_cannot_score(caplog: pytest.LogCaptureFixture) -> None:
    def fragile(texts: Sequence[str]) -> list[float]:
        if any("boom" in text for text in texts):
            raise ValueError("rubbish")
        return [0.5] * len(texts)

    with caplog.at_level("WARNING"):
        assert _count_failures(fragile)(["a", "boom", "b", ""]) == [0.5, None, 0.5, None]
    assert len([line for line in caplog.messages if "rubbish" in line]) == 1


def _make_classifier(folder: Path, demo: Pair, value: float | None = None) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(demo[1]),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "fine", 1: "toxic"},
        label2id={"fine": 0, "toxic": 1},
    )
    model = BertForSequenceClassification(config)
    if value is not None:
        torch.nn.init.constant_(model.classifier.bias, value)
    model.save_pretrained(folder)
    demo[1].save_pretrained(folder)
    return folder


def test_a_classifier_that_gives_nan_measures_nothing(
    demo: Pair, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    folder = _make_classifier(tmp_path / "nan", demo, math.nan)
    prompts = jsonl("p.jsonl", [{"text": "Tom was angry"}, {"text": "Anna was"}])
    asked = {"source": str(prompts), "count": 2, "scorer": str(folder), "generations": 1, "max_new_tokens": 4}
    mean = evaluate(demo[0], demo[1], {"toxicity": asked}).find("toxicity.mean")
    assert (mean.value, mean.n, mean.failures) == (None, 0, 2)


def test_a_classifier_without_a_padding_token_scores_all_the_same(demo: Pair, tmp_path: Path) -> None:
    folder = _make_classifier(tmp_path / "c", demo)
    texts = ["You fool!", "Tom and Anna went home to eat", "a"]
    padded = scorers.make_scorer(str(folder))(texts)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"})
    )
    scorers.make_scorer.cache_clear()
    assert scorers.make_scorer(str(folder))(texts) == pytest.approx(padded, abs=1e-6)
    scorers.make_scorer.cache_clear()


class Bare:
    """The demo's tokenizer without a padding, a first and a last token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pad_token_id = self.bos_token_id = self.eos_token_id = None
        self.all_special_ids: list[int] = []

    def __call__(self, text: Any, **options: Any) -> Any:
        return self.tokenizer(text, **{**options, "add_special_tokens": False})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def test_a_tokenizer_without_pad_or_first_token(demo: Pair) -> None:
    model, bare = demo[0], Bare(demo[1])
    one, many = (
        complete(model, bare, ["Tom was angry", "Tom"], max_new_tokens=6),
        complete(model, bare, ["Tom"], max_new_tokens=6),
    )  # type: ignore[arg-type]
    assert one[1] == many[0]
    assert attribute(model, ["Tom was angry", "Tom"], tokenizer=bare).provenance["samples"] == 2  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"prompt 1\b"):
        complete(model, bare, ["Tom", ""], max_new_tokens=2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sample 0\b"):
        attribute(model, [Sample(text="")], tokenizer=bare)  # type: ignore[arg-type]


def test_samples_of_one_token(demo: Pair) -> None:
    for target, sample in (
        ("predicted", Sample(input_ids=(7,))),
        ("completion", Sample(input_ids=(7,), completion=" Tom")),
        ("label", Sample(input_ids=(7,), target=" Tom")),
    ):
        scores = attribute(demo[0], [sample], tokenizer=demo[1], target=target)
        assert all(tensor.isfinite().all() for tensor in scores.values())
        assert any(tensor.abs().sum() > 0 for tensor in scores.values())
    with pytest.raises(UserError, match=r"sample 0\b.*target next"):
        attribute(demo[0], [[7]], target="next")
    assert complete(demo[0], demo[1], [demo[1].decode([7])], max_new_tokens=3)


def test_empty_completions_are_failures_and_no_zeros(
    demo: Pair, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = jsonl("p.jsonl", [{"text": "Tom was angry"}, {"text": "Anna was"}])
    for module in ("toxicity", "tasks"):
        monkeypatch.setattr(
            f"sparc3.evaluation.{module}.complete",
            lambda model, tokenizer, prompts, generations=1, **_: [
                ["", "You fool!"][:generations] for _ in prompts
            ],
        )
    asked = {"source": str(prompts), "count": 2, "max_new_tokens": 3}
    found = evaluate(
        demo[0],
        demo[1],
        {"toxicity": {**asked, "scorer": "lexicon", "generations": 2}, "repetition": asked, "fluency": {}},
    )
    assert (found.find("toxicity.mean").value, found.find("toxicity.mean").failures) == (1.0, 2)
    assert (found.find("rur.mean").value, found.find("rur.mean").n, found.find("rur.mean").failures) == (
        None,
        0,
        2,
    )
    assert found.find("fluency").failures == 2


def test_repeated_samples_are_told(demo: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="sparc3"):
        attribute(demo[0], ["Tom was", "Tom was", "Anna was"], tokenizer=demo[1])
    assert "1 of 3 samples" in caplog.text
    assert ReferenceSet((Sample("a"), Sample("a"), Sample("a"))).repeats == 2


def test_a_search_never_takes_a_circuit_whose_damage_it_cannot_see() -> None:
    """A candidate that breaks a window of the budget is not within it, however well the other windows look."""
    from types import SimpleNamespace

    from sparc3.experiment.search import Trials
    from sparc3.recipe.sections import Tune

    trials = Trials(SimpleNamespace(), Tune(max_kl=0.1), [], [])  # type: ignore[arg-type]
    trials.original = {"perplexity": 10.0, "kl": 0.0}
    assert trials.is_within_budget({"perplexity": 10.0, "kl": 0.0})
    assert not trials.is_within_budget({"kl": 0.0})
    assert not trials.is_within_budget({"perplexity": 10.0})
