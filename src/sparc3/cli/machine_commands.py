"""The machine and the cluster: doctor, plan and slurm."""

import argparse
import time

from ..errors import Sparc3Error
from ..progress import write_duration
from .console import Add, precision_arguments, quiet_transformers, say, set_argument


def add_to(add: Add) -> None:
    _add_doctor(add)
    _add_plan(add)
    _add_slurm(add)


def _add_doctor(add: Add) -> None:
    doctor = add("doctor", _doctor, "what this machine has, and whether relevance on a model is right")
    doctor.add_argument(
        "model",
        nargs="?",
        help="a hub id, a checkpoint's folder, a config.json (random weights), a GGUF, smollm2, or demo",
    )
    precision_arguments(doctor)


def _add_plan(add: Add) -> None:
    plan = add(
        "plan",
        _plan,
        "what a recipe will need, before anything is loaded: memory, time, disk, and whether it fits",
    )
    plan.add_argument("recipe", help="a bundled recipe's name, or the path of a YAML file")
    set_argument(plan)
    plan.add_argument(
        "--hardware",
        metavar="NAME",
        help="another device than this machine's, such as h100, a100-80 or rtx4090",
    )
    plan.add_argument(
        "--gpus", type=int, default=1, help="number of devices that share the samples (default: %(default)s)"
    )
    plan.add_argument(
        "--config", metavar="FILE", help="the model's config.json, if the hub cannot be reached"
    )


def _add_slurm(add: Add) -> None:
    slurm = add(
        "slurm", _slurm, "write a batch file that runs a recipe under SLURM, and goes on after a time-out"
    )
    slurm.add_argument("recipe", help="a bundled recipe's name, or the path of a YAML file")
    slurm.add_argument("--nodes", type=int, default=1, help="(default: %(default)s)")
    slurm.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="GPUs per node, one rank each; 0 for CPUs only (default: %(default)s)",
    )
    slurm.add_argument(
        "--time",
        default="04:00:00",
        help="time limit of one job; it is queued again until the run is done (default: %(default)s)",
    )
    slurm.add_argument("--partition", metavar="NAME", help="partition that takes the job")
    slurm.add_argument("--account", metavar="NAME", help="account that the job is charged to")
    slurm.add_argument("--mem", metavar="SIZE", help="memory of each node, such as 64G")
    slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="CPUs on each node")
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, such as --qos=long; may be repeated",
    )
    _add_environment(slurm)
    slurm.add_argument(
        "--array",
        type=int,
        metavar="N",
        help="N runs, with seeds 0 to N-1 of the general set, in numbered run folders",
    )
    slurm.add_argument("--run-out", metavar="DIR", help="run folder (default: runs/<recipe's name>)")
    set_argument(slurm)
    slurm.add_argument(
        "--out", metavar="FILE", help="where the batch file goes (default: <recipe's name>.sbatch)"
    )
    slurm.add_argument("--submit", action="store_true", help="hand it to sbatch")


def _add_environment(slurm: argparse.ArgumentParser) -> None:
    slurm.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="an environment module to load, such as cuda/12.4; may be repeated",
    )
    slurm.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable of the job; may be repeated",
    )
    slurm.add_argument(
        "--token-file", metavar="FILE", help="a file with the hub's token, which the job reads when it starts"
    )


def _doctor(args: argparse.Namespace) -> None:
    from ..doctor.examine import examine, list_environment

    if not args.model:
        for what, how in list_environment():
            say(f"{what:16} {how}")
        return
    quiet_transformers()
    began = time.monotonic()
    found = examine(args.model, dtype=args.dtype, device=args.device, progress=True)
    say("\n".join(found.lines()))
    say(f"\nexamined in {write_duration(time.monotonic() - began)}, the loading included")
    if found.failed:
        raise Sparc3Error(
            f"{len(found.failed)} of {len(found.findings)} checks failed: "
            f"{'; '.join(f.name for f in found.failed)}"
        )


def _plan(args: argparse.Namespace) -> None:
    from ..plan.plan import plan
    from ..recipe.schema import load_recipe

    quiet_transformers()
    say(
        plan(
            load_recipe(args.recipe, args.set), hardware=args.hardware, gpus=args.gpus, config=args.config
        ).text()
    )


def _slurm(args: argparse.Namespace) -> None:
    from ..experiment.slurm import make_log_folder, sbatch, submit, write_job
    from ..recipe.schema import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    text = sbatch(
        recipe,
        args.recipe,
        nodes=args.nodes,
        gpus=args.gpus,
        time=args.time,
        partition=args.partition,
        account=args.account,
        mem=args.mem,
        cpus_per_task=args.cpus_per_task,
        options=tuple(args.sbatch),
        modules=tuple(args.module),
        environment=tuple(args.env),
        token_file=args.token_file,
        array=args.array,
        folder=args.run_out,
        sets=tuple(args.set),
    )
    path = args.out or f"{recipe.name}.sbatch"
    make_log_folder(recipe, args.run_out)
    write_job(path, text)
    say(f"{path}: {f'submitted as job {submit(path)}' if args.submit else f'submit it with sbatch {path}'}")
