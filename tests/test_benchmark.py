"""The benchmark's part for GPUs runs on a CPU too, so that what waits for a GPU is known to run."""

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
    assert "## cuda\n\nNot measured: no GPU was at hand." in page
    assert "## cpu, tiny" in page
    for line in (
        "s per 2048-token sample",
        "neuron `signed` against the forward",
        "perplexity: forward throughput",
        "generation, 32 × 64 tokens",
    ):
        assert f"| {line}" in page
