"""Exported checkpoints: whose files are the source's but for what was removed, and which load elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.tiny import CONFIGS, tiny

from sparc3 import Circuit, UserError, ablate_, ablated, attribute, export, load_model, select
from sparc3.checkpoints.shrink import plan_shrinking, relative_logit_difference
from sparc3.errors import Sparc3Error
from sparc3.models.families import FAMILIES
from sparc3.models.load import load_weights
from sparc3.models.sites import sites_of

IDS = torch.tensor([[1, 5, 9, 30]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def saved(folder: Path, name: str, dtype: torch.dtype, **changes: Any) -> Path:
    """A tiny model in several shards, with all that a checkpoint has beside its weights."""
    from sparc3.models.load import DEMO

    model = tiny(name, dtype=dtype, **changes)
    model.save_pretrained(folder, max_shard_size="5KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((Path(DEMO) / file).read_bytes())
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "LICENSE").write_text("To whom it may concern\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n# Source\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights, not to be handed on")
    return folder


def circuit_of(model: Any) -> Circuit:
    """Two neurons of the first layer."""
    from sparc3.models.fingerprint import describe

    return Circuit("neuron", {sites_of(model, ["mlp.up"])[0].name: (1, 4)}, describe(model))


def test_an_export_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "llama", torch.float32)
    model, _ = load_model(source)
    out = export(model, None, circuit_of(model), tmp_path / "out")
    names = {file.name for file in out.iterdir()}
    assert "config.json" in names
    assert not names & {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("name", "dtype", "changes"),
    [
        ("llama-bias", torch.bfloat16, {}),
        ("gpt2", torch.float32, {"tie_word_embeddings": True}),
        ("phi3", torch.float16, {}),
    ],
)
def test_nothing_differs_from_the_source_but_what_was_removed(
    name: str, dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", name, dtype, **changes)
    model, tokenizer = load_model(source)
    circuit = circuit_of(model)
    out = export(model, tokenizer, circuit, tmp_path / "out")
    assert {f.name for f in out.iterdir()} == {f.name for f in source.iterdir()} - {"pytorch_model.bin"} | {
        "circuit.json"
    }
    assert len(list(out.glob("*.safetensors"))) > 1
    site = sites_of(model, ["mlp.up"])[0]
    biased = getattr(site.module, "bias", None) is not None
    changed = 0
    for file in out.iterdir():
        if file.name in ("README.md", "circuit.json"):
            continue
        old, new = (source / file.name).read_bytes(), file.read_bytes()
        if file.suffix != ".safetensors":
            assert old == new, file.name
            continue
        assert len(old) == len(new)
        length = int.from_bytes(new[:8], "little")
        assert old[: 8 + length] == new[: 8 + length]
        one, other = load_file(source / file.name), load_file(file)
        changed += sum(int((one[key] != other[key]).sum()) for key in one)
    assert changed == 2 * (site.inp + biased)
    with ablated(model, circuit):
        assert torch.equal(logits(load_weights(out)), logits(model))
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "a/b" not in card


def test_a_checkpoint_with_other_names_and_more_tensors(tmp_path: Path) -> None:
    """GPT-2 on the hub: no "transformer." before its names, and a causal mask among the weights."""
    source = saved(tmp_path / "source", "gpt2", torch.float32, tie_word_embeddings=True)
    (source / "model.safetensors.index.json").unlink()
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= {key.removeprefix("transformer."): value for key, value in load_file(shard).items()}
        shard.unlink()
    save_file(
        {**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)},
        source / "model.safetensors",
        {"format": "pt", "by": "hand"},
    )
    model, tokenizer = load_model(source)
    circuit = circuit_of(model)
    out = export(model, tokenizer, circuit, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "hand"}
        assert set(opened.keys()) == {*tensors, "h.0.attn.bias"}
    with ablated(model, circuit):
        assert torch.equal(logits(load_weights(out)), logits(model))


def test_weights_that_were_changed_in_memory_are_written_from_there(tmp_path: Path) -> None:
    """In the source's dtype where that loses nothing: float16 computes in float32 on a CPU."""
    source = saved(tmp_path / "source", "llama-bias", torch.float16)
    model, tokenizer = load_model(source, device="cpu")
    assert model.dtype == torch.float32
    ablate_(model, Circuit("neuron", {sites_of(model, ["mlp.up"])[1].name: (0,)}))
    circuit = circuit_of(model)
    out = export(model, tokenizer, circuit, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}  # noqa: SIM118
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert (out / "chat_template.jinja").is_file()
    assert not (out / "model.safetensors.index.json").exists()
    with ablated(model, circuit):
        assert torch.equal(logits(load_weights(out, device="cpu")), logits(model))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1 / 3
    third = load_file(export(model, tokenizer, circuit, tmp_path / "third") / "model.safetensors")
    assert {tensor.dtype for tensor in third.values()} == {torch.float32}


def test_a_model_without_a_source(tmp_path: Path) -> None:
    _, tokenizer = load_model("demo")
    model = tiny("llama", dtype=torch.float32)
    out = export(model, tokenizer, circuit_of(model), tmp_path / "out")
    with ablated(model, circuit_of(model)):
        assert torch.equal(logits(load_weights(out)), logits(model))


