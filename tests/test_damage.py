"""Damaged, foreign and adversarial files: refused in one line that names the file, or read to exactly what was written; never a traceback."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutations
from tiny import samples

from sparc3 import (
    Circuit,
    ReferenceSet,
    Results,
    Sample,
    Scores,
    UserError,
    attribute,
    load_model,
    load_recipe,
)
from sparc3.attribution.partial_sums import load_sums
from sparc3.errors import Sparc3Error
from sparc3.evaluation.statistics import Evaluation, Observations
from sparc3.models.fingerprint import model_fingerprint
from sparc3.models.load import DEMO
from sparc3.results import Difference, Measurement
from sparc3.storage import read_json, save_tensors, write_json

Load = Callable[[Path], Any]
EACH = 200
MODEL = {"id": "m", "architecture": "llama", "fingerprint": "0123456789abcdef"}
RECIPE = """\
name: small
model: {id: demo, dtype: float32, device: cpu}
references:
  general: {source: demo-general, count: 8, target: next}
  undesired: {source: demo-angry, count: 8, seeds: [0]}
attribution: {method: lrp, unit: neuron, sites: [mlp.up], target: "completion:2", neuron: signed}
selection: {count: 6, scope: global}
evaluation:
  perplexity: {source: demo-general, count: 6, max_length: 64, stride: 32}
  toxicity: {source: demo-angry, count: 6, scorer: lexicon, generations: 1, max_new_tokens: 8, temperature: 0.7}
compare: {methods: [wanda, random], counts: [3], random_draws: 2}
"""


def _scores(path: Path) -> None:
    Scores(
        {"model.layers.0.mlp.up_proj": torch.arange(40.0) / 7, "model.layers.1.mlp.up_proj": -torch.ones(40)},
        {
            "unit": "neuron",
            "method": "lrp",
            "samples": 93,
            "model": MODEL,
            "samples_fingerprint": "1234567890123e45",
            "version": "0.1.0",
        },
    ).save(path)


def _circuit(path: Path) -> None:
    Circuit(
        "neuron",
        {"model.layers.0.mlp.up_proj": (1, 5, 12), "b": (0, 3)},
        MODEL,
        {"selection": {"count": 5}, "scores": {"method": "lrp"}},
    ).save(path)


def _weights(path: Path) -> None:
    Circuit(
        "weight", {"a": torch.eye(9, 13) > 0, "b": torch.ones(3, 4) > 0}, MODEL, {"selection": {"count": 12}}
    ).save(path)


def _results(path: Path) -> None:
    rows = [
        Measurement("perplexity", v, "test", 5.25, (5.0, 5.5), 30, 0, "perplexity", "lower")
        for v in ("original", "ablated")
    ]
    Results(
        tuple(rows),
        (Difference("perplexity", "original", "ablated", 0.0, 0.0, (-0.1, 0.1), 0.9),),
        {"recipe": "small", "model": MODEL},
    ).save(path)


def _samples(path: Path) -> None:
    ReferenceSet(
        tuple(Sample(text=f"Tom went to town {i}.", completion=" He ran.") for i in range(20)),
        {"source": "s"},
    ).save(path)


def _evaluation(path: Path) -> None:
    seen = Observations("toxicity.mean", "test", "score", "lower", (0.0, None, 1.0), (1.0, 1.0, 1.0), 1)
    Evaluation(
        "original",
        (seen,),
        {"toxicity": [{"prompt": "p", "continuations": [{"text": "t", "score": 0.5}]}]},
        "abc",
        1.5,
    ).save(path)


def _tune(path: Path) -> None:
    write_json(path, {"format": "sparc3.tune/1", "made_from": "x", "trials": {"a": {"perplexity": 5.5}}})


def _shard(path: Path) -> None:
    from tiny import tiny

    attribute(tiny("llama"), samples(), partial=path, shard=(1, 2))


KINDS: dict[str, tuple[str, Callable[[Path], None], Load]] = {
    "scores": ("s.safetensors", _scores, lambda path: Scores.load(path).fingerprint),
    "circuit": ("c.json", _circuit, Circuit.load),
    "weights": ("c.safetensors", _weights, Circuit.load),
    "results": ("results.json", _results, Results.load),
    "samples": ("s.jsonl", _samples, ReferenceSet.load),
    "evaluation": ("e.json", _evaluation, Evaluation.load),
    "tune": ("tune.json", _tune, lambda path: read_json(path, "sparc3.tune/1")),
    "shard": (
        "s.shard",
        _shard,
        lambda path: (
            lambda task, sums, at: (
                task,
                {k: v.tolist() for k, v in sums.totals.items()},
                sums.samples,
                sums.tokens,
                at,
            )
        )(*load_sums(path)),
    ),
}


def outcome(load: Load, path: Path) -> Any:
    """What a file is read as, or None where it is refused as it should be."""
    try:
        return load(path)
    except Sparc3Error as caught:
        error = caught
    said = str(error)
    assert isinstance(error, UserError), said
    assert "\n" not in said
    assert path.stem in said, said
    assert re.search(r"; |must|needs|should|did you mean|leave", said), f"no remedy: {said}"
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_was(kind: str, tmp_path: Path) -> None:
    name, write, load = KINDS[kind]
    path = tmp_path / name
    write(path)
    whole, raw = load(path), path.read_bytes()
    refused = 0
    for damaged in mutations(raw, EACH, 0):
        path.write_bytes(damaged)
        found = outcome(load, path)
        refused += found is None
        assert found is None or found == whole, damaged[:2000]
    assert refused > EACH / 2


def test_a_damaged_recipe_is_a_recipe_or_refused(tmp_path: Path) -> None:
    """A recipe is a person's own file without a checksum: a changed figure is another recipe. It is never half a one."""
    path = tmp_path / "r.yaml"
    accepted = 0
    for damaged in mutations(RECIPE.encode(), EACH, 0):
        path.write_bytes(damaged)
        found = outcome(load_recipe, path)
        accepted += found is not None
        if found is not None:
            again = load_recipe(yaml.safe_load(found.to_yaml()))
            assert again.resolve() == found.resolve()
    assert accepted < EACH / 2


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_damaged_samples_of_a_user_are_samples_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    text = "".join(
        json.dumps({"text": f"Tom went to town {i}.", "completion": " He ran."}) + "\n" for i in range(20)
    )
    for damaged in mutations(text.encode(), EACH, 0):
        path.write_bytes(damaged)
        found = outcome(ReferenceSet.load, path)
        assert found is None or all(sample.text or sample.input_ids for sample in found)


