"""Circuits taken out of GGUF files: only the removed rows' bytes differ, undone to the checksum, and the dequantised model is the ablated one."""

import hashlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.test_gguf import logits, permute
from tests.tiny import CONFIGS, tiny

from sparc3 import Circuit, UserError, ablate_
from sparc3.checkpoints.gguf_blocks import SCALES, make_zeros, scale_blocks
from sparc3.checkpoints.gguf_names import gguf_architecture, locate
from sparc3.checkpoints.gguf_patch import GgufPatch, patch_gguf, undo_patch
from sparc3.cli.main import main
from sparc3.errors import DamagedFile, Sparc3Error
from sparc3.models.families import FAMILIES
from sparc3.models.fingerprint import describe
from sparc3.models.load import load_weights
from sparc3.models.sites import sites_of

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType
UP, OUT = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, model: Any, kind: Any = TYPES.Q8_0, **extra: Any) -> Path:
    """A Llama of transformers as a GGUF with its matrices in blocks of the given type."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
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
    for key, value in extra.items():
        writer.add_uint32(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(
            key.split("_proj")[0][-1]
        )
        if heads and key.endswith("weight") and "self_attn" in key:
            weight = permute(weight, heads)
        elif heads and key.endswith("bias") and "self_attn" in key:
            weight = permute(weight[:, None], heads)[:, 0]
        name, values = names.get_name(key, (".weight", ".bias")), weight.float().numpy()
        if values.ndim == 2 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", tiny("llama", dtype=torch.float32, **WIDE))


def circuit_for(path: Path, unit: str, members: dict[str, tuple[int, ...]], **more: Any) -> Circuit:
    return Circuit(unit, members, model=describe(load_weights(str(path), device="cpu")), **more)


@pytest.mark.parametrize(
    "kind", [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_1, TYPES.Q8_0]
)
@pytest.mark.parametrize(
    ("unit", "members"),
    [
        ("neuron", {UP: (0, 5, 6, 95), "model.layers.0.mlp.up_proj": (7,)}),
        ("neuron", {"model.layers.0.self_attn.q_proj": (3, 40), "model.layers.0.self_attn.k_proj": (1, 17)}),
        ("neuron", {"model.layers.0.self_attn.v_proj": (3,), "model.layers.1.mlp.down_proj": (63,)}),
        ("head", {OUT: (1,), "model.layers.1.self_attn.o_proj": (0, 1)}),
    ],
)
def test_the_patched_file_is_the_ablated_model(tmp_path: Path, kind: Any, unit: str, members: Any) -> None:
    model = tiny("llama", dtype=torch.float32, attention_bias=True, mlp_bias=True, **WIDE)
    path = write(tmp_path / "tiny.gguf", model, kind)
    before, new = path.read_bytes(), tmp_path / "new.gguf"
    whole = load_weights(str(path), device="cpu")
    circuit = Circuit(unit, members, model=describe(whole))
    patch, kept = patch_gguf(path, circuit, new)
    ablate_(whole, circuit)
    patched = load_weights(str(new), device="cpu")
    for key, values in whole.state_dict().items():
        assert torch.equal(patched.state_dict()[key], values), key
    assert torch.equal(logits(patched), logits(whole))
    after, changed = new.read_bytes(), numpy.zeros(len(before), bool)
    for change in patch.changes:
        for n in range(change.count):
            changed[change.offset + n * change.stride :][: change.length] = True
    differ = numpy.frombuffer(before, numpy.uint8) != numpy.frombuffer(after, numpy.uint8)
    assert len(after) == len(before)
    assert differ.any()
    assert not differ[~changed].any()
    assert patch.bytes_changed == differ.sum()
    assert path.read_bytes() == before
    undo_patch(new, kept, tmp_path / "back.gguf")
    assert digest(tmp_path / "back.gguf") == digest(path) == patch.sha256_before
    assert digest(new) == patch.sha256_after


@pytest.mark.parametrize("kind", [k for k in TYPES if k not in (TYPES.F64,)], ids=lambda kind: kind.name)
def test_zero_bytes_are_zero_weights_or_the_type_is_refused(kind: Any) -> None:
    size = gguf.GGML_QUANT_SIZES[kind][1]
    block = numpy.full((3, size), 77, numpy.uint8)
    try:
        gguf.dequantize(block, kind)
    except NotImplementedError:
        with pytest.raises(UserError, match=kind.name):
            make_zeros(block, kind)
        return
    assert gguf.dequantize(block, kind).any()
    assert not gguf.dequantize(make_zeros(block, kind), kind).any()


@pytest.mark.parametrize("name", sorted(SCALES))
def test_half_the_scales_are_half_the_weights(name: str) -> None:
    kind = TYPES[name]
    block = numpy.random.default_rng(0).integers(0, 256, (20, gguf.GGML_QUANT_SIZES[kind][1]), numpy.uint8)
    for place in SCALES[name]:
        block[:, place : place + 2] = numpy.array([0.0123], numpy.float16).view(numpy.uint8)
    halved = scale_blocks(block, kind, 0.5)
    assert numpy.array_equal(gguf.dequantize(halved, kind), gguf.dequantize(block, kind) / 2)
    with pytest.raises(UserError, match=name):
        scale_blocks(block, kind, 0.9)


def test_scales_that_are_no_floats_are_refused() -> None:
    for name in ("MXFP4", "NVFP4", "IQ1_M"):
        size = gguf.GGML_QUANT_SIZES[TYPES[name]][1]
        with pytest.raises(UserError, match=name):
            scale_blocks(numpy.ones((1, size), numpy.uint8), TYPES[name], 0.5)


@pytest.mark.parametrize(("unit", "members"), [("neuron", {UP: (0, 5)}), ("head", {OUT: (1,)})])
@pytest.mark.parametrize("kind", [TYPES.Q8_0, TYPES.F32])
def test_half_a_strength_halves_the_output(tmp_path: Path, kind: Any, unit: str, members: Any) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama", dtype=torch.float32, **WIDE), kind)
    whole = load_weights(str(path), device="cpu")
    circuit = Circuit(unit, members, model=describe(whole), strength=0.5)
    patch_gguf(path, circuit, tmp_path / "new.gguf")
    original = logits(whole)
    ablate_(whole, circuit)
    patched = logits(load_weights(str(tmp_path / "new.gguf"), device="cpu"))
    assert torch.allclose(patched, logits(whole), atol=1e-6)
    assert not torch.allclose(patched, original, atol=1e-4)


@pytest.mark.parametrize(("kind", "own"), [(TYPES.Q8_0, (0.5, 1.0, -1.0)), (TYPES.F32, (0.3, 1.0, -0.4))])
def test_each_row_at_its_own_strength(tmp_path: Path, kind: Any, own: tuple[float, ...]) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama", dtype=torch.float32, **WIDE), kind)
    whole = load_weights(str(path), device="cpu")
    circuit = Circuit("neuron", {UP: (0, 1, 7)}, model=describe(whole), strengths={UP: own})
    _, kept = patch_gguf(path, circuit, tmp_path / "new.gguf")
    original = logits(whole)
    ablate_(whole, circuit)
    patched = logits(load_weights(str(tmp_path / "new.gguf"), device="cpu"))
    assert torch.allclose(patched, logits(whole), atol=1e-5)
    assert not torch.allclose(patched, original, atol=1e-4)
    assert GgufPatch.load(kept).circuit["strengths"] == {UP: list(own)}
    assert undo_patch(tmp_path / "new.gguf", kept, tmp_path / "back.gguf").sha256_before == digest(path)
    if kind == TYPES.Q8_0:
        inexact = Circuit("neuron", circuit.members, circuit.model, strengths={UP: (0.5, 1.0, 0.3)})
        with pytest.raises(UserError, match=r"0\.7 "):
            patch_gguf(path, inexact, tmp_path / "inexact.gguf")


def test_a_change_in_place_is_undone_and_twice_in_the_opposite_order(file: Path) -> None:
    first, before = digest(file), circuit_for(file, "neuron", {UP: (1,)})
    _, one = patch_gguf(file, before, in_place=True)
    middle = digest(file)
    _, two = patch_gguf(file, Circuit("neuron", {UP: (1, 2)}, before.model), in_place=True, force=True)
    assert one != two
    with pytest.raises(UserError, match=re.escape(str(one))):
        undo_patch(file, one, in_place=True)
    assert undo_patch(file, two, in_place=True).sha256_before == digest(file) == middle
    undo_patch(file, one, in_place=True)
    assert digest(file) == first


def test_the_patch_is_on_the_disk_before_the_first_byte(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, circuit = digest(file), circuit_for(file, "neuron", {UP: (1, 8)})

    def half(opened: Any, changes: Any) -> None:
        (change, content), *_ = changes
        opened.seek(change.offset)
        opened.write(content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparc3.checkpoints.gguf_patch._write", half)
    with pytest.raises((OSError, Sparc3Error)):
        patch_gguf(file, circuit, in_place=True)
    monkeypatch.undo()
    assert digest(file) != first
    undo_patch(file, file.with_name("tiny.gguf.patch.json"), in_place=True)
    assert digest(file) == first


def test_another_models_circuit_is_refused(file: Path, tmp_path: Path) -> None:
    made, out = circuit_for(file, "neuron", {UP: (1,)}), tmp_path / "new.gguf"
    other = {**made.model, "fingerprint": "0" * 16}
    with pytest.raises(UserError, match="0000000000000000"):
        patch_gguf(file, Circuit("neuron", made.members, other), out)
    for model, members, named in (
        ({"architecture": "qwen2"}, {UP: (1,)}, "qwen2"),
        ({}, {"model.layers.9.mlp.up_proj": (1,)}, r"layers\.9"),
        ({}, {UP: (96,)}, "96"),
        ({}, {"model.layers.0.mlp.experts.gate_up_proj#0.up": (1,)}, "experts"),
        ({"architecture": "mixtral"}, {"model.layers.0.mlp.experts.gate_up_proj#0.up": (1,)}, "ffn_up_exps"),
    ):
        with pytest.raises(UserError, match=named):
            patch_gguf(file, Circuit("neuron", members, model), out)
    with pytest.raises(UserError, match="128"):
        patch_gguf(file, Circuit("neuron", {UP: (1,)}, {}, {"sizes": {UP: 128}}), out)
    with pytest.raises(UserError, match="head 2"):
        patch_gguf(file, Circuit("head", {OUT: (2,)}), out)
    mask = {UP: torch.zeros(96, 64, dtype=torch.bool)}
    with pytest.raises(UserError, match="weights"):
        patch_gguf(file, Circuit("weight", mask), out)
    assert not out.exists()
    patch, _ = patch_gguf(file, Circuit("neuron", made.members, other), out, force=True)
    assert "architecture llama" in patch.checked


def test_heads_narrower_than_a_block_are_refused(tmp_path: Path) -> None:
    narrow = {**WIDE, "num_attention_heads": 4}
    path = write(tmp_path / "tiny.gguf", tiny("llama", dtype=torch.float32, **narrow))
    with pytest.raises(UserError, match=r"Q8_0.*16"):
        patch_gguf(path, Circuit("head", {OUT: (1,)}), tmp_path / "new.gguf")
    patch_gguf(path, Circuit("head", {OUT: (2, 3)}), tmp_path / "new.gguf")


BLOCKS = [kind for kind in TYPES if gguf.GGML_QUANT_SIZES[kind][0] > 1]


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("kind", [*BLOCKS, TYPES.F32, TYPES.F16, TYPES.BF16], ids=lambda kind: kind.name)
def test_heads_are_whole_blocks_of_every_type_or_refused_by_its_name(
    tmp_path: Path, kind: Any, count: int
) -> None:
    """Heads of 256, 128 and 32 columns: the K-quants' blocks are 256, the others' 32 to 64."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width, rows = 512 // count, 6
    content = numpy.random.default_rng(0).integers(1, 60, (rows, 512 // block * size), numpy.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(count)
    typed = {TYPES.F32: numpy.float32, TYPES.F16: numpy.float16}.get(kind, numpy.uint8)
    writer.add_tensor("blk.0.attn_output.weight", content.view(typed), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    heads = (1,) if width % block == 0 else tuple(range(block // width))
    out, circuit = tmp_path / "new.gguf", Circuit("head", {OUT: heads}, {"architecture": "llama"})
    try:
        gguf.dequantize(content, kind)
    except NotImplementedError:
        with pytest.raises(UserError, match=kind.name):
            patch_gguf(tmp_path / "one.gguf", circuit, out)
        return
    if width % block:
        for alone in ((0,), (len(heads) - 1,), heads[1:]):
            with pytest.raises(UserError, match=f"{kind.name}.* {width} columns.* {block}"):
                patch_gguf(tmp_path / "one.gguf", Circuit("head", {OUT: alone}, circuit.model), out)
        assert not out.exists()
    patch, _ = patch_gguf(tmp_path / "one.gguf", circuit, out)
    changed = gguf.GGUFReader(out).tensors[0].data.view(numpy.uint8).reshape(rows, -1, size)
    columns = gguf.dequantize(changed.reshape(rows, -1), kind).reshape(rows, count, width)
    assert not columns[:, list(heads)].any()
    blocks = numpy.ones(512 // block, bool)
    blocks[heads[0] * width // block : (heads[-1] + 1) * width // block] = False
    assert numpy.array_equal(changed[:, blocks], content.reshape(changed.shape)[:, blocks])
    assert columns[:, [head for head in range(count) if head not in heads]].any()
    assert patch.bytes_changed == (changed != content.reshape(changed.shape)).sum()


def test_bad_files_and_places_are_one_line(file: Path, tmp_path: Path) -> None:
    circuit, whole = Circuit("neuron", {UP: (1,)}), file.read_bytes()
    split = write(tmp_path / "part.gguf", tiny("llama", dtype=torch.float32, **WIDE), split__count=3)
    with pytest.raises(UserError, match="--merge"):
        patch_gguf(split, circuit, tmp_path / "new.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.gguf.*bytes"):
        patch_gguf(cut, circuit, tmp_path / "new.gguf")
    unknown, name = bytearray(whole), b"blk.0.ffn_up.weight"
    place = whole.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and both of them
    unknown[place : place + 4] = (99).to_bytes(4, "little")
    (tmp_path / "unknown.gguf").write_bytes(unknown)
    with pytest.raises(UserError, match=r"type 99.*gguf"):
        patch_gguf(tmp_path / "unknown.gguf", circuit, tmp_path / "new.gguf")
    with pytest.raises(UserError, match=r"cut\.gguf.*remove"):
        patch_gguf(file, circuit, cut)
    with pytest.raises(UserError, match=r"/proc/new.gguf"):
        patch_gguf(file, circuit, "/proc/new.gguf")
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    with pytest.raises(UserError, match=rf"link\.gguf.*{re.escape(str(file))}.*--out"):
        patch_gguf(link, circuit, in_place=True)
    _, kept = patch_gguf(file, circuit, tmp_path / "new.gguf")
    with pytest.raises(UserError, match=rf"{cut.stat().st_size:,} .*{len(whole):,}"):
        undo_patch(cut, kept, in_place=True)
    content = json.loads(kept.read_text())
    content["changes"][0]["offset"] += 1
    kept.write_text(json.dumps(content))
    with pytest.raises(DamagedFile):
        GgufPatch.load(kept)
    assert file.read_bytes() == whole


def test_a_file_that_changes_meanwhile_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparc3.checkpoints import gguf_patch

    def touch(path: Path, changes: Any) -> Any:
        os.utime(path, ns=(1, 1))
        return digests(path, changes)

    digests = gguf_patch._hash_before_and_after
    monkeypatch.setattr(gguf_patch, "_hash_before_and_after", touch)
    for where in ({"out": tmp_path / "new.gguf"}, {"in_place": True}):
        before = digest(file)
        os.utime(file)
        with pytest.raises(Sparc3Error, match=r"tiny\.gguf"):
            patch_gguf(file, Circuit("neuron", {UP: (1,)}), **where)
        assert digest(file) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit, new = tmp_path / "circuit.json", tmp_path / "new.gguf"
    circuit_for(file, "neuron", {UP: (1, 2)}).save(circuit)
    first = digest(file)
    main(["ablate", str(file), "--circuit", str(circuit), "--out", str(new)])
    assert "2 neurons" in capsys.readouterr().out
    blob = tmp_path / "sha256-blob"
    new.rename(blob)
    main(["ablate", str(blob), "--undo", f"{new}.patch.json", "--in-place"])
    assert first in capsys.readouterr().out
    assert digest(blob) == first
    for wrong in (
        ["--out", str(new)],
        ["--circuit", str(circuit)],
        ["--circuit", str(circuit), "--in-place", "--out", str(new)],
        ["--circuit", str(circuit), "--out", str(new), "--shrink"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["ablate", str(file), *wrong])
        assert stopped.value.code == 2
    assert not new.exists()
    main(["ablate", str(file), "--circuit", str(circuit), "--out", str(tmp_path / "folder")])
    assert (tmp_path / "folder" / "config.json").is_file()


def test_every_architecture_of_gguf_has_the_names_of_its_family() -> None:
    known = set(gguf.MODEL_ARCH_NAMES.values())
    absent = {name for name in FAMILIES if gguf_architecture(name) not in known}
    assert absent == {"helium", "flex_olmo", "opt", "gpt_neo"}
    seen = set()
    for config in CONFIGS:
        model = tiny(config)
        name = model.config.model_type
        if name in absent:
            continue
        seen.add(name)
        for role, tensor in (("mlp.up", "ffn_up"), ("attn.o", "attn_output"), ("mlp.down", "ffn_down")):
            for site in sites_of(model, [role]):
                if (
                    FAMILIES[name].experts
                    and site.expert is None
                    and site.name.endswith(("mlp.up_proj", "mlp.down_proj"))
                ):
                    continue  # llama.cpp has no layers without experts here
                where = locate(site.name, FAMILIES[name], gguf_architecture(name), 4)
                assert where.tensor.startswith(f"blk.{site.layer}.{tensor}"), (config, site.name)
                assert (where.role, where.expert) == (role, site.expert)
    assert seen == FAMILIES.keys() - absent


def patch_slowly(file: Path, new: Path | None) -> None:
    """What a killed process was doing: one change after the other, with pauses."""
    from sparc3.checkpoints import gguf_patch

    plain = gguf_patch._write

    def slowly(opened: Any, changes: Any) -> None:
        for change in changes:
            plain(opened, [change])
            opened.flush()
            time.sleep(0.002)

    gguf_patch._write = slowly
    circuit = Circuit("neuron", {UP: tuple(range(0, 96, 2))})
    patch_gguf(file, circuit, new, in_place=new is None)


def test_fifty_kills_leave_the_old_file_whole(file: Path, tmp_path: Path) -> None:
    first, new, moments = digest(file), tmp_path / "new.gguf", random.Random(0)
    halves = unfinished = 0
    for n in range(50):
        in_place = n % 2 == 1
        child = os.fork()
        if not child:
            patch_slowly(file, None if in_place else new)
            os._exit(0)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        patches = sorted(tmp_path.glob("tiny.gguf*.patch.json"))
        if in_place and digest(file) != first:
            halves += 1
            undo_patch(file, patches[0], in_place=True)
        assert digest(file) == first
        if new.exists():
            assert digest(new) == GgufPatch.load(f"{new}.patch.json").sha256_after
            new.unlink()
        elif not in_place:
            unfinished += 1
        for left in tmp_path.glob("*.patch.json"):
            left.unlink()
    assert halves >= 5
    assert unfinished >= 5
