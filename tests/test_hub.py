"""Circuits and checkpoints onto the hub and back, through its own client, against a hub on this machine (tests/hub.py)."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.hub import TOKEN, Hub, running

from sparc3 import Circuit, UserError, ablated, load_model
from sparc3.models.fingerprint import describe
from sparc3.models.hub import Place, parse_place
from sparc3.models.sites import sites_of

Say = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


@pytest.fixture
def say(hub: Hub, tmp_path: Path) -> Say:
    """The command line in a process of its own, whose hub is the one on this machine; `token` and `home` of choice."""

    def call(
        *arguments: str | Path, token: str = TOKEN, home: str = "home", code: int = 0, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }
        done = subprocess.run(
            [sys.executable, "-m", "sparc3", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **settings, **env},
        )
        assert done.returncode == code, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def circuit(demo: tuple, tmp_path: Path) -> Circuit:
    found = Circuit(
        "neuron",
        {site.name: (3, 5 + site.layer) for site in sites_of(demo[0], ["mlp.up"])},
        describe(demo[0]),
    )
    found.save(tmp_path / "c.json")
    return found


def test_names_that_mean_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "c").touch()
    meant = {
        "a/b": Place("a/b"),
        "a/b@v1": Place("a/b", None, "v1"),
        "hf://a/b": Place("a/b"),
        "hf://a/b/circuit.json": Place("a/b", "circuit.json"),
        "hf://models/a/b/x/c.json": Place("a/b", "x/c.json"),
        "hf://a/b@refs/pr/3/c.json": Place("a/b", "c.json", "refs/pr/3"),
        "hf://datasets/a/b@main/c.json": Place("a/b", "c.json", "main", "dataset"),
    }
    assert {name: parse_place(name) for name in meant} == meant
    assert not any(
        map(
            parse_place,
            ["circuit.json", "runs/circuit.json", "./a/b", "/a/b", "a/b/c", "here/c", "here", "../b"],
        )
    )
    with pytest.raises(UserError, match="hf://USER/REPO"):
        parse_place("hf://a")


@pytest.mark.slow
def test_a_checkpoint_goes_to_the_hub_and_comes_back(
    say: Say, hub: Hub, circuit: Circuit, demo: tuple, tmp_path: Path
) -> None:
    """Pushed, loaded by its name, and, as a hub's model, ablated again: a copy of its files."""
    say("ablate", "demo", "--circuit", "c.json", "--out", "m")
    assert f"{hub.address}/me/m (private)" in say("push", "m", "me/m").stdout
    here = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    assert hub.repositories["me/m"].files == here
    assert hub.repositories["me/m"].private
    assert [commit[:9] for commit in hub.repositories["me/m"].commits] == ["8 neurons"]
    (tmp_path / "calm.txt").write_text("Mary had a small book.\n")
    say("attribute", "me/m", "--samples", "calm.txt", "--sites", "mlp.up", "--out", "s.safetensors")
    say("select", "--scores", "s.safetensors", "--count", "4", "--out", "d.json")
    say("ablate", "me/m", "--circuit", "d.json", "--out", "n")
    assert {file.name for file in (tmp_path / "n").iterdir()} == set(here)
    assert all(
        (tmp_path / "n" / name).read_bytes() == data
        for name, data in here.items()
        if name.endswith("config.json") or "token" in name
    )
    assert "base_model: me/m" in (tmp_path / "n" / "README.md").read_text()
    model, _ = load_model(tmp_path / "n", dtype="float32", device="cpu")
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad(), ablated(demo[0], circuit), ablated(demo[0], Circuit.load(tmp_path / "d.json")):
        assert torch.equal(model(ids).logits, demo[0](ids).logits)


@pytest.mark.slow
def test_a_circuit_made_on_one_machine_gives_the_same_logits_on_another(
    say: Say, hub: Hub, circuit: Circuit, demo: tuple, tmp_path: Path
) -> None:
    say("push", "c.json", "me/circuit", "--public", "--base", "me/model")
    pushed = hub.repositories["me/circuit"]
    assert set(pushed.files) == {"circuit.json", "README.md"}
    assert b"sparc3 ablate me/model --circuit me/circuit" in pushed.files["README.md"]
    assert not pushed.private
    for name, out in (("me/circuit", "one"), (f"hf://me/circuit@{pushed.sha}/circuit.json", "two")):
        say("ablate", "demo", "--circuit", name, "--out", out, token="", home="elsewhere")
        model, _ = load_model(tmp_path / out, dtype="float32", device="cpu")
        ids = torch.tensor([[1, 5, 9, 30]])
        with torch.no_grad(), ablated(demo[0], circuit):
            assert torch.equal(model(ids).logits, demo[0](ids).logits)
    refused = say(
        "ablate",
        "one",
        "--circuit",
        "me/circuit",
        "--out",
        "no",
        home="elsewhere",
        code=2,
        HF_HUB_OFFLINE="1",
    )
    assert re.search("sparc3-demo.*--force", refused.stderr)
    assert (
        "'me/circuit'"
        in say("circuits", "overlap", "me/circuit", "c.json", home="new", code=2, HF_HUB_OFFLINE="1").stderr
    )


@pytest.mark.slow
def test_mistakes_on_the_hub_are_one_line(say: Say, hub: Hub, circuit: Circuit, tmp_path: Path) -> None:
    def mistake(*arguments: str | Path, **how: str) -> str:
        lines = say(*arguments, code=2, **how).stderr.splitlines()  # type: ignore[arg-type]
        assert len(lines) == 1, lines
        return lines[0]

    assert "HF_TOKEN" in mistake("push", "c.json", "me/c", token="")
    assert re.search("'me/c'.*HF_TOKEN", mistake("push", "c.json", "me/c", token="hf_wrong"))
    assert re.search("'someone-else/c'.*HF_TOKEN", mistake("push", "c.json", "someone-else/c"))
    assert re.search("'c'.*USER/REPO", mistake("push", "c.json", "c"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "circuit.json").write_bytes((tmp_path / "c.json").read_bytes())
    assert "config.json" in mistake("push", "run", "me/c")
    assert "nowhere" in mistake("push", "nowhere", "me/c")
    assert not hub.repositories
    say("push", "c.json", "me/open", "--public")
    assert "--public" in mistake("push", "c.json", "me/open")
    overlap = ("circuits", "overlap", "c.json")
    assert "'me/none'" in mistake(*overlap, "me/none")
    assert re.search(r"me/open .*d\.json", mistake(*overlap, "hf://me/open/d.json"))
    assert re.search("me/open .*revision 'v9'", mistake(*overlap, "me/open@v9"))
    hub.repositories["me/open"].files["circuit.json"] = json.dumps({"format": "else"}).encode()
    hub.repositories["me/open"].commits.append("else")
    assert "sparc3.circuit/1" in mistake(*overlap, "me/open")
