"""Load a causal language model and its tokenizer."""

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
from .offloading import count_offloaded_layers, gpu_room
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
        dtype: "auto" (as stored; float16 becomes float32 on a CPU, which handles it badly), "float32",
            "bfloat16", "float16", "float64".
        device: "auto" (CUDA if available, else CPU), "cpu", "cuda", "cuda:1"; or "map", for a model larger
            than one GPU: its layers are distributed over all GPUs (accelerate's device map), and the rest
                stays on
            the CPU and is copied to a GPU for each use.

    Raises:
        UserError: a missing or inaccessible folder, hub model or device, no tokenizer, or weights larger than
            the device's free memory; the message says what to do.
        UnsupportedModel: an architecture without a row in FAMILIES, detected before any weight is read.

    `sparc3.models.load.load_weights` loads a model without a tokenizer, which suffices for token ids.
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

    given_name, adapter, config, torch_dtype, target = _check_names(name_or_path, dtype, device)
    name = adapter.base if adapter else given_name
    if name.endswith(".json") and Path(name).is_file():
        raise UserError(f"{name} is a configuration without weights; give the folder with both")
    spreads = device == MAP
    with hub_errors(name):
        spread = _plan_placement(name, config, torch_dtype) if spreads else {}
        if not spreads:
            _require_room(name, config, torch_dtype, target)
        is_text_part = not find_gguf(name) and _read_config(name).model_type != config.model_type
        if path := find_gguf(name):
            options = {"dtype": torch.float32 if torch_dtype == "auto" else torch_dtype, **spread}
            model, report = load_gguf_weights(name, path, config, options)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=torch_dtype,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                key_mapping=TEXT_ALONE if is_text_part else None,
                **NOT_BY_ITSELF,
                **spread,
            )
    require_present(model)
    layers = list(layers_of(model))
    if offloaded := count_offloaded_layers(layers):
        log.info(
            f"{offloaded} of {len(layers)} layers stay on the CPU and are copied to the GPU for each use, "
            "which is slower"
        )
    elif (
        spreads and target.type == "cuda" and {weight.device.type for weight in model.parameters()} == {"cpu"}
    ):
        log.warning("no layer fits on a GPU, so everything is computed on the CPU")
    layers_path = family_of(model).layers
    if is_text_part:  # only the text's weights of a model of text and images are used and saved
        model.__dict__.pop("_weight_conversions", None)
        report["unexpected_keys"] = [key for key in report["unexpected_keys"] if key.startswith(layers_path)]
    require_whole(name, model, report, layers_path)
    if adapter:
        model = merge_(model, adapter, given_name)
    if family_of(model).experts and model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default, grouped_mm, does not support float64
    # A quantised model may refuse .to(), even to its own device.
    return (model if spreads or model.device == target else model.to(target)).eval()


def build_model(config: Any, **options: Any) -> "PreTrainedModel":
    """A model built from a configuration, in eval mode, on torch's current device, with transformers' initial
    weights. Raises UserError if transformers cannot build it."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, **options).eval()
    except Sparc3Error:
        raise
    except Exception as error:  # an invalid configuration can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"transformers cannot build a {config.model_type} from this configuration: {reason}"
        ) from error


def _require_room(name: str, config: Any, dtype: torch.dtype | str, device: torch.device) -> None:
    """Raise UserError if the weights alone exceed the device's free memory."""
    free = available(device)
    if free is None or getattr(config, "quantization_config", None):
        return
    needed, dtype_in_memory = _measure_weights(config, dtype)
    if needed > free:
        hint = ", or device map, which leaves on the CPU what does not fit" if device.type == "cuda" else ""
        raise UserError(
            f"the weights of '{name}' take {needed / 2**30:.3g} GiB in "
            f"{str(dtype_in_memory).removeprefix('torch.')}, and {device} has {free / 2**30:.3g} GiB left; "
            f"{'load them in bfloat16, or ' if dtype_in_memory.itemsize > 2 else ''}use a device with "
            f"more{hint}"
        )


def _plan_placement(name: str, config: Any, dtype: torch.dtype | str) -> dict[str, Any]:
    """Arguments with which from_pretrained distributes a model over devices."""
    from accelerate.utils import get_max_memory

    if getattr(config, "quantization_config", None):
        return {"device_map": "auto"}
    free = get_max_memory()
    if (free_on_cpu := available(torch.device("cpu"))) is not None:  # `available` respects control groups
        free["cpu"] = min(free["cpu"], free_on_cpu)
    return {"device_map": "auto", "max_memory": gpu_room(free, _measure_weights(config, dtype)[0], name)}


