"""`examine`: run all checks on a model. A configuration without weights is examined as a model of that
architecture with random weights."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..attribution.patching import lrp_rules
from ..errors import UserError
from ..models.families import ROLES
from ..models.fingerprint import model_id
from ..models.gguf import is_gguf
from ..models.hub import require_hub
from ..models.load import (
    build_model,
    context_length,
    load_config,
    load_tokenizer,
    load_weights,
    require_loadable,
)
from ..models.offloading import device_of
from ..models.sites import DTYPES, family_of, sites_of
from ..progress import Progress
from ..samples.tokens import tokenize
from .checks import Finding, dtype_name, run_checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The environment: installed packages, GPUs, and the hub.


NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface_hub", "numpy")

EXTRAS = {
    "accelerate": "spreads one model over GPUs and the CPU, --device map",
    "lm_eval": "runs the language model evaluation harness",
    "bitsandbytes": "loads 4-bit and 8-bit weights",
    "torchao": "loads weights that torchao quantised",
}
"""Optional package → what it adds."""


def list_environment() -> list[tuple[str, str]]:
    """(name, state) of versions, GPUs, the hub and optional packages. Never raises."""
    rows = [
        ("sparc3", __version__),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]
    rows += [(name, _version(name) or "not installed") for name in NEEDED]
    rows += [("CUDA", _cuda()), ("hub", _hub())]
    return rows + [(name, _version(name) or f"not installed: {adds}") for name, adds in EXTRAS.items()]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no GPU that PyTorch can use; everything runs on the CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _hub() -> str:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "switched off by HF_HUB_OFFLINE; folders, the local cache and the demo work"
    try:
        require_hub("")
        get_session().head(constants.ENDPOINT, timeout=5)
    except UserError:
        return f"no address for {constants.ENDPOINT}; folders, the local cache and the demo work"
    except Exception as error:  # any error means that the hub does not answer
        return (
            f"{constants.ENDPOINT} does not answer ({type(error).__name__}); "
            "folders, the local cache and the demo work"
        )
    return f"{constants.ENDPOINT} answers"


# The specimen: the model to examine, and its input.


LARGE = 64 * 2**20
"""Number of parameters above which a model with random weights is made smaller."""

TEXTS = (
    "The old keeper climbed the stairs of the lighthouse, lit the lamp, and looked out over the dark water "
    "for ships.",
    "When it rains in the mountains, the river behind the village rises.",
    "Two and two make",
)


@dataclass(frozen=True)
class Specimen:
    """A model and its input.

    Attributes:
        model: in eval mode, on its device.
        ids: token-id lists of unequal length, the longest first.
        notes: lines on how both were made.
    """

    model: "PreTrainedModel"
    ids: list[list[int]]
    notes: tuple[str, ...]


def load_specimen(name: str, *, dtype: str = "auto", device: str = "auto") -> Specimen:
    """The specimen for a hub id, a folder, a config.json, or "demo". Raises the errors of `load_model`."""
    if has_weights(name):
        model = load_weights(name, dtype=dtype, device=device)
        ids, notes = _read_texts(model, name)
        return Specimen(model, ids, notes)
    require_loadable(name, dtype=dtype, device=device)
    model, note = random_model(load_config(name))
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(default_device if device == "auto" else device).to(DTYPES.get(dtype, torch.float32))
    return Specimen(model, _random_ids(model), (note, "random tokens"))


def has_weights(name: str) -> bool:
    """Whether there are weights to load; assumed for the demo and for the hub, whose client says what is
    missing."""
    path = Path(name)
    if path.is_file():
        return path.suffix.lower() == ".gguf" or is_gguf(path)
    return not path.is_dir() or any(
        file.suffix.lower() in (".safetensors", ".bin", ".gguf") for file in path.iterdir()
    )


def _read_texts(model: "PreTrainedModel", name: str) -> tuple[list[list[int]], tuple[str, ...]]:
    """TEXTS tokenised by the model's own tokenizer, or random tokens if there is none (transformers may
    create an empty one)."""
    try:
        tokenizer = load_tokenizer(name)
        ids = [list(tokenize(text, tokenizer)) for text in TEXTS]
    except UserError:
        ids = [[]]
    if all(len(sequence) > 1 and max(sequence) < model.config.vocab_size for sequence in ids):
        return ids, ()
    return _random_ids(model), ("random tokens, because no tokenizer could be loaded",)


def _random_ids(model: "PreTrainedModel") -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()
        for length in (21, 14, 6)
    ]


def random_model(config: Any) -> "tuple[PreTrainedModel, str]":
    """A model with random weights from a configuration, made smaller if it is large, and a note on that.

    Matrices have a spectral norm of about one, and biases and gains differ from 0 and 1, so that every
    parameter matters.
    """
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in build_model(config).parameters())
    smaller, cuts = (config, []) if total <= LARGE else shrink_config(config)
    model, generator = build_model(smaller).float(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    remaining = sum(parameter.numel() for parameter in model.parameters())
    if not cuts:
        return model, f"random weights, because there is only a configuration ({remaining:,} parameters)"
    summary = f"{', '.join(cuts)}; {remaining:,} of {total:,} parameters"
    return model, f"random weights, and smaller than the configuration: {summary}"


WIDTHS = (
    *("hidden_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "word_embed_proj_dim"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)


def shrink_config(config: Any) -> tuple[Any, list[str]]:
    """A configuration with few layers, a small vocabulary and a fraction of the width, and what was cut.

    Every kind of layer (sliding and full attention) is kept, and so are the width of a head and everything
    that is not a size.
    """
    settings, cuts = config.to_dict(), []

    def put(name: str, value: Any) -> None:
        settings[config.attribute_map.get(name, name)] = value

    depth = config.num_hidden_layers
    by_layer = {
        name: value
        for name, value in settings.items()
        if isinstance(value, list) and len(value) == depth and not isinstance(value[0], list)
    }
    kinds = [tuple(map(str, kind)) for kind in zip(*by_layer.values(), strict=True)]
    layers = min(depth, max([2, *(kinds.index(kind) + 1 for kind in kinds)]))
    settings.update({name: value[:layers] for name, value in by_layer.items()})
    if "attention_types" in settings:  # GPT-Neo's own format for the list of layers
        settings["attention_types"] = [[settings["attention_layers"][:layers], 1]]
    put("num_hidden_layers", layers)
    cuts.append(f"{layers} of {depth} layers")
    if config.vocab_size > 1000:
        put("vocab_size", 1000)
        cuts.append(f"1,000 of {config.vocab_size:,} tokens")
        settings.update(dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
    # At most two key heads, shared by at most four queries each as they were by more.
    heads = config.num_attention_heads
    key_head_names = [
        name
        for name in ("num_key_value_heads", "num_kv_heads")
        if isinstance(getattr(config, name, None), int)
    ]
    key_heads = min((getattr(config, name) for name in key_head_names), default=heads)
    new_keys = min(key_heads, 2)
    if (new_heads := new_keys * min(heads // key_heads, 4)) < heads:
        for name in WIDTHS:
            if isinstance(value := getattr(config, name, None), int):
                put(name, value * new_heads // heads)
        for name, count in {
            "num_attention_heads": new_heads,
            **dict.fromkeys(key_head_names, new_keys),
        }.items():
            put(name, count)
        cuts.append(f"{new_heads} of {heads} heads and their share of the width")
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    if experts > (active := 2 * getattr(config, "num_experts_per_tok", experts)):
        put("num_local_experts" if hasattr(config, "num_local_experts") else "num_experts", active)
        cuts.append(f"{active} of {experts} experts")
    settings.pop("quantization_config", None)
    return type(config).from_dict(settings), cuts


# The examination of one model, and its output.


@dataclass(frozen=True)
class Examination:
    """The result of an examination.

    Attributes:
        about: lines on the model.
        sites: role → (modules, number of sites, shapes, units).
        findings: one per check.
    """

    about: tuple[str, ...]
    sites: dict[str, tuple[str, int, str, str]]
    findings: tuple[Finding, ...]

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_passed is False]

    def lines(self) -> Iterator[str]:
        """The tables, as text."""
        yield from self.about
        yield ""
        width = max(len(modules) for modules, *_ in self.sites.values())
        yield f"{'role':9} {'modules':{width}} {'sites':>5}  {'out x in':>15}  units"
        for role, (modules, count, shape, units) in self.sites.items():
            yield f"{role:9} {modules:{width}} {count:5}  {shape:>15}  {units}"
        yield ""
        yield f"{'check':50} {'':4} {'figure':>9} {'limit':>6} {'time':>7}"
        for f in self.findings:
            figure, limit = ("-" if x is None else f"{x:.2g}" for x in (f.value, f.limit))
            verdict = {True: "pass", False: "FAIL", None: ""}[f.is_passed]
            yield f"{f.name:50} {verdict:4} {figure:>9} {limit:>6} {f.seconds:5.1f} s  {f.note}".rstrip()


def examine(name: str, *, dtype: str = "auto", device: str = "auto", progress: bool = False) -> Examination:
    """Examine a hub id, a folder, a config.json without weights, or "demo".

    Args:
        progress: show how many checks are finished.

    Raises:
        UserError: a missing or inaccessible model or device.
        UnsupportedModel: an architecture or a module without a rule, which is named.
    """
    return examine_specimen(load_specimen(name, dtype=dtype, device=device), progress=progress)


CHECKS = 9


def examine_specimen(specimen: Specimen, *, progress: bool = False) -> Examination:
    """Examine a model in memory, and leave it as it was."""
    model, ids = specimen.model, [sequence[: context_length(specimen.model)] for sequence in specimen.ids]
    with lrp_rules(model):  # refuses unknown modules before anything is computed
        pass
    size = f"{model.num_parameters():,} parameters"
    description = (
        f"{model_id(model)}: {model.config.model_type} ({type(model).__name__}), {size}, "
        f"{dtype_name(model.dtype)} on {device_of(model)}, attention "
        f"{model.config._attn_implementation or 'its own'}"
    )
    with Progress(CHECKS, "examining", "check", show=progress) as progress_bar:
        findings = tuple(progress_bar.each(run_checks(model, ids)))
    return Examination((description, *specimen.notes), _count_sites(model), findings)


def _count_sites(model: "PreTrainedModel") -> dict[str, tuple[str, int, str, str]]:
    rows = {}
    for role in sorted(family_of(model).roles, key=ROLES.index):
        sites = sites_of(model, (role,))
        modules = sites[0].name.replace(".0.", ".*.", 1).replace("#0", "#*")
        shapes = sorted({f"{site.out} x {site.inp}" for site in sites})
        units = [f"{sum(site.out * site.inp for site in sites):,} weights"]
        if role == "mlp.up":
            units.insert(0, f"{sum(site.out for site in sites):,} neurons")
        elif role == "attn.o":
            units.insert(0, f"{sum(site.heads for site in sites):,} heads")
        rows[role] = (modules, len(sites), ", ".join(shapes), ", ".join(units))
    return rows
