"""Loading a causal language model, and the one table that knows the names inside each architecture."""

import hashlib
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch
from torch import nn

from .errors import UnsupportedModel, UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""Canonical names of the prunable matrices of a decoder layer, in the order data meets them."""


@dataclass(frozen=True)
class Family:
    """One architecture: where its parts are, as module paths.

    Attributes:
        classes: prefix of the class names of its layer, attention and MLP modules ("Llama" of LlamaDecoderLayer).
        layers: path of the list of decoder layers.
        roles: role → path inside a layer.
        activation: path, inside a layer, of the MLP's non-linearity.
        gated: path, inside a layer, of an MLP that computes down(act(gate(x)) · up(x)); None where it is down(act(up(x))).
        positions: path of the learned position embedding; None where positions are not learned.
    """

    classes: str
    layers: str
    roles: Mapping[str, str]
    activation: str
    gated: str | None = None
    positions: str | None = None


def _llama_like(classes: str) -> Family:
    attention = {f"attn.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
    mlp = {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    return Family(classes, "model.layers", {**attention, **mlp}, "mlp.act_fn", gated="mlp")


FAMILIES: dict[str, Family] = {
    "llama": _llama_like("Llama"),
    "opt": Family(
        "OPT",
        "model.decoder.layers",
        {
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.out_proj",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
        "activation_fn",
        positions="model.decoder.embed_positions",
    ),
}
"""model_type of the configuration → Family. A new plain decoder is a new row."""


@dataclass(frozen=True)
class Site:
    """One prunable matrix of a model.

    Attributes:
        name: module path, the key in Scores and Circuits ("model.layers.0.mlp.up_proj").
        role: canonical role ("mlp.up").
        layer: index of the decoder layer.
        module: the linear module itself; its weight is [out, in], or [in, out] where `transposed`.
        out, inp: numbers of output and input features.
        heads: number of attention heads that read or write it (query heads for attn.q and attn.o).
        transposed: whether the weight is stored [in, out], as GPT-2's Conv1D does.
    """

    name: str
    role: str
    layer: int
    module: nn.Module
    out: int
    inp: int
    heads: int
    transposed: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a [out, in] view."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.T if self.transposed else weight


def family_of(model: "PreTrainedModel") -> Family:
    """The model's row of the table. Raises UnsupportedModel where there is none."""
    return require_family(model.config.model_type, type(model).__name__)


def require_family(model_type: str, what: str) -> Family:
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{what}: architecture '{model_type}' is not supported, it has no row in the family table "
            f"(sparc3.models.FAMILIES); supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


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
    heads = model.config.num_attention_heads
    key_value_heads = getattr(model.config, "num_key_value_heads", None) or heads
    sites = []
    for index, layer in enumerate(layers_of(model)):
        for role in (role for role in ROLES if role in wanted):
            path = family.roles[role]
            module = layer.get_submodule(path)
            out, inp, transposed = _linear_shape(module, f"{family.layers}.{index}.{path}")
            of_role = key_value_heads if role in ("attn.k", "attn.v") else heads
            sites.append(Site(f"{family.layers}.{index}.{path}", role, index, module, out, inp, of_role, transposed))
    return sites


def _linear_shape(module: nn.Module, name: str) -> tuple[int, int, bool]:
    if type(module).__name__ == "Conv1D":
        inp, out = module.get_parameter("weight").shape
        return int(out), int(inp), True
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features), False  # type: ignore[arg-type]
    raise UnsupportedModel(f"{name} is a {type(module).__name__}, not a linear map that sparc3 knows")


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model and its tokenizer, ready to attribute: eval mode, on one device.

    Args:
        name_or_path: a hub id, or a folder with an ordinary Hugging Face checkpoint.
        dtype: "auto" (as stored; float16 becomes float32 on a CPU, which computes it poorly), "float32", "bfloat16", "float16", "float64".
        device: "auto" (CUDA where there is one, else CPU), "cpu", "cuda", "cuda:1".

    Raises:
        UserError: no such folder or hub model, no access to it, or no such device; the message says what to do.
        UnsupportedModel: an architecture without a row in FAMILIES, found out before any weight is read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(name_or_path)
    target = _device(device)
    config = load_config(name)
    require_family(config.model_type, name)
    wanted = _dtype(dtype, config, target)
    with hub_errors(name):
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=wanted)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to(target).eval(), tokenizer


def load_config(name: str) -> Any:
    """The configuration of a hub model or a local checkpoint, with every way it can fail as one line."""
    from transformers import AutoConfig

    if _looks_local(name) and not Path(name).is_dir():
        raise UserError(f"no model folder at {name}; give a folder with config.json and safetensors, or a hub id")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} has no config.json; give a folder that save_pretrained wrote")
    with hub_errors(name):
        if not Path(name).is_dir():
            try:
                return AutoConfig.from_pretrained(name, local_files_only=True)
            except OSError:
                require_hub(name)
        return AutoConfig.from_pretrained(name)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def require_hub(name: str) -> None:
    """Fail at once where the hub's host has no address, instead of after half a minute of retries."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or ""
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError
        if not any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
            socket.getaddrinfo(host, 443)
    except OSError:
        raise UserError(_no_hub(name)) from None


def _no_hub(name: str) -> str:
    return f"cannot reach the hub for '{name}' and it is not in the local cache; download it elsewhere and give the folder's path"


class hub_errors:  # noqa: N801  a context manager, used like a function
    """Turns what the hub's client raises into one line that says what to do."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError):
            return
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        chain: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and link not in chain:
            chain.append(link)
            link = link.__cause__ or link.__context__
        name = self.name
        if any(isinstance(e, GatedRepoError) or "gated repo" in str(e) for e in chain):
            raise UserError(
                f"'{name}' is gated: accept its terms on the hub, then run `hf auth login` or set HF_TOKEN to a token that may read it"
            ) from None
        if any(isinstance(e, RepositoryNotFoundError) for e in chain):
            raise UserError(f"no model '{name}' on the hub, or no right to see it; check the name, or log in with `hf auth login`") from None
        if any(isinstance(e, (LocalEntryNotFoundError, HfHubHTTPError)) for e in chain):
            raise UserError(_no_hub(name)) from None
        if any("trust_remote_code" in str(e) for e in chain):
            raise UnsupportedModel(f"'{name}' needs Python code from its own repository, which sparc3 does not run") from None
        if isinstance(error, (OSError, ValueError, KeyError)):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot load '{name}': {first}") from None


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
    return Path(name).resolve().name if _looks_local(name) else name


@torch.no_grad()
def model_fingerprint(model: "PreTrainedModel") -> str:
    """A short name of the weights' values: 16 hex digits.

    Each matrix enters by the exact integer sums of its rows and columns, after rounding to bfloat16, so that one checkpoint
    has one fingerprint whether it is loaded in float32 or bfloat16, on CPU or GPU, and one changed weight gives another.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        rows = parameter.detach().reshape(parameter.shape[0] if parameter.dim() > 1 else 1, -1)
        columns = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
        for piece in rows.split(max(1, 2**25 // rows.shape[1])):
            bits = piece.to(torch.bfloat16).contiguous().view(torch.int16) if piece.is_floating_point() else piece
            digest.update(bits.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
            columns += bits.sum(0, dtype=torch.int64)
        digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
