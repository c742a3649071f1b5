import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # on models this small, threads wait for each other far longer than they work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def demo() -> tuple[Any, Any]:
    """The embedded model and its tokenizer; tests that change it restore it."""
    from sparc3 import load_model

    return load_model("demo", dtype="float32", device="cpu")


@pytest.fixture
def sparc3(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: arguments → (exit code, standard output, standard error)."""
    from sparc3.cli.main import main

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def mistake(sparc3: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """A command that must end as the user's mistake: exit code 2 and one line, which is returned."""

    def call(*arguments: str | Path) -> str:
        code, out, err = sparc3(*arguments)
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, (code, out, err)
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    return call


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, Sequence[dict[str, Any]]], Path]:
    import json

    def write(name: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
