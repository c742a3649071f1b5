"""An exported checkpoint in vLLM, where it is installed: the greedy tokens that transformers gives."""

from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; it brings a torch of its own")


@pytest.mark.slow
def test_vllm_writes_what_transformers_writes(demo: tuple[Any, Any], tmp_path: Path) -> None:
    from sparc3 import ablated, attribute, export, select

    model, tokenizer = demo
    circuit = select(
        attribute(model, ["Tom was angry and yelled,"], tokenizer=tokenizer), count=20, order="highest"
    )
    folder = export(model, tokenizer, circuit, tmp_path / "out")
    prompt = tokenizer("Tom was glad and", return_tensors="pt")
    with ablated(model, circuit):
        expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ].tolist()
    engine = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=64)
    (answer,) = engine.generate(
        [{"prompt_token_ids": prompt["input_ids"][0].tolist()}],
        vllm.SamplingParams(temperature=0, max_tokens=8),
    )
    assert list(answer.outputs[0].token_ids) == expected
