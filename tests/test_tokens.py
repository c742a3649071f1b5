"""Prompt and completion are the tokens of the joined text, opened once and closed by nothing, for every kind of tokenizer."""

import copy
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparc3 import ReferenceSet, Sample, UserError, evaluate
from sparc3.demo.text import texts
from sparc3.evaluation.generate import complete, read_prompts
from sparc3.models.load import load_model, load_tokenizer
from sparc3.samples.batches import encode, join_completions
from sparc3.samples.tokens import decode_after, join_characters, plain_ids, read_sample, texts_of, tokenize

Pair = tuple[Any, Any]
MARKS = ["<unk>", "<s>", "</s>"]
TIKTOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel.alphabet()


def _bytes(add_prefix_space: bool) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    return made, trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS, initial_alphabet=BYTES)


def _tiktoken() -> tuple[Tokenizer, Any]:
    from tokenizers import Regex

    made, trainer = _bytes(False)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TIKTOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made, trainer


def _unigram(prepend: str) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    made.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return made, trainers.UnigramTrainer(vocab_size=300, special_tokens=MARKS, unk_token="<unk>")


def _llama() -> tuple[Tokenizer, Any]:
    """As the files of Llama 2 have it: a normaliser writes the prefix, and nothing is split beforehand."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made, trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS)


KINDS = {
    "bytes": lambda: _bytes(False),
    "bytes, prefix": lambda: _bytes(True),
    "tiktoken": _tiktoken,
    "unigram, prefix": lambda: _unigram("always"),
    "unigram, first": lambda: _unigram("first"),
    "unigram": lambda: _unigram("never"),
    "llama": _llama,
}
FRAMES = {"nothing": "$A", "opens": "<s> $A", "closes": "$A </s>", "both": "<s> $A </s>"}


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, str], PreTrainedTokenizerFast]:
    made = {}
    corpus = [text.text for kind in ("story", "angry") for text in itertools.islice(texts(kind, "train"), 60)]
    for name, start in KINDS.items():
        tokenizer, trainer = start()
        tokenizer.train_from_iterator(corpus, trainer)
        if name == "llama":
            tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        for frame, template in FRAMES.items():
            tokenizer.post_processor = processors.TemplateProcessing(
                single=template, pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
            copy = Tokenizer.from_str(tokenizer.to_str())
            made[name, frame] = PreTrainedTokenizerFast(
                tokenizer_object=copy, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
            )
    return made


WORDS = (
    "Tom",
    "was",
    "angry",
    "the",
    "there",
    "a",
    "red",
    "garden",
    "said",
    "he",
    "s",
    "ing",
    "7",
    "é",
    "我",
    "\n",
)
PIECES = st.lists(
    st.tuples(st.sampled_from(WORDS), st.sampled_from(("", " ", "  ", ", "))), min_size=1, max_size=6
)
TEXTS = PIECES.map(lambda pieces: "".join(word + gap for word, gap in pieces))


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_saved_with_truncation_and_padding_cuts_and_fills_nothing(
    trained: dict[tuple[str, str], Any], kind: str, tmp_path: Path
) -> None:
    text, whole = "Tom was angry at the red garden. " * 9, copy.deepcopy(trained[kind, "opens"])
    wanted = tokenize(text, whole)
    whole.backend_tokenizer.enable_truncation(8)
    whole.backend_tokenizer.enable_padding(length=64, pad_id=0, pad_token="<unk>")
    whole.save_pretrained(tmp_path)
    assert '"max_length": 8' in (tmp_path / "tokenizer.json").read_text()
    assert tokenize(text, load_tokenizer(tmp_path)) == wanted


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, space=st.sampled_from(("", " ", "  ")), completion=TEXTS, opened=st.booleans())
def test_prompt_and_completion_are_the_joined_text(
    trained: dict[tuple[str, str], Any],
    kind: str,
    frame: str,
    prompt: str,
    space: str,
    completion: str,
    opened: bool,
) -> None:
    tokenizer = trained[kind, frame]
    text, follows = ("<s>" if opened else "") + prompt, space + completion
    read = read_sample(Sample(text=text, completion=follows), tokenizer)
    opens = frame in ("opens", "both") and not opened
    whole = ([1] if opens else []) + _plain(tokenizer, text + follows)
    assert [*read.prompt, *read.completion] == whole
    assert 2 not in whole
    assert whole.count(1) == (opens or opened)
    assert read.text == text
    alone = tokenize(text, tokenizer)
    assert list(alone) == ([1] if opens else []) + _plain(tokenizer, text)
    # The prompt without the spaces at its end, as far as its tokens are those of the whole.
    before = tokenize(text.rstrip(" "), tokenizer)
    shared = len(read.prompt)
    assert read.prompt == before[:shared]
    assert shared == len(before) or shared == len(whole) or before[shared] != whole[shared]
    (joined,) = join_completions(ReferenceSet.of([Sample(text=text, completion=follows)]), tokenizer)
    assert list(joined.input_ids or ()) == whole


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_that_begins_with_a_space(
    trained: dict[tuple[str, str], Any], kind: str, frame: str
) -> None:
    tokenizer = trained[kind, frame]
    r = random.Random(0)
    for text in itertools.islice(texts("angry", "test"), 30):
        words = text.text.split(" ")
        cut = r.randrange(1, len(words))
        prompt, completion = " ".join(words[:cut]), " " + " ".join(words[cut:])
        read = read_sample(Sample(text=prompt, completion=completion), tokenizer)
        assert read.prompt == tokenize(prompt, tokenizer)
        assert not "".join(tokenizer.convert_ids_to_tokens(read.completion)).startswith("▁▁")
        assert decode_after(read.prompt, read.completion, tokenizer) == completion
        # A space at the end of the prompt belongs to the word behind it.
        moved = read_sample(Sample(text=prompt + " ", completion=completion[1:]), tokenizer)
        assert (moved.prompt, moved.completion) == (read.prompt, read.completion)
        # Token ids with a completion are read as the text that they are.
        as_ids = read_sample(Sample(input_ids=read.prompt, completion=completion), tokenizer)
        assert as_ids.prompt + as_ids.completion == read.prompt + read.completion


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_label_is_the_one_token_that_follows(
    trained: dict[tuple[str, str], Any], kind: str, frame: str
) -> None:
    tokenizer = trained[kind, frame]
    prompt = "Tom was angry and"
    labels = [
        (" " + word, ids[-1])
        for word in ("Tom", "said", "the", "was")
        if (ids := _plain(tokenizer, f"{prompt} {word}"))[:-1] == _plain(tokenizer, prompt)
    ]
    assert len(labels) >= 2
    (one, other), *_ = itertools.combinations(labels, 2)
    sample = Sample(text=prompt, target=one[0], contrast=other[0])
    (made,) = encode(ReferenceSet.of([sample]), tokenizer, "contrast", context=64, vocabulary=500)
    assert (made.ids, made.tokens, made.against) == (tokenize(prompt, tokenizer), (one[1],), (other[1],))


def test_a_boundary_inside_a_token_is_the_completions(trained: dict[tuple[str, str], Any]) -> None:
    tokenizer = trained["bytes", "opens"]
    assert len(plain_ids(" angry", tokenizer)) == 1
    read = read_sample(Sample(text="the ang", completion="ry"), tokenizer)
    assert read.prompt == tokenize("the", tokenizer)
    assert read.completion == plain_ids(" angry", tokenizer)


def test_a_completion_that_nothing_precedes_is_named(trained: dict[tuple[str, str], Any]) -> None:
    samples = ReferenceSet.of([Sample(text="the", completion=" end"), Sample(text=" ang", completion="ry")])
    with pytest.raises(UserError, match="sample 1"):
        encode(samples, trained["bytes", "nothing"], "completion", context=64, vocabulary=500)


@pytest.fixture(scope="module")
def closing(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The embedded model with a tokenizer that closes every text."""
    from sparc3.models.load import DEMO

    folder = tmp_path_factory.mktemp("closing") / "model"
    shutil.copytree(DEMO, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    frame = content["post_processor"]
    frame["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    frame["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    path.write_text(json.dumps(content))
    return load_model(folder)


def test_figures_do_not_hang_on_what_closes_a_text(demo: Pair, closing: Pair, tmp_path: Path) -> None:
    assert closing[1]("Tom")["input_ids"][-1] == 2
    rows = [
        {"text": t.prompt, "target": " Tom", "contrast": " Anna"}
        for t in itertools.islice(texts("angry", "test"), 3)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: dict[str, Any] = {"source": str(tmp_path / "s.jsonl"), "count": 3}
    metrics = {
        "perplexity": {"source": asked["source"], "max_length": 32, "stride": 16},
        "toxicity": {**asked, "scorer": "lexicon", "generations": 2, "max_new_tokens": 8},
        "fluency": {},
        "repetition": {**asked, "max_new_tokens": 8},
        "ioi": asked,
    }
    one, other = (evaluate(*pair, metrics) for pair in (demo, closing))
    assert list(one) == list(other)


def test_a_rendered_chat_has_one_first_token(demo: Pair) -> None:
    model, tokenizer = demo
    prompts, shown = read_prompts(ReferenceSet.of(["<s>Tom was angry", "Tom was angry"]), tokenizer)
    assert prompts[0] == prompts[1]
    assert shown == ["<s>Tom was angry", "Tom was angry"]
    written = complete(model, tokenizer, ["<s>Tom was angry", "Tom was angry"], max_new_tokens=6)
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", ["bytes", "tiktoken"])
def test_a_character_of_several_tokens_stands_with_the_first(
    trained: dict[tuple[str, str], Any], kind: str
) -> None:
    tokenizer, text = trained[kind, "nothing"], "Tom said 私は🙂 and नमस्ते."
    ids = plain_ids(text, tokenizer)
    found = texts_of(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found).lstrip() == text
    joined = join_characters(found, [1.0] * len(ids))
    assert all(piece for _, piece, _ in joined)
    assert sum(value for *_, value in joined) == len(ids) > len(joined)
    # The first byte of a character that never ends is a part of nothing.
    assert texts_of(tokenizer, plain_ids("私", tokenizer)[:1])[0].strip() == "\ufffd"
