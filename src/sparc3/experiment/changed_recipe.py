"""A run folder whose recipe changed: what that touches, where the earlier results go, and which files no
longer belong."""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..recipe.schema import Recipe
from ..storage import fingerprint, parse_json, read_header, read_text

log = logging.getLogger("sparc3")
OUTCOME = ("recipe.yaml", "results.json", "report.html", "circuit.json", "circuit.safetensors")
"""What a finished run of a recipe is read by; of no use to a run of another one, which makes its own from
what else is there."""
FOLDERS = ("samples", "scores", "evaluation", "circuits", "distributions")
FILES = ("tune.json", "cards.json", "tokens.json", "circuit.json", "circuit.safetensors")


def take_over(folder: Path, recipe: Recipe) -> None:
    """Say what changed since the recipe that the folder holds, and put that one's results aside.

    Nothing expensive is lost by a mistake here: samples, scores and evaluations stay until what replaces them
    is there, and each names what it was made from, so that until then the earlier recipe finds them again.
    """
    before = _read_recipe(folder / "recipe.yaml")
    keys = list(changed_keys(before, yaml.safe_load(recipe.to_yaml()))) or ["its format"]
    moved = _put_aside(folder, before)
    where = f"; the results so far are in {moved}" if moved else ""
    if not {"model.id", "model.dtype", "job"}.isdisjoint(keys):
        log.warning(
            "the recipe of %s changed (%s): everything is made anew%s; scores stay until new ones are "
            "there, so stop now if they matter",
            folder,
            list_names(keys),
            where,
        )
    else:
        log.info(
            "the recipe of %s changed (%s): what that touches is made anew, the rest is used again%s",
            folder,
            list_names(keys),
            where,
        )


def changed_keys(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """The keys, as in "evaluation.toxicity.count", in which two recipes differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            yield from changed_keys(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield key


def _read_recipe(path: Path) -> dict[str, Any]:
    """What recipe.yaml says, unchecked: an earlier version may have known other keys. Empty where it cannot
    be read."""
    try:
        found = yaml.safe_load(read_text(path))
    except (UserError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_aside(folder: Path, before: dict[str, Any]) -> str | None:
    """Move the results, where there are any, into a folder of their own; its name."""
    if not (folder / "results.json").is_file():
        return None
    aside = folder / "earlier" / fingerprint(before)
    aside.mkdir(parents=True, exist_ok=True)
    # The results go last: where this is cut short, the next run finds them here, and goes on with it.
    for name in sorted(OUTCOME, key=lambda name: name == "results.json"):
        if (folder / name).is_file():
            os.replace(folder / name, aside / name)
    return f"{aside.parent.name}/{aside.name}"


def remove_strangers(folder: Path, belongs: set[str]) -> list[str]:
    """Remove what runs of earlier recipes left and this one does not use; files that no run wrote stay.

    Args:
        belongs: names, relative to the folder, of what this run made or used.

    Returns:
        the removed files' names.
    """
    there = [folder / name for name in FILES]
    there += [path for name in FOLDERS for path in sorted((folder / name).rglob("*"))]
    removed = []
    for path in there:
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in belongs and _is_of_a_run(path):
            removed.append(name)
    for name in removed:
        (folder / name).unlink(missing_ok=True)
    return [name for name in removed if not name.endswith(".source.json")]


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
