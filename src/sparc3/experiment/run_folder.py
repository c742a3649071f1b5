"""The run folder: whose it is, who is working in it, what of it can be used again, and what becomes of it
when its recipe changes."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from .. import __version__, distributed
from ..circuits.ablate import Damping
from ..circuits.circuit import Circuit
from ..circuits.mean_ablation import MeanAblation
from ..errors import Sparc3Error, UserError
from ..evaluation.metrics import Prepared
from ..evaluation.statistics import Evaluation
from ..models.fingerprint import tokenizer_fingerprint
from ..recipe.schema import CorrectRecipe, Recipe
from ..safe_text import LineFormatter
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from ..storage import fingerprint, parse_json, read_header, read_json, read_text, remove_leftovers, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")
Noun = TypeVar("Noun", ReferenceSet, Scores, Circuit, Evaluation)
Intervention = Circuit | Damping | MeanAblation
"""What makes a variant: units that are removed, damped, or at their means."""


@dataclass
class RunContext:
    """One run under way: what every stage needs.

    Attributes:
        described: id, architecture and fingerprint of the model as it was loaded.
        references: name → reference set, filled by the samples stage.
        prepared: the metrics with their test samples, filled by the samples stage.
        budget, aim: the metrics of a search with their validation samples: those it keeps within bounds, and
            the one to better, with the fluency of what is written for it.
        warnings: what the reader of the results should know.
        noted: what stages add to the results' provenance.
        protected: units that no selection takes, because the model breaks without one of them.
        rivals: variant → the best that another method does under the same budget, found by the search.
        belongs, made, used_again: names of files in the folder: all that belong to this run, those it made,
            those that were there.
        waiting: samples and where they go, instead of an earlier recipe's, once this one has passed the
            check; None from then on.
    """

    recipe: Recipe
    folder: Path
    progress: bool
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    described: dict[str, str]
    references: dict[str, ReferenceSet] = field(default_factory=dict)
    prepared: list[Prepared] = field(default_factory=list)
    budget: list[Prepared] = field(default_factory=list)
    aim: list[Prepared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    noted: dict[str, Any] = field(default_factory=dict)
    protected: Circuit | None = None
    rivals: dict[str, Intervention] = field(default_factory=dict)
    belongs: set[str] = field(default_factory=set)
    made: list[str] = field(default_factory=list)
    used_again: list[str] = field(default_factory=list)
    waiting: list[tuple[Any, Path]] | None = None

    def claim(self, name: str) -> Path:
        """The path of a file of this run, which from now on belongs to it."""
        self.belongs |= {name, f"{name.removesuffix('.jsonl')}.source.json"}
        return self.folder / name

    def warn(self, said: str) -> None:
        """Say it in the log and in the results, once."""
        if said not in self.warnings:
            self.warnings.append(said)
            log.warning(said)

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


def load_or_make(
    work: RunContext, name: str, kind: type[Noun], inputs: Mapping[str, Any], make: Callable[[], Noun]
) -> Noun:
    """The noun in the run folder's file `name` if it was made from the same inputs, else a new one, which
    notes their fingerprint and is saved there by rank 0."""
    made_from = fingerprint({**inputs, "version": __version__})
    found: Noun | None = None
    where = work.claim(name)
    if where.is_file():
        try:
            found = kind.load(where)
        except UserError as error:  # also another kind of file: under this name, it is not what the run left
            log.warning("%s; making it again", error)
    if distributed.first(found is not None and _made_from(found) == made_from):
        log.info("%s is there", name)
        work.used_again.append(name)
        return found or kind.load(where)
    if found is not None:
        log.info("%s was made from other inputs; making it again", name)
    made = make()
    if isinstance(made, Evaluation):
        made = replace(made, made_from=made_from)
    elif isinstance(made, ReferenceSet):
        made = replace(made, source={**made.source, "made_from": made_from})
    else:
        made = replace(made, provenance={**made.provenance, "made_from": made_from})
    work.made.append(name)
    if work.waiting is not None and where.exists():
        work.waiting.append((made, where))
    elif distributed.is_main():
        made.save(where)
    distributed.wait()
    return made


def _made_from(noun: ReferenceSet | Scores | Circuit | Evaluation) -> object:
    if isinstance(noun, Evaluation):
        return noun.made_from
    return (noun.source if isinstance(noun, ReferenceSet) else noun.provenance).get("made_from")


def read_made(work: RunContext, name: str, format: str, made_from: str) -> dict[str, Any]:
    """The run folder's JSON file `name` if it was made from the same inputs, else nothing."""
    where, found = work.claim(name), dict[str, Any]()
    if where.is_file():
        try:
            found = read_json(where, format)
        except UserError as error:
            log.warning("%s; making it again", error)
    found = distributed.first(found)
    return found if found.get("made_from") == made_from else {}


