"""Export a model without a circuit as an ordinary Hugging Face checkpoint, whose files equal the source's
wherever nothing was removed."""

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
from .model_card import make_model_card
from .shrink import Shrinking, plan_shrinking, relative_logit_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BESIDE = "*.json *.jinja *.model *.txt *.tiktoken *.py LICEN[CS]E* NOTICE* USE_POLICY*".split()
"""Patterns of a checkpoint's other files, besides weights and card; they are copied unchanged."""
TOKENIZER_FILES = (
    "tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json chat_template* *.jinja *.model "
    "*.tiktoken"
).split()
"""Patterns of the tokenizer's files, which are left out if the model is exported without a tokenizer."""
OURS = (*NAMES, "results.json")
NOT_OF_IT = ("adapter_config.json",)  # an adapter is merged into the weights
ROUNDINGS = 16
"""Tolerance for the logits of a shrunk model relative to their norm, in units of its dtype's epsilon: sums of
different length are rounded differently."""
STORED_AS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element → a type in which any can be set to zero."""
Stored = Mapping[str, Mapping[str, str]]
"""File of weights → key in the file → name of the model's tensor."""


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

    If the model in memory still equals the folder or hub cache from which it was loaded, the new folder is
    a copy of that one: the same files with the same names, keys, dtypes and metadata, and every byte
    unchanged except those of the removed units (multiplied in the files' own dtype if they are not set to
    zero) and of the card. If the weights were changed in memory, or their source is not safetensors or uses
    other names, transformers writes them, in the source's dtype if that loses nothing. After an error no
    partial folder is left.

    Args:
        tokenizer: the model's; None leaves the folder without one.
        results: measurements for the model card.
        shrink: delete the circuit's neurons from their matrices, which requires the same number in every
            layer, and change the MLPs' width in the configuration; then load the result, and compare its
            logits with those of the model with the neurons set to zero.

    Raises:
        UserError: `out` exists and is not an empty folder; a unit that this model does not have; a circuit
            that was measured by mean ablation; a circuit or model that cannot be shrunk.
        Sparc3Error: `out` cannot be written, or the smaller model's logits differ from those of the zeroed
            one.
    """
    circuit.require_exportable()
    removed = targets_by_name(model, circuit)
    smaller = plan_shrinking(model, circuit) if shrink else None
    with whole_folder(out) as temporary:
        source = source_folder(model)
        stored = match_stored_names(source, model) if source else None
        copies_tokenizer = source and tokenizer is not None and tokenizer.name_or_path == model.name_or_path
        if not (source and stored):
            _write_from_memory(model, circuit, temporary, source, smaller)
        if source and (stored or copies_tokenizer):
            copy_other_files(source, temporary, with_tokenizer=tokenizer is not None)
        if source and stored and smaller:
            _shrink_shards(source, temporary, stored, smaller)
        elif source and stored:
            _weaken_shards(source, temporary, stored, removed)
        if tokenizer is not None and not copies_tokenizer:
            tokenizer.save_pretrained(temporary)
        circuit.save(temporary / f"circuit{circuit.suffix}")
        name = model.name_or_path or "."
        base = repository_of(name) or (None if looks_local(name) else name)
        source_info, front = describe(model), read_front_matter(source)
        card = make_model_card(
            circuit, results, source=source_info, base=base, matter=front, shrunk=str(smaller or "")
        )
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
        metadata, tensors = _read_tensors(source / file)
        tensors = {key: smaller.shrink(names.get(key, ""), tensor) for key, tensor in tensors.items()}
        save_file(tensors, out / file, metadata)
        size += sum(tensor.nbytes for tensor in tensors.values())
        count += sum(tensor.numel() for tensor in tensors.values())
    smaller.configure_(out / "config.json")
    if ALONE not in stored:
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        index_metadata = index.setdefault("metadata", {})
        counts = {"total_parameters": count, "total_size": size}
        index_metadata.update({key: counts[key] for key in counts if key in index_metadata})
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_from_memory(
    model: "PreTrainedModel", circuit: Circuit, out: Path, source: Path | None, smaller: Shrinking | None
) -> None:
    """Let transformers write the model, in the source's dtype if that loses nothing."""
    if smaller is None:
        with ablated(model, circuit):
            model.save_pretrained(out, state_dict=state_of(model))
    else:
        config = copy.deepcopy(model.config)
        setattr(config, smaller.key, smaller.after)
        with torch.device("meta"):
            smaller_model = type(model)(config)
        smaller_model.load_state_dict(
            {name: smaller.shrink(name, tensor) for name, tensor in state_of(model).items()}, assign=True
        )
        smaller_model.tie_weights()
        smaller_model.save_pretrained(out)
    _keep_dtype(out, source)


def _require_same_logits(model: "PreTrainedModel", circuit: Circuit, folder: Path) -> None:
    """Raise Sparc3Error unless the folder's model has the ablated one's logits, up to rounding."""
    device = MAP if is_offloaded(model) else str(model.device)
    loaded = load_weights(folder, dtype=str(model.dtype).removeprefix("torch."), device=device)
    with ablated(model, circuit):
        difference = relative_logit_difference(model, loaded)
    if not difference <= (limit := ROUNDINGS * torch.finfo(model.dtype).eps):
        raise Sparc3Error(
            "the smaller model's logits differ from those of the zeroed one (relative difference "
            f"{difference:.2g}, limit {limit:.2g}), and nothing was written; leave out --shrink"
        )


