"""Loading a causal language model, and finding its sites."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .errors import UnsupportedModel, UserError, unknown
from .families import ROLES as ROLES
from .families import Family, require_family
from .hub import hub_errors, looks_local, require_hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = slice | torch.Tensor | None
"""Which output rows of a module belong to a site; None for all of them."""


@dataclass(frozen=True)
class Site:
    """One prunable matrix of a model.

    Attributes:
        name: the key in Scores and Circuits: the module's path ("model.layers.0.mlp.up_proj"), with "#up" after it where the
            module holds several matrices in one.
        role: canonical role ("mlp.up").
        layer: index of the decoder layer.
        module: the linear module; its weight is [out, in], or [in, out] where `transposed`.
        out, inp: numbers of output and input features of the site.
        heads: number of attention heads that read or write it (query heads for attn.q and attn.o).
        transposed: whether the weight is stored [in, out], as GPT-2's Conv1D does.
        rows: the site's share of the module's output features.
    """

    name: str
    role: str
    layer: int
    module: nn.Module
    out: int
    inp: int
    heads: int
    transposed: bool = False
    rows: Rows = None

    @property
    def stored(self) -> torch.Tensor:
        """The module's whole weight as a [module's out, in] view."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> torch.Tensor:
        """The site's weight [out, in]: a view, or a copy where its rows are scattered in the module. Raises UserError where it is quantised."""
        self.require_values()
        return self.stored if self.rows is None else self.stored[self._on(self.stored)]

    @property
    def quantised(self) -> bool:
        """Whether the module holds its weight in some other form than a matrix of floating-point numbers."""
        weight: object = getattr(self.module, "weight", None)
        return not isinstance(weight, torch.Tensor) or type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype not in DTYPES.values()

    def require_values(self) -> None:
        """Raise UserError where the weight's values cannot be had."""
        if self.quantised:
            weight = getattr(self.module, "weight", None)
            kind = type(weight).__name__ if weight is not None else type(self.module).__name__
            raise UserError(
                f"{self.name} holds its weight quantised ({kind}), and its values are needed; use neuron signed, unit head or method activation, "
                "which need none, or load the model unquantised"
            )

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """The site's features [..., out] of an output of the module [..., module's out]."""
        return output if self.rows is None else output[..., self._on(output)]

    def stored_rows(self, units: torch.Tensor) -> torch.Tensor:
        """Which rows of `stored` hold these output features of the site."""
        return units if self.rows is None else torch.arange(self.stored.shape[0], device=units.device)[self._on(units)][units]

    def _on(self, tensor: torch.Tensor) -> slice | torch.Tensor:
        assert self.rows is not None
        return self.rows.to(tensor.device) if isinstance(self.rows, torch.Tensor) else self.rows