@contextmanager
def claim_folder(folder: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Hold the folder's lock, which dies with the process, after checking that the folder is a run's or
    empty.

    Raises:
        UserError: the folder holds other files than a run's, a link, or a run though `resume` is False;
            another process works in it, or it cannot be written.
    """
    if not distributed.is_main():
        distributed.wait()
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.rglob("*"):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link, but a run only writes inside its folder; remove it, or "
                    "choose another --out"
                )
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
        if not (folder / "recipe.yaml").is_file():
            write_text(folder / "recipe.yaml", recipe.to_yaml())
        distributed.wait()
        yield


def accept_recipe(work: RunContext) -> None:
    """The recipe has passed the check, and is the folder's from now on: what an earlier one left makes way.
    Until here a refused recipe has changed nothing of a finished run."""
    if distributed.is_main():
        if read_text(work.folder / "recipe.yaml") != work.recipe.to_yaml():
            take_over(work.folder, work.recipe)
            write_text(work.folder / "recipe.yaml", work.recipe.to_yaml())
        for made, where in work.waiting or ():
            made.save(where)
    work.waiting = None
    distributed.wait()


def _require_run(folder: Path, resume: bool) -> None:
    """Raise UserError where the folder holds something else than a run, or a run that is not to be gone on
    with."""
    names = [entry.name for entry in folder.iterdir() if not entry.name.endswith(".tmp")]
    others = [name for name in names if name not in (".lock", "log.txt")]
    if others and "recipe.yaml" not in others:
        raise UserError(
            f"{folder} contains files ({others[0]}, …) that do not belong to a run; choose an empty --out"
        )
    if others and not resume:
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


# A folder whose recipe changed: what that touches, where the earlier results go, and which files no longer
# belong.


OUTCOME = ("recipe.yaml", "report.html", "circuit.json", "circuit.safetensors", "results.json")
"""What a finished run of a recipe is read by; of no use to a run of another one, which makes its own from
what else is there. The results are last: where moving is cut short, the next run finds them, and goes on."""
FOLDERS = ("samples", "scores", "evaluation", "circuits", "distributions")
FILES = ("tune.json", "cards.json", "tokens.json", "circuit.json", "circuit.safetensors")


def take_over(folder: Path, recipe: Recipe) -> None:
    """Say what changed since the recipe that the folder holds, and put that one's results aside.

    Nothing expensive is lost by a mistake here: samples, scores and evaluations stay until what replaces them
    is there, and each names what it was made from, so that until then the earlier recipe finds them again.
    """
    try:  # unchecked: an earlier version may have known other keys
        before = yaml.safe_load(read_text(folder / "recipe.yaml"))
    except (UserError, yaml.YAMLError, RecursionError):
        before = {}
    before = before if isinstance(before, dict) else {}
    keys = list(changed_keys(before, yaml.safe_load(recipe.to_yaml()))) or ["its format"]
    where = ""
    if (folder / "results.json").is_file():
        aside = folder / "earlier" / fingerprint(before)
        aside.mkdir(parents=True, exist_ok=True)
        for name in OUTCOME:
            if (folder / name).is_file():
                os.replace(folder / name, aside / name)
        where = f"; the results so far are in earlier/{aside.name}"
    if {"model.id", "model.dtype", "job"}.isdisjoint(keys):
        say, then = log.info, f"what that touches is made anew, the rest is used again{where}"
    else:
        say, then = (
            log.warning,
            f"everything is made anew{where}; scores stay until new ones are there, so stop now if they "
            "matter",
        )
    say("the recipe of %s changed (%s): %s", folder, list_names(keys), then)


def changed_keys(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """The keys, as in "evaluation.toxicity.count", in which two recipes differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            yield from changed_keys(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield key


def tidy(work: RunContext) -> None:
    """At the end of a run: remove what runs of earlier recipes left and this one does not use, and log what
    was used again, made and removed. Files that no run wrote stay."""
    there = [work.folder / name for name in FILES]
    there += [path for name in FOLDERS for path in sorted((work.folder / name).rglob("*"))]
    strangers = [
        path
        for path in there
        if path.relative_to(work.folder).as_posix() not in work.belongs
        and path.is_file()
        and _is_of_a_run(path)
    ]
    for path in strangers:
        path.unlink(missing_ok=True)
    if work.used_again:
        log.info("used again: %d files; made anew: %s", len(work.used_again), list_names(work.made) or "none")
    removed = [path.relative_to(work.folder).as_posix() for path in strangers]
    if removed := [name for name in removed if not name.endswith(".source.json")]:
        log.info("removed, as this recipe has no use for it: %s", list_names(removed))


def _is_of_a_run(path: Path) -> bool:
    """Whether the file says that a run made it."""
    try:
        if path.suffix == ".jsonl":
            path = path.with_suffix(".source.json")
        if path.suffix == ".json":
            found = parse_json(read_text(path))
            said = str(found.get("format"))
            made = found.get("made_from") or (found.get("source") or {}).get("made_from")
            return said.startswith("sparc3.") and bool(made or (found.get("provenance") or {}))
        return str(read_header(path).get("format")).startswith("sparc3.")
    except (UserError, ValueError, AttributeError, OSError, RecursionError):
        return False


def list_names(names: list[str], most: int = 6) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most + 1 else []
    return ", ".join([*(names[:most] if more else names), *more])
