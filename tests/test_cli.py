"""The command line through the front door: the whole way once, and every mistake as one line with exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparc3 import Circuit, Results, Scores

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples, scores and a circuit of the demo model, made by the commands themselves."""
    from sparc3.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    (folder / "angry.jsonl").write_text(
        json.dumps({"text": 'Tom was angry and yelled, "', "completion": "You fool!"}) + "\n"
    )
    (folder / "calm.txt").write_text("Mary had a small book.\nThen Tom and Mary went home.\n")
    for name, samples in (("angry", "angry.jsonl"), ("calm", "calm.txt")):
        main(
            [
                "attribute",
                "demo",
                "--samples",
                str(folder / samples),
                "--out",
                str(folder / f"{name}.safetensors"),
            ]
        )
    main(
        [
            "select",
            "--general",
            str(folder / "calm.safetensors"),
            "--undesired",
            str(folder / "angry.safetensors"),
            "--count",
            "7",
            "--out",
            str(folder / "c.json"),
        ]
    )
    return folder


def test_the_whole_way(made: Path, tmp_path: Path, sparc3: Call) -> None:
    scores = Scores.load(made / "angry.safetensors")
    assert [tuple(t.shape) for t in scores.values()] == [(512,)] * 4
    assert len(Circuit.load(made / "c.json")) == 7
    code, out, _ = sparc3(
        "evaluate",
        "demo",
        "--circuit",
        made / "c.json",
        "--metrics",
        "perplexity",
        "--set",
        f"perplexity.source={made / 'calm.txt'}",
        "--out",
        tmp_path / "r.json",
    )
    assert code == 0
    assert "perplexity" in out
    results = Results.load(tmp_path / "r.json")
    assert {m.variant for m in results} == {"original", "ablated"}
    code, out, _ = sparc3(
        "ablate",
        "demo",
        "--circuit",
        made / "c.json",
        "--results",
        tmp_path / "r.json",
        "--out",
        tmp_path / "model",
    )
    assert code == 0
    assert "perplexity" in (tmp_path / "model" / "README.md").read_text()


def test_results_on_the_exported_model_are_those_of_the_trial(
    made: Path, tmp_path: Path, sparc3: Call
) -> None:
    ask = ("--metrics", "perplexity", "--set", f"perplexity.source={made / 'calm.txt'}")
    assert sparc3("ablate", "demo", "--circuit", made / "c.json", "--out", tmp_path / "model")[0] == 0
    assert (
        sparc3("evaluate", "demo", "--circuit", made / "c.json", *ask, "--out", tmp_path / "a.json")[0] == 0
    )
    assert sparc3("evaluate", tmp_path / "model", *ask, "--out", tmp_path / "b.json")[0] == 0
    trial = Results.load(tmp_path / "a.json").find("perplexity", "ablated").value
    assert Results.load(tmp_path / "b.json").find("perplexity").value == pytest.approx(trial, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu", "demo"], "'run'"),
        (["run", "demmo"], "'demmo'.*'demo'"),
        (["run", "demo", "--set", "selection.cuont=3"], "'cuont'.*'count'"),
        (["run", "demo", "--set", "model=3"], "model"),
        (["run", "demo", "--set", "attribution.method=lpr"], "method 'lpr'.*'lrp'"),
        (["run", "demo", "--set", "attribution.sites=[mlp.upp]"], r"site 'mlp\.upp'.*'mlp\.up'"),
        (["run", "demo", "--set", "evaluation.toxicty={}"], "metric 'toxicty'.*'toxicity'"),
        (["run", "demo", "--set", "evaluation.toxicity.temprature=1"], "'temprature'.*'temperature'"),
        (
            ["run", "demo", "--set", "references.undesired.source=demo-angri"],
            "source 'demo-angri'.*'demo-angry'",
        ),
        (["run", "demo", "--set", "references.undesired.source=nowhere.jsonl"], r"file.* nowhere\.jsonl"),
        (["run", "demo", "--set", "selection.count=-4"], r"selection\.count .*-4"),
        (["run", "demo", "--set", "model.device=cuda"], "CUDA"),
        (["run", "nowhere.yaml"], r"file.* nowhere\.yaml"),
        (["attribute", "demo", "--samples", "nowhere.jsonl", "--out", "x"], r"file.* nowhere\.jsonl"),
        (["attribute", "demo", "--samples", "demo-angry", "--method", "wnda", "--out", "x"], "'wanda'"),
        (
            [
                "attribute",
                "demo",
                "--samples",
                "demo-angry",
                "--unit",
                "head",
                "--sites",
                "attn.o",
                "--method",
                "wanda",
                "--out",
                "x",
            ],
            "wanda.*'head'",
        ),
        (
            [
                "attribute",
                "demo",
                "--samples",
                "demo-angry",
                "--count",
                "2",
                "--sites",
                "mlp.uo",
                "--out",
                "x",
            ],
            r"'mlp\.up'",
        ),
        (
            [
                "attribute",
                "demo",
                "--samples",
                "demo-angry",
                "--count",
                "2",
                "--target",
                "next:3",
                "--out",
                "x",
            ],
            "'next:3'.*completion",
        ),
        (["attribute", "./nomodel", "--samples", "demo-angry", "--out", "x"], r"\./nomodel"),
        (["attribute", "demo", "--out", "x"], "--samples"),
        (["select", "--count", "3", "--out", "x"], "--general.*--undesired.*--scores"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(
    mistake: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(said, mistake(*arguments))
    assert not list(tmp_path.rglob("*.*")), "something was left behind"


def test_mistakes_with_files_are_one_line(mistake: Call, made: Path, tmp_path: Path) -> None:
    general, undesired = made / "calm.safetensors", made / "angry.safetensors"
    select = ("select", "--general", general, "--undesired", undesired, "--out", tmp_path / "c.json")
    assert re.search(r"\b9999 .*\b2048\b", mistake(*select, "--count", "9999"))
    assert "penalty" in mistake(*select, "--count", "3", "--penalty", "2")
    assert re.search(
        r"angry\.jsonl.*safetensors",
        mistake("select", "--scores", made / "angry.jsonl", "--count", "3", "--out", tmp_path / "c.json"),
    )
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    assert "bad.jsonl, line 2 " in mistake(
        "attribute", "demo", "--samples", tmp_path / "bad.jsonl", "--out", tmp_path / "s"
    )
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "Tom " * 700}) + "\n")
    long = ("attribute", "demo", "--samples", tmp_path / "long.jsonl", "--out", tmp_path / "s.safetensors")
    assert re.search(r"\b1 of 1 samples.*\b512 tokens", mistake(*long))
    (tmp_path / "broken.yaml").write_text("name: [\n")
    assert "broken.yaml, line 2 " in mistake("run", tmp_path / "broken.yaml")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text('{"model_type": "t5"}')
    assert "'t5'" in mistake(
        "attribute", tmp_path / "wrong", "--samples", made / "angry.jsonl", "--out", tmp_path / "s"
    )
    assert not (tmp_path / "c.json").exists()
    assert not (tmp_path / "s").exists()


