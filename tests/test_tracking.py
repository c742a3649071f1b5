"""`run(track=...)`: what a tracker is told, and that no tracker stops a run."""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sparc3 import UserError, load_recipe, run
from sparc3.cli.main import main
from sparc3.experiment.tracking import WandbTracker
from sparc3.results import Measurement

RECIPE: dict[str, Any] = {
    "name": "tracked",
    "model": {"id": "demo", "dtype": "float32", "device": "cpu"},
    "references": {
        "general": {"source": "demo-general", "count": 4},
        "undesired": {"source": "demo-angry", "count": 4},
    },
    "selection": {"count": 4},
    "evaluation": {"perplexity": {"source": "demo-general", "count": 4, "max_length": 64, "stride": 32}},
}
STAGES = ["model", "samples", "scores", "evaluation"]


class Notebook:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def stage(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.told.append(("stage", name))

    def measurements(self, found: Iterable[Measurement]) -> None:
        self.told.append(("measurements", {(one.metric, one.variant): one.value for one in found}))

    def report(self, page: Path) -> None:
        assert page.is_file()
        self.told.append(("report", page.name))

    def close(self, finished: bool) -> None:
        self.told.append(("close", finished))


def test_a_tracker_is_told_stages_measurements_and_the_report(tmp_path: Path) -> None:
    notebook = Notebook()
    results = run(RECIPE, tmp_path / "run", track=notebook)
    assert [value for event, value in notebook.told if event == "stage"] == STAGES
    figures = dict(notebook.told)["measurements"]
    assert figures == {(one.metric, one.variant): one.value for one in results}
    assert notebook.told[-2:] == [("report", "report.html"), ("close", True)]


def test_a_run_that_fails_closes_its_tracker_as_failed(tmp_path: Path) -> None:
    notebook = Notebook()
    with pytest.raises(UserError):
        run({**RECIPE, "selection": {"count": 10**9}}, tmp_path / "run", track=notebook)
    assert notebook.told == [("stage", "model"), ("close", False)]


@pytest.mark.parametrize("event", ["stage", "measurements", "report", "close"])
def test_a_tracker_that_raises_is_left_out_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    notebook = Notebook()

    def fail(*_: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    setattr(notebook, event, fail)
    results = run(RECIPE, tmp_path / "run", track=notebook)
    assert results.find("perplexity", "ablated").value
    warned = [r.getMessage() for r in caplog.records if "Notebook" in r.getMessage()]
    assert len(warned) == 1  # not once an event
    assert "no route to host" in warned[0]
    assert "\n" not in warned[0]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    assert run(RECIPE, tmp_path / "run", track=name).find("perplexity").value
    assert any(f"pip install {name}" in record.getMessage() for record in caplog.records)


def test_an_unknown_tracker_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mlflow'"):
        run(RECIPE, tmp_path / "run", track="mlflow")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["run", "demo", "--track", "mlflow", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_figures_with_their_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    started: dict[str, Any] = {}
    logged: dict[str, Any] = {}
    ended: list[dict[str, Any]] = []
    module = ModuleType(name)
    calls = SimpleNamespace(
        init=lambda **given: started.update(given),
        log=logged.update,
        finish=lambda **given: ended.append(given),
        Html=lambda text: text,
    )
    for call, function in vars(calls).items():
        setattr(module, call, function)
    monkeypatch.setitem(sys.modules, name, module)
    results = run(RECIPE, tmp_path / "run", track=name)
    assert (started["project"], started["name"]) == ("sparc3", "tracked")
    assert started["config"]["selection"]["count"] == 4
    one = results.find("perplexity", "ablated")
    assert logged["perplexity/ablated"] == one.value
    assert (logged["perplexity/ablated/low"], logged["perplexity/ablated/high"]) == one.ci95
    assert all(logged[f"seconds/{stage}"] >= 0 for stage in STAGES)
    assert logged["report"] == (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert ended == [{"exit_code": 0} if name == "wandb" else {}]


def test_tensorboard_reads_the_figures_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = run(RECIPE, tmp_path / "run", track="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    figure = events.Scalars("perplexity/ablated")[0].value
    assert figure == pytest.approx(results.find("perplexity", "ablated").value, rel=1e-6)
    again = run(
        RECIPE, tmp_path / "run", track="tensorboard"
    )  # its files do not keep the folder from being resumed
    assert again.measurements == results.measurements


def test_a_tracker_gets_no_path_of_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = tmp_path / "texts.txt"
    source.write_text("A text.\n")
    asked = {**RECIPE, "evaluation": {"perplexity": {"source": str(source), "count": 1}}}
    started: dict[str, Any] = {}
    WandbTracker(SimpleNamespace(init=lambda **given: started.update(given)), load_recipe(asked))
    assert started["config"]["evaluation"]["perplexity"]["source"].endswith("texts.txt")
    assert str(tmp_path) not in repr(started["config"])