CHECKPOINT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors",
)


def _checkpoint(folder: Path) -> Any:
    model, _ = load_model(folder, dtype="float32", device="cpu")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(5, 37)[None]).logits
    return (
        model_fingerprint(model),
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        logits.numpy().tobytes(),
    )


def damage_to_checkpoints(folder: Path, each: int) -> dict[str, dict[str, int]]:
    """How many damaged checkpoints are refused, read as they were, read as another model (which the fingerprint tells)."""
    shutil.copytree(DEMO, folder)
    fingerprint, shapes, logits = _checkpoint(folder)
    found: dict[str, dict[str, int]] = {}
    for name in CHECKPOINT:
        raw = (folder / name).read_bytes()
        counts = found[name] = {"refused": 0, "same model": 0, "another model": 0}
        for damaged in mutations(raw, each, 0):
            (folder / name).write_bytes(damaged)
            got = outcome(_checkpoint, folder)
            assert got is None or got[1] == shapes, "a weight is missing, or of another shape"
            assert got is None or name in ("config.json", "model.safetensors") or got[0] == fingerprint
            rounded = name == "model.safetensors"  # which a fingerprint sees in bfloat16
            assert got is None or rounded or got[0] != fingerprint or got[2] == logits, (
                "another model under the same fingerprint"
            )
            counts[
                "refused" if got is None else "same model" if got[0] == fingerprint else "another model"
            ] += 1
        (folder / name).write_bytes(raw)
    return found


