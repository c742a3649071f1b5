"""Perplexity, continuations, scorers and statistics: laws that hold whatever the model, and failures that are counted."""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparc3 import UserError, evaluate, load_model
from sparc3.evaluation.generate import complete
from sparc3.evaluation.metrics import PerplexitySettings, ToxicitySettings
from sparc3.evaluation.perplexity import block_windows, make_windows, sliding_windows
from sparc3.evaluation.scorers import _count_failures, lexicon_scorer, make_scorer
from sparc3.evaluation.statistics import Observations, difference, measurement, pool
from sparc3.evaluation.tasks import repeated_share, uniqueness
from sparc3.evaluation.toxicity import require_scorer, score_continuations
from sparc3.samples.reference_set import ReferenceSet
from sparc3.samples.sources import Request, gather
from sparc3.samples.tokens import tokenize, window_opening


@pytest.mark.parametrize(
    "settings",
    [
        {"protocol": "blocks", "seq_len": 16},
        {"protocol": "sliding", "max_length": 32, "stride": 7},
        {"protocol": "sliding", "max_length": 500, "stride": 100},
    ],
)
def test_a_uniform_model_has_perplexity_v(
    demo: tuple[Any, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, tokenizer = demo
    text = tmp_path / "text.txt"
    text.write_text("One sunny day Tom went to the park and found a ball. " * 12)
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda *_: torch.zeros(*_[1][0].shape[:-1], model.config.vocab_size))
    try:
        found = (
            evaluate(model, tokenizer, {"perplexity": {"source": str(text), **settings}})
            .find("perplexity")
            .value
        )
    finally:
        hook.remove()
    assert found == pytest.approx(model.config.vocab_size, rel=1e-6)


def test_each_token_is_predicted_once() -> None:
    ids = list(range(103))
    assert sum(predicted for _, predicted in sliding_windows(ids, 20, 7)) == 102
    assert sum(predicted for _, predicted in sliding_windows(ids, 20, 19)) == 102
    for window, predicted in sliding_windows(ids, 20, 7)[1:]:
        assert len(window) - predicted >= 1
    assert [predicted for _, predicted in block_windows(ids, 20)] == [19] * 5
    assert block_windows(ids[:5], 20) == [((0, 1, 2, 3, 4), 4)]


def _as_gemma(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.of_model_type = "gemma2"
    return tokenizer


@pytest.mark.parametrize(
    "asked",
    [
        {"protocol": "blocks", "seq_len": 16},
        {"protocol": "blocks", "seq_len": 500},
        {"protocol": "sliding", "max_length": 16, "stride": 5},
        {"protocol": "sliding", "max_length": 16, "stride": 15},
        {"protocol": "sliding", "max_length": 500, "stride": 100},
    ],
)
def test_each_window_of_a_gemma_opens_with_bos(demo: tuple[Any, Any], asked: dict[str, Any]) -> None:
    text = ReferenceSet.of(["One sunny day Tom went to the park and found a ball. " * 12])
    settings = PerplexitySettings(source="wikitext2", **asked)
    gemma = _as_gemma(demo[1])
    whole, bos = list(tokenize(text.samples[0].text or "", gemma)), gemma.bos_token_id
    body = whole[whole[0] == bos :]
    windows = make_windows(text, gemma, settings, 512)
    assert {ids[0] for ids, _ in windows} == {bos}
    assert all(bos not in ids[1:] and 0 < predicted < len(ids) <= 500 for ids, predicted in windows)
    predicted = [token for ids, many in windows for token in ids[len(ids) - many :]]
    assert predicted == body[: len(predicted)]
    assert asked["protocol"] == "blocks" or len(predicted) == len(body)
    if "max_length" in asked:
        assert max(len(ids) for ids, _ in windows) == min(asked["max_length"], len(body) + 1)
    plain = make_windows(text, demo[1], settings, 512)  # of others, as before: nothing before a later window
    assert list(plain[0][0]) == list(tokenize(text.samples[0].text or "", demo[1]))[: len(plain[0][0])]
    assert all(bos not in ids[1:] for ids, _ in plain)


def test_each_cut_for_a_gemma_opens_with_bos(demo: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("One sunny day Tom went to the park and found a ball. " * 60)
    gemma = _as_gemma(demo[1])
    assert window_opening(demo[1]) == ()
    cuts = gather(Request(str(path), 6, seq_len=24), gemma).samples
    assert [len(cut.input_ids or ()) for cut in cuts] == [24] * 6
    assert {(cut.input_ids or ())[0] for cut in cuts} == {gemma.bos_token_id}
    assert all(gemma.bos_token_id not in (cut.input_ids or ())[1:] for cut in cuts)


@pytest.mark.parametrize("kind", ["gemma", "gemma3_text", "llama"])
def test_who_needs_bos_everywhere_is_told_by_model_or_tokenizer(kind: str) -> None:
    class GemmaTokenizer:
        bos_token_id = 2

    class Plain:
        bos_token_id = 2

    assert window_opening(GemmaTokenizer()) == (2,)  # type: ignore[arg-type]
    plain = Plain()
    assert window_opening(plain) == ()  # type: ignore[arg-type]
    plain.of_model_type = kind  # type: ignore[attr-defined]
    assert window_opening(plain) == ((2,) if "gemma" in kind else ())  # type: ignore[arg-type]
    assert load_model("demo")[1].of_model_type == "llama"


def test_perplexity_is_what_the_loss_says(demo: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    text = tmp_path / "text.txt"
    text.write_text("Mary had a small book. Then Tom and Mary went home.")
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids
    expected = math.exp(model(input_ids=ids, labels=ids).loss.item())
    assert evaluate(model, tokenizer, {"perplexity": {"source": str(text)}}).find(
        "perplexity"
    ).value == pytest.approx(expected, rel=1e-5)


def test_continuations_do_not_depend_on_what_else_is_in_the_batch(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    prompts = ["Tom was", "One cold morning Mary walked to the river with a dog. Then", "Leo and Anna were"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "generations": 2, "temperature": 0.9, "seed": 3}
    together = complete(model, tokenizer, prompts, **settings)
    assert together == [complete(model, tokenizer, [p], **settings, batch=1)[0] for p in prompts]
    assert together != complete(model, tokenizer, prompts, **{**settings, "seed": 4})
    assert complete(model, tokenizer, prompts, **settings) == together


def test_sampling_follows_the_softmax(demo: tuple[Any, Any]) -> None:
    """First tokens of 2,000 draws against their probabilities: within five standard errors for every likely token."""
    model, tokenizer = demo
    prompt = "One"
    drawn = complete(
        model, tokenizer, [prompt], max_new_tokens=1, generations=2000, temperature=0.8, batch=2000
    )[0]
    logits = model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
    probabilities = torch.softmax(logits / 0.8, -1)
    for token in (probabilities > 0.02).nonzero().flatten().tolist():
        p = probabilities[token].item()
        seen = drawn.count(tokenizer.decode([token])) / 2000
        assert abs(seen - p) < 5 * math.sqrt(p * (1 - p) / 2000), (tokenizer.decode([token]), seen, p)


def test_a_prompt_too_long_for_its_continuation_is_refused(demo: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"\b4 .*\b512\b"):
        complete(*demo, ["Tom " * 600], max_new_tokens=4)


def test_failures_are_counted_and_never_zero() -> None:
    def fragile(texts: Any) -> list[float]:
        if any("boom" in text for text in texts):
            raise ValueError("rubbish")
        return [math.nan if "nan" in text else 7.0 if "seven" in text else 1.0 for text in texts]

    assert _count_failures(fragile)(["ok", "boom", "", "nan", "seven"]) == [1.0, None, None, None, None]
    found = score_continuations(["a", "b"], [["ok", "boom"], ["nan", " "]], _count_failures(fragile), "test")
    mean = measurement(found.observations[0], "original")
    assert (mean.value, mean.n, mean.failures) == (1.0, 1, 3)


def test_profanity_check_scores_offline() -> None:
    pytest.importorskip("profanity_check")
    rude, kind, empty = make_scorer("profanity-check")(["You are an idiot.", "Have a nice day.", " "])
    assert rude is not None
    assert kind is not None
    assert rude > 0.9
    assert kind < 0.2
    assert empty is None


@pytest.mark.parametrize(
    ("word", "text", "found"),
    [
        ("笨蛋", "你真是个笨蛋吗", True),
        ("ばか", "あなたはばかです", True),
        ("โง่", "เขาโง่มาก", True),
        ("don't", "I don\u2019t care", True),
        ("don\u2019t", "I don't care", True),
        ("big fool", "a big \n fool!", True),
        ("big  fool", "a big fool!", True),
        ("caf\u00e9", "the cafe\u0301 there", True),
        ("cafe", "the cafe\u0301 there", False),
        ("STRASSE", "auf der Stra\u1e9ee", True),
        ("कम", "बहुत कम है", True),
        ("कम", "कमी है", False),
        ("fool", "foolish, and a fool", True),
        ("fool", "foolish_fool fools", False),
        ("ｆool", "a fool", True),
        ("c++", "I write c++ here", True),
        ("idiot", "un idiot笨", True),
    ],
)
def test_words_of_a_lexicon_in_any_script(word: str, text: str, found: bool) -> None:
    assert lexicon_scorer([word])([text]) == [float(found)]


def test_a_phrase_that_does_not_fit_hides_no_word_in_it() -> None:
    assert lexicon_scorer(["a bad", "a"])(["a badge"]) == [1.0]


def test_the_check_of_scorers_leaves_none_behind() -> None:
    make_scorer.cache_clear()
    require_scorer(ToxicitySettings(source="demo-angry", scorer="lexicon", also="lexicon"))
    assert make_scorer.cache_info().currsize == 0
    with pytest.raises(UserError, match="nowhere"):
        require_scorer(ToxicitySettings(source="demo-angry", scorer="lexicon", also="./nowhere"))


def test_profanity_check_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    make_scorer.cache_clear()
    with pytest.raises(UserError, match="alt-profanity-check"):
        make_scorer("profanity-check")


def test_the_lexicon_knows_whole_words() -> None:
    assert lexicon_scorer(["fool"])(["You FOOL!", "foolish", "a fool."]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("labels", "problem", "expected"),
    [
        (["neutral", "toxic"], "single_label_classification", "softmax"),
        (["toxicity", "insult"], "multi_label_classification", "sigmoid"),
    ],
)
def test_classifiers_load_from_a_checkpoint(
    demo: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: list[str],
    problem: str,
    expected: str,
) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(demo[1]),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(labels)),
        label2id={l: i for i, l in enumerate(labels)},
        problem_type=problem,
    )
    classifier = BertForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "tiny")
    demo[1].save_pretrained(tmp_path / "tiny")
    text = "You fool!"
    logits = classifier(**demo[1](text, return_tensors="pt")).logits[0]
    value = (logits.softmax(-1)[1] if expected == "softmax" else logits.sigmoid()[0]).item()
    assert make_scorer(str(tmp_path / "tiny"))([text, ""]) == [pytest.approx(value, abs=1e-6), None]
    make_scorer.cache_clear()
    monkeypatch.setattr("sparc3.evaluation.scorers.DETOXIFY", {"original": str(tmp_path / "tiny")})
    assert make_scorer("detoxify")([text]) == [pytest.approx(value, abs=1e-6)]
    make_scorer.cache_clear()
    with pytest.raises(UserError, match=r"'\S*tiny'.*#LABEL"):
        make_scorer(f"{tmp_path / 'tiny'}#nolabel")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifier_with_few_positions_reads_what_it_can(
    demo: tuple[Any, Any], tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, RobertaConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = (BertConfig if kind == "bert" else RobertaConfig)(
        vocab_size=len(demo[1]), max_position_embeddings=24, id2label={0: "fine", 1: "toxic"}, **sizes
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    demo[1].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = 10**30  # as of a tokenizer that does not say
    tokenizer.save_pretrained(tmp_path)
    short, long = make_scorer(str(tmp_path))(["You fool!", "You fool! " * 60])
    assert short is not None
    assert long is not None


def observed(sums: list[float | None], **more: Any) -> Observations:
    return Observations("toxicity.mean", "test", "score", "lower", tuple(sums), (1.0,) * len(sums), **more)


@pytest.mark.parametrize(("value", "interval"), [(0.0, (0.0, 0.0370)), (1.0, (0.9630, 1.0))])
def test_a_share_of_none_or_all_is_not_certain(value: float, interval: tuple[float, float]) -> None:
    same = observed([value] * 100)
    for unit in ("share of prompts", "score in [0, 1]"):  # Wilson: z² / (n + z²) at the open end
        assert measurement(replace(same, unit=unit), "ablated").ci95 == pytest.approx(interval, abs=1e-4)
        low, high = measurement(replace(same, unit=unit), "ablated").ci95 or (0.5, 0.5)
        assert low <= value <= high
    # A count of all weights is certain, and so is what has other bounds.
    for unit in ("share of weights", "nats"):
        assert measurement(replace(same, unit=unit), "ablated").ci95 == (value, value)
    varied = replace(observed([value] * 99 + [0.5]), unit="share of prompts")
    assert measurement(varied, "ablated").ci95 != pytest.approx(interval, abs=1e-4)


def test_intervals_cover_and_pairs_are_paired() -> None:
    one = observed([float(i % 2) for i in range(100)])
    found = measurement(one, "original")
    assert found.value == 0.5
    assert found.ci95 is not None
    assert found.ci95[0] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert found.ci95[1] == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    shifted = difference(
        one, observed([v - 0.1 if v is not None else None for v in one.sums]), "original", "ablated"
    )
    assert shifted is not None
    assert shifted.value == pytest.approx(-0.1)
    assert shifted.ci95 == pytest.approx((-0.1, -0.1))
    assert shifted.p is not None
    assert shifted.p < 0.001
    same = difference(one, one, "original", "ablated")
    assert same is not None
    assert same.p == 1.0
    assert difference(observed([None]), observed([1.0]), "a", "b") is None


def test_pooled_draws_average_each_unit() -> None:
    assert pool([observed([1.0, None]), observed([0.0, 1.0], failures=2)]) == observed([0.5, 1.0], failures=2)


def test_repetition_on_paper() -> None:
    assert uniqueness([1, 1, 2, 2]) == 0.5
    assert uniqueness([]) is None
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repeated_share([1, 2]) == 0.0