def source_folder(model: "PreTrainedModel") -> Path | None:
    """The folder from which the model was loaded: a local one, or the hub's cache."""
    name = str(model.name_or_path or "")
    if name and Path(name).is_dir():
        return Path(name)
    if not name or looks_local(name) or repository_of(name):
        return None
    return snapshot(name, getattr(model.config, "_commit_hash", None), [*BESIDE, "README.md"])


def match_stored_names(folder: Path, model: "PreTrainedModel") -> Stored | None:
    """The model's tensors in the folder's files; None unless the files contain all of its current values."""
    state, names = state_of(model), {}
    seen: set[int] = set()
    for file in _weight_files(folder):
        names[file] = dict[str, str]()
        with safe_open(folder / file, "pt") as file_reader:
            for key in file_reader.keys():  # noqa: SIM118
                name = key if key in state else f"{model.base_model_prefix}.{key}"
                if name not in state:
                    continue  # ignored by transformers too: the causal mask in old GPT-2 files
                in_memory, in_file = state[name], file_reader.get_tensor(key)
                if in_memory.shape != in_file.shape or not torch.equal(
                    in_file.to(in_memory.device, in_memory.dtype), in_memory
                ):
                    return None
                names[file][key] = name
                seen.add(in_memory.data_ptr())
    return names if all(value.data_ptr() in seen for _, value in named_values(model)) else None


def _weight_files(folder: Path) -> list[str]:
    """The names of the checkpoint's safetensors files, in order; empty if one is missing."""
    names = [ALONE]
    if not (folder / ALONE).is_file() and (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    return names if all((folder / file).is_file() for file in names) else []


def copy_other_files(source: Path, out: Path, *, with_tokenizer: bool = True) -> None:
    """Copy a checkpoint's files other than weights; existing files stay."""
    for path in [*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]:
        destination = out / path.relative_to(source)
        is_excluded = path.name in (*OURS, *NOT_OF_IT) or path.name.endswith(".index.json")
        if not path.is_file() or is_excluded or destination.exists() or not _matches(path.name, BESIDE):
            continue
        if with_tokenizer or not _matches(path.name, TOKENIZER_FILES):
            destination.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, destination)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def weaken_in_file_(path: Path, removed: Mapping[str, list[Target]]) -> None:
    """Weaken elements of a safetensors file's tensors in place, in the file's dtype. Zero is all bits zero
    in every dtype.

    Args:
        removed: key → what is weakened in its tensor, in order.

    Raises:
        UserError: a share of elements that are not floating-point numbers of at least 16 bits.
    """
    import numpy

    if not removed:
        return
    with open(path, "rb") as weight_file:
        length = int.from_bytes(weight_file.read(8), "little")
        header = json.loads(weight_file.read(length))
    for key, targets in removed.items():
        begin, end = header[key]["data_offsets"]
        shape = targets[0][0].parameter.shape
        elements = numpy.memmap(path, "uint8", "r+", offset=8 + length + begin, shape=(end - begin,))
        zeroes = all(strength == 1 for _, strength in targets)
        dtype = AS_BITS[elements.size // shape.numel()] if zeroes else STORED_AS.get(header[key]["dtype"])
        if dtype is None:
            raise UserError(
                f"{key} is stored as {header[key]['dtype']}, which cannot be scaled; use a circuit of "
                "strength 1"
            )
        values = torch.from_numpy(elements).view(dtype).view(shape)
        for place, strength in targets:
            place.weaken_(strength, values)
        elements.flush()


def _read_tensors(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _keep_dtype(folder: Path, source: Path | None) -> None:
    """Convert the written weights to the source's dtype if that loses nothing, since float16 is loaded as
    float32 on a CPU."""
    if source is None or not (source / "config.json").is_file():
        return
    source_config, config = (
        json.loads((directory / "config.json").read_text(encoding="utf-8")) for directory in (source, folder)
    )
    name = source_config.get("dtype", source_config.get("torch_dtype"))
    if name not in DTYPES or name == config.get("dtype"):
        return

    def narrow(tensor: Tensor) -> Tensor:
        return tensor.to(DTYPES[name]) if tensor.is_floating_point() else tensor

    for commit in (False, True):
        for file in _weight_files(folder):
            metadata, tensors = _read_tensors(folder / file)
            if commit:
                save_file({key: narrow(tensor) for key, tensor in tensors.items()}, folder / file, metadata)
            elif not all(torch.equal(narrow(t).to(t.dtype), t) for t in tensors.values()):
                return
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": name}, indent=2) + "\n", encoding="utf-8"
    )


def read_front_matter(folder: Path | None) -> dict[str, Any]:
    """The front matter of a folder's card; empty if there is none, or if it cannot be parsed."""
    import yaml

    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        matter = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        return {}
    return matter if isinstance(matter, dict) else {}
