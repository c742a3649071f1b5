"""A recipe as a SLURM job: the same command under torchrun, requeued when its time is up, going on where it
was."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import Sparc3Error, UserError
from ..recipe.schema import Recipe
from ..safe_text import one_line
from ..storage import read_text, write_text

GRACE = 120
"""How many seconds before the time limit SLURM signals the job: enough for the batch under way and for saving
the sums."""

SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""Variables that hold the hub's token."""

HEAD = """\
#!/bin/bash
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{resources}#SBATCH --time={time}
#SBATCH --signal=B:USR1@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
"""

BODY = """
# {what}
# {grace} s before the time limit SLURM sends USR1. The ranks save their sums and end, the job is queued
# again, and the same command resumes. It also resumes after a node failure.
{setup}set -uo pipefail
{changes}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"

save_and_requeue() {{
    echo "time is almost up: saving, and queueing job $SLURM_JOB_ID again"
    scancel --signal=TERM "$SLURM_JOB_ID.0"  # not to srun, which would end its tasks at once
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}}
trap save_and_requeue USR1

srun --kill-on-bad-exit=1 {cpus}{launch} &
step=$!
wait "$step"
"""


def format_job(
    recipe: Recipe,
    name: str,
    *,
    nodes: int = 1,
    gpus: int = 1,
    time: str = "04:00:00",
    partition: str | None = None,
    account: str | None = None,
    mem: str | None = None,
    cpus_per_task: int | None = None,
    options: tuple[str, ...] = (),
    modules: tuple[str, ...] = (),
    environment: tuple[str, ...] = (),
    token_file: str | None = None,
    array: int | None = None,
    folder: str | None = None,
    sets: tuple[str, ...] = (),
) -> str:
    """The text of a batch file that runs a recipe.

    Args:
        name: the recipe as `sparc3 run` takes it; a path is made absolute.
        nodes, gpus: nodes, and GPUs on each; one rank a GPU, or one rank a node where gpus is 0.
        time: SLURM's time limit of one submission, such as 30 (minutes), 04:00:00 or 1-12:00:00; a long run
            is requeued several times.
        partition, account, mem, cpus_per_task: SLURM's options of these names; mem is of each node, such as
            64G.
        options: further options, each as an #SBATCH line has it, such as "--qos=long".
        modules: environment modules that the job loads, such as "cuda/12.4".
        environment: variables of the job, as "NAME=value".
        token_file: a file that holds the hub's token, which the hub's library reads when it needs it: the
            token itself stands in no batch file and in no list of processes.
        array: this many runs, with the seeds 0 to array - 1, whose folders are numbered by their seeds.
        folder: the run folder.

    Raises:
        UserError: numbers, a time or names that SLURM or bash would not take; no such token file.
    """
    _check_names(name, folder, (partition, account, mem), options)
    _check_resources(nodes, gpus, cpus_per_task, array, time)
    out = _locate_run(recipe, folder)
    resources = "".join(
        f"#SBATCH --{option}\n"
        for option, wanted in (
            (f"gpus-per-node={gpus}", gpus),
            (f"partition={partition}", partition),
            (f"account={account}", account),
            (f"mem={mem}", mem),
            (f"cpus-per-task={cpus_per_task}", cpus_per_task),
            (f"array=0-{(array or 1) - 1}", array),
        )
        if wanted
    ) + "".join(f"#SBATCH {option}\n" for option in options)
    head = HEAD.format(
        job=f"sparc3-{recipe.name}",
        nodes=nodes,
        resources=resources,
        time=time,
        grace=GRACE,
        log=f"{out}-{'%A-%a' if array else '%j'}.log",
    )
    machines = f"{nodes} node{'s' if nodes > 1 else ''}, {gpus or 'no'} GPU{'s' if gpus != 1 else ''} each"
    return head + BODY.format(
        what=f"sparc3 run {one_line(name)} on {machines}",
        grace=GRACE,
        setup=_write_setup(modules, environment, token_file),
        changes=f"cd {shlex.quote(os.getcwd())}",
        threads=1 if gpus > 1 else "$(nproc)",
        cpus=f"--cpus-per-task={cpus_per_task} "
        if cpus_per_task
        else "",  # srun does not take it from the job
        launch=_format_torchrun_command(name, out, nodes, max(1, gpus), array, sets),
    )


def _check_resources(nodes: int, gpus: int, cpus_per_task: int | None, array: int | None, time: str) -> None:
    """Raise UserError for numbers that are too small, and a time that leaves none to work."""
    for option, given, least in (
        ("--nodes", nodes, 1),
        ("--gpus", gpus, 0),
        ("--cpus-per-task", cpus_per_task, 1),
        ("--array", array, 1),
    ):
        if given is not None and given < least:
            raise UserError(f"{option} is {given}; give {least} or more")
    if parse_time(time) < 2 * GRACE:
        raise UserError(
            f"a time limit of {time} leaves nothing beside the {GRACE} s in which the job saves; give at "
            f"least {2 * GRACE // 60} minutes"
        )


