"""Batch files: their text, and a real SLURM of one node where one is installed."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparc3 import Results, UserError, load_recipe
from sparc3.experiment.slurm import format_job, parse_time, write_job

Call = Callable[..., Any]
ROOT = Path(__file__).parent.parent


def lines(**options: Any) -> list[str]:
    return format_job(load_recipe("demo"), "demo", **options).splitlines()


def test_one_node() -> None:
    text = lines(gpus=4, time="02:00:00", partition="gpu", folder="/runs/demo")
    head = [line for line in text if line.startswith("#SBATCH")]
    assert {
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=02:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
    } <= set(head)
    assert "#SBATCH --signal=B:USR1@120" in head
    assert "#SBATCH --output=/runs/demo-%j.log" in head
    assert text[0] == "#!/bin/bash"
    assert any("--standalone --nproc-per-node=4" in line for line in text)
    assert any(line.strip() == "-m sparc3 run demo --out /runs/demo &" for line in text)


def test_nodes_arrays_and_settings() -> None:
    text = "\n".join(lines(nodes=2, gpus=0, array=3, folder="a run", sets=("model.dtype=float32",)))
    assert "--array=0-2" in text
    assert "gpus-per-node" not in text
    assert "--rdzv-backend=c10d" in text
    assert f"--out '{Path('a run').absolute()}'-\"$SLURM_ARRAY_TASK_ID\" --set model.dtype=float32" in text
    assert '--set references.general.seeds="[$SLURM_ARRAY_TASK_ID]" &' in text


def test_jobs_on_one_node_meet_at_ports_of_their_own() -> None:
    assert "SLURM_JOB_ID % 20000" in "\n".join(lines(nodes=2))


def test_another_batch_file_is_not_written_over(tmp_path: Path) -> None:
    path = str(tmp_path / "demo.sbatch")
    write_job(path, "one")
    write_job(path, "one")
    with pytest.raises(UserError):
        write_job(path, "two")
    assert Path(path).read_text() == "one"


@pytest.mark.parametrize(
    "options", [{}, {"nodes": 3, "gpus": 8, "array": 2}, {"gpus": 0, "folder": "it's here"}]
)
def test_bash_reads_it(options: dict[str, Any]) -> None:
    subprocess.run(["bash", "-n"], input="\n".join(lines(**options)), text=True, check=True)


@pytest.mark.parametrize(
    ("time", "there"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("02:00:00", 7200),
        ("1-0", 86400),
        ("1-12:30", 131400),
        ("2-01:00:05", 176405),
    ],
)
def test_times(time: str, there: int) -> None:
    assert parse_time(time) == there


def test_mistakes() -> None:
    for options, said in (
        ({"time": "soon"}, "soon"),
        ({"time": "3"}, "3 .*4 minutes"),
        ({"nodes": 0}, "--nodes is 0"),
        ({"gpus": -1}, "--gpus is -1"),
    ):
        with pytest.raises(UserError, match=said):
            lines(**options)


def test_further_options_of_slurm() -> None:
    text = lines(mem="64G", cpus_per_task=8, account="lab", options=("--qos=long", "-C a100"))
    end_of_head = max(number for number, line in enumerate(text) if line.startswith("#SBATCH"))
    wanted = ("--mem=64G", "--cpus-per-task=8", "--account=lab", "--qos=long", "-C a100")
    assert {f"#SBATCH {option}" for option in wanted} <= set(text[: end_of_head + 1])
    assert all(line.startswith("#") for line in text[: end_of_head + 1])
    for options in (
        {"options": ("--qos=long\nrm -rf ~",)},
        {"options": ("qos",)},
        {"mem": "1 G"},
        {"account": "a\nb"},
        {"cpus_per_task": 0},
    ):
        with pytest.raises(UserError):
            lines(**options)


def test_modules_variables_and_the_token(tmp_path: Path) -> None:
    token = tmp_path / "my token"
    token.write_text("hf_secret")
    text = lines(
        modules=("cuda/12.4", "python"), environment=("HF_HOME=/scratch/a b", "EMPTY="), token_file=str(token)
    )
    assert "hf_secret" not in "\n".join(text)
    first = next(number for number, line in enumerate(text) if line.startswith("type module"))
    last = text.index("cd " + str(Path.cwd()))
    script = "\n".join(text[first:last])
    # a stand-in for the module system, which is not made for `set -u`
    said = subprocess.run(
        ["bash"],
        input='module() { echo "$1 $2"; }\n'
        + script
        + '\necho "$HF_HOME|$EMPTY|$HF_TOKEN_PATH|${HF_TOKEN:-none}"',
        text=True,
        capture_output=True,
        check=True,
        env={**os.environ, "HF_TOKEN": "of the user"},
    ).stdout
    assert said.splitlines() == ["load cuda/12.4", "load python", f"/scratch/a b||{token}|none"]


def test_a_module_that_is_not_there_ends_the_job() -> None:
    script = "\n".join(line for line in lines(modules=("nowhere",)) if "module" in line)
    done = subprocess.run(["bash"], input=f"module() {{ return 1; }}\n{script}\necho on", text=True)
    assert done.returncode == 1


@pytest.mark.parametrize(
    "options",
    [
        {"modules": ("a; rm -rf ~",)},
        {"modules": ("-r",)},
        {"environment": ("NAME",)},
        {"environment": ("A B=c",)},
        {"environment": ("A=b\nc",)},
        {"environment": ("HF_TOKEN=hf_secret",)},
        {"token_file": "nowhere"},
    ],
)
def test_what_a_job_cannot_be_set_up_with(options: dict[str, Any]) -> None:
    with pytest.raises(UserError) as told:
        lines(**options)
    assert "hf_secret" not in str(told.value)


def test_options_pass_through_and_the_log_has_a_folder(
    sparc3: Call, mistake: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--sbatch=--qos=long", "--sbatch", "--exclusive", "--mem", "64G", "--cpus-per-task", "8")
    assert sparc3("slurm", "demo", *arguments, "--run-out", "far/away/demo")[0] == 0
    text = Path("demo.sbatch").read_text()
    assert all(f"#SBATCH {option}\n" in text for option in ("--qos=long", "--exclusive", "--mem=64G"))
    log = re.search(r"--output=(.*)", text)
    assert log
    assert Path(log[1]).parent == tmp_path / "far/away"
    assert (tmp_path / "far/away").is_dir()
    assert "demo.sbatch" in mistake("slurm", "demo", "--run-out", "demo.sbatch/demo", "--out", "other.sbatch")
    assert not Path("other.sbatch").exists()
    mistake("slurm", "demo", "--sbatch")


def test_the_command(sparc3: Call, mistake: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = sparc3("slurm", "demo", "--gpus", "0")
    assert code == 0
    assert "sbatch demo.sbatch" in out
    assert os.access("demo.sbatch", os.X_OK)
    assert "'demo'" in mistake("slurm", "demoo")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch demo.sbatch" in mistake("slurm", "demo", "--gpus", "0", "--submit")


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))) or os.geteuid() != 0:
        pytest.skip("needs Debian's slurm-wlm and munge, and root")
    folder = tmp_path_factory.mktemp("slurm")
    begun = subprocess.run(
        [ROOT / "scripts/slurm_one_node.sh", "start", folder, str(os.getpid())],
        capture_output=True,
        text=True,
    )
    if begun.returncode:
        pytest.skip(f"SLURM did not start: {begun.stderr.strip()[-200:]}")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield
    subprocess.run([ROOT / "scripts/slurm_one_node.sh", "stop", folder], check=True)


def wait_for(what: str, there: Callable[[], bool], limit: float = 300) -> None:
    began = time.monotonic()
    while not there():
        assert time.monotonic() - began < limit, f"{what}: not within {limit} s"
        time.sleep(0.2)


def processes(folder: Path) -> dict[bytes, int]:
    """Of all processes that name the folder: command → mask of the signals that it hears itself."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if str(folder).encode() in command:
                found[command] = int(re.findall(r"SigCgt:\s*(\w+)", (process / "status").read_text())[0], 16)
        except (OSError, IndexError):
            continue
    return found


