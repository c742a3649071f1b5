"""What is examined: a model with its weights, or, of a configuration alone, a model of that architecture with
random ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..models.load import load_config, load_tokenizer, load_weights, require_loadable
from ..models.sites import DTYPES
from ..samples.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LARGE = 64 * 2**20
"""Parameters, above which a model of random weights is made smaller."""

TEXTS = (
    "The old keeper climbed the stairs of the lighthouse, lit the lamp, and looked out over the dark water "
    "for ships.",
    "When it rains in the mountains, the river behind the village rises.",
    "Two and two make",
)


@dataclass(frozen=True)
class Specimen:
    """A model and what it is fed.

    Attributes:
        model: in eval mode, on its device.
        ids: token-id lists of unequal length, the longest first.
        notes: what to know about how the two came to be, a line each.
    """

    model: "PreTrainedModel"
    ids: list[list[int]]
    notes: tuple[str, ...]


def load_specimen(name: str, *, dtype: str = "auto", device: str = "auto") -> Specimen:
    """The specimen of a hub id, a folder, a config.json, or "demo". Raises what `load_model` does."""
    if has_weights(name):
        model = load_weights(name, dtype=dtype, device=device)
        ids, how = _ids(model, name)
        return Specimen(model, ids, how)
    require_loadable(name, dtype=dtype, device=device)
    model, note = random_model(load_config(name))
    best = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(best if device == "auto" else device).to(DTYPES.get(dtype, torch.float32))
    return Specimen(model, _random_ids(model), (note, "random tokens"))


def has_weights(name: str) -> bool:
    """Whether there are weights to load: always so of the demo and of the hub, whose client says what is
    missing."""
    path = Path(name)
    if path.is_file():
        return path.suffix.lower() == ".gguf"
    return not path.is_dir() or any(
        file.suffix.lower() in (".safetensors", ".bin", ".gguf") for file in path.iterdir()
    )


def _ids(model: "PreTrainedModel", name: str) -> tuple[list[list[int]], tuple[str, ...]]:
    """The texts as the model's own tokenizer reads them. Where no tokenizer was saved, transformers may well
    make an empty one."""
    try:
        tokenizer = load_tokenizer(name)
        ids = [list(tokenize(text, tokenizer)) for text in TEXTS]
    except UserError:
        ids = [[]]
    if all(len(one) > 1 and max(one) < model.config.vocab_size for one in ids):
        return ids, ()
    return _random_ids(model), ("random tokens, for no tokenizer could be loaded",)


def _random_ids(model: "PreTrainedModel") -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()
        for length in (21, 14, 6)
    ]


def random_model(config: Any) -> "tuple[PreTrainedModel, str]":
    """A model of a configuration with random weights, made smaller where it is large; and what was done, in
    words."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            whole = sum(
                parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters()
            )
        smaller, cuts = (config, []) if whole <= LARGE else shrink_config(config)
        model = AutoModelForCausalLM.from_config(smaller).float().eval()
    except Exception as error:  # a configuration can be wrong in any way that Python can
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"transformers cannot build a {config.model_type} of this configuration: {why}"
        ) from error
    _randomise_(model)
    kept = sum(parameter.numel() for parameter in model.parameters())
    if not cuts:
        return model, f"random weights: there are none here, only a configuration ({kept:,} parameters)"
    return (
        model,
        f"random weights, and smaller than the configuration: {', '.join(cuts)}; {kept:,} of {whole:,} "
        "parameters",
    )


@torch.no_grad()
def _randomise_(model: nn.Module) -> None:
    """Matrices of spectral size about one, biases and gains away from 0 and 1, so that every parameter
    matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


WIDTHS = (
    *("hidden_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "word_embed_proj_dim"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)


def shrink_config(config: Any) -> tuple[Any, list[str]]:
    """A configuration with few layers, a small vocabulary and a fraction of the width, and what was cut.

    Every kind of layer stays (sliding and full attention), and so do the width of a head and all that is not
    a size.
    """
    settings, cuts = config.to_dict(), []

    def put(name: str, value: Any) -> None:
        settings[config.attribute_map.get(name, name)] = value

    layers = _layers_of_every_kind(config)
    for name, value in list(settings.items()):
        if (
            isinstance(value, list)
            and len(value) == config.num_hidden_layers
            and not isinstance(value[0], list)
        ):
            settings[name] = value[:layers]
    if "attention_types" in settings:  # GPT-Neo's own way to write the list of layers
        settings["attention_types"] = [[settings["attention_layers"][:layers], 1]]
    put("num_hidden_layers", layers)
    cuts.append(f"{layers} of {config.num_hidden_layers} layers")
    if config.vocab_size > 1000:
        put("vocab_size", 1000)
        cuts.append(f"1,000 of {config.vocab_size:,} tokens")
        settings.update(dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
    heads, kept = config.num_attention_heads, _fewer_heads(config)
    if kept["num_attention_heads"] < heads:
        for name in WIDTHS:
            value = getattr(config, name, None)
            if isinstance(value, int):
                put(name, value * kept["num_attention_heads"] // heads)
        for name, count in kept.items():
            put(name, count)
        cuts.append(f"{kept['num_attention_heads']} of {heads} heads and their share of the width")
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    if experts > (fewer := 2 * getattr(config, "num_experts_per_tok", experts)):
        put("num_local_experts" if hasattr(config, "num_local_experts") else "num_experts", fewer)
        cuts.append(f"{fewer} of {experts} experts")
    settings.pop("quantization_config", None)
    return type(config).from_dict(settings), cuts


def _layers_of_every_kind(config: Any) -> int:
    """How many of the first layers hold each kind of layer that there is; 2 at least."""
    lists = [
        value
        for value in config.to_dict().values()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    ]
    kinds = [tuple(map(str, kind)) for kind in zip(*lists, strict=True)]
    needed = max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    return min(int(config.num_hidden_layers), needed)


def _fewer_heads(config: Any) -> dict[str, int]:
    """At most two key heads, shared by at most four queries each as they were by more: name in the
    configuration → number."""
    heads = config.num_attention_heads
    shared = [
        name
        for name in ("num_key_value_heads", "num_kv_heads")
        if isinstance(getattr(config, name, None), int)
    ]
    keys = min((getattr(config, name) for name in shared), default=heads)
    few = min(keys, 2)
    return {"num_attention_heads": few * min(heads // keys, 4), **dict.fromkeys(shared, few)}
