"""The benchmark's part for GPUs runs on a CPU too, so that what waits for a GPU is known to run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_part_for_a_device_runs_and_writes_its_page(tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "benchmarks/attribution.py",
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--repeats",
        "1",
        "--out",
        tmp_path / "page.md",
    ]
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "page.md").read_text()
    assert "## cuda\n\nNot measured" in page
    assert "## cpu, tiny" in page
    for line in (
        "s per 2048-token sample",
        "neuron `signed` against the forward",
        "perplexity: forward throughput",
        "generation, 32 × 64 tokens",
    ):
        assert f"| {line}" in page


@pytest.mark.slow
def test_all_that_waits_for_a_gpu_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--device", "cpu", "--shape", "tiny"]
    subprocess.run([*command, "--out", tmp_path / "gpu.json"], check=True, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["not_measured"] == {}
    assert found["agreement"] == dict.fromkeys(("neuron abs", "neuron signed", "weight", "wanda"), 0.0)
    assert len(found["speed"]["rows"]) == 5
    assert all(one["value"] > 0 for one in (*found["speed"]["rows"], *found["other_methods"]["rows"]))
    assert found["long_sample"]["tokens"] == 2048
    late = subprocess.run(
        [*command, "--minutes", "0", "--out", tmp_path / "late.json"], capture_output=True, text=True
    )
    assert late.returncode == 1
    assert set(json.loads((tmp_path / "late.json").read_text())["not_measured"]) == {
        *("agreement", "speed", "other_methods", "long_sample")
    }