def adds_up(folder: Path) -> bool:
    """Whether a rank of the run is adding up scores: only then does it hear SIGTERM itself."""
    return any(
        heard >> (signal.SIGTERM - 1) & 1
        for command, heard in processes(folder).items()
        if b"torch.distributed.run" not in command
    )


def of_job(job: str, field: str) -> str:
    shown = subprocess.run(
        ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=True
    ).stdout
    return next(part.partition("=")[2] for part in shown.split() if part.startswith(field + "="))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_job_out_of_time_is_queued_again_and_finishes(sparc3: Call, tmp_path: Path) -> None:
    """The signal that SLURM sends before the time limit comes midway through the scores."""
    content = load_recipe("demo").resolve()
    content["references"]["general"]["count"] = 1000
    content["evaluation"] = {"perplexity": content["evaluation"]["perplexity"]}
    content["compare"] = {}
    recipe, folder = tmp_path / "job.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(content))
    code, out, err = sparc3(
        "slurm", recipe, "--gpus", "0", "--run-out", folder, "--out", tmp_path / "job.sbatch", "--submit"
    )
    assert code == 0, err
    job = out.split()[-1]
    wait_for("the first scores", lambda: adds_up(folder))
    time.sleep(1)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    wait_for("queued again", lambda: of_job(job, "Restarts") == "1")
    wait_for("the first go gone", lambda: not processes(folder) and of_job(job, "JobState") == "PENDING")
    assert not (folder / "results.json").exists()
    assert list(folder.glob("scores/*.partial")), "the sums were not saved"
    # SLURM waits two minutes by itself. Within the second in which the first go ended, slurmd takes the second one's credential for the first's.
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], check=True)
    wait_for("the end", lambda: of_job(job, "JobState") in ("COMPLETED", "FAILED"))
    log = Path(f"{folder}-{job}.log").read_text()
    assert of_job(job, "JobState") == "COMPLETED", log
    assert re.search(r"\d+ of \d+ samples", log)
    assert Results.load(folder / "results.json").find("perplexity", "ablated").value
    assert not list(folder.glob("scores/*.partial"))
