"""`--track`: send a run's stages, measurements and report to an experiment tracker while it runs.

A tracker never stops a run: if it is not installed, cannot be reached or raises, a warning names it and the
run goes on without it.
"""

import importlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from .. import distributed
from ..errors import unknown
from ..recipe.schema import Recipe
from ..results import Measurement
from ..safe_text import shareable

log = logging.getLogger("sparc3")


class Tracker(Protocol):
    """What a run calls. Any object with these methods can be passed to `run(track=...)`."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage has ended: "model", "samples", "scores", "evaluation"."""

    def measurements(self, measurements: Iterable[Measurement]) -> None:
        """All figures of the run, with their intervals."""

    def report(self, page: Path) -> None:
        """The report is written."""

    def close(self, finished: bool) -> None:
        """The run has ended; False after an error."""


class WandbTracker:
    """Weights & Biases, and Trackio, which has the same calls. Figures are named METRIC/VARIANT, the ends of
    their interval METRIC/VARIANT/low and /high."""

    def __init__(self, module: Any, recipe: Recipe) -> None:
        self.module = module
        # As in recipe.yaml: without the user's home, which a tracker would publish.
        module.init(project="sparc3", name=recipe.name, config=shareable(recipe.resolve()))

    def stage(self, name: str, seconds: float) -> None:
        self.module.log({f"seconds/{name}": seconds})

    def measurements(self, measurements: Iterable[Measurement]) -> None:
        self.module.log(
            {name: value for measurement in measurements for name, value in name_figures(measurement).items()}
        )

    def report(self, page: Path) -> None:
        self.module.log({"report": self.module.Html(page.read_text(encoding="utf-8"))})

    def close(self, finished: bool) -> None:
        if self.module.__name__ == "wandb":
            self.module.finish(exit_code=0 if finished else 1)
        else:
            self.module.finish()


class TensorboardTracker:
    """TensorBoard event files in the run folder's `tensorboard/`, with the path of the report as text."""

    def __init__(self, module: Any, recipe: Recipe, folder: Path) -> None:
        self.writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))
        self.writer.add_text("recipe", "".join(f"    {line}\n" for line in recipe.to_yaml().splitlines()))

    def stage(self, name: str, seconds: float) -> None:
        self.writer.add_scalar(f"seconds/{name}", seconds)

    def measurements(self, measurements: Iterable[Measurement]) -> None:
        for measurement in measurements:
            for name, value in name_figures(measurement).items():
                self.writer.add_scalar(name, value)

    def report(self, page: Path) -> None:
        self.writer.add_text("report", str(page))

    def close(self, finished: bool) -> None:
        self.writer.close()


def name_figures(measurement: Measurement) -> dict[str, float]:
    """METRIC/VARIANT → the value, with /low and /high → the ends of its interval, if they are known."""
    ends = dict(zip(("/low", "/high"), measurement.ci95 or (), strict=False))
    figures = {"": measurement.value, **ends, "/failures": measurement.failures or None}
    return {
        f"{measurement.metric}/{measurement.variant}{end}": float(value)
        for end, value in figures.items()
        if value is not None
    }


TRACKERS: dict[str, tuple[str, str, Callable[[Any, Recipe, Path], Tracker]]] = {
    "wandb": ("wandb", "wandb", lambda module, recipe, folder: WandbTracker(module, recipe)),
    "trackio": ("trackio", "trackio", lambda module, recipe, folder: WandbTracker(module, recipe)),
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", TensorboardTracker),
}
"""Name → (the module to import, the package to install, a function that makes the tracker)."""


class TrackedRun:
    """One run and its tracker, which is dropped at its first failure."""

    def __init__(self, track: "str | Tracker | None", recipe: Recipe, folder: Path) -> None:
        self.name = track if isinstance(track, str) else type(track).__name__
        self.tracker: Tracker | None = None
        if not distributed.is_main():
            return
        if not isinstance(track, str):
            self.tracker = track
            return
        module, package, make = TRACKERS[track]
        try:
            self.tracker = make(importlib.import_module(module), recipe, folder)
        except ImportError:
            log.warning("%s is not installed, so the run is not tracked; pip install %s", track, package)
        except Exception as error:  # whatever a tracker's package raises without a network or a login
            self._give_up(error)

    def notify(self, event: str, *values: Any) -> None:
        """Call the tracker's method of that name."""
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, event)(*values)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.tracker = None
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        log.warning("%s failed (%s), so the run goes on untracked", self.name, reason)


def require_tracker(track: "str | Tracker | None") -> None:
    """Raise UserError for an unknown tracker."""
    if isinstance(track, str) and track not in TRACKERS:
        raise unknown("tracker", track, TRACKERS)
