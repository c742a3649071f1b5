"""Texts are generated as the recipe says: nothing of generation_config.json but the end-of-text token counts."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sparc3 import UserError, evaluate
from sparc3.evaluation.generate import complete
from sparc3.models.load import load_model
from sparc3.samples.reference_set import Sample
from sparc3.samples.tokens import read_sample

PROMPTS = ["The little dog", "Once upon a time there was"]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_model("demo")


def _write(demo: tuple[Any, Any]) -> list[list[str]]:
    model, tokenizer = demo
    return complete(model, tokenizer, PROMPTS, max_new_tokens=12)


@pytest.mark.parametrize(
    "leak",
    [
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 400))},
        {"begin_suppress_tokens": list(range(3, 400))},
        {"bad_words_ids": [[i] for i in range(3, 400)]},
        {"sequence_bias": [[[i], -50.0] for i in range(3, 400)]},
        {"forced_eos_token_id": 5},
        {"encoder_repetition_penalty": 5.0},
        {"repetition_penalty": 9.0},
        {"exponential_decay_length_penalty": (1, 9.0)},
        {"guidance_scale": 3.0},
        {"max_time": 1e-9},
        {"min_new_tokens": 12},
        {"min_length": 60},
        {"stop_strings": ["."]},
        {"return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 2},
        {"token_healing": True},
        {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0}},
        {"cache_implementation": "static"},
        {"max_length": 3},
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
    ],
    ids=lambda leak: next(iter(leak)),
)
def test_settings_of_the_model_do_not_leak(demo: tuple[Any, Any], leak: dict[str, Any]) -> None:
    model, _ = demo
    wanted, own = _write(demo), model.generation_config
    changed = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    for key, value in leak.items():
        setattr(changed, key, value)
    model.generation_config = changed
    try:
        assert _write(demo) == wanted
        assert model.generation_config is changed
    finally:
        model.generation_config = own


@pytest.mark.parametrize("metric", ["toxicity", "repetition"])
def test_token_ids_and_their_text_are_the_same_prompt(
    demo: tuple[Any, Any], tmp_path: Path, metric: str
) -> None:
    model, tokenizer = demo
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    settings: dict[str, Any] = {"max_new_tokens": 12, "count": 2}
    if metric == "toxicity":
        settings |= {"scorer": "lexicon", "generations": 2, "temperature": 0.7}
    texts, as_ids = (
        evaluate(model, tokenizer, {metric: {**settings, "source": str(tmp_path / name)}})
        for name in ("texts.jsonl", "ids.jsonl")
    )
    assert list(texts) == list(as_ids)


def test_ids_beyond_the_embeddings_are_refused(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    beyond = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(UserError, match=str(beyond)):
        complete(model, tokenizer, [(1, 2), (1, beyond)], max_new_tokens=2)


def test_a_text_ends_where_model_or_tokenizer_says(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    [[whole], _] = complete(model, tokenizer, PROMPTS, max_new_tokens=12)
    ends = read_sample(Sample(text=PROMPTS[0], completion=whole), tokenizer).completion[5]
    own, other = model.generation_config.eos_token_id, copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(ends)
    assert other.eos_token_id == ends != own
    cut = []
    try:
        cut.append(complete(model, other, PROMPTS, max_new_tokens=12)[0][0])
        model.generation_config.eos_token_id = [own, ends]
        cut.append(complete(model, tokenizer, PROMPTS, max_new_tokens=12)[0][0])
        model.generation_config.eos_token_id = None
        cut.append(complete(model, other, PROMPTS, max_new_tokens=12)[0][0])
    finally:
        model.generation_config.eos_token_id = own
    assert all(whole.startswith(text) and 0 < len(text) < len(whole) for text in cut)


@pytest.mark.parametrize(("end", "warned"), [(" ", True), ("", False), ("\n", False)])
def test_prompts_that_end_with_a_space_are_told(
    demo: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str, warned: bool
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Tom {n}{end}"}) + "\n" for n in range(3)))
    asked = {"source": str(path), "count": 3, "max_new_tokens": 2}
    evaluate(*demo, {"repetition": asked})
    assert ("3 of the 3 prompts of repetition" in caplog.text) == warned


def test_a_padding_token_without_an_embedding(demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo
    wanted = _write(demo)
    monkeypatch.setattr(tokenizer, "_pad_token", "[PAD]", raising=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        assert _write((model, tokenizer)) == wanted
