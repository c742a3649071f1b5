"""A model without a circuit as an ordinary Hugging Face checkpoint, whose files are the source's wherever
nothing was removed."""

import copy
import fnmatch
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..circuits.ablate import Target, ablated, targets_by_name
from ..circuits.circuit import NAMES, Circuit
from ..errors import Sparc3Error, UserError
from ..models.check_checkpoint import ALONE, INDEX
from ..models.fingerprint import describe
from ..models.gguf import repository_of
from ..models.hub import looks_local, snapshot
from ..models.load import MAP, load_weights
from ..models.offloading import is_offloaded, named_values, state_of
from ..models.sites import DTYPES
from ..results import Results
from ..storage import whole_folder
from .model_card import model_card
from .shrink import Shrinking, furthest, plan_shrinking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BESIDE = "*.json *.jinja *.model *.txt *.tiktoken *.py LICEN[CS]E* NOTICE* USE_POLICY*".split()
"""What a checkpoint has beside its weights and its card; copied as it is."""
TOKENIZER_FILES = (
    "tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json chat_template* *.jinja *.model "
    "*.tiktoken"
).split()
"""Those of them that belong to the tokenizer; left out where the model is exported without one."""
OURS = (*NAMES, "results.json")
NOT_OF_IT = ("adapter_config.json",)  # merged into the weights, where there is one
ROUNDINGS = 16
"""How many roundings of its dtype the logits of a shrunk model may be away, relative to their norm: sums of
other lengths are rounded otherwise."""
STORED_AS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element → a type in which any can be set to zero."""
Stored = Mapping[str, Mapping[str, str]]
"""File of weights → key in it → name of the model's tensor."""


def export(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    circuit: Circuit,
    out: str | os.PathLike[str],
    *,
    results: Results | None = None,
    shrink: bool = False,
) -> Path:
    """Write the model without the circuit as an ordinary Hugging Face checkpoint, with its circuit's file and
    a model card.

    Where the model in memory is still what it was loaded from, a folder or the hub's cache, the new folder is
    a copy of that one: the same files with the same names, keys, dtype and metadata, and every byte as it was
    but those of the removed units (where they are not set to zero multiplied in the files' own dtype) and of
    the card. Weights that were changed in memory, or whose source holds them in another form than safetensors
    or under other names, are written as transformers writes them, in the source's dtype where that loses
    nothing. The folder appears whole or not at all.

    Args:
        tokenizer: the model's; None leaves the folder without one.
        results: measurements for the model card.
        shrink: take the circuit's neurons out of their matrices, which needs as many in every layer, and
            change the MLPs' width in the configuration; then load the result, and compare its logits with
            those of the model with the neurons at zero.

    Raises:
        UserError: `out` exists and is not an empty folder; a unit that this model does not have; a circuit
            that was measured by mean ablation; a circuit or model that cannot be shrunk.
        Sparc3Error: `out` cannot be written, or the smaller model's logits are not those of the zeroed one.
    """
    circuit.require_exportable()
    removed = targets_by_name(model, circuit)
    smaller = plan_shrinking(model, circuit) if shrink else None
    with whole_folder(out) as temporary:
        source = source_folder(model)
        stored = stored_names(source, model) if source else None
        copied = source and tokenizer is not None and tokenizer.name_or_path == model.name_or_path
        if not (source and stored):
            _write_from_memory(model, circuit, temporary, source, smaller)
        if source and (stored or copied):
            copy_beside(source, temporary, with_tokenizer=tokenizer is not None)
        if source and stored and smaller:
            _shrink_shards(source, temporary, stored, smaller)
        elif source and stored:
            _weaken_shards(source, temporary, stored, removed)
        if tokenizer is not None and not copied:
            tokenizer.save_pretrained(temporary)
        circuit.save(temporary / f"circuit{circuit.suffix}")
        name = model.name_or_path or "."
        base = repository_of(name) or (None if looks_local(name) else name)
        about, matter = describe(model), front_matter(source)
        card = model_card(circuit, results, source=about, base=base, matter=matter, shrunk=str(smaller or ""))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if smaller:
            _require_same_logits(model, circuit, temporary)
    return Path(out)


def _weaken_shards(source: Path, out: Path, stored: Stored, removed: Mapping[str, list[Target]]) -> None:
    for file in [*stored, *([] if ALONE in stored else [INDEX])]:
        shutil.copyfile(source / file, out / file)
    for file, names in stored.items():
        weaken_in_file_(out / file, {key: removed[name] for key, name in names.items() if name in removed})


def _shrink_shards(source: Path, out: Path, stored: Stored, smaller: Shrinking) -> None:
    size = count = 0
    for file, names in stored.items():
        metadata, tensors = _read(source / file)
        tensors = {key: smaller.of(names.get(key, ""), tensor) for key, tensor in tensors.items()}
        save_file(tensors, out / file, metadata)
        size += sum(tensor.nbytes for tensor in tensors.values())
        count += sum(tensor.numel() for tensor in tensors.values())
    smaller.configure_(out / "config.json")
    if ALONE not in stored:
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        about = index.setdefault("metadata", {})
        counted = {"total_parameters": count, "total_size": size}
        about.update({key: counted[key] for key in counted if key in about})
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_from_memory(
    model: "PreTrainedModel", circuit: Circuit, out: Path, source: Path | None, smaller: Shrinking | None
) -> None:
    """As transformers writes it, in the source's dtype where that loses nothing."""
    if smaller is None:
        with ablated(model, circuit):
            model.save_pretrained(out, state_dict=state_of(model))
    else:
        config = copy.deepcopy(model.config)
        setattr(config, smaller.key, smaller.after)
        with torch.device("meta"):
            other = type(model)(config)
        other.load_state_dict(
            {name: smaller.of(name, tensor) for name, tensor in state_of(model).items()}, assign=True
        )
        other.tie_weights()
        other.save_pretrained(out)
    _keep_dtype(out, source)


