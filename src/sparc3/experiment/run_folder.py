"""The run folder: its lock, the files in it that can be reused, and what happens to them when the recipe
changes."""

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
"""What turns the model into a variant: units to remove, to damp, or to replace by their means."""


@dataclass
class RunContext:
    """The state of one run, which every stage gets.

    Attributes:
        model_info: id, architecture and fingerprint of the model as it was loaded.
        references: name → reference set, filled by the samples stage.
        prepared: the metrics with their test samples, filled by the samples stage.
        budget, aim: the metrics of a search with their validation samples: those it keeps within bounds, and
            the one it improves, with the fluency of the texts written for it.
        warnings: warnings for the reader of the results.
        notes: sections that stages add to the results' provenance.
        protected: units that no selection takes, because the model breaks without any one of them.
        rivals: variant → another method's best intervention under the same budget, found by the search.
        own_files, made_files, reused_files: names of files in the folder: all that belong to this run, those
            that it made, and those that it found.
        pending_samples: (samples, path) that replace an earlier recipe's once the new recipe has passed the
            check; None from then on.
    """

    recipe: Recipe
    folder: Path
    progress: bool
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    model_info: dict[str, str]
    references: dict[str, ReferenceSet] = field(default_factory=dict)
    prepared: list[Prepared] = field(default_factory=list)
    budget: list[Prepared] = field(default_factory=list)
    aim: list[Prepared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    protected: Circuit | None = None
    rivals: dict[str, Intervention] = field(default_factory=dict)
    own_files: set[str] = field(default_factory=set)
    made_files: list[str] = field(default_factory=list)
    reused_files: list[str] = field(default_factory=list)
    pending_samples: list[tuple[Any, Path]] | None = None

    def claim(self, name: str) -> Path:
        """The path of a file, which from now on belongs to this run (`tidy` removes the others)."""
        self.own_files |= {name, f"{name.removesuffix('.jsonl')}.source.json"}
        return self.folder / name

    def warn(self, message: str) -> None:
        """Write a warning into the log and the results, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            log.warning(message)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies what every stage depends on: model, tokenizer, and the tokens that end a
        continuation."""
        end_tokens = getattr(self.model.generation_config, "eos_token_id", None)
        return fingerprint(
            [self.model_info["fingerprint"], tokenizer_fingerprint(self.tokenizer), end_tokens]
        )

    @property
    def correct(self) -> CorrectRecipe:
        """The recipe of the job correct."""
        assert self.recipe.job == "correct"
        return self.recipe


def load_or_make(
    work: RunContext, name: str, kind: type[Noun], inputs: Mapping[str, Any], make: Callable[[], Noun]
) -> Noun:
    """The object in the run folder's file `name` if it was made from the same inputs; otherwise a new one,
    which records their fingerprint and is saved by rank 0."""
    made_from = fingerprint({**inputs, "version": __version__})
    loaded: Noun | None = None
    path = work.claim(name)
    if path.is_file():
        try:
            loaded = kind.load(path)
        except UserError as error:  # damaged, or of another kind, hence not written by a run
            log.warning("%s; making it again", error)
    # Rank 0 decides for all: on a shared disk, another rank might not see its file yet.
    if distributed.first(loaded is not None and _made_from(loaded) == made_from):
        log.info("%s exists and fits", name)
        work.reused_files.append(name)
        return loaded or kind.load(path)
    if loaded is not None:
        log.info("%s was made from other inputs; making it again", name)
    noun = make()
    if isinstance(noun, Evaluation):
        noun = replace(noun, made_from=made_from)
    elif isinstance(noun, ReferenceSet):
        noun = replace(noun, source={**noun.source, "made_from": made_from})
    else:
        noun = replace(noun, provenance={**noun.provenance, "made_from": made_from})
    work.made_files.append(name)
    if work.pending_samples is not None and path.exists():
        work.pending_samples.append((noun, path))
    elif distributed.is_main():
        noun.save(path)
    distributed.wait()
    return noun


def _made_from(noun: ReferenceSet | Scores | Circuit | Evaluation) -> object:
    if isinstance(noun, Evaluation):
        return noun.made_from
    return (noun.source if isinstance(noun, ReferenceSet) else noun.provenance).get("made_from")


def read_if_current(work: RunContext, name: str, format: str, made_from: str) -> dict[str, Any]:
    """The content of the run folder's JSON file `name` if it was made from the same inputs, else {}."""
    path, content = work.claim(name), dict[str, Any]()
    if path.is_file():
        try:
            content = read_json(path, format)
        except UserError as error:
            log.warning("%s; making it again", error)
    content = distributed.first(content)
    return content if content.get("made_from") == made_from else {}


@contextmanager
def claim_folder(folder: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Inside, hold the folder's lock, after checking that the folder is empty or holds a run. The system
    frees the lock when the process ends.

    Raises:
        UserError: the folder contains foreign files, a link, or a run although `resume` is False; another
            process works in it; or it cannot be written.
    """
    # Rank 0 alone holds the lock; the others wait here until it does.
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
    """Make the folder this recipe's, after it has passed the check: put an earlier recipe's results aside,
    and save the samples. A recipe that is refused before has changed nothing of a finished run."""
    if distributed.is_main():
        if read_text(work.folder / "recipe.yaml") != work.recipe.to_yaml():
            take_over(work.folder, work.recipe)
            write_text(work.folder / "recipe.yaml", work.recipe.to_yaml())
        for noun, path in work.pending_samples or ():
            noun.save(path)
    work.pending_samples = None
    distributed.wait()


def _require_run(folder: Path, resume: bool) -> None:
    """Raise UserError if the folder contains something other than a run, or a run that must not be
    resumed."""
    names = [entry.name for entry in folder.iterdir() if not entry.name.endswith(".tmp")]
    files = [name for name in names if name not in (".lock", "log.txt")]
    if files and "recipe.yaml" not in files:
        raise UserError(
            f"{folder} contains files ({files[0]}, …) that do not belong to a run; choose an empty --out"
        )
    if files and not resume:
        raise UserError(
            f"{folder} already contains a run; omit --no-resume to resume it, or choose another --out"
        )


@contextmanager
def log_to_folder(folder: Path) -> Iterator[None]:
    """Inside, log lines also go to log.txt."""
    if not distributed.is_main():
        yield
        return
    handler = _LogFile(folder / "log.txt")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    previous_level = log.level
    log.setLevel(min(previous_level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(previous_level)


class _LogFile(logging.Handler):
    """Opens the file for each line, so that a full disk fails at the line that it affects, not later."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self.format(record) + "\n")
        except OSError as error:
            raise Sparc3Error(
                f"cannot write {self.path}: {error.strerror}; make room, then run the same command to resume"
            ) from error


# A folder whose recipe changed: what the change affects, where the earlier results go, and which files are
# removed.


OUTCOME = ("recipe.yaml", "report.html", "circuit.json", "circuit.safetensors", "results.json")
"""The files to move aside when the recipe changes. results.json is last: if moving is interrupted, the
next run still finds it, and continues."""
FOLDERS = ("samples", "scores", "evaluation", "circuits", "distributions")
FILES = ("tune.json", "cards.json", "tokens.json", "circuit.json", "circuit.safetensors")


def take_over(folder: Path, recipe: Recipe) -> None:
    """Log what changed since the folder's recipe, and move that recipe's results aside.

    A mistaken change loses nothing expensive: samples, scores and evaluations stay until their replacements
    exist. Each records what it was made from, so until then the earlier recipe can reuse them.
    """
    try:  # not validated, because an earlier version may have known other keys
        old_recipe = yaml.safe_load(read_text(folder / "recipe.yaml"))
    except (UserError, yaml.YAMLError, RecursionError):
        old_recipe = {}
    old_recipe = old_recipe if isinstance(old_recipe, dict) else {}
    keys = list(list_changed_keys(old_recipe, yaml.safe_load(recipe.to_yaml()))) or ["its format"]
    note = ""
    if (folder / "results.json").is_file():
        archive = folder / "earlier" / fingerprint(old_recipe)
        archive.mkdir(parents=True, exist_ok=True)
        for name in OUTCOME:
            if (folder / name).is_file():
                os.replace(folder / name, archive / name)
        note = f"; the results so far are in earlier/{archive.name}"
    if {"model.id", "model.dtype", "job"}.isdisjoint(keys):
        log_line, consequence = log.info, f"what that touches is made anew, the rest is used again{note}"
    else:
        log_line, consequence = (
            log.warning,
            f"everything is made anew{note}; scores stay until new ones are there, so stop now if they "
            "matter",
        )
    log_line("the recipe of %s changed (%s): %s", folder, list_names(keys), consequence)


def list_changed_keys(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """The keys, such as "evaluation.toxicity.count", in which two recipes differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            yield from list_changed_keys(
                before.get(name), after.get(name), f"{key}.{name}" if key else str(name)
            )
    elif before != after:
        yield key


def tidy(work: RunContext) -> None:
    """At the end of a run, remove files of earlier recipes that this run does not use, and log what was
    reused, made and removed. Files that no run wrote stay."""
    paths = [work.folder / name for name in FILES]
    paths += [path for name in FOLDERS for path in sorted((work.folder / name).rglob("*"))]
    unused = [
        path
        for path in paths
        if path.relative_to(work.folder).as_posix() not in work.own_files
        and path.is_file()
        and _was_made_by_run(path)
    ]
    for path in unused:
        path.unlink(missing_ok=True)
    if work.reused_files:
        made_names = list_names(work.made_files) or "none"
        log.info("reused: %d files; made: %s", len(work.reused_files), made_names)
    removed = [path.relative_to(work.folder).as_posix() for path in unused]
    if removed := [name for name in removed if not name.endswith(".source.json")]:
        log.info("removed, because this recipe does not use it: %s", list_names(removed))


def _was_made_by_run(path: Path) -> bool:
    """Whether the file's content says that a run made it."""
    try:
        if path.suffix == ".jsonl":
            path = path.with_suffix(".source.json")
        if path.suffix == ".json":
            content = parse_json(read_text(path))
            format = str(content.get("format"))
            made_from = content.get("made_from") or (content.get("source") or {}).get("made_from")
            return format.startswith("sparc3.") and bool(made_from or (content.get("provenance") or {}))
        return str(read_header(path).get("format")).startswith("sparc3.")
    except (UserError, ValueError, AttributeError, OSError, RecursionError):
        return False


def list_names(names: list[str], limit: int = 6) -> str:
    rest = [f"{len(names) - limit} more"] if len(names) > limit + 1 else []
    return ", ".join([*(names[:limit] if rest else names), *rest])
