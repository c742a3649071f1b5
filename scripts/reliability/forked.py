"""Runs of a small recipe in forked processes: what takes seconds to import is there already, so that a kill
meets work and not imports."""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401

import sparc3.attribution.partial_sums as resume
from sparc3 import Circuit, Results, Scores
from sparc3.cli.main import main as command

SMALL = (
    "references.general.count=40",
    "references.undesired.count=24",
    "evaluation.toxicity.count=8",
    "evaluation.toxicity.generations=2",
    "evaluation.toxicity.max_new_tokens=8",
    "evaluation.perplexity.count=8",
    "evaluation.ioi.count=16",
    "compare.methods=[random]",
    "compare.counts=[100]",
)
GRACE = 30


def run_small(out: Path) -> None:
    """`sparc3 run demo`, with fewer samples, saving the sums after every batch."""
    start = resume.PartialSums.__init__
    resume.SHARE = 1e9
    resume.PartialSums.__init__ = lambda self, path, task, every: start(self, path, task, 0.0)  # type: ignore[method-assign]
    command(["run", "demo", "--out", str(out), *(part for change in SMALL for part in ("--set", change))])


def forked(work: Callable[[], Any], said: Path) -> int:
    """The process id of a child that does the work, with its output in the file `said`, and ends with its
    exit code."""
    child = os.fork()
    if child:
        return child
    opened = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    os._exit(code)


def ranks(count: int, work: Callable[[], Any], said: Path) -> list[int]:
    """As many children as torchrun would start, which find each other at a store of their parent's; one child
    where count is 1."""
    if count == 1:
        return [forked(work, said)]
    reading, writing = os.pipe()

    def keep_store() -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    parent = os.getpid()
    STORES.append(forked(keep_store, said))
    port = os.read(reading, 20).decode()
    os.close(reading)
    os.close(writing)

    def work_as(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        work()

    return [forked(lambda rank=rank: work_as(rank), said) for rank in range(count)]  # type: ignore[misc]


STORES: list[int] = []


def ended(children: list[int]) -> list[int]:
    """Their exit codes. Where one fails the others are asked to end, and made to after a while, as torchrun
    does it."""
    codes: dict[int, int] = {}
    asked = 0.0
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            for child in set(children) - set(codes):
                if not asked or time.monotonic() - asked > GRACE:
                    os.kill(child, signal.SIGKILL if asked else signal.SIGTERM)
            asked = asked or time.monotonic()
        time.sleep(0.005)
    while STORES:
        store = STORES.pop()
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)
    return [codes[child] for child in children]


def differences(whole: Path, again: Path, tolerance: float) -> list[str]:
    """What of a run's outcome is not as in the uninterrupted run; nothing where the campaign may go on. Times
    of stages are no outcome."""
    found = [
        f"{path.relative_to(again)} is left over"
        for path in again.rglob("*")
        if path.name.endswith(".tmp") or ".partial" in path.name
    ]
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    if names != sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file()):
        found.append("other files")
    for path in (
        path for path in whole.rglob("*.safetensors") if (again / path.relative_to(whole)).is_file()
    ):
        one, other = Scores.load(path), Scores.load(again / path.relative_to(whole))
        far = max(
            float(((one[name] - other[name]).abs() / one[name].abs().max().clamp_min(1e-30)).max())
            for name in one
        )
        if far > tolerance:
            found.append(f"{path.name} differs by {far:.1e}")
    if Circuit.load(whole / "circuit.json").members != Circuit.load(again / "circuit.json").members:
        found.append("another circuit")
    for one, other in zip(
        Results.load(whole / "results.json"), Results.load(again / "results.json"), strict=True
    ):
        if abs((one.value or 0) - (other.value or 0)) > tolerance * abs(one.value or 0):
            found.append(f"{one.metric} of {one.variant} is {other.value}, not {one.value}")
    return found


def removed(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