def _require_same_logits(model: "PreTrainedModel", circuit: Circuit, folder: Path) -> None:
    """Raise Sparc3Error unless the folder's model has the ablated one's logits, but for rounding."""
    device = MAP if is_offloaded(model) else str(model.device)
    loaded = load_weights(folder, dtype=str(model.dtype).removeprefix("torch."), device=device)
    with ablated(model, circuit):
        difference = furthest(model, loaded)
    if not difference <= (limit := ROUNDINGS * torch.finfo(model.dtype).eps):
        raise Sparc3Error(
            "the smaller model's logits are not those of the zeroed one (relative difference "
            f"{difference:.2g}, limit {limit:.2g}), and nothing was written; leave out --shrink"
        )


def source_folder(model: "PreTrainedModel") -> Path | None:
    """The folder that the model was loaded from: its own, or that of the hub's cache."""
    name = str(model.name_or_path or "")
    if name and Path(name).is_dir():
        return Path(name)
    if not name or looks_local(name) or repository_of(name):
        return None
    return snapshot(name, getattr(model.config, "_commit_hash", None), [*BESIDE, "README.md"])


def stored_names(folder: Path, model: "PreTrainedModel") -> Stored | None:
    """What the folder's files hold of the model; None unless that is all of its values."""
    state, found = state_of(model), {}
    seen: set[int] = set()
    for file in _weight_files(folder):
        found[file] = dict[str, str]()
        with safe_open(folder / file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name = key if key in state else f"{model.base_model_prefix}.{key}"
                if name not in state:
                    continue  # as transformers does: the causal mask in old GPT-2 checkpoints
                here, there = state[name], opened.get_tensor(key)
                if here.shape != there.shape or not torch.equal(there.to(here.device, here.dtype), here):
                    return None
                found[file][key] = name
                seen.add(here.data_ptr())
    return found if all(value.data_ptr() in seen for _, value in named_values(model)) else None


def _weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the checkpoint's weights as safetensors, in order."""
    named = [ALONE]
    if not (folder / ALONE).is_file() and (folder / INDEX).is_file():
        named = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    return named if all((folder / file).is_file() for file in named) else []


def copy_beside(source: Path, out: Path, *, with_tokenizer: bool = True) -> None:
    """Copy what a checkpoint has beside its weights; a file that is there already stays."""
    for path in [*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]:
        there = out / path.relative_to(source)
        unwanted = path.name in (*OURS, *NOT_OF_IT) or path.name.endswith(".index.json")
        if not path.is_file() or unwanted or there.exists() or not _matches(path.name, BESIDE):
            continue
        if with_tokenizer or not _matches(path.name, TOKENIZER_FILES):
            there.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, there)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def weaken_in_file_(path: Path, removed: Mapping[str, list[Target]]) -> None:
    """Weaken elements of a safetensors file's tensors in place, in the file's dtype; zero is all bits zero in
    each of its types.

    Args:
        removed: key → what is weakened in its tensor, in order.

    Raises:
        UserError: a share of elements that are no floating-point numbers of 16 bits or more.
    """
    import numpy

    if not removed:
        return
    with open(path, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for key, targets in removed.items():
        begin, end = header[key]["data_offsets"]
        shape = targets[0][0].parameter.shape
        elements = numpy.memmap(path, "uint8", "r+", offset=8 + length + begin, shape=(end - begin,))
        zeroes = all(strength == 1 for _, strength in targets)
        kind = AS_BITS[elements.size // shape.numel()] if zeroes else STORED_AS.get(header[key]["dtype"])
        if kind is None:
            raise UserError(
                f"{key} is stored as {header[key]['dtype']}, of which no share can be taken; use a circuit "
                "of strength 1"
            )
        values = torch.from_numpy(elements).view(kind).view(shape)
        for place, strength in targets:
            place.weaken_(strength, values)
        elements.flush()


def _read(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(path, "pt") as opened:
        return opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def _keep_dtype(folder: Path, source: Path | None) -> None:
    """Store what was written in the source's dtype where that loses nothing: CPUs load float16 as float32."""
    if source is None or not (source / "config.json").is_file():
        return
    theirs, config = (
        json.loads((place / "config.json").read_text(encoding="utf-8")) for place in (source, folder)
    )
    name = theirs.get("dtype", theirs.get("torch_dtype"))
    if name not in DTYPES or name == config.get("dtype"):
        return

    def narrow(tensor: Tensor) -> Tensor:
        return tensor.to(DTYPES[name]) if tensor.is_floating_point() else tensor

    for commit in (False, True):
        for file in _weight_files(folder):
            metadata, tensors = _read(folder / file)
            if commit:
                save_file({key: narrow(tensor) for key, tensor in tensors.items()}, folder / file, metadata)
            elif not all(torch.equal(narrow(t).to(t.dtype), t) for t in tensors.values()):
                return
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": name}, indent=2) + "\n", encoding="utf-8"
    )


def front_matter(folder: Path | None) -> dict[str, Any]:
    """The front matter of a folder's card; empty where there is none that can be read."""
    import yaml

    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