def _check_names(
    name: str, folder: str | None, asked: tuple[str | None, ...], options: tuple[str, ...]
) -> None:
    """Raise UserError for a value that bash or SLURM would not read as a plain word."""
    for path in (name, folder or ""):
        if path != one_line(path):
            raise UserError(
                f"{path!r} is not allowed in a batch file; choose a shorter one, or one without line breaks, "
                "control characters and repeated spaces"
            )
    for word in asked:
        if word is not None and (word != one_line(word) or not re.fullmatch(r"[\w.,-]+", word)):
            raise UserError(
                f"{word!r} is not allowed in a batch file; use letters, digits, underscores, dots, commas "
                "and dashes"
            )
    for option in options:
        if option != one_line(option) or not re.fullmatch(r"--?[A-Za-z].*", option):
            raise UserError(
                f"{option!r} is not allowed in a batch file; give an option of sbatch, such as --qos=long"
            )


def _write_setup(modules: tuple[str, ...], environment: tuple[str, ...], token_file: str | None) -> str:
    """The lines that load modules and export variables; a module that is not there ends the job."""
    lines = []
    for module in modules:
        if not re.fullmatch(r"[\w.+/-]+", module) or module.startswith("-"):
            raise UserError(f"{module!r} is no name of a module; give one such as cuda/12.4")
        # Where bash does not know modules yet, the system's profile teaches it.
        lines.append(f"type module > /dev/null 2>&1 || . /etc/profile\nmodule load {module} || exit 1")
    for variable in environment:
        name, there, value = variable.partition("=")
        if not (there and re.fullmatch(r"[A-Za-z_]\w*", name) and value == one_line(value)):
            raise UserError(f"{variable!r} is no variable; write NAME=value, in one line")
        if name in SECRET:
            raise UserError(
                f"{name} would stand in the batch file for all to read; write the token into a file, and "
                "name it with --token-file"
            )
        lines.append(f"export {name}={shlex.quote(value)}")
    if token_file is not None:
        if not Path(token_file).is_file():
            raise UserError(f"no token file {token_file}; write the hub's token into it, or check the path")
        lines.append(f"export HF_TOKEN_PATH={shlex.quote(str(Path(token_file).absolute()))}")
        lines.append("unset HF_TOKEN  # HF_TOKEN would take precedence over the file")
    return "".join(f"{line}\n" for line in lines)


def make_log_folder(recipe: Recipe, folder: str | None = None) -> None:
    """Make the folder of the job's log, without which SLURM ends the job at once. Raises UserError where it
    cannot."""
    place = Path(_locate_run(recipe, folder)).parent
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the log's folder {place}: {error.strerror}; choose another with --run-out"
        ) from None


def _locate_run(recipe: Recipe, folder: str | None) -> str:
    return str(Path(folder or f"runs/{recipe.name}").absolute())


def _format_torchrun_command(
    name: str, out: str, nodes: int, ranks: int, array: int | None, sets: tuple[str, ...]
) -> str:
    """torchrun on every node, and under it the command that a laptop runs."""
    recipe = str(Path(name).absolute()) if Path(name).suffix in (".yaml", ".yml") else name
    rendezvous = (
        ["--standalone"]
        if nodes == 1
        else [
            '--nnodes="$SLURM_JOB_NUM_NODES"',
            "--rdzv-backend=c10d",
            '--rdzv-id="$SLURM_JOB_ID"',
            '--rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + '
            'SLURM_JOB_ID % 20000))"',
        ]
    )
    numbered = '-"$SLURM_ARRAY_TASK_ID"' if array else ""
    seeds = ['--set references.general.seeds="[$SLURM_ARRAY_TASK_ID]"'] if array else []
    changed = [*(f"--set {shlex.quote(change)}" for change in sets), *seeds]
    torchrun = [
        shlex.quote(sys.executable),
        "-m torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={ranks}",
    ]
    command = ["-m sparc3 run", shlex.quote(recipe), "--out", shlex.quote(out) + numbered, *changed]
    return " ".join(torchrun) + " \\\n    " + " ".join(command)


def parse_time(time: str) -> int:
    """Seconds of a SLURM time: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours[:minutes[:seconds]]. Raises UserError for another."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise UserError(
            f"time '{time}' is not a SLURM time; write minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds"
        )
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, left = (*parts, 0, 0)[:3] if dash or len(parts) == 3 else (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def write_job(path: str, text: str) -> None:
    """Write an executable batch file. Raises UserError where another file of that name is in the way."""
    if os.path.exists(path) and read_text(path) != text:
        raise UserError(
            f"{path} already exists with other content; remove it, or choose another name with --out"
        )
    write_text(path, text)
    os.chmod(path, 0o755)


def submit(path: str) -> str:
    """Hand a batch file to SLURM; its job's number. Raises UserError where there is no SLURM, Sparc3Error
    where it says no."""
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not installed; copy {path} to a machine with SLURM, and submit it with sbatch {path}"
        )
    done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
    if done.returncode:
        raise Sparc3Error(
            f"sbatch refused {path}: {(done.stderr.strip().splitlines() or ['it did not say why'])[-1]}"
        )
    return done.stdout.strip().partition(";")[0]
