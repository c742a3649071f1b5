"""`--track`: a run's stages, measurements and report, told to an experiment tracker while it runs.

A tracker is never a reason for a run to stop: one that is not installed, cannot be reached or raises is
named in a warning, and the run goes on without it.
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
    """What a run tells. Anything with these methods can be given to `run(track=...)`."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage has ended: "model", "samples", "scores", "evaluation"."""

    def measurements(self, found: Iterable[Measurement]) -> None:
        """All figures of the run, with their intervals."""

    def report(self, page: Path) -> None:
        """The report is written."""

    def close(self, finished: bool) -> None:
        """The run has ended; False where an error ended it."""


class WandbTracker:
    """Weights & Biases, and Trackio, which has the same calls. Figures are named METRIC/VARIANT, the ends of
    their interval METRIC/VARIANT/low and /high."""

    def __init__(self, module: Any, recipe: Recipe) -> None:
        self.module = module
        # As in recipe.yaml: without the user's home, which a tracker would publish.
        module.init(project="sparc3", name=recipe.name, config=shareable(recipe.resolved()))

    def stage(self, name: str, seconds: float) -> None:
        self.module.log({f"seconds/{name}": seconds})

    def measurements(self, found: Iterable[Measurement]) -> None:
        self.module.log({name: value for one in found for name, value in name_figures(one).items()})

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

    def measurements(self, found: Iterable[Measurement]) -> None:
        for one in found:
            for name, value in name_figures(one).items():
                self.writer.add_scalar(name, value)

    def report(self, page: Path) -> None:
        self.writer.add_text("report", str(page))

    def close(self, finished: bool) -> None:
        self.writer.close()


def name_figures(one: Measurement) -> dict[str, float]:
    """METRIC/VARIANT → the value, and /low and /high → the ends of its interval, where they are known."""
    ends = dict(zip(("/low", "/high"), one.ci95 or (), strict=False))
    figures = {"": one.value, **ends, "/failures": one.failures or None}
    return {
        f"{one.metric}/{one.variant}{end}": float(value)
        for end, value in figures.items()
        if value is not None
    }


TRACKERS: dict[str, tuple[str, str, Callable[[Any, Recipe, Path], Tracker]]] = {
    "wandb": ("wandb", "wandb", lambda module, recipe, folder: WandbTracker(module, recipe)),
    "trackio": ("trackio", "trackio", lambda module, recipe, folder: WandbTracker(module, recipe)),
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", TensorboardTracker),
}
"""Name → (the module to import, the package to install, what to make of the module)."""


class TrackedRun:
    """One run and its tracker, which is left out from its first failure on."""

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

    def tell(self, event: str, *values: Any) -> None:
        """Call the tracker's method of that name."""
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, event)(*values)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.tracker = None
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        log.warning("%s failed (%s), so the run goes on untracked", self.name, said)


def require_tracker(track: "str | Tracker | None") -> None:
    """Raise UserError for a name that is no tracker's."""
    if isinstance(track, str) and track not in TRACKERS:
        raise unknown("tracker", track, TRACKERS)