def test_an_export_loads_and_gives_the_ablated_logits(demo: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = demo
    found = attribute(model, ["Tom was angry and yelled,"], tokenizer=tokenizer)
    circuit = select(found, count=5, order="highest")
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad(), ablated(model, circuit):
        expected = model(ids).logits
    folder = export(model, tokenizer, circuit, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    card = (folder / "README.md").read_text()
    assert "5 neurons" in card
    assert all(site in card for site in circuit.members)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        export(model, tokenizer, circuit, folder)
    again, _ = load_model(folder)
    with pytest.raises(UserError, match=f"{circuit.model['fingerprint']}.*--force"):
        circuit.require_model(again)
    circuit.require_model(model)


# Shrinking ------------------------------------------------------------------------------------------------------------

PLAIN = sorted(
    name
    for name, (kind, _) in CONFIGS.items()
    if kind != "bloom" and not getattr(FAMILIES[kind], "experts", None)
)


@pytest.mark.parametrize("name", PLAIN)
def test_a_shrunk_model_has_the_logits_of_the_zeroed_one(name: str, tmp_path: Path) -> None:
    _, tokenizer = load_model("demo")
    source = tiny(name, dtype=torch.float32)
    source.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    model = load_weights(tmp_path / "source")
    ups = sites_of(model, ["mlp.up"])
    circuit = Circuit("neuron", {site.name: (0, 3, site.out - 1 - i) for i, site in enumerate(ups)})
    out = export(model, tokenizer, circuit, tmp_path / "out", shrink=True)
    small = load_weights(out)
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, (
        "readable by whoever may read the others"
    )
    assert {site.out for site in sites_of(small, ["mlp.up"])} == {ups[0].out - 3}
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with ablated(model, circuit):
        torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "source", out))
    assert {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} <= {
        "intermediate_size",
        "ffn_dim",
        "n_inner",
        "ffn_hidden_size",
    }
    index = "model.safetensors.index.json"
    if (out / index).is_file():
        old, new = (json.loads((folder / index).read_text()) for folder in (tmp_path / "source", out))
        assert old["weight_map"] == new["weight_map"]
        assert new["metadata"]["total_size"] == sum(
            t.nbytes for file in out.glob("*.safetensors") for t in load_file(file).values()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shrinking_from_memory_and_in_sixteen_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    _, tokenizer = load_model("demo")
    model = tiny("llama-bias", dtype=dtype)
    circuit = Circuit("neuron", {site.name: (2, 7) for site in sites_of(model, ["mlp.up"])})
    small = load_weights(
        export(model, tokenizer, circuit, tmp_path / "out", shrink=True), dtype=str(dtype)[6:]
    )
    assert small.config.intermediate_size == 22
    assert relative_logit_difference(small, model) > 0.02, (
        "a check that cannot tell these neurons from none would pass anything"
    )


def test_what_cannot_be_shrunk_says_why(tmp_path: Path) -> None:
    _, tokenizer = load_model("demo")
    model = tiny("llama", dtype=torch.float32)
    one, two = (site.name for site in sites_of(model, ["mlp.up"]))
    shrink = lambda model, circuit: export(model, tokenizer, circuit, tmp_path / "out", shrink=True)  # noqa: E731
    with pytest.raises(UserError, match=r"\b1 .*\b2 .*--scope site"):
        shrink(model, Circuit("neuron", {one: (0,), two: (1, 2)}))
    with pytest.raises(UserError, match=r"\b0 .*\b1 .*--scope site"):
        shrink(model, Circuit("neuron", {one: (0,)}))
    with pytest.raises(UserError, match=r"--shrink.* heads"):
        shrink(model, Circuit("head", {"model.layers.0.self_attn.o_proj": (0,)}))
    with pytest.raises(UserError, match="24 of 24"):
        shrink(model, Circuit("neuron", {name: tuple(range(24)) for name in (one, two)}))
    bloom = tiny("bloom", dtype=torch.float32)
    with pytest.raises(UserError, match=r"bloom.*--shrink"):
        shrink(bloom, Circuit("neuron", {site.name: (0,) for site in sites_of(bloom, ["mlp.up"])}))
    assert not (tmp_path / "out").exists()


def test_a_shrunk_model_that_is_not_the_zeroed_one_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the wrong neurons taken out, the logits would say so."""
    _, tokenizer = load_model("demo")
    model = tiny("opt", dtype=torch.float32)
    circuit, other = (
        Circuit("neuron", {site.name: (unit,) for site in sites_of(model, ["mlp.up"])}) for unit in (3, 4)
    )
    monkeypatch.setattr(
        "sparc3.checkpoints.export.plan_shrinking", lambda model, _: plan_shrinking(model, other)
    )
    with pytest.raises(Sparc3Error, match="logits"):
        export(model, tokenizer, circuit, tmp_path / "out", shrink=True)
    assert not list(tmp_path.iterdir())
