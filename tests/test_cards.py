"""Neuron cards: figures against the model's own numbers, the tokens a neuron writes against a hand-made neuron."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from unchanged import fingerprint, require_same

from sparc3 import Circuit
from sparc3.experiment.neuron_cards import _apply_final_norm, make_cards
from sparc3.models.sites import sites_of
from sparc3.report.cards import cards
from sparc3.report.examples import Mask
from sparc3.report.read import read_folder
from sparc3.samples.reference_set import ReferenceSet, Sample
from sparc3.scores import Scores

SAMPLES = ReferenceSet(
    (
        Sample(text="Tom was angry and yelled,", completion=' "You fool!"'),
        Sample(text="Mary went to the store."),
    )
)


def _scores(model: Any, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores(
        {site.name: torch.randn(site.out, generator=generator) for site in sites_of(model, ["mlp.up"])}
    )


def test_a_card_says_what_the_model_does(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    up, down = (sites_of(model, [role])[1] for role in ("mlp.up", "mlp.down"))
    contrast, parts = _scores(model, 0), {"general": _scores(model, 1), "undesired": _scores(model, 2)}
    circuit = Circuit("neuron", {up.name: (3, 7, 11)})
    before = fingerprint(model)
    with torch.no_grad():
        kept = down.module.weight.clone()
        fool = int(tokenizer(" fool", add_special_tokens=False)["input_ids"][-1])
        # A neuron that writes the direction of one token, undoing the gain that stands between.
        down.module.weight[:, 7] = model.lm_head.weight[fool] / model.model.norm.weight
        alone = []
        made = make_cards(
            model,
            tokenizer,
            circuit,
            contrast=contrast,
            parts=parts,
            samples=SAMPLES,
            alone=1,
            measure=lambda one: alone.append(one) or {"perplexity": 2.0},
        )
        down.module.weight.copy_(kept)
    require_same(before, fingerprint(model))
    order = sorted((3, 7, 11), key=lambda index: float(contrast[up.name][index]))
    assert [card["index"] for card in made] == order
    assert [dict(one.members) for one in alone] == [{up.name: (order[0],)}]
    assert made[0]["alone"] == {"perplexity": 2.0}
    assert "alone" not in made[1]
    card = made[order.index(7)]
    assert (card["module"], card["layer"]) == (up.name, 1)
    assert card["general"] == pytest.approx(float(parts["general"][up.name][7]))
    words = card["promotes"] if card["fired"][0]["activation"] > 0 else card["suppresses"]
    assert words[0].strip()
    assert words[0].strip() in " fool"
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]  # a special token, at which nothing counts
    ids = [
        *tokenizer(SAMPLES.samples[0].text)["input_ids"],
        *tokenizer(SAMPLES.samples[0].completion, add_special_tokens=False)["input_ids"],
    ]
    seen: list[torch.Tensor] = []
    hook = down.module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 1:, 7]))
    with torch.no_grad():
        model(torch.tensor([ids]))
        model(torch.tensor([tokenizer(SAMPLES.samples[1].text)["input_ids"]]))
    hook.remove()
    largest = sorted((a[a.abs().argmax()] for a in seen), key=abs, reverse=True)
    assert [one["activation"] for one in card["fired"]] == pytest.approx(
        [float(a) for a in largest], rel=1e-4
    )
    assert all(one["prompt"].endswith(one["token"].strip()) for one in card["fired"])
    assert (
        len(make_cards(model, tokenizer, circuit, contrast=contrast, parts=parts, samples=SAMPLES, most=2))
        == 2
    )


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma",
        "gpt2",
        "opt",
        "opt-350m",
        "bloom",
        "falcon",
        "phi",
        "pythia",
        "cohere",
        "gpt-neo",
        "gptj",
    ],
)
def test_the_final_norm_is_folded_in_as_the_model_applies_it(name: str) -> None:
    """A small step of the last hidden state along the column moves the logits as the folded column says, up to the norm's scale."""
    model = tiny(name)
    column = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    folded = _apply_final_norm(model, column.float()).double()
    head = model.get_output_embeddings()
    assert folded.shape[0] == head.weight.shape[1]
    if name == "opt-350m":  # no final norm, but a projection
        return
    parent = model.base_model if name != "opt" else model.model.decoder
    norm = [
        child
        for child_name, child in parent.named_children()
        if "Norm" in type(child).__name__ and "embed" not in child_name
    ][-1]
    # At a state orthogonal to the column, a norm passes a step on divided by its scale, which is the same in every direction.
    h = torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    centred = column - column.mean() if "RMS" not in type(norm).__name__ else column
    state = h - h.mean() if "RMS" not in type(norm).__name__ else h
    state = state - (state @ centred) / (centred @ centred) * centred
    step = (norm(state + 1e-5 * column) - norm(state - 1e-5 * column)) / 2e-5
    assert torch.cosine_similarity(step, folded, dim=0) > 0.99999


def test_other_units_have_no_card(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    empty = Scores({})
    assert make_cards(model, tokenizer, Circuit("head", {}), contrast=empty, parts={}, samples=SAMPLES) == []


def test_a_run_leaves_cards_that_the_report_reads(tmp_path: Path) -> None:
    from test_experiment import SMALL

    from sparc3 import run

    run(SMALL, tmp_path / "run")
    folder = read_folder(tmp_path / "run")
    assert len(folder.cards) == 6
    shown = cards(folder, Mask(()))
    assert len(shown) == 6
    assert shown[0].alone
    assert not shown[1].alone
    assert len(shown[0].promotes) == 10
