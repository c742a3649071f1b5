"""The targets words and logwords: how likely the model is to write any of a list of words next."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import Words, samples, tiny

from sparc3 import Sample, UserError, attribute, load_recipe
from sparc3.attribution.attribute import merge
from sparc3.attribution.options import AttributionOptions, WordsBy
from sparc3.attribution.relevance import target_of
from sparc3.attribution.token_relevance import attribute_tokens
from sparc3.experiment.gather import find_words
from sparc3.models.sites import sites_of
from sparc3.plan.lengths import Lengths
from sparc3.samples.batches import encode, find_word_tokens, make_batches
from sparc3.samples.reference_set import ReferenceSet
from sparc3.samples.tokens import token_of_word
from sparc3.settings import parse

AMONG = (3, 11, 17)
UPS = ("mlp.up",)


@pytest.mark.parametrize("target", ["words", "logwords"])
def test_it_is_the_probability_of_any_of_them_at_each_position(target: str) -> None:
    """With a completion at the positions that predict it and after it, else after every token; batched or not."""
    model = tiny("llama")
    both = ReferenceSet((Sample(text="w5 w7 w9", completion="w21 w22"), Sample(input_ids=(4, 8))))
    encoded = encode(both, Words(), target, context=32, vocabulary=40, words=["w11", 3, "w17", 11])  # type: ignore[arg-type]
    assert [(one.ids, one.positions, one.among) for one in encoded] == [
        ((5, 7, 9, 21, 22), (2, 3, 4), AMONG),
        ((4, 8), (0, 1), AMONG),
    ]
    expected = 0.0
    for one in encoded:
        chances = (
            model(torch.tensor([one.ids])).logits[0].softmax(-1)[list(one.positions)][:, list(AMONG)].sum(-1)
        )
        expected += float((chances.log() if target == "logwords" else chances).sum().detach())
    (batch,) = make_batches(encoded, 1000, torch.device("cpu"))
    assert float(target_of(model, batch).detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["gradient", "lrp", "cp-lrp"])
def test_its_relevance_is_that_of_the_logits_by_their_slopes(method: str) -> None:
    """The rules are linear in what the target gives the logits: R = Σ_t Σ_v ∂y/∂logit_tv R of logit v after t tokens."""
    model, ids = tiny("llama"), (5, 7, 9)
    how: dict[str, Any] = {"method": method, "neuron": "signed", "sites": UPS}
    found = attribute(model, [ids], target="words", words=AMONG, **how)
    assert found.provenance["targets"] == 3
    logits = model(torch.tensor([ids])).logits[0].detach().double().requires_grad_()
    (slopes,) = torch.autograd.grad(logits.softmax(-1)[:, list(AMONG)].sum(), logits)
    expected = {name: torch.zeros(len(values), dtype=torch.float64) for name, values in found.items()}
    for at, row in enumerate(slopes):
        for token, slope in enumerate(row.tolist()):
            sample = Sample(input_ids=ids[: at + 1], target=f"w{token}")
            part = attribute(model, [sample], target="label", tokenizer=Words(), **how)  # type: ignore[arg-type]
            for name in expected:
                expected[name] += slope * part[name].double() / 3
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name].float(), rtol=1e-4, atol=1e-9)
        assert values.abs().max() > 0


def test_the_gradient_is_autograds() -> None:
    model, ids = tiny("opt"), [[5, 7, 9, 1], [2, 8]]
    found = attribute(model, ids, target="logwords", words=AMONG, method="gradient", neuron="signed")
    site = sites_of(model, UPS)[0]
    total = torch.zeros(site.out, dtype=torch.float64)
    for one in ids:
        kept: list[torch.Tensor] = []
        hook = site.module.register_forward_hook(lambda _, __, z, kept=kept: kept.append(z))
        logits = model(torch.tensor([one])).logits[0]
        hook.remove()
        (g,) = torch.autograd.grad(logits.softmax(-1)[:, list(AMONG)].sum(-1).log().sum(), kept)
        total += (g * kept[0]).reshape(-1, site.out).sum(0).detach()
    torch.testing.assert_close(found[site.name], (total / 6).float(), rtol=1e-4, atol=1e-8)


def test_root_mean_square_of_signed_neurons() -> None:
    model, ids = tiny("llama"), samples(3)
    how: dict[str, Any] = {"method": "gradient", "neuron": "signed", "target": "logprob", "reduce": "rms"}
    found = attribute(model, ids, **how, batch_tokens=50)
    site = sites_of(model, UPS)[1]
    total = torch.zeros(site.out, dtype=torch.float64)
    for one in ids:
        kept: list[torch.Tensor] = []
        hook = site.module.register_forward_hook(lambda _, __, z, kept=kept: kept.append(z))
        logits = model(torch.tensor([one])).logits[0, :-1]
        hook.remove()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(one[1:]), reduction="sum")
        (g,) = torch.autograd.grad(loss, kept)
        total += (g * kept[0])[0].square().sum(0).detach()
    expected = (total / sum(map(len, ids))).sqrt()
    torch.testing.assert_close(found[site.name], expected.float(), rtol=1e-4, atol=1e-9)


def test_a_word_is_one_token_with_its_space(demo: Any, tmp_path: Path) -> None:
    model, tokenizer = demo
    inside = token_of_word(" glad", tokenizer)
    assert inside is not None
    assert tokenizer.decode([inside]).strip() == "glad"
    assert token_of_word(" glad and", tokenizer) is None
    (tmp_path / "words.txt").write_text(" glad\n\n sad\n")
    how: dict[str, Any] = {"tokenizer": tokenizer, "target": "words"}
    texts = ["Tom was", "The dog was"]
    one = attribute(model, texts, words=str(tmp_path / "words.txt"), **how)
    other = attribute(model, texts, words=(" sad", " glad"), **how)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "words" in one.provenance
    (map_,) = attribute_tokens(model, texts[:1], words=[" glad", " sad"], **how)
    assert map_.targets == ("any of 2 words",)
    assert 0 < map_.y < len(map_.positions)


@pytest.mark.parametrize(
    ("words", "said"),
    [((), "words"), (("w3 w4",), "1 of 1"), ((40,), "40"), (("w1", "w2 w3", "w4 w5"), "2 of 3")],
)
def test_words_that_are_none_are_refused(words: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_word_tokens(words, Words(), 40)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        attribute(tiny("llama"), [[1, 2]], target="words", words=words, tokenizer=Words())  # type: ignore[arg-type]


def test_files_and_recipes_without_words_are_as_before(tmp_path: Path) -> None:
    assert "words" not in AttributionOptions().model_dump()
    assert AttributionOptions(words=("a", 3)).model_dump()["words"] == ("a", 3)
    (tmp_path / "empty.txt").write_text("\n")
    for file in ("nowhere.txt", "empty.txt"):
        with pytest.raises(UserError, match=file):
            parse(AttributionOptions, {"words": str(tmp_path / file)}, "")
    resolved = load_recipe("demo", ["attribution.target=words", "attribution.words=[' sad', 7]"])
    assert resolved.attribution.words == (" sad", 7)
    assert "words" not in load_recipe("demo").to_yaml()
    for changed in (["attribution.target=words"], ["attribution.words=[' sad']"]):
        with pytest.raises(UserError, match=r"attribution\.words"):
            load_recipe("demo", changed)


def test_a_recipe_finds_a_scorers_words(demo: Any) -> None:
    found = find_words(demo[1], WordsBy(scorer="lexicon", min_score=1))
    assert found
    assert all(word[0] == " " and token_of_word(word, demo[1]) is not None for word in found)
    with pytest.raises(UserError, match=r"words\.min_score"):
        find_words(demo[1], WordsBy(scorer="lexicon:tests/tiny.py", min_score=1))
    with pytest.raises(UserError, match="words"):
        attribute(tiny("llama"), [[1, 2]], target="words", words={"scorer": "lexicon"})  # type: ignore[arg-type]


def test_shards_of_other_words_do_not_add_up(tmp_path: Path) -> None:
    model, ids = tiny("llama"), samples(4)
    whole = attribute(model, ids, target="words", words=AMONG)
    files = [tmp_path / f"{n}.shard" for n in (1, 2)]
    for n, file in enumerate(files, 1):
        attribute(model, ids, target="words", words=AMONG, shard=(n, 2), partial=file)
    merged = merge(files, model=model)
    assert merged.provenance["words"] == whole.provenance["words"]
    torch.testing.assert_close(list(merged.values()), list(whole.values()))
    attribute(model, ids, target="words", words=(5,), shard=(2, 2), partial=files[1])
    with pytest.raises(UserError):
        merge(files, model=model)


def test_the_command_line_takes_a_file_of_words(
    sparc3: Any, mistake: Any, tmp_path: Path, jsonl: Any
) -> None:
    (tmp_path / "words.txt").write_text(" sad\n")
    samples_ = jsonl("s.jsonl", [{"text": "Tom was"}, {"text": "The dog", "completion": " was"}])
    asked = (
        "attribute",
        "demo",
        "--samples",
        samples_,
        "--out",
        tmp_path / "s.safetensors",
        "--device",
        "cpu",
    )
    code, out, err = sparc3(*asked, "--target", "words", "--words", tmp_path / "words.txt")
    assert code == 0, err
    assert "2 samples" in out
    assert "words" in mistake(*asked, "--target", "words")
    assert "words" in mistake(*asked, "--words", tmp_path / "words.txt")


def test_the_plan_counts_the_tokens_of_completions() -> None:
    with_one, without = Lengths(((5, 3), (4, 1))).encode("words", 32)
    assert (len(with_one.ids), with_one.positions) == (8, (4, 5, 6, 7))
    assert (len(without.ids), without.positions) == (4, (0, 1, 2, 3))
