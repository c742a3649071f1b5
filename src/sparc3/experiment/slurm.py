"""A recipe as a SLURM job: the same command under torchrun, which is requeued at its time limit and
resumes."""

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
"""Seconds before the time limit at which SLURM signals the job: enough to finish the current batch and to
save the sums."""

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
        name: the recipe as passed to `sparc3 run`; a path is made absolute.
        nodes, gpus: number of nodes, and of GPUs on each; one rank per GPU, or one per node if gpus is 0.
        time: SLURM's time limit of one submission, such as 30 (minutes), 04:00:00 or 1-12:00:00; a long run
            is requeued several times.
        partition, account, mem, cpus_per_task: SLURM's options of these names; mem is per node, such as 64G.
        options: further sbatch options, such as "--qos=long".
        modules: environment modules that the job loads, such as "cuda/12.4".
        environment: variables of the job, as "NAME=value".
        token_file: a file with the hub's token, which the hub's library reads when it needs it; so the token
            itself appears in no batch file and no list of processes.
        array: number of runs, with the seeds 0 to array - 1, whose folders are numbered by their seeds.
        folder: the run folder.

    Raises:
        UserError: numbers, a time or names that SLURM or bash would reject, or a missing token file.
    """
    _check_names(name, folder, (partition, account, mem), options)
    _check_resources(nodes, gpus, cpus_per_task, array, time)
    out = _locate_run(recipe, folder)
    resources = "".join(
        f"#SBATCH --{option}\n"
        for option, is_set in (
            (f"gpus-per-node={gpus}", gpus),
            (f"partition={partition}", partition),
            (f"account={account}", account),
            (f"mem={mem}", mem),
            (f"cpus-per-task={cpus_per_task}", cpus_per_task),
            (f"array=0-{(array or 1) - 1}", array),
        )
        if is_set
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
        # As torchrun: one thread each where several ranks share a node, since the GPUs do the work.
        threads=1 if gpus > 1 else "$(nproc)",
        # Since SLURM 22.05, srun does not inherit the job's --cpus-per-task.
        cpus=f"--cpus-per-task={cpus_per_task} " if cpus_per_task else "",
        launch=_format_torchrun_command(name, out, nodes, max(1, gpus), array, sets),
    )


def _check_resources(nodes: int, gpus: int, cpus_per_task: int | None, array: int | None, time: str) -> None:
    """Raise UserError for numbers that are too small, and for a time limit that leaves no time to work."""
    for option, value, minimum in (
        ("--nodes", nodes, 1),
        ("--gpus", gpus, 0),
        ("--cpus-per-task", cpus_per_task, 1),
        ("--array", array, 1),
    ):
        if value is not None and value < minimum:
            raise UserError(f"{option} is {value}; give {minimum} or more")
    if parse_time(time) < 2 * GRACE:
        raise UserError(
            f"the time limit {time} is too short, because the job stops {GRACE} s earlier to save; give at "
            f"least {2 * GRACE // 60} minutes"
        )


def _check_names(
    name: str, folder: str | None, words: tuple[str | None, ...], options: tuple[str, ...]
) -> None:
    """Raise UserError for a value that bash or SLURM would not read as a plain word."""
    for path in (name, folder or ""):
        if path != one_line(path):
            raise UserError(
                f"{path!r} is not allowed in a batch file; choose a shorter one, or one without line breaks, "
                "control characters and repeated spaces"
            )
    for word in words:
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
    """The lines that load modules and export variables. A missing module ends the job."""
    lines = []
    for module in modules:
        if not re.fullmatch(r"[\w.+/-]+", module) or module.startswith("-"):
            raise UserError(f"{module!r} is not a module name; give one such as cuda/12.4")
        # A batch shell may not have read the profile that defines `module`.
        lines.append(f"type module > /dev/null 2>&1 || . /etc/profile\nmodule load {module} || exit 1")
    for variable in environment:
        name, equals, value = variable.partition("=")
        if not (equals and re.fullmatch(r"[A-Za-z_]\w*", name) and value == one_line(value)):
            raise UserError(f"{variable!r} is not a variable; write NAME=value, in one line")
        if name in SECRET:
            raise UserError(
                f"{name} would be readable in the batch file; write the token into a file, and name it with "
                "--token-file"
            )
        lines.append(f"export {name}={shlex.quote(value)}")
    if token_file is not None:
        if not Path(token_file).is_file():
            raise UserError(
                f"the token file {token_file} does not exist; write the hub's token into it, or check the "
                "path"
            )
        lines.append(f"export HF_TOKEN_PATH={shlex.quote(str(Path(token_file).absolute()))}")
        lines.append("unset HF_TOKEN  # HF_TOKEN would take precedence over the file")
    return "".join(f"{line}\n" for line in lines)


def make_log_folder(recipe: Recipe, folder: str | None = None) -> None:
    """Make the folder of the job's log; without it, SLURM ends the job at once. Raises UserError if that
    fails."""
    log_folder = Path(_locate_run(recipe, folder)).parent
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the log's folder {log_folder}: {error.strerror}; choose another with --run-out"
        ) from None


def _locate_run(recipe: Recipe, folder: str | None) -> str:
    return str(Path(folder or f"runs/{recipe.name}").absolute())


def _format_torchrun_command(
    name: str, out: str, nodes: int, ranks: int, array: int | None, sets: tuple[str, ...]
) -> str:
    """The command that runs torchrun on every node, and under it the same `sparc3 run` as on a laptop."""
    recipe = str(Path(name).absolute()) if Path(name).suffix in (".yaml", ".yml") else name
    rendezvous = (
        ["--standalone"]
        if nodes == 1
        else [
            '--nnodes="$SLURM_JOB_NUM_NODES"',
            "--rdzv-backend=c10d",
            '--rdzv-id="$SLURM_JOB_ID"',
            # A port from the job's number, so that two jobs on one node do not collide.
            '--rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + '
            'SLURM_JOB_ID % 20000))"',
        ]
    )
    suffix = '-"$SLURM_ARRAY_TASK_ID"' if array else ""
    seeds = ['--set references.general.seeds="[$SLURM_ARRAY_TASK_ID]"'] if array else []
    changes = [*(f"--set {shlex.quote(change)}" for change in sets), *seeds]
    torchrun = [
        shlex.quote(sys.executable),
        "-m torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={ranks}",
    ]
    command = ["-m sparc3 run", shlex.quote(recipe), "--out", shlex.quote(out) + suffix, *changes]
    return " ".join(torchrun) + " \\\n    " + " ".join(command)


def parse_time(time: str) -> int:
    """A SLURM time in seconds: minutes, minutes:seconds, hours:minutes:seconds, or
    days-hours[:minutes[:seconds]]. Raises UserError for another form."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise UserError(
            f"time '{time}' is not a SLURM time; write minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds"
        )
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = (*parts, 0, 0)[:3] if dash or len(parts) == 3 else (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def write_job(path: str, text: str) -> None:
    """Write an executable batch file. Raises UserError if a different file of that name exists."""
    if os.path.exists(path) and read_text(path) != text:
        raise UserError(
            f"{path} already exists with other content; remove it, or choose another name with --out"
        )
    write_text(path, text)
    os.chmod(path, 0o755)


def submit(path: str) -> str:
    """Submit a batch file to SLURM, and return the job's number. Raises UserError if SLURM is not installed,
    Sparc3Error if it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not installed; copy {path} to a machine with SLURM, and submit it with sbatch {path}"
        )
    result = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
    if result.returncode:
        raise Sparc3Error(
            f"sbatch refused {path}: {(result.stderr.strip().splitlines() or ['it did not say why'])[-1]}"
        )
    return result.stdout.strip().partition(";")[0]
