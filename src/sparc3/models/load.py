"""Loading a causal language model and its tokenizer, and whether a checkpoint is whole."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Sparc3Error, UserError, unknown
from .adapters import NOT_BY_ITSELF, Adapter, find_adapter, merge_
from .check_checkpoint import require_downloaded, require_readable, require_whole
from .families import FAMILIES, require_family
from .fingerprint import require_present
from .gguf import find_gguf, gguf_config, load_gguf_tokenizer, load_gguf_weights
from .hub import hub_errors, looks_local, require_hub
from .memory import available
from .offloading import gpu_room, offloaded_layers
from .sites import DTYPES, family_of, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model and its tokenizer, ready to attribute: eval mode.

    Args:
        name_or_path: a hub id, a folder with an ordinary Hugging Face checkpoint, or "demo" for the embedded
            model; or a GGUF: its path, a folder with one, ORG/REPO:FILE.gguf, or "smollm2" (see
            docs/models.md).
        dtype: "auto" (as stored; float16 becomes float32 on a CPU, which computes it poorly), "float32",
            "bfloat16", "float16", "float64".
        device: "auto" (CUDA where there is one, else CPU), "cpu", "cuda", "cuda:1"; "map": its layers over
            all GPUs there are (accelerate's device map), for a model that is larger than one; those that find
            no place stay on the CPU and are copied to the GPU for each use.

    Raises:
        UserError: no such folder or hub model, no access to it, no such device, or weights that are larger
            than what the device has left; the message says what to do.
        UnsupportedModel: an architecture without a row in FAMILIES, found out before any weight is read.

    A folder without a tokenizer is a UserError too; `sparc3.models.load.load_weights` loads its model alone,
    which token ids will do for.
    """
    model = load_weights(name_or_path, dtype=dtype, device=device)
    tokenizer = load_tokenizer(name_or_path)
    tokenizer.of_model_type = model.config.model_type  # see samples.tokens.window_opening
    return model, tokenizer


def load_weights(
    name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto"
) -> "PreTrainedModel":
    """The model of `load_model`, without its tokenizer."""
    from transformers import AutoModelForCausalLM

    given, adapter, config, wanted, target = _check_names(name_or_path, dtype, device)
    name = adapter.base if adapter else given
    if name.endswith(".json") and Path(name).is_file():
        raise UserError(f"{name} is a configuration without weights; give the folder that has both")
    mapped = device == MAP
    with hub_errors(name):
        spread = _spread(name, config, wanted) if mapped else {}
        if not mapped:
            _require_room(name, config, wanted, target)
        within = not find_gguf(name) and _read_config(name).model_type != config.model_type
        if path := find_gguf(name):
            options = {"dtype": torch.float32 if wanted == "auto" else wanted, **spread}
            model, found = load_gguf_weights(name, path, config, options)
        else:
            model, found = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=wanted,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                key_mapping=TEXT_ALONE if within else None,
                **NOT_BY_ITSELF,
                **spread,
            )
    require_present(model)
    layers = list(layers_of(model))
    if away := offloaded_layers(layers):
        log.info(
            f"{away} of {len(layers)} layers stay on the CPU and are copied to the GPU for each use, which "
            "is slower"
        )
    elif (
        mapped and target.type == "cuda" and {weight.device.type for weight in model.parameters()} == {"cpu"}
    ):
        log.warning("no layer fits on a GPU, so everything is computed on the CPU")
    layers_at = family_of(model).layers
    if within:  # of a model of text and images only the text's weights are of interest, to save them too
        model.__dict__.pop("_weight_conversions", None)
        found["unexpected_keys"] = [key for key in found["unexpected_keys"] if key.startswith(layers_at)]
    require_whole(name, model, found, layers_at)
    if adapter:
        model = merge_(model, adapter, given)
    if family_of(model).experts and model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default, grouped_mm, knows no float64
    # A quantised model may refuse to be moved, even to where it is.
    return (model if mapped or model.device == target else model.to(target)).eval()


