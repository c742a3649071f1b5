"""Hostile models, names and texts get nothing: no code runs, nothing is written outside the folder that was named, nothing acts on a screen."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparc3 import Circuit, Results, Scores, UserError, load_model, load_recipe, run
from sparc3.checkpoints.model_card import make_circuit_card, make_model_card
from sparc3.errors import UnsupportedModel
from sparc3.experiment.run_folder import claim_folder
from sparc3.experiment.slurm import format_job
from sparc3.models.load import DEMO
from sparc3.results import Measurement
from sparc3.safe_text import one_line, visible
from sparc3.samples.reference_set import MAX_LINE
from sparc3.samples.sources import Request, gather

ACTING = (
    "\x1b[2J\x1b]0;owned\x07\u202egnp.exe\x9b31m\u2066<script>alert(1)</script>\r\n[x](javascript:alert(1))|`"
)
ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "/etc/x",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        "-rf",
        "",
        "x" * 101,
        "CON",
        "nul.txt",
        "com1",
        "dot.",
        "a b",
        "\u202ex",
        "~",
    ],
)
def test_a_recipe_cannot_name_its_folder_out_of_place(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        load_recipe({**load_recipe("demo").resolve(), "name": name})


@pytest.mark.parametrize("method", ["../../x", "lrp/../../x", "random:../x", "lrp\0"])
def test_methods_cannot_name_files_out_of_place(method: str) -> None:
    with pytest.raises(UserError, match="method"):
        load_recipe("demo", [f"compare.methods=[{json.dumps(method)}]"])


def test_a_run_folder_with_links_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for name in (".lock", "log.txt", "scores"):
        folder = tmp_path / f"run{name}"
        folder.mkdir()
        victim.write_text("precious")
        (folder / name).symlink_to(victim)
        with pytest.raises(UserError, match=f"{re.escape(str(folder / name))}.*link"):
            run("demo", folder)
        assert victim.read_text() == "precious"
        assert [path.name for path in folder.iterdir()] == [name]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with claim_folder(tmp_path / "link", load_recipe("demo"), True):
        assert (tmp_path / "real" / "recipe.yaml").is_file()


def test_odd_names_of_outputs_are_one_line(tmp_path: Path, sparc3: Any) -> None:
    scores = Scores({"a": torch.ones(3)}, {"unit": "neuron"})
    scores.save(tmp_path / "s.safetensors")
    for out in ("x" * 300 + ".json", "no\0.json"):
        code, _, err = sparc3(
            "select", "--scores", tmp_path / "s.safetensors", "--count", "1", "--out", tmp_path / out
        )
        assert code in (1, 2)
        assert err.count("\n") == 1, err
        assert not ACTS.search(err)


def test_weights_as_pickle_are_refused_with_the_way_to_convert_them(tmp_path: Path, mistake: Any) -> None:
    """The pickle here would write a file if it were read; neither transformers nor torch is let near it."""
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "owned"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    said = mistake(
        "attribute", folder, "--samples", "demo-angry", "--count", "1", "--out", tmp_path / "s.safetensors"
    )
    assert "pytorch_model.bin" in said
    assert "save_pretrained" in said
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_of_a_checkpoint_is_never_run(tmp_path: Path, kind: str) -> None:
    folder, mark = tmp_path / "m", tmp_path / "owned"
    shutil.copytree(DEMO, folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    name = "config.json" if kind == "model" else "tokenizer_config.json"
    content = json.loads((folder / name).read_text())
    if kind == "model":
        content |= {
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        }
    else:
        content |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / name).write_text(json.dumps(content))
    if kind == "model":
        with pytest.raises(UnsupportedModel, match="Python code"):
            load_model(folder)
    else:
        try:
            load_model(folder)
        except UserError as error:
            assert str(folder) in str(error)  # noqa: PT017
    assert not mark.exists()


def test_what_acts_is_written_out_everywhere(
    tmp_path: Path, sparc3: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert visible("\x1b[2J\u202e\U000e0041") == "\\x1b[2J\\u202e\\U000e0041"
    assert len(one_line("x" * 10**7)) < 3000
    for arguments in (
        ("run", f"{ACTING}.yaml"),
        ("report", ACTING),
        ("evaluate", "demo", "--metrics", ACTING, "--out", "x"),
        (ACTING,),
        ("attribute", f"./{ACTING}", "--samples", "demo-angry", "--out", "x"),
    ):
        code, _, err = sparc3(*arguments)
        assert code == 2
        assert err.count("\n") == 1, err
        assert not ACTS.search(err)
    Results(
        (Measurement(ACTING, ACTING, "test", 1.0, None, 1, 0, ACTING, "lower"),), (), {"recipe": ACTING}
    ).save(tmp_path / "results.json")
    assert sparc3("report", tmp_path)[0] == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert not ACTS.search(page)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"name": ACTING}))
    assert not ACTS.search(sparc3("slurm", recipe)[2])


def test_a_circuit_cannot_write_markup_into_a_card() -> None:
    circuit = Circuit(
        "neuron",
        {f"a{ACTING}": (1,)},
        {"id": ACTING, "fingerprint": ACTING},
        {"scores": {"method": ACTING, "target": ACTING}, "selection": {ACTING: ACTING}},
    )
    results = Results((Measurement(ACTING, "original", "test", 1.0, None, 1, 0, "x", "lower"),))
    for card in (
        make_model_card(
            circuit, results, source={"id": ACTING, "fingerprint": "f"}, base=None, matter={"license": ACTING}
        ),
        make_circuit_card(circuit, "user/repo", base=None, results=results),
    ):
        body = card.split("---\n", 2)[2]
        assert "<script>" not in body
        assert "](javascript:" not in body.replace("\\]", "")
        assert not ACTS.search(body)
        assert all(line.count("|") - line.count("\\|") in (0, 3, 8) for line in body.splitlines()), (
            "a row has another number of cells"
        )


def test_a_batch_file_holds_no_line_that_a_name_smuggled_in() -> None:
    recipe = load_recipe("demo")
    with pytest.raises(UserError, match="rm -rf"):
        format_job(recipe, "demo\nrm -rf ~\n.yaml")
    for bad in ({"partition": "gpu\n#SBATCH --uid=0"}, {"folder": "runs/a\nb"}, {"partition": "a b"}):
        with pytest.raises(UserError, match=re.escape(repr(*bad.values())[1:-1])):
            format_job(recipe, "demo", **bad)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_line_of_100_mb_is_refused_with_flat_memory(tmp_path: Path) -> None:
    """In a process of its own: the peak grows by a few blocks, not by the line; so it does for a large file of which a few rows are taken."""
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as opened:
        opened.write(b'{"text": "fine"}\n{"text": "')
        for _ in range(100):
            opened.write(b"x" * 1_000_000)
        opened.write(b'"}\n')
    many = tmp_path / "many.jsonl"
    with open(many, "wb") as opened:
        for number in range(40_000):
            opened.write(b'{"text": "%d %s"}\n' % (number, b"y" * 2500))
    code = (
        "import resource, sys; from sparc3 import ReferenceSet, UserError; from sparc3.samples.sources import Request, gather\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "try: ReferenceSet.load(sys.argv[1])\n"
        "except UserError as error: print(error)\n"
        "print(peak() - before); before = peak(); print(len(gather(Request(sys.argv[2], 50)))); print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, many], capture_output=True, text=True, check=True
    )
    said, grown, taken, grown_many = done.stdout.splitlines()
    assert f"{MAX_LINE:,} bytes" in said
    assert "byte 17" in said
    assert int(grown) < 50, f"{grown} MiB"
    assert taken == "50"
    assert int(grown_many) < 30, f"{grown_many} MiB of a file of {many.stat().st_size // 2**20} MiB"


def test_rows_of_a_file_are_drawn_as_before(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    """Reading row by row draws the rows that shuffling all of them would."""
    import random

    rows = [{"text": f"t{i}"} for i in range(50)]
    path = str(jsonl("r.jsonl", rows))
    order = list(rows)
    random.Random("sparc3/3").shuffle(order)
    assert [sample.text for sample in gather(Request(path, 7, seeds=(3,)))] == [
        row["text"] for row in order[:7]
    ]


def test_a_fault_of_ours_is_told_without_secrets(sparc3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError(
            "Illegal header value b'Bearer hf_abcdefghijklmnop' \x1b[2J https://me:pass1234@host/x"
        )

    monkeypatch.setattr("sparc3.recipe.schema.bundled_recipes", fails)
    code, _, err = sparc3("recipes")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("sparc3: ")
    assert not any(part in err for part in ("hf_abc", "pass1234", "\x1b"))