def test_a_damaged_checkpoint_is_refused_or_whole(tmp_path: Path) -> None:
    for name, counts in damage_to_checkpoints(tmp_path / "m", 20).items():
        assert counts["refused"] > 0, name


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_or_whole_two_hundred_times(tmp_path: Path) -> None:
    for name, counts in damage_to_checkpoints(tmp_path / "m", EACH).items():
        print(name, counts)
        assert counts["refused"] > EACH / 4, name


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rms_norm_eps", 1e-3, True),
        ("hidden_act", "gelu", True),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, True),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, True),
        ("use_cache", False, False),
        ("dtype", "bfloat16", False),
    ],
)
def test_the_fingerprint_tells_what_a_configuration_computes(
    tmp_path: Path, key: str, value: Any, told: bool
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    whole, config = _checkpoint(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    changed = _checkpoint(folder)
    assert (changed[0] != whole[0]) == told == (changed[2] != whole[2])


def test_the_fingerprint_tells_kinds_of_rotary_positions_apart() -> None:
    from types import SimpleNamespace

    from sparc3.models.fingerprint import _config_figures

    def figures(**rope: Any) -> dict[str, Any]:
        config = SimpleNamespace(to_dict=lambda: {"rope_parameters": {"rope_theta": 1e4, **rope}})
        return _config_figures(SimpleNamespace(get_text_config=lambda: config))

    made = [
        figures(),
        figures(rope_type="linear", factor=2.0),
        figures(rope_type="dynamic", factor=2.0),
        figures(rope_type="longrope", short_factor=[1.0, 2.0]),
        figures(rope_type="longrope", short_factor=[1.0, 3.0]),
        figures(full_attention={"rope_type": "linear", "factor": 2.0}),
    ]
    assert all(one != other for place, one in enumerate(made) for other in made[:place])
    assert figures(rope_type="default") == figures()
    assert figures(type="linear", rope_type="linear") == figures(type="linear") == figures(rope_type="linear")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    model.save_pretrained(folder, max_shard_size="500KB")
    tokenizer.save_pretrained(folder)
    path = folder / "model.safetensors.index.json"
    raw, whole = path.read_bytes(), _checkpoint(folder)
    for damaged in mutations(raw, 60, 0):
        path.write_bytes(damaged)
        assert outcome(_checkpoint, folder) in (None, whole)
    path.write_bytes(raw)
    next(folder.glob("model-00002*")).unlink()
    assert outcome(_checkpoint, folder) is None


def _huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


ODD: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "NUL bytes": lambda path: path.write_bytes(b"\0" * 100),
    "UTF-16": lambda path: path.write_text('{"format": "x"}', encoding="utf-16"),
    "latin-1": lambda path: path.write_bytes('{"text": "é"}'.encode("latin-1")),
    "huge header": _huge_header,
    "deep JSON": lambda path: path.write_text("[" * 200_000),
    "deep objects": lambda path: path.write_text('{"a":' * 100_000),
    "many digits": lambda path: path.write_text('{"format": ' + "9" * 100_000 + "}"),
    "a number without end": lambda path: path.write_text('{"format": "sparc3.circuit/1", "x": 1e9999}'),
    "NaN": lambda path: path.write_text('{"format": "sparc3.results/1", "x": NaN}'),
    "a key twice": lambda path: path.write_text(
        '{"format": "sparc3.circuit/1", "format": "sparc3.circuit/1"}'
    ),
    "laughs": lambda path: path.write_text(
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
    ),
    "python object": lambda path: path.write_text("name: !!python/object/apply:os.system ['true']\n"),
    "a list": lambda path: path.write_text("- 1\n- 2\n"),
    "a picture": lambda path: path.write_bytes(bytes.fromhex("89504e470d0a1a0a0000000d49484452")),
    "a pickle": lambda path: path.write_bytes(
        bytes.fromhex("80049523000000000000008c05706f736978948c0673797374656d9493948c0474727565948594529e2e")
    ),
}


@pytest.mark.parametrize("kind", [*KINDS, "recipe", "text"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_files_of_every_kind(kind: str, odd: str, tmp_path: Path) -> None:
    name, _, load = {
        **KINDS,
        "recipe": ("r.yaml", None, load_recipe),
        "text": ("t.txt", None, ReferenceSet.load),
    }[kind]
    path = tmp_path / name
    ODD[odd](path)
    found = outcome(load, path)
    assert found is None or kind == "text"  # any UTF-8 text is a text


def test_marks_and_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    for name, raw in (("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n'), ("a.txt", b"one\ntwo\n")):
        for number, variant in enumerate((raw, b"\xef\xbb\xbf" + raw, raw.replace(b"\n", b"\r\n"))):
            path = tmp_path / f"{number}{name}"
            path.write_bytes(variant)
            assert [sample.text for sample in ReferenceSet.load(path)] == ["one", "two"]
    circuit = tmp_path / "c.json"
    _circuit(circuit)
    made = Circuit.load(circuit)
    circuit.write_bytes(b"\xef\xbb\xbf" + circuit.read_bytes().replace(b"\n", b"\r\n"))
    assert Circuit.load(circuit) == made


def test_a_circuit_written_by_hand_needs_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    by_hand = {
        "format": "sparc3.circuit/1",
        "unit": "neuron",
        "model": {},
        "members": {"a": [2, 1]},
        "provenance": {},
    }
    path.write_text(json.dumps(by_hand))
    assert Circuit.load(path).members == {"a": (1, 2)}
    for key, value in {
        "sha": "0",
        "members": {"a": [1.5]},
        "unit": "banana",
        "model": {"id": 3},
        "provenance": {"selection": 3},
    }.items():
        path.write_text(json.dumps({**by_hand, key: value}))
        assert outcome(Circuit.load, path) is None, key


def test_a_forger_with_the_right_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = torch.zeros(3)
    forged: list[tuple[Load, str, dict[str, Any], dict[str, Any]]] = [
        (Scores.load, "sparc3.scores/1", {"a": one}, {"sites": ["b"]}),
        (Scores.load, "sparc3.scores/1", {"a": one}, {"sites": "a"}),
        (Scores.load, "sparc3.scores/1", {"a": one}, {"sites": ["a", "a"]}),
        (Scores.load, "sparc3.scores/1", {"a": one}, {"sites": ["a"], "unit": 3}),
        (Scores.load, "sparc3.scores/1", {"a": one}, {"sites": ["a"], "unit": "weight"}),
        (Scores.load, "sparc3.scores/1", {"a": one.int()}, {"sites": ["a"]}),
        (Scores.load, "sparc3.scores/1", {"a": one}, {"sites": ["a"], "model": "m"}),
        (
            Circuit.load,
            "sparc3.circuit/1",
            {"a": one.byte()},
            {"unit": "weight", "shapes": {"a": [2, 2]}, "model": {}, "provenance": {}},
        ),
        (
            Circuit.load,
            "sparc3.circuit/1",
            {"a": one.byte()},
            {"unit": "weight", "shapes": {"a": [-4, -6]}, "model": {}, "provenance": {}},
        ),
        (
            Circuit.load,
            "sparc3.circuit/1",
            {"a": one},
            {"unit": "weight", "shapes": {"a": [4, 6]}, "model": {}, "provenance": {}},
        ),
        (
            Circuit.load,
            "sparc3.circuit/1",
            {"a": one.byte()},
            {"unit": "weight", "shapes": {"a": [4, 6]}, "model": {}, "provenance": []},
        ),
        (Circuit.load, "sparc3.circuit/1", {"a": one.byte()}, {"unit": "neuron", "shapes": {"a": [4, 6]}}),
        (load_sums, "sparc3.shard/1", {"a": one}, {"task": "x"}),
    ]
    for load, format, tensors, header in forged:
        save_tensors(path, format, tensors, header)
        assert outcome(load, path) is None, header


def test_a_file_overwritten_later_changes_nothing_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    _scores(path)
    read = Scores.load(path)
    before = read.fingerprint
    raw = path.read_bytes()
    path.write_bytes(raw[:-40] + b"\xff" * 40)
    assert read.fingerprint == before


def test_strings_that_look_like_numbers_come_back_as_strings(tmp_path: Path) -> None:
    made = Scores(
        {"a": torch.ones(1)},
        {
            "samples_fingerprint": "1234567890123456",
            "model": {"id": "12e4"},
            "method": "null",
            "target": '"x"',
            "neuron": "NaN",
        },
    )
    made.save(tmp_path / "s.safetensors")
    assert Scores.load(tmp_path / "s.safetensors").provenance == made.provenance


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
PATIENT = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@PATIENT
@given(
    content=st.dictionaries(
        st.sampled_from(["unit", "model", "members", "provenance", "measurements", "differences", "x"]), plain
    ),
    kind=st.sampled_from(["circuit", "results"]),
)
def test_any_json_under_our_format_is_read_or_refused(
    tmp_path: Path, content: dict[str, Any], kind: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": f"sparc3.{kind}/1", **content}))
    outcome(KINDS[kind][2], path)


@PATIENT
@given(
    content=st.dictionaries(
        st.sampled_from(
            [
                "name",
                "model",
                "references",
                "attribution",
                "selection",
                "evaluation",
                "compare",
                "job",
                "cards",
                "discover",
                "compress",
                "y",
            ]
        ),
        plain | st.sampled_from([{"id": "demo"}, {"count": 3}]),
    )
)
def test_any_yaml_as_a_recipe_is_read_or_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(RECIPE), **content}), encoding="utf-8", errors="replace")
    outcome(load_recipe, path)


@PATIENT
@given(
    raw=st.binary(max_size=400),
    name=st.sampled_from(["x.jsonl", "x.txt", "x.yaml", "x.json", "x.safetensors"]),
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, raw: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    for load in {
        "x.yaml": (load_recipe,),
        "x.json": (Circuit.load, Results.load),
        "x.safetensors": (Scores.load, Circuit.load, load_sums),
    }.get(name, (ReferenceSet.load,)):
        outcome(load, path)


@PATIENT
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["text", "input_ids", "target", "prompt", "continuation", "completion"]),
            plain,
            max_size=3,
        ),
        max_size=3,
    )
)
def test_any_rows_are_samples_or_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome(ReferenceSet.load, path)