def build_model(config: Any, **options: Any) -> "PreTrainedModel":
    """A model of a configuration alone, in eval mode, on torch's present device; its weights are as
    transformers draws them. Raises UserError where transformers cannot build it."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, **options).eval()
    except Sparc3Error:
        raise
    except Exception as error:  # a configuration can be wrong in any way that Python can
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"transformers cannot build a {config.model_type} of this configuration: {why}"
        ) from error


def _require_room(name: str, config: Any, dtype: torch.dtype | str, device: torch.device) -> None:
    """Raise UserError where the weights alone are larger than what the device has left."""
    free = available(device)
    if free is None or getattr(config, "quantization_config", None):
        return
    needed, kept = _size(config, dtype)
    if needed > free:
        map_too = (
            ", or device map, which leaves on the CPU what does not fit" if device.type == "cuda" else ""
        )
        raise UserError(
            f"the weights of '{name}' take {needed / 2**30:.3g} GiB in {str(kept).removeprefix('torch.')}, "
            f"and {device} has {free / 2**30:.3g} GiB left; "
            f"{'load them in bfloat16, or ' if kept.itemsize > 2 else ''}use a device with more{map_too}"
        )


def _spread(name: str, config: Any, dtype: torch.dtype | str) -> dict[str, Any]:
    """What from_pretrained is told to spread a model over devices."""
    from accelerate.utils import get_max_memory

    if getattr(config, "quantization_config", None):
        return {"device_map": "auto"}
    free = get_max_memory()
    if (left := available(torch.device("cpu"))) is not None:  # which knows of control groups
        free["cpu"] = min(free["cpu"], left)
    return {"device_map": "auto", "max_memory": gpu_room(free, _size(config, dtype)[0], name)}


def _size(config: Any, dtype: torch.dtype | str) -> tuple[int, torch.dtype]:
    """Bytes of all weights, and the type they are then of."""
    from transformers import AutoModelForCausalLM

    kept = (config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        return sum(w.nbytes for w in AutoModelForCausalLM.from_config(config, dtype=kept).parameters()), kept


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of `load_model`, without its model. Raises UserError where there is none, of which
    transformers may well make an empty one."""
    from transformers import AutoTokenizer

    name = _name(name_or_path)
    if path := find_gguf(name):
        return load_gguf_tokenizer(name, path)
    if (adapter := find_adapter(name)) and not _has_vocabulary(adapter.folder):
        return load_tokenizer(adapter.base)
    no_tokenizer = UserError(
        f"'{name}' has no tokenizer, or an empty one; put its files beside the model (tokenizer.json), or "
        "give token ids as samples"
    )
    if Path(name).is_dir() and not _has_vocabulary(Path(name)):
        raise no_tokenizer
    with hub_errors(name):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except ValueError as error:
            raise no_tokenizer if "backend tokenizer" in str(error) else error from None
        ids = tokenizer("a text", add_special_tokens=False)["input_ids"]
        # transformers 5.0 makes one that knows a few marks and takes every word for the unknown one.
        if not ids or (len(tokenizer) <= 16 and set(ids) == {tokenizer.unk_token_id}):
            raise no_tokenizer
    return tokenizer


def _has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer's tokens can be in."""
    patterns = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json", "*.spm")
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def require_loadable(
    name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto"
) -> None:
    """Raise what `load_model` would, as far as it can be told without reading a weight."""
    _check_names(name_or_path, dtype, device)


def _check_names(
    name_or_path: str | os.PathLike[str], dtype: str, device: str
) -> tuple[str, Adapter | None, Any, torch.dtype | str, torch.device]:
    name, target = _name(name_or_path), _device(device)
    config = load_config(name)
    _require_language_model(config, name)
    require_family(config, name)
    adapter = find_adapter(name)
    require_readable(adapter.base if adapter else name)
    return name, adapter, config, _dtype(dtype, config, target), target


