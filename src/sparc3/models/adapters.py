"""Adapters of peft: which folders and repositories are one, and a model with its adapter merged."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..storage import parse_json, read_text
from .hub import CONVERT, hub_errors, looks_local, reachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOT_BY_ITSELF: dict[str, Any] = {"adapter_kwargs": {"subfolder": "none"}}
"""Told to from_pretrained, which where peft is installed would look for an adapter and put it on,
unmerged."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and the model that it changes: the folder itself where its weights are there."""

    folder: Path
    base: str


def find_adapter(name: str) -> Adapter | None:
    """The adapter that a model's name means: a folder or a repository of the hub; None where it has none.

    Raises:
        UserError: it cannot be merged: no peft, no weights, weights as pickle alone, no base model.
    """
    folder = _folder(name)
    if folder is None or not (folder / CONFIG).is_file():
        return None
    whole = (folder / "config.json").is_file()
    if not (folder / WEIGHTS).is_file():
        if any(folder.glob("adapter_model.*")):
            raise UserError(f"'{name}' has its adapter as pickle, which sparc3 does not read; {CONVERT}")
        more = "; if the adapter is merged into its weights, remove that file" if whole else ""
        raise UserError(f"'{name}' has {CONFIG} and no {WEIGHTS}{more or '; download it again'}")
    try:
        told = parse_json(read_text(folder / CONFIG))
        base = told.get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error}); download it again") from None
    if find_spec("peft") is None:
        raise UserError(f"'{name}' is an adapter, which needs the package peft; run: pip install peft")
    if whole:
        return Adapter(folder, str(folder))
    if not isinstance(base, str) or not base or base == name:
        raise UserError(f"{folder / CONFIG} names no base model; write its path to base_model_name_or_path")
    return Adapter(folder, base)


def _folder(name: str) -> Path | None:
    """The folder that holds the model's adapter files; of a repository of the hub the one in its cache."""
    if looks_local(name):
        return Path(name) if Path(name).is_dir() else None
    from transformers.utils import cached_file

    quietly = {
        f"_raise_exceptions_for_{what}": False
        for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    away = not reachable()
    with hub_errors(name):
        found = cached_file(name, CONFIG, local_files_only=away, **quietly)
        found = found and cached_file(name, WEIGHTS, local_files_only=away, **quietly)
    return Path(found).parent if found else None


def merge_(model: "PreTrainedModel", adapter: Adapter, name: str) -> "PreTrainedModel":
    """The model with the adapter's change in its own weights, and nothing of peft left.

    Raises:
        UserError: a quantised model, a kind of adapter that cannot be merged, or one that does not fit the
            model.
    """
    if getattr(model.config, "quantization_config", None):
        raise UserError(f"'{name}' is an adapter of a quantised model; give one of the unquantised model")
    from peft import PeftModel

    with hub_errors(name):
        changed = PeftModel.from_pretrained(model, str(adapter.folder), low_cpu_mem_usage=False)
        if not hasattr(changed.base_model, "merge_and_unload"):
            kind = getattr(changed.active_peft_config, "peft_type", "unknown")
            raise UserError(f"'{name}' is an adapter of kind {kind}, which has no weights to merge into")
        merged: PreTrainedModel = changed.merge_and_unload(safe_merge=True)
    merged.name_or_path = merged.config.name_or_path = name
    return merged
