"""peft adapters: find the adapter that a model's name means, and merge it into the model's weights."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..storage import parse_json, read_text
from .hub import CONVERT, hub_errors, is_reachable, looks_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOT_BY_ITSELF: dict[str, Any] = {"adapter_kwargs": {"subfolder": "none"}}
"""Arguments that keep from_pretrained from looking for an adapter, which it would otherwise attach without
merging if peft is installed."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and its base model, which is the same folder if the base weights are in it."""

    folder: Path
    base: str


def find_adapter(name: str) -> Adapter | None:
    """The adapter in a folder or a repository on the hub; None if there is none.

    Raises:
        UserError: it cannot be merged, because peft, its weights or the base model are missing, or its
            weights are only available as pickle.
    """
    folder = _find_folder(name)
    if folder is None or not (folder / CONFIG).is_file():
        return None
    is_full_model = (folder / "config.json").is_file()
    if not (folder / WEIGHTS).is_file():
        if any(folder.glob("adapter_model.*")):
            raise UserError(
                f"the adapter '{name}' is in pickle format, which sparc3 does not read; {CONVERT}"
            )
        hint = "; if the adapter is merged into its weights, remove that file" if is_full_model else ""
        raise UserError(f"'{name}' has {CONFIG}, but no {WEIGHTS}{hint or '; download it again'}")
    try:
        content = parse_json(read_text(folder / CONFIG))
        base = content.get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error}); download it again") from None
    if find_spec("peft") is None:
        raise UserError(f"'{name}' is an adapter, which needs the package peft; run: pip install peft")
    if is_full_model:
        return Adapter(folder, str(folder))
    if not isinstance(base, str) or not base or base == name:
        raise UserError(f"{folder / CONFIG} names no base model; write its path to base_model_name_or_path")
    return Adapter(folder, base)


def _find_folder(name: str) -> Path | None:
    """The folder with the adapter's files; for a repository on the hub, the one in its cache."""
    if looks_local(name):
        return Path(name) if Path(name).is_dir() else None
    from transformers.utils import cached_file

    quiet = {
        f"_raise_exceptions_for_{error}": False
        for error in ("gated_repo", "missing_entries", "connection_errors")
    }
    offline = not is_reachable()
    with hub_errors(name):
        path = cached_file(name, CONFIG, local_files_only=offline, **quiet)
        path = path and cached_file(name, WEIGHTS, local_files_only=offline, **quiet)
    return Path(path).parent if path else None


def merge_(model: "PreTrainedModel", adapter: Adapter, name: str) -> "PreTrainedModel":
    """The model with the adapter merged into its weights, without any module of peft.

    Raises:
        UserError: a quantised model, or an adapter that cannot be merged or does not fit the model.
    """
    if getattr(model.config, "quantization_config", None):
        raise UserError(f"'{name}' is an adapter for a quantised model; use one for the unquantised model")
    from peft import PeftModel

    with hub_errors(name):
        peft_model = PeftModel.from_pretrained(model, str(adapter.folder), low_cpu_mem_usage=False)
        if not hasattr(peft_model.base_model, "merge_and_unload"):
            kind = getattr(peft_model.active_peft_config, "peft_type", "unknown")
            raise UserError(
                f"'{name}' is an adapter of kind {kind}, which cannot be merged into weights; use one that "
                "can, such as LoRA"
            )
        merged: PreTrainedModel = peft_model.merge_and_unload(safe_merge=True)
    merged.name_or_path = merged.config.name_or_path = name
    return merged