def test_a_circuit_of_another_model_needs_force(
    mistake: Call, sparc3: Call, made: Path, tmp_path: Path
) -> None:
    assert sparc3("ablate", "demo", "--circuit", made / "c.json", "--out", tmp_path / "other")[0] == 0
    again = ("ablate", tmp_path / "other", "--circuit", made / "c.json", "--out", tmp_path / "again")
    assert re.search("sparc3-demo.*--force", mistake(*again))
    assert not (tmp_path / "again").exists()
    assert sparc3(*again, "--force")[0] == 0


def test_scores_of_another_model_are_named(mistake: Call, sparc3: Call, made: Path, tmp_path: Path) -> None:
    assert sparc3("ablate", "demo", "--circuit", made / "c.json", "--out", tmp_path / "other")[0] == 0
    assert (
        sparc3(
            "attribute",
            tmp_path / "other",
            "--samples",
            made / "calm.txt",
            "--out",
            tmp_path / "o.safetensors",
        )[0]
        == 0
    )
    said = mistake(
        "select",
        "--general",
        tmp_path / "o.safetensors",
        "--undesired",
        made / "angry.safetensors",
        "--count",
        "3",
        "--out",
        tmp_path / "x.json",
    )
    assert re.search("general.*model other", said)


def test_hub_models_without_a_hub_and_gated_ones(
    mistake: Call, monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    arguments = ("attribute", "someone/some-model", "--samples", made / "calm.txt", "--out", tmp_path / "s")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search("reach.*'someone/some-model'", mistake(*arguments))

    def gated(*_: Any, **__: Any) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", gated)
    monkeypatch.setattr("sparc3.models.load.require_hub", lambda name: None)
    assert re.search("'someone/some-model'.*gated.*hf auth login", mistake(*arguments))


def test_a_folder_that_cannot_be_written_is_named(sparc3: Call, made: Path) -> None:
    code, _, err = sparc3(
        "select", "--scores", made / "angry.safetensors", "--count", "2", "--out", "/proc/nowhere/c.json"
    )
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "/proc/nowhere/c.json" in err


def test_it_is_a_program() -> None:
    """The installed module, in a process of its own: exit codes as the shell sees them."""
    run = lambda *a: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "sparc3", *a],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert run("recipes").returncode == 0
    failed = run("select", "--out", "x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("sparc3: ")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_folder_without_a_tokenizer_does_for_token_ids_and_says_so_for_texts(
    kind: str,
    tmp_path: Path,
    sparc3: Callable[..., tuple[int, str, str]],
    mistake: Callable[..., str],
    jsonl: Any,
) -> None:
    import torch
    from tiny import tiny

    tiny(kind, dtype=torch.float32).save_pretrained(tmp_path / "model")
    model, ids, texts = (
        tmp_path / "model",
        jsonl("ids.jsonl", [{"input_ids": [3, 4, 5]}]),
        jsonl("texts.jsonl", [{"text": "once"}]),
    )
    assert sparc3("attribute", model, "--samples", ids, "--out", tmp_path / "s.safetensors")[0] == 0
    said = mistake("attribute", model, "--samples", texts, "--out", tmp_path / "t.safetensors")
    assert f"'{model}'" in said
    assert "tokenizer.json" in said
    assert (
        sparc3(
            "select", "--scores", tmp_path / "s.safetensors", "--count", "2", "--out", tmp_path / "c.json"
        )[0]
        == 0
    )
    code, _, err = sparc3("ablate", model, "--circuit", tmp_path / "c.json", "--out", tmp_path / "without")
    assert code == 0
    assert "tokenizer" in err
    assert (tmp_path / "without" / "model.safetensors").is_file()


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    made: Path, tmp_path: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparc3.models.load.load_weights", lambda *_, **__: pytest.fail("the work has begun"))
    monkeypatch.setattr("sparc3.models.load.load_model", lambda *_, **__: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    attributed = ("attribute", "demo", "--samples", made / "calm.txt", "--out")
    assert re.search(rf"{tmp_path}: .*\bfolder", mistake(*attributed, tmp_path))
    for command in (
        attributed,
        ("ablate", "demo", "--circuit", made / "c.json", "--out"),
        ("evaluate", "demo", "--metrics", "sparsity", "--out"),
    ):
        assert f"{tmp_path / 'file'} " in mistake(*command, tmp_path / "file" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_word_list_is_met_before_the_work(
    mistake: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparc3.models.load.load_model", lambda *_, **__: pytest.fail("the work has begun"))
    asked = (
        "evaluate",
        "demo",
        "--metrics",
        "toxicity",
        "--set",
        "toxicity.source=demo-angry",
        "--set",
        "toxicity.scorer=lexicon:nowhere.txt",
    )
    assert "nowhere.txt" in mistake(*asked, "--out", tmp_path / "r.json")
    assert "nowhere.txt" in mistake(
        "run", "demo", "--set", "evaluation.toxicity.scorer=lexicon:nowhere.txt", "--out", tmp_path / "run"
    )
    # The second scorer as early as the first.
    assert "nowhere" in mistake(
        "run", "demo", "--set", "evaluation.toxicity.also=./nowhere", "--out", tmp_path / "run"
    )
    assert not [*tmp_path.iterdir()]


def test_count_is_that_of_a_file_too(
    made: Path, tmp_path: Path, sparc3: Call, mistake: Callable[..., str]
) -> None:
    for count, samples in ((), 2), (("--count", 1), 1):
        assert (
            sparc3(
                "attribute",
                "demo",
                "--samples",
                made / "calm.txt",
                *count,
                "--out",
                tmp_path / "s.safetensors",
            )[0]
            == 0
        )
        assert Scores.load(tmp_path / "s.safetensors").provenance["samples"] == samples
    for source, option, named in (
        (made / "calm.txt", ("--count", 3), r"\b2 samples.* 3\b"),
        (made / "calm.txt", ("--count", 0), r"--count.* 0\b"),
        ("demo-general", ("--seq-len", 3), r"'demo-general'.*seq_len 3\b"),
    ):
        said = mistake("attribute", "demo", "--samples", source, *option, "--out", tmp_path / "t.safetensors")
        assert re.search(named, said), said


def test_a_recipe_without_an_evaluation_ends_well(tmp_path: Path, sparc3: Call) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: bare\nmodel: {id: demo}\nreferences:\n  general: {source: demo-general, count: 3}\n  undesired: {source: demo-angry, count: 3}\n"
        "selection: {count: 3}\n"
    )
    code, out, err = sparc3("run", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert (code, "evaluation" in out) == (0, True), err


# Completion -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shell → the file that it would read."""
    from sparc3.cli.completion import SHELLS, write_completion
    from sparc3.cli.main import make_parser

    files = {shell: tmp_path_factory.mktemp("completion") / f"sparc3.{shell}" for shell in SHELLS}
    for shell, path in files.items():
        path.write_text(write_completion(make_parser(), shell) + "\n")
    return files


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("attr",), {"attribute"}),
        (("run", "demo-c"), {"demo-compress"}),
        (("run", "demo", "--no-"), {"--no-resume"}),
        (("evaluate", "demo", "--engine", ""), {"transformers", "llama.cpp"}),
        (("circuits", "u"), {"union"}),
        (("run", "--out", ""), set()),  # a file: bash's own
        (("nonsense", ""), set()),
    ],
)
def test_bash_completes_what_argparse_takes(
    scripts: dict[str, Path], typed: tuple[str, ...], offered: set[str]
) -> None:
    ask = 'source "$0"; COMP_WORDS=(sparc3 "$@"); COMP_CWORD=$#; _sparc3; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask, scripts["bash"], *typed], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(scripts: dict[str, Path], shell: str) -> None:
    text = scripts[shell].read_text()
    assert all(command in text for command in ("attribute", "doctor", "demo-compress"))
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", scripts[shell]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prints_the_script(scripts: dict[str, Path], sparc3: Call, mistake: Call) -> None:
    assert sparc3("completion", "fish") == (0, scripts["fish"].read_text(), "")
    assert "'fish'" in mistake("completion", "fsh")
