"""Commands for the machine and the cluster: doctor, plan, slurm, and shell completion."""

import argparse
import time

from ..errors import Sparc3Error
from ..progress import write_duration
from .completion import SHELLS, write_completion
from .console import (
    FLAG,
    INTEGER,
    OPTIONAL,
    PRECISION,
    RECIPE,
    REPEATED,
    SET,
    Add,
    Arguments,
    quiet_transformers,
    say,
)

DOCTOR: Arguments = {
    "model": (
        "a hub id, a checkpoint's folder, a config.json (random weights), a GGUF, smollm2, or demo",
        OPTIONAL,
    ),
    **PRECISION,
}
PLAN: Arguments = {
    **RECIPE,
    **SET,
    "--hardware NAME": "another device than this machine's, such as h100, a100-80 or rtx4090",
    "--gpus": (
        "number of devices that share the samples (default: %(default)s)",
        {"type": int, "default": 1},
    ),
    "--config FILE": "the model's config.json, if the hub cannot be reached",
    "--try-prompts N": (
        "load the model and let it complete N prompts of each set that it chooses, for a narrower estimate",
        INTEGER,
    ),
}
SLURM: Arguments = {
    **RECIPE,
    "--nodes": ("(default: %(default)s)", {"type": int, "default": 1}),
    "--gpus": (
        "GPUs per node, one rank each; 0 for CPUs only (default: %(default)s)",
        {"type": int, "default": 1},
    ),
    "--time": (
        "time limit of one job; it is queued again until the run is done (default: %(default)s)",
        {"default": "04:00:00"},
    ),
    "--partition NAME": "partition that takes the job",
    "--account NAME": "account that the job is charged to",
    "--mem SIZE": "memory of each node, such as 64G",
    "--cpus-per-task N": ("CPUs on each node", INTEGER),
    "--sbatch OPTION": ("a further option of sbatch, such as --qos=long; may be repeated", REPEATED),
    "--module NAME": ("an environment module to load, such as cuda/12.4; may be repeated", REPEATED),
    "--env NAME=VALUE": ("an environment variable of the job; may be repeated", REPEATED),
    "--token-file FILE": "a file with the hub's token, which the job reads when it starts",
    "--array N": ("N runs, with seeds 0 to N-1 of the general set, in numbered run folders", INTEGER),
    "--run-out DIR": "run folder (default: runs/<recipe's name>)",
    **SET,
    "--out FILE": "where the batch file goes (default: <recipe's name>.sbatch)",
    "--submit": ("hand it to sbatch", FLAG),
}
COMPLETION: Arguments = {"shell": ("bash, zsh or fish", {"choices": SHELLS})}


def add_to(add: Add) -> None:
    add("doctor", _doctor, "what this machine has, and whether relevance on a model is right", DOCTOR)
    description = (
        "what a recipe will need, before anything is loaded: memory, time, disk, and whether it fits"
    )
    add("plan", _plan, description, PLAN)
    description = "write a batch file that runs a recipe under SLURM, and resumes after a time-out"
    add("slurm", _slurm, description, SLURM)
    description = "print the lines that complete sparc3's commands and options in a shell"
    add("completion", _complete, description, COMPLETION)


def _doctor(args: argparse.Namespace) -> None:
    from ..doctor.examine import examine, list_environment

    if not args.model:
        for name, state in list_environment():
            say(f"{name:16} {state}")
        return
    quiet_transformers()
    start = time.monotonic()
    examination = examine(args.model, dtype=args.dtype, device=args.device, progress=True)
    say("\n".join(examination.lines()))
    say(f"\nexamined in {write_duration(time.monotonic() - start)}, the loading included")
    if examination.failures:
        raise Sparc3Error(
            f"{len(examination.failures)} of {len(examination.findings)} checks failed: "
            f"{'; '.join(f.name for f in examination.failures)}"
        )


def _plan(args: argparse.Namespace) -> None:
    from ..plan.plan import plan
    from ..recipe.schema import load_recipe

    quiet_transformers()
    recipe = load_recipe(args.recipe, args.set)
    asked = {"hardware": args.hardware, "gpus": args.gpus, "config": args.config}
    say(plan(recipe, **asked, try_prompts=args.try_prompts).text())


def _slurm(args: argparse.Namespace) -> None:
    from ..experiment.slurm import format_job, make_log_folder, submit, write_job
    from ..recipe.schema import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    names = ("nodes", "gpus", "time", "partition", "account", "mem", "cpus_per_task", "token_file", "array")
    text = format_job(
        recipe,
        args.recipe,
        **{name: getattr(args, name) for name in names},
        options=tuple(args.sbatch),
        modules=tuple(args.module),
        environment=tuple(args.env),
        folder=args.run_out,
        sets=tuple(args.set),
    )
    path = args.out or f"{recipe.name}.sbatch"
    make_log_folder(recipe, args.run_out)
    write_job(path, text)
    say(f"{path}: {f'submitted as job {submit(path)}' if args.submit else f'submit it with sbatch {path}'}")


def _complete(args: argparse.Namespace) -> None:
    from .main import make_parser

    print(write_completion(make_parser(), args.shell))