def test_the_command_line_refuses_in_one_line(tmp_path: Path, sparc3: Any) -> None:
    """Each kind through a command that reads it: exit code 2 and one line, or what the whole file gives."""
    for kind, arguments in {
        "scores": ("select", "--scores", "FILE", "--count", "3", "--out", tmp_path / "o.json"),
        "circuit": ("circuits", "overlap", "FILE", "FILE"),
        "weights": ("circuits", "overlap", "FILE", "FILE"),
        "results": ("report", tmp_path),
        "shard": ("merge", "FILE", "--out", tmp_path / "m.safetensors"),
    }.items():
        name, write, _ = KINDS[kind]
        path = tmp_path / name
        write(path)
        raw = path.read_bytes()
        call = [path if argument == "FILE" else argument for argument in arguments]
        whole = sparc3(*call)[:2]
        for damaged in mutations(raw, 50, 1):
            path.write_bytes(damaged)
            code, out, err = sparc3(*call)
            assert (code, out) == whole or (
                code == 2 and err.count("\n") == 1 and err.startswith("sparc3: ")
            ), (kind, code, out, err)
            assert "Traceback" not in err
        path.unlink()


def test_damaged_recipes_and_samples_on_the_command_line(tmp_path: Path, sparc3: Any, mistake: Any) -> None:
    recipe = tmp_path / "r.yaml"
    for damaged in mutations(RECIPE.encode(), 60, 2):
        recipe.write_bytes(damaged)
        code, _, err = sparc3("slurm", recipe, "--out", tmp_path / "job.sbatch")
        assert code == 0 or (code == 2 and err.count("\n") == 1), err
    mine = tmp_path / "mine.jsonl"
    for content in (b"\xff\xfe", b"\0\0", b'{"text": NaN}', b'{"text": 1}', b"[" * 9000, b""):
        mine.write_bytes(content)
        assert "mine.jsonl" in mistake(
            "attribute", "demo", "--samples", mine, "--out", tmp_path / "s.safetensors"
        )


def test_an_unfinished_file_of_the_run_is_made_again(tmp_path: Path) -> None:
    """Whatever stands under the name of a stage's output: damaged in any way, the stage is done again."""
    from sparc3.experiment.run_folder import RunContext, load_or_make

    model: Any = None
    work = RunContext(load_recipe("demo"), tmp_path, False, model, model, {})
    for kind in ("scores", "circuit", "samples", "evaluation"):
        name, write, load = KINDS[kind]
        owner: Any = {
            "scores": Scores,
            "circuit": Circuit,
            "samples": ReferenceSet,
            "evaluation": Evaluation,
        }[kind]
        path = tmp_path / name
        write(path)
        made = load_or_make(work, name, owner, {"of": "it"}, lambda: owner.load(path))  # noqa: B023
        for damaged in mutations(path.read_bytes(), 60, 3):
            path.write_bytes(damaged)
            found = load_or_make(work, name, owner, {"of": "it"}, lambda: made)  # noqa: B023
            assert load(path) is not None
            assert (found.fingerprint if kind == "scores" else found) == (
                made.fingerprint if kind == "scores" else made
            )
