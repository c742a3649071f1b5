"""The hub's token and the user's name in no byte that a run, a batch file, the doctor or a failing command writes or says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparc3 as front
from sparc3.models.load import DEMO

TOKEN, PASSWORD = "hf_PLANTEDplantedPLANTED123", "sesame-open-4711"
SMALL = """\
name: small
model: {id: MODEL, dtype: float32, device: cpu}
references:
  general: {source: HOME/data/general.jsonl, count: 6, target: next}
  undesired: {source: HOME/data/angry.jsonl, count: 6}
selection: {count: 4, protect: false}
evaluation:
  perplexity: {source: HOME/data/text.txt, max_length: 64, stride: 32}
  toxicity: {source: demo-angry, count: 4, scorer: "lexicon:HOME/data/words.txt", generations: 1, max_new_tokens: 6}
compare: {random_draws: 1}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, str]]:
    """Commands run as a user whose token, home, name and files are known: every byte that they wrote and said."""
    root = tmp_path_factory.mktemp("planted")
    home = root / "home" / "jane.doe-4711"
    (home / "data").mkdir(parents=True)
    (home / "hf").mkdir()
    (home / "hf" / "token").write_text("hf_FILEplantedFILEplanted456\n")
    front.ReferenceSet.of([f"Tom had a small book {i}." for i in range(8)]).save(
        home / "data" / "general.jsonl"
    )
    front.ReferenceSet.of([f"Tom was angry {i}" for i in range(8)]).save(home / "data" / "angry.jsonl")
    (home / "data" / "text.txt").write_text("Mary had a small book. Then Tom and Mary went home. " * 8)
    (home / "data" / "words.txt").write_text("fool\n")
    shutil.copytree(DEMO, home / "model")
    (root / "r.yaml").write_text(SMALL.replace("MODEL", str(home / "model")).replace("HOME", str(home)))
    environment = {
        **os.environ,
        "HOME": str(home),
        "USER": "jane.doe-4711",
        "LOGNAME": "jane.doe-4711",
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": f"http://jane:{PASSWORD}@127.0.0.1:9",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    said = ""
    commands = [
        ("run", "r.yaml", "--out", "out"),
        ("run", "r.yaml", "--out", "out"),
        ("run", "out/recipe.yaml", "--out", "again"),
        ("slurm", "r.yaml", "--out", "job.sbatch"),
        ("doctor",),
        ("doctor", "someone/nothing"),
        ("run", "r.yaml", "--set", "model.id=someone/nothing", "--out", "no"),
        ("run", "r.yaml", "--set", f"model.id=https://jane:{PASSWORD}@host/x", "--out", "no"),
        ("run", "r.yaml", "--set", f"references.general.source={TOKEN}", "--out", "no"),
        (
            "ablate",
            str(home / "model"),
            "--circuit",
            "out/circuit.json",
            "--results",
            "out/results.json",
            "--out",
            "exported",
        ),
        (
            "evaluate",
            str(home / "model"),
            "--metrics",
            "perplexity",
            "--set",
            f"perplexity.source={home}/data/text.txt",
            "--out",
            "e.json",
        ),
        ("attribute", str(home / "model"), "--samples", f"{home}/data/angry.jsonl", "--out", "s.safetensors"),
        ("ablate", "someone/nothing", "--circuit", "out/circuit.json", "--out", "no"),
        ("report", "out"),
    ]
    codes = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "sparc3", *command],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
        )
        codes.append(str(done.returncode))
        said += f"$ {' '.join(command[:2])}\n{done.stdout}{done.stderr}"
    assert codes == ["0", "0", "0", "0", "0", "2", "2", "2", "2", "0", "0", "0", "2", "0"], (codes, said)
    return root, said, environment


@pytest.mark.slow
def test_no_secret_is_in_any_byte_written_or_said(planted: tuple[Path, str, dict[str, str]]) -> None:
    root, said, _ = planted
    written = [
        path
        for path in root.rglob("*")
        if path.is_file() and path.parent.name not in ("hf", "data") and path.name != "r.yaml"
    ]
    assert len(written) > 30
    for secret in (TOKEN, "hf_FILEplanted", PASSWORD, "jane:"):
        assert secret not in said, secret
        for path in written:
            assert secret.encode() not in path.read_bytes(), (path, secret)


@pytest.mark.slow
def test_what_is_shared_names_neither_user_nor_machine(planted: tuple[Path, str, dict[str, str]]) -> None:
    import socket

    root, _, _ = planted
    shared = [
        *(root / "out").rglob("*"),
        *(root / "again").rglob("*"),
        *(root / "exported").rglob("*"),
        root / "e.json",
        root / "s.safetensors",
    ]
    for path in (path for path in shared if path.is_file()):
        for private in ("jane.doe-4711", str(root), socket.gethostname()):
            assert private.encode() not in path.read_bytes(), (path, private)
    recipe = (root / "out" / "recipe.yaml").read_text()
    assert "source: ~/data/general.jsonl" in recipe
    assert "lexicon:~/data/words.txt" in recipe
    assert not re.search(r"/home/", (root / "out" / "report.html").read_text())
