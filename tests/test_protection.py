"""Protection: the screen against the model's own numbers, and that no selection takes what is protected."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_experiment import SMALL
from tiny import tiny
from unchanged import fingerprint, require_same

from sparc3 import Circuit, run
from sparc3.attribution.activations import largest_writes
from sparc3.experiment import score as protection
from sparc3.models.sites import family_of, layers_of, sites_of
from sparc3.samples.reference_set import ReferenceSet, Sample


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_largest_writes_are_the_models_own(name: str) -> None:
    model = tiny(name, dtype=torch.float32)
    samples = [(3, 5, 7, 9, 4), (8, 6)]
    before = fingerprint(model)
    found = largest_writes(model, ReferenceSet(tuple(Sample(input_ids=ids) for ids in samples)))
    require_same(before, fingerprint(model))
    site, layer = sites_of(model, ["mlp.up"])[0], next(iter(layers_of(model)))
    down = layer.get_submodule(family_of(model).roles["mlp.down"])
    seen: list[Any] = []
    hook = down.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, site.out).abs().amax(0))
    )
    with torch.no_grad():
        for ids in samples:
            model(torch.tensor([ids]))
    hook.remove()
    column = sites_of(model, ["mlp.down"])[0].weight.norm(dim=0)
    assert torch.allclose(found[site.name], torch.stack(seen).amax(0) * column, rtol=1e-4)


def test_what_is_protected_is_not_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        **SMALL,
        "compare": {},
        "cards": {"most": 0},
        "references": {k: v for k, v in SMALL["references"].items() if k != "matched"},
    }
    recipe |= {"selection": {"count": 30}, "attribution": {}}
    recipe["references"] = {**recipe["references"], "general": {"source": "demo-general", "count": 8}}
    free = run(recipe, tmp_path / "free")
    assert free.provenance["protected"] == []  # nothing in so small a model breaks it alone
    first = Circuit.load(tmp_path / "free" / "circuit.json")
    site, index = next((site, indices[0]) for site, indices in first.members.items() if indices)
    monkeypatch.setattr(protection, "_select_suspects", lambda work, samples: [(site, index)])
    monkeypatch.setattr(protection, "PROTECTION_RATIO", 0.0)
    kept = run(recipe, tmp_path / "kept")
    assert [(one["module"], one["index"]) for one in kept.provenance["protected"]] == [(site, index)]
    second = Circuit.load(tmp_path / "kept" / "circuit.json")
    assert len(second) == 30
    assert index not in second.members[site]
    open_ = run({**recipe, "selection": {"count": 30, "protect": False}}, tmp_path / "open")
    assert "protected" not in open_.provenance


def test_a_second_look_is_for_those_the_first_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity is made up here: of the first tokens, and of the whole, without each of three neurons."""
    model = tiny("llama", dtype=torch.float32)
    site = sites_of(model, ["mlp.up"])[0]
    plain = site.weight.clone()
    made_up = {"first": {0: 1.0, 1: 2.0, 2: 1.3}, "whole": {1: 1.1, 2: 1.6}}
    seen = []

    def measure(work: Any, windows: list[Any]) -> float:
        look = "whole" if max(len(ids) for ids, _ in windows) > protection.SCREEN_TOKENS else "first"
        gone = [i for i in range(3) if (site.weight[i] == 0).all() and (plain[i] != 0).any()]
        seen.append((look, *gone))
        return 10.0 * made_up[look][gone[0]] if gone else 10.0

    monkeypatch.setattr(protection, "is_protected", lambda recipe: True)
    monkeypatch.setattr(protection, "_select_suspects", lambda *_: [(site.name, i) for i in range(3)])
    monkeypatch.setattr(protection, "_measure_perplexity", measure)
    general = ReferenceSet((Sample(input_ids=tuple(range(3, 63))), Sample(input_ids=(3, 4))))
    work: Any = SimpleNamespace(
        model=model, tokenizer=None, recipe=None, references={"general": general}, model_info={},
        notes={}, progress=False,
    )  # fmt: skip
    protection.protect_units(work)
    assert seen == [
        ("first",),
        ("first", 0),
        ("first", 1),
        ("first", 2),
        ("whole",),
        ("whole", 1),
        ("whole", 2),
    ]
    assert [(one["index"], one["perplexity_ratio"]) for one in work.notes["protected"]] == [(2, 1.6)]
    assert dict(work.protected.members) == {site.name: (2,)}