def _name(name_or_path: str | os.PathLike[str]) -> str:
    if name_or_path == "demo":
        return DEMO
    name = os.fspath(name_or_path)
    try:
        os.stat(name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, a folder that may not be entered, a null byte
        said = getattr(error, "strerror", None) or error
        raise UserError(f"no model has the name {name[:60]!r} ({said}); check the name") from None
    if os.path.isdir(name) and os.fsencode(name).decode(errors="replace") != name:
        raise UserError(
            f"the folder {name!a} has a name that is not UTF-8, which safetensors cannot open; rename it"
        )
    return name


_REMEDY = "check the name (the embedded model is demo), or give the path of a downloaded folder"
TEXT_ALONE = {
    r"^(?:model\.)?language_model\.lm_head": "lm_head",
    r"^(?:model\.)?language_model\.(?:model\.)?(?!lm_head|model\.)": "model.",
}
"""How the names of a wrapper's weights become those of its text model."""


def load_config(name: str, remedy: str = _REMEDY) -> Any:
    """The configuration of a hub model, a local checkpoint, a GGUF, a config.json or "demo", with every way
    it can fail as one line. Of an adapter it is that of the base model, and of a model of text and images
    that of its text model, where that is of a family.

    Args:
        remedy: what to do where the hub cannot be reached.
    """
    name = _name(name)
    if find_gguf(name) is None and (adapter := find_adapter(name)):
        name = adapter.base
    config = _read_config(name, remedy)
    text = config.get_text_config()
    if (
        config.model_type in FAMILIES
        or text.model_type not in FAMILIES
        or hasattr(config, "quantization_config")
    ):
        return config
    text.dtype, text.tie_word_embeddings = text.dtype or config.dtype, config.tie_word_embeddings
    return text


def _read_config(name: str, remedy: str = _REMEDY) -> Any:
    from transformers import AutoConfig

    if path := find_gguf(name):
        return gguf_config(path)
    alone = name.endswith(".json") and Path(name).is_file()
    if looks_local(name) and not Path(name).is_dir() and not alone:
        if Path(name).exists():
            raise UserError(f"{name} is no folder; give a folder with config.json and safetensors, or a GGUF")
        raise UserError(
            f"no model folder at {name}; give a folder with config.json and safetensors, or a hub id"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        inside = [
            path.parent for part in ("*", "snapshots/*") for path in Path(name).glob(f"{part}/config.json")
        ]
        remedy = f"{min(inside)} has one, give that" if inside else "give a folder that save_pretrained wrote"
        raise UserError(f"{name} has no config.json; {remedy}")
    require_downloaded(name)
    with hub_errors(name):
        try:
            here = not Path(name).is_dir() and not alone  # of a hub's model what its cache has
            config = AutoConfig.from_pretrained(name, local_files_only=here, trust_remote_code=False)
        except OSError:
            if not here:
                raise
            require_hub(name, remedy)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    _require_rope(config, name)
    for part in (config, config.get_text_config()):
        pad, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(size, int) and pad >= size:
            part.pad_token_id = None  # what stands at padding is masked, and transformers would fail
        # Others need a package, or are code of the hub that transformers would run, and compute the same.
        if (asked := part._attn_implementation) not in (None, "eager", "sdpa"):
            log.info(
                f"'{name}' asks for the attention '{asked}', and PyTorch's is used, which computes the same"
            )
            part._attn_implementation = None
    return config


def _require_language_model(config: Any, name: str) -> None:
    """Raise UserError for a checkpoint with another head, in whose place a tied embedding would be used."""
    for said in config.architectures or ():
        head = str(said).partition("For")[2]
        if head.endswith(
            ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "RewardModel")
        ):
            raise UserError(
                f"'{name}' is a {said}, which predicts no next token; give the model it was made from"
            )


def _require_rope(config: Any, name: str) -> None:
    """Raise UserError for a kind of rotary positions that transformers does not know."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = ["default", *ROPE_INIT_FUNCTIONS]
    for kind in rope_kinds(config.get_text_config()):
        if (said := kind.get("rope_type", "default")) not in known:
            raise UserError(f"'{name}': {unknown('rope_type', said, known)} (in its config.json)")


def _device(device: str) -> torch.device:
    from importlib.util import find_spec

    from ..distributed import local_rank, world

    if device == MAP and find_spec("accelerate") is None:
        raise UserError("device map needs accelerate; pip install accelerate")
    if device == MAP and world() > 1:
        raise UserError(
            "device map spreads one model over all GPUs, and each of several processes would; use one "
            "process, or device auto"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in ("auto", MAP):
        return torch.device("cuda", local_rank() % gpus) if gpus else torch.device("cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ("auto", "cpu", "cuda", MAP)) from None
    if target.type == "cuda" and not gpus:
        raise UserError(
            "device is 'cuda', but PyTorch finds no CUDA GPU; use device auto or cpu, or install a CUDA build"
        )
    if target.type == "cuda" and (target.index or 0) >= gpus:
        raise UserError(f"device is '{device}', but there are {gpus} GPUs; the first is cuda:0")
    return target


MAP = "map"
"""The device that means several."""

DEMO = str(Path(__file__).parents[1] / "demo" / "sparc3-demo")
"""The embedded model, an ordinary checkpoint in the package."""


def _dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and config.dtype == torch.float16 else "auto"
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def context_length(model: "PreTrainedModel") -> int:
    """The longest input the model was made for, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def rope_switches(model: "PreTrainedModel") -> tuple[int, ...]:
    """The lengths beyond which the model turns its positions otherwise, in tokens (LongRoPE, as in Phi-3).

    It looks at the longest row of a batch, so rows on either side of such a length do not belong in one
    batch. Dynamic NTK turns them otherwise beyond `context_length` only, which no row exceeds.
    """
    key = "original_max_position_embeddings"
    long = [kind for kind in rope_kinds(model.config) if kind.get("rope_type") == "longrope"]
    found = {kind.get(key) or getattr(model.config, key, None) for kind in long}
    return tuple(sorted(int(length) for length in found if length))


def rope_kinds(config: Any) -> list[dict[str, Any]]:
    """A configuration's rotary positions: one kind, or one of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def vocabulary_size(model: "PreTrainedModel") -> int:
    """The number of token ids the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])