def _gate_up(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    return {"gate": slice(0, out // 2), "up": slice(out // 2, out)}


def _qkv(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    width = out // (heads + 2 * key_value_heads)
    ends = (heads * width, (heads + key_value_heads) * width, out)
    return {"q": slice(0, ends[0]), "k": slice(ends[0], ends[1]), "v": slice(ends[1], ends[2])}


def _qkv_by_head(out: int, heads: int, key_value_heads: int) -> dict[str, Rows]:
    """For each key head: the queries that share it, the key, the value."""
    width = out // (heads + 2 * key_value_heads)
    rows = torch.arange(out).view(key_value_heads, heads // key_value_heads + 2, width)
    return {"q": rows[:, :-2].reshape(-1), "k": rows[:, -2].reshape(-1), "v": rows[:, -1].reshape(-1)}


LAYOUTS: dict[str, Callable[[int, int, int], dict[str, Rows]]] = {"gate, up": _gate_up, "q, k, v": _qkv, "q, k, v by head": _qkv_by_head}
"""Layout of a module that holds several matrices: (out, heads, key and value heads) → part → its rows."""


def family_of(model: "PreTrainedModel") -> Family:
    """The model's row of the table. Raises UnsupportedModel where there is none."""
    return require_family(model.config, type(model).__name__)


def layers_of(model: "PreTrainedModel") -> Iterable[nn.Module]:
    layers = model.get_submodule(family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def sites_of(model: "PreTrainedModel", roles: Iterable[str]) -> list[Site]:
    """The sites of the given roles, in the order of the layers, then of ROLES.

    Raises:
        UserError: an unknown role, or one that this architecture does not have.
        UnsupportedModel: the architecture, or a module at a site, is not one the rules know.
    """
    family = family_of(model)
    wanted = set(roles)
    for role in wanted:
        if role not in ROLES:
            raise unknown("site", role, ROLES)
        if role not in family.roles:
            raise UserError(
                f"{model.config.model_type} has no site '{role}' (its MLP has no gate); it has: {', '.join(sorted(family.roles))}"
            )
    if not wanted:
        raise UserError("no site given; name at least one, such as mlp.up")
    ordered = [role for role in ROLES if role in wanted]
    return [_site(model, family, index, layer, role) for index, layer in enumerate(layers_of(model)) for role in ordered]


def _site(model: "PreTrainedModel", family: Family, index: int, layer: nn.Module, role: str) -> Site:
    heads, key_value_heads = model.config.num_attention_heads, family.key_value_heads(model.config)
    name = f"{family.layers}.{index}.{family.roles[role]}"
    path, _, part = family.roles[role].partition("#")
    module = layer.get_submodule(path)
    out, inp, transposed = _linear_shape(module, name)
    rows = LAYOUTS[family.fused[path]](out, heads, key_value_heads)[part] if part else None
    if rows is not None:
        out = len(range(out)[rows]) if isinstance(rows, slice) else len(rows)
    return Site(name, role, index, module, out, inp, key_value_heads if role in ("attn.k", "attn.v") else heads, transposed, rows)


def _linear_shape(module: nn.Module, name: str) -> tuple[int, int, bool]:
    if type(module).__name__ == "Conv1D":
        inp, out = cast(torch.Tensor, module.weight).shape
        return out, inp, True
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features), False  # type: ignore[arg-type]
    raise UnsupportedModel(f"{name} is a {type(module).__name__}, not a linear map that sparc3 knows")


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model and its tokenizer, ready to attribute: eval mode, on one device.

    Args:
        name_or_path: a hub id, a folder with an ordinary Hugging Face checkpoint, or "demo" for the embedded model.
        dtype: "auto" (as stored; float16 becomes float32 on a CPU, which computes it poorly), "float32", "bfloat16", "float16", "float64".
        device: "auto" (CUDA where there is one, else CPU), "cpu", "cuda", "cuda:1".

    Raises:
        UserError: no such folder or hub model, no access to it, or no such device; the message says what to do.
        UnsupportedModel: an architecture without a row in FAMILIES, found out before any weight is read.
    """
    return load_weights(name_or_path, dtype=dtype, device=device), load_tokenizer(name_or_path)


def load_weights(name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto") -> "PreTrainedModel":
    """The model of `load_model`, without its tokenizer."""
    from transformers import AutoModelForCausalLM

    name, config, wanted, target = _checked(name_or_path, dtype, device)
    with hub_errors(name):
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=wanted, trust_remote_code=False)
    # A quantised model may refuse to be moved, even to where it is.
    return (model if model.device == target else model.to(target)).eval()


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of `load_model`, without its model."""
    from transformers import AutoTokenizer

    name = _name(name_or_path)
    with hub_errors(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def require_loadable(name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto") -> None:
    """Raise what `load_model` would, as far as it can be told from the configuration, without reading a weight."""
    _checked(name_or_path, dtype, device)


def _checked(name_or_path: str | os.PathLike[str], dtype: str, device: str) -> tuple[str, Any, torch.dtype | str, torch.device]:
    name, target = _name(name_or_path), _device(device)
    config = load_config(name)
    require_family(config, name)
    return name, config, _dtype(dtype, config, target), target


def _name(name_or_path: str | os.PathLike[str]) -> str:
    return DEMO if name_or_path == "demo" else os.fspath(name_or_path)


def load_config(name: str, remedy: str = "download it elsewhere and give the folder's path") -> Any:
    """The configuration of a hub model, a local checkpoint, a config.json or "demo", with every way it can fail as one line.

    Args:
        remedy: what to do where the hub cannot be reached.
    """
    from transformers import AutoConfig

    name = _name(name)
    alone = name.endswith(".json") and Path(name).is_file()
    if looks_local(name) and not Path(name).is_dir() and not alone:
        raise UserError(f"no model folder at {name}; give a folder with config.json and safetensors, or a hub id")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} has no config.json; give a folder that save_pretrained wrote")
    with hub_errors(name):
        if not Path(name).is_dir() and not alone:
            try:
                return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            except OSError:
                require_hub(name, remedy)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _device(device: str) -> torch.device:
    if device == "auto":
        from .distributed import local_rank

        return torch.device("cuda", local_rank() % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ("auto", "cpu", "cuda")) from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for and PyTorch sees no CUDA GPU; use device auto or cpu, or install a CUDA build")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{device}' was asked for and there are {torch.cuda.device_count()} GPUs; the first is cuda:0")
    return target


DEMO = str(Path(__file__).parent / "demo" / "sparc3-demo")
"""The embedded model, an ordinary checkpoint in the package."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and config.dtype == torch.float16 else "auto"
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def context_length(model: "PreTrainedModel") -> int:
    """The longest input the model was made for, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def describe(model: "PreTrainedModel") -> dict[str, str]:
    """Which model this is: id, architecture and fingerprint, as scores and circuits record them."""
    return {"id": model_id(model), "architecture": model.config.model_type, "fingerprint": model_fingerprint(model)}


def model_id(model: "PreTrainedModel") -> str:
    """The hub id, or the name of the local folder (never its whole path, which is nobody else's business)."""
    name = str(getattr(model, "name_or_path", "") or model.config.model_type)
    return Path(name).resolve().name if looks_local(name) else name


@torch.no_grad()
def model_fingerprint(model: "PreTrainedModel") -> str:
    """A short name of the weights' values: 16 hex digits.

    Each matrix enters by the exact integer sums of its rows and columns, after rounding to bfloat16, so that one checkpoint
    has one fingerprint whether it is loaded in float32 or bfloat16, on CPU or GPU, and one changed weight gives another.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in ((name, part) for name, whole in model.named_parameters() for part in _plain_parts(whole.detach())):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        rows = parameter.reshape(parameter.shape[0] if parameter.dim() > 1 else 1, -1)
        columns = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
        for piece in rows.split(max(1, 2**25 // rows.shape[1])):
            bits = piece.to(torch.bfloat16).contiguous().view(torch.int16) if piece.is_floating_point() else piece
            digest.update(bits.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
            columns += bits.sum(0, dtype=torch.int64)
        digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself, or the ones that a quantised tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain_parts(getattr(tensor, name))]
