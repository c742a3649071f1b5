"""The run folder: whose it is, who is working in it, and what of it can be used again."""

import fcntl
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import distributed
from ..circuits.ablate import Damping
from ..circuits.circuit import Circuit
from ..errors import Sparc3Error, UserError
from ..evaluation.metrics import Prepared
from ..evaluation.statistics import Evaluation
from ..models.fingerprint import tokenizer_fingerprint
from ..recipe.schema import CorrectRecipe, Recipe
from ..safe_text import LineFormatter
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from ..storage import fingerprint, read_text, remove_leftovers, write_text
from .changed_recipe import list_names, remove_strangers, take_over

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")
Noun = TypeVar("Noun", ReferenceSet, Scores, Circuit, Evaluation)


@contextmanager
def claim_folder(folder: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Hold the folder's lock, which dies with the process, after checking that the folder is a run's or
    empty.

    Raises:
        UserError: the folder holds other files than a run's, or a run though `resume` is False; another
            process works in it, or it cannot be written.
    """
    if not distributed.is_main():
        distributed.wait()
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_links(folder)
        locked_before = (folder / ".lock").exists()
        lock = open(folder / ".lock", "w")  # noqa: SIM115  held until the run ends
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; choose a folder that can be written"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another run is active in {folder}; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            log.warning(
                "%s does not support locks (%s); make sure that no other run uses it", folder, error.strerror
            )
        try:
            _require_run(folder, resume)
        except UserError:
            if not locked_before:
                (folder / ".lock").unlink()
            raise
        remove_leftovers(folder)
        if (known := folder / "recipe.yaml").is_file() and read_text(known) != recipe.to_yaml():
            take_over(folder, recipe)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        distributed.wait()
        yield


def _refuse_links(folder: Path) -> None:
    """Raise UserError if the folder contains a link, through which a run would write outside of it."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link, but a run only writes inside its folder; remove it, or choose "
                "another --out"
            )


def _require_run(folder: Path, resume: bool) -> None:
    """Raise UserError where the folder holds something else than a run, or a run that is not to be gone on
    with."""
    others = [
        entry.name
        for entry in folder.iterdir()
        if entry.name not in (".lock", "log.txt") and not entry.name.endswith(".tmp")
    ]
    if not others:
        return
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder} contains files ({others[0]}, …) that do not belong to a run; choose an empty --out"
        )
    if not resume:
        raise UserError(
            f"{folder} already contains a run; omit --no-resume to resume it, or choose another --out"
        )


@contextmanager
def log_to_folder(folder: Path) -> Iterator[None]:
    """Stage lines also go to log.txt while the run lasts."""
    if not distributed.is_main():
        yield
        return
    handler = _LogFile(folder / "log.txt")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    earlier = log.level
    log.setLevel(min(earlier or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(earlier)


class _LogFile(logging.Handler):
    """Opens the file for each line, so that a line that cannot be written is an error of that line and of no
    later one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as opened:
                opened.write(self.format(record) + "\n")
        except OSError as error:
            raise Sparc3Error(
                f"cannot write {self.path}: {error.strerror}; make room, then run the same command to resume"
            ) from error


def load_or_make(
    work: "RunContext",
    name: str,
    made_from: str,
    load: Callable[[Path], Noun],
    is_of: Callable[[Noun], object],
    make: Callable[[], Noun],
) -> Noun:
    """The noun in the run folder's file `name` if it was made from the same things, else a new one, which is
    saved there by rank 0."""
    found: Noun | None = None
    where = work.claim(name)
    if where.is_file():
        try:
            found = load(where)
        except UserError as error:  # also another kind of file: under this name, it is not what the run left
            log.warning("%s; making it again", error)
    if distributed.first(found is not None and is_of(found) == made_from):
        log.info("%s is there", name)
        work.used_again.append(name)
        return found or load(where)
    if found is not None:
        log.info("%s was made from other inputs; making it again", name)
    made = make()
    work.made.append(name)
    if distributed.is_main():
        made.save(where)
    distributed.wait()
    return made


def tidy(work: "RunContext") -> None:
    """At the end of a run: remove what earlier recipes left, and log what was reused, made and removed."""
    removed = remove_strangers(work.folder, work.belongs)
    if work.used_again:
        log.info("used again: %d files; made anew: %s", len(work.used_again), list_names(work.made) or "none")
    if removed:
        log.info("removed, as this recipe has no use for it: %s", list_names(removed))


# What every stage of a run needs: the recipe, the folder, the model.


Intervention = Circuit | Damping
"""What makes a variant: units that are removed, or damped."""


@dataclass
class RunContext:
    """One run under way.

    Attributes:
        described: id, architecture and fingerprint of the model as it was loaded.
        references: name → reference set, filled by the samples stage.
        prepared: the metrics with their test samples, filled by the samples stage.
        warnings: what the reader of the results should know.
        noted: what stages add to the results' provenance.
        protected: units that no selection takes, because the model breaks without one of them.
        rivals: variant → the best that another method does under the same budget, found by the search.
        belongs, made, used_again: names of files in the folder: all that belong to this run, those it made,
            those that were there.
    """

    recipe: Recipe
    folder: Path
    progress: bool
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    described: dict[str, str]
    references: dict[str, ReferenceSet] = field(default_factory=dict)
    prepared: list[Prepared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    noted: dict[str, Any] = field(default_factory=dict)
    protected: Circuit | None = None
    rivals: dict[str, Intervention] = field(default_factory=dict)
    belongs: set[str] = field(default_factory=set)
    made: list[str] = field(default_factory=list)
    used_again: list[str] = field(default_factory=list)

    def claim(self, name: str) -> Path:
        """The path of a file of this run, which from now on belongs to it."""
        self.belongs |= {name, f"{name.removesuffix('.jsonl')}.source.json"}
        return self.folder / name

    @cached_property
    def fingerprint(self) -> str:
        """Names what every stage computes with: model, tokenizer, and the tokens that end a continuation."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        return fingerprint([self.described["fingerprint"], tokenizer_fingerprint(self.tokenizer), ends])

    @property
    def correct(self) -> CorrectRecipe:
        """The recipe of the job correct."""
        assert self.recipe.job == "correct"
        return self.recipe

    def held(self, samples: Mapping[str, ReferenceSet], source: str) -> frozenset[str]:
        """Prompts that those of these reference sets which come from `source` hold."""
        found = [
            some
            for name, some in samples.items()
            if self.recipe.references[name.partition(".")[0]].source == source
        ]
        return frozenset(sample.words for some in found for sample in some if sample.words)
