"""A full disk and a folder that may not be written, met by every kind of file: the message names it, the earlier one stays, a rerun goes on."""

import errno
import fcntl
import itertools
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny import tiny

from sparc3 import Circuit, ReferenceSet, Results, Scores, Sparc3Error, UserError, attribute
from sparc3.attribution.partial_sums import load_sums, save_sums
from sparc3.checkpoints.export import export
from sparc3.evaluation.statistics import Evaluation, Observations
from sparc3.experiment.run_folder import RunContext, accept_recipe, claim_folder, log_to_folder
from sparc3.experiment.run_folder import log as log_of_runs
from sparc3.experiment.slurm import format_job, write_job
from sparc3.recipe.schema import load_recipe
from sparc3.report.write import write_report
from sparc3.results import Measurement
from sparc3.storage import remove_leftovers, whole_file, whole_folder

Call = Callable[..., Any]
Write = Callable[[Path], object]
MODEL = {"id": "m", "architecture": "llama", "fingerprint": "0" * 16}
RESULTS = Results(
    (Measurement("perplexity", "original", "test", 2.0, (1.0, 3.0), 4, 0, "perplexity", "lower"),),
    (),
    {"model": MODEL},
)


def scores() -> Scores:
    return Scores(
        {"model.layers.0.mlp.up_proj": torch.rand(5000)}, {"unit": "neuron", "method": "lrp", "model": MODEL}
    )


def sums(folder: Path) -> Write:
    attribute(
        tiny("llama"),
        [[3, 4, 5], [6, 7]],
        partial=folder / "shard",
        shard=(1, 1),
        unit="weight",
        sites=("mlp.up", "mlp.down"),
    )
    read = load_sums(folder / "shard")
    (folder / "shard").unlink()
    return lambda path: save_sums(path, read[0], read[1], read[2])


def report(path: Path) -> None:
    write_report(path.parent)


def log_line(path: Path) -> None:
    with log_to_folder(path.parent):
        log_of_runs.info("a line that is written")


COUNTS = itertools.count(100)


def recipe_copy(path: Path) -> None:
    """Another recipe each time, which an accepted run writes over the one before."""
    recipe, model = load_recipe("demo", [f"selection.count={next(COUNTS)}"]), cast(Any, None)
    with claim_folder(path.parent, recipe, True):
        accept_recipe(RunContext(recipe, path.parent, False, model, model, {}))


@pytest.fixture(
    params=[
        "scores",
        "sums",
        "circuit",
        "packed",
        "results",
        "samples",
        "evaluation",
        "job",
        "report.html",
        "log.txt",
        "recipe.yaml",
    ]
)
def kind(request: pytest.FixtureRequest, open_folder: Path) -> tuple[Path, Write]:
    """Where one kind of file goes, and what writes it."""
    name, observed = request.param, Observations("m", "test", "u", "lower", (1.0,) * 50, (1.0,) * 50)
    writes: dict[str, Write] = {
        "scores": scores().save,
        "circuit": Circuit("neuron", {"model.layers.0.mlp.up_proj": tuple(range(900))}, MODEL).save,
        "packed": Circuit("weight", {"model.layers.0.mlp.up_proj": torch.rand(200, 200) < 0.5}, MODEL).save,
        "results": RESULTS.save,
        "samples": ReferenceSet.of(["some words"] * 300).save,
        "evaluation": Evaluation("original", (observed,), {}, "x", 1.0).save,
        "job": lambda path: write_job(str(path), format_job(load_recipe("demo"), "demo")),
        "report.html": report,
        "log.txt": log_line,
        "recipe.yaml": recipe_copy,
    }
    if name == "report.html":
        RESULTS.save(open_folder / "results.json")
    write = sums(open_folder) if name == "sums" else writes[name]
    suffix = {"circuit": ".json", "packed": ".safetensors"}.get(name, "")
    return open_folder / f"{name}{suffix}", write


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file grows beyond 256 bytes, which its writer hears as from a full disk."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


@contextmanager
def read_only() -> Iterator[None]:
    """Inside, this process is an ordinary user's, to whom the folder of the test is not open for writing."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("broken", [full_disk, read_only])
def test_every_kind_of_file(
    kind: tuple[Path, Write], broken: Callable[[], AbstractContextManager[None]]
) -> None:
    path, write = kind
    write(path)
    if path.name == "log.txt":
        path.write_bytes(path.read_bytes() * 9)  # a log grows at its end, and only then meets the limit
    before, beside = path.read_bytes(), sorted(path.parent.iterdir())
    named = re.escape(str(path.parent if path.name == "recipe.yaml" else path))
    with broken(), pytest.raises(Sparc3Error, match=named) as told:
        write(path)
    assert "\n" not in str(told.value)
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == beside
    write(path)
    assert path.stat().st_size >= len(before)


@pytest.mark.parametrize("broken", [full_disk, read_only])
def test_a_checkpoint(
    open_folder: Path, demo: tuple[Any, Any], broken: Callable[[], AbstractContextManager[None]]
) -> None:
    out, circuit = open_folder / "export", Circuit("neuron", {"model.layers.0.mlp.up_proj": (3,)})
    with broken(), pytest.raises(Sparc3Error, match=re.escape(str(out))):
        export(*demo, circuit, out)
    assert not list(open_folder.iterdir())
    assert (export(*demo, circuit, out) / "config.json").is_file()


@pytest.mark.parametrize(("broken", "code"), [(full_disk, 1), (read_only, 2)])
def test_the_command_line_says_it_in_one_line(
    sparc3: Call, open_folder: Path, broken: Call, code: int
) -> None:
    out = open_folder / "run"
    with broken():
        ended, _, err = sparc3("run", "demo", "--out", out)
    said = [line for line in err.splitlines() if line.startswith("sparc3:")]
    assert (ended, len(said)) == (code, 1), err
    assert str(out) in said[0]
    assert "Traceback" not in err


def test_what_a_killed_process_left_goes_and_what_another_is_writing_stays(tmp_path: Path) -> None:
    left = tmp_path / ".name.12345678.tmp"
    left.mkdir()
    (left / ".lock").touch()
    (left / "name").write_text("half")
    (tmp_path / ".name.empty123.tmp").mkdir()
    with whole_file(tmp_path / "name") as one:
        one.write_text("one")
        with whole_file(tmp_path / "name") as other:
            other.write_text("other")
        remove_leftovers(tmp_path)
        assert one.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert (tmp_path / "name").read_text() == "one"
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "folder", "name"]


def test_a_run_folder_has_one_run_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel keeps the lock and lets it go with the process: no process number is written down that another could get."""
    recipe = load_recipe("demo")
    with (
        claim_folder(tmp_path, recipe, True),
        pytest.raises(UserError, match=re.escape(str(tmp_path))),
        claim_folder(tmp_path, recipe, True),
    ):
        pass
    child = os.fork()
    if not child:
        with claim_folder(tmp_path, recipe, True):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with claim_folder(tmp_path, recipe, True):
        pass

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(log_of_runs, "propagate", True)
    with claim_folder(tmp_path, recipe, True):
        assert re.search(rf"{re.escape(str(tmp_path))}.*\block", caplog.text)