def _measure_weights(config: Any, dtype: torch.dtype | str) -> tuple[int, torch.dtype]:
    """Bytes of all weights, and their dtype."""
    from transformers import AutoModelForCausalLM

    dtype_in_memory = (config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        return sum(
            w.nbytes for w in AutoModelForCausalLM.from_config(config, dtype=dtype_in_memory).parameters()
        ), dtype_in_memory


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of `load_model`, without its model. Raises UserError if there is none; transformers
    may create an empty one instead."""
    from transformers import AutoTokenizer

    name = _resolve_name(name_or_path)
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
        # transformers 5.0 creates one with only special tokens, which maps every word to the unknown token.
        if not ids or (len(tokenizer) <= 16 and set(ids) == {tokenizer.unk_token_id}):
            raise no_tokenizer
    return tokenizer


def _has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file that may contain a tokenizer's vocabulary."""
    patterns = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json", "*.spm")
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def require_loadable(
    name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto"
) -> None:
    """Raise the errors of `load_model` that can be detected without reading a weight."""
    _check_names(name_or_path, dtype, device)


def _check_names(
    name_or_path: str | os.PathLike[str], dtype: str, device: str
) -> tuple[str, Adapter | None, Any, torch.dtype | str, torch.device]:
    name, target = _resolve_name(name_or_path), _resolve_device(device)
    config = load_config(name)
    _require_language_model(config, name)
    require_family(config, name)
    adapter = find_adapter(name)
    require_readable(adapter.base if adapter else name)
    return name, adapter, config, _resolve_dtype(dtype, config, target), target


def _resolve_name(name_or_path: str | os.PathLike[str]) -> str:
    if name_or_path == "demo":
        return DEMO
    name = os.fspath(name_or_path)
    try:
        os.stat(name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, no permission, or a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name[:60]!r} cannot be the name of a model ({reason}); check the name") from None
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
"""Pattern of a weight's name in a model of text and images → its name in the text model."""


def load_config(name: str, remedy: str = _REMEDY) -> Any:
    """The configuration of a hub model, a local checkpoint, a GGUF, a config.json or "demo"; every failure
    is a UserError. For an adapter it is the base model's, and for a model of text and images the text
    model's, if that has a family.

    Args:
        remedy: what to do if the hub cannot be reached.
    """
    name = _resolve_name(name)
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
    is_config_file = name.endswith(".json") and Path(name).is_file()
    if looks_local(name) and not Path(name).is_dir() and not is_config_file:
        if Path(name).exists():
            raise UserError(
                f"{name} is not a folder; give a folder with config.json and safetensors, or a GGUF"
            )
        raise UserError(
            f"no model folder at {name}; give a folder with config.json and safetensors, or a hub id"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        folders = [
            path.parent for part in ("*", "snapshots/*") for path in Path(name).glob(f"{part}/config.json")
        ]
        remedy = (
            f"{min(folders)} has one, give that" if folders else "give a folder that save_pretrained wrote"
        )
        raise UserError(f"{name} has no config.json; {remedy}")
    require_downloaded(name)
    with hub_errors(name):
        try:
            local_only = (
                not Path(name).is_dir() and not is_config_file
            )  # prefer the cache for a model on the hub
            config = AutoConfig.from_pretrained(name, local_files_only=local_only, trust_remote_code=False)
        except OSError:
            if not local_only:
                raise
            require_hub(name, remedy)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    _require_rope(config, name)
    for part in (config, config.get_text_config()):
        pad, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(size, int) and pad >= size:
            part.pad_token_id = None  # transformers would fail; padding is masked anyway
        # Other implementations compute the same, but need a package, or code from the hub that would be run.
        if (implementation := part._attn_implementation) not in (None, "eager", "sdpa"):
            log.info(
                f"'{name}' asks for the attention '{implementation}', and PyTorch's is used, which computes "
                "the same"
            )
            part._attn_implementation = None
    return config


def _require_language_model(config: Any, name: str) -> None:
    """Raise UserError for a checkpoint with a head of another kind, which would be replaced by tied
    embeddings."""
    for architecture in config.architectures or ():
        head = str(architecture).partition("For")[2]
        if head.endswith(
            ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "RewardModel")
        ):
            raise UserError(
                f"'{name}' is a {architecture}, which does not predict the next token; give its base model"
            )


def _require_rope(config: Any, name: str) -> None:
    """Raise UserError for a kind of rotary position embedding that transformers does not know."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known_types = ["default", *ROPE_INIT_FUNCTIONS]
    for kind in rope_kinds(config.get_text_config()):
        if (rope_type := kind.get("rope_type", "default")) not in known_types:
            raise UserError(f"'{name}': {unknown('rope_type', rope_type, known_types)} (in its config.json)")


def _resolve_device(device: str) -> torch.device:
    from importlib.util import find_spec

    from ..distributed import local_rank, world

    if device == MAP and find_spec("accelerate") is None:
        raise UserError("device map needs accelerate; pip install accelerate")
    if device == MAP and world() > 1:
        raise UserError(
            "device map distributes the model over all GPUs, which several processes cannot do at once; use "
            "one process, or device auto"
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
"""The device that means all GPUs and the CPU."""

DEMO = str(Path(__file__).parents[1] / "demo" / "sparc3-demo")
"""The embedded model, an ordinary checkpoint in the package."""


def _resolve_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and config.dtype == torch.float16 else "auto"
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def context_length(model: "PreTrainedModel") -> int:
    """The longest input that the model supports, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def rope_switches(model: "PreTrainedModel") -> tuple[int, ...]:
    """The lengths in tokens beyond which the model changes its rotary angles (LongRoPE, as in Phi-3).

    The longest row of a batch decides for all rows, so rows on different sides of such a length must not
    share a batch. Dynamic NTK changes them only beyond `context_length`, which no row exceeds.
    """
    key = "original_max_position_embeddings"
    longrope = [kind for kind in rope_kinds(model.config) if kind.get("rope_type") == "longrope"]
    lengths = {kind.get(key) or getattr(model.config, key, None) for kind in longrope}
    return tuple(sorted(int(length) for length in lengths if length))


def rope_kinds(config: Any) -> list[dict[str, Any]]:
    """A configuration's rope_parameters: one dict, and one for each kind of layer, if there are several."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def vocabulary_size(model: "PreTrainedModel") -> int:
    """The number of token ids for which the model has an embedding."""
    return int(model.get_input_embeddings().weight.shape[0])
