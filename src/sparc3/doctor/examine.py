"""`examine`: a model in, what was found out. Examined is a model with its weights, or, of a configuration
alone, a model of that architecture with random ones."""

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
from .checks import Finding, run_checks, spelt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What is installed here, and what can be reached.


NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface_hub", "numpy")

EXTRAS = {
    "accelerate": "spreads one model over GPUs and the CPU, --device map",
    "lm_eval": "runs the language model evaluation harness",
    "bitsandbytes": "loads 4-bit and 8-bit weights",
    "torchao": "loads weights that torchao quantised",
}
"""Packages that sparc3 works without → what each adds."""


def list_environment() -> list[tuple[str, str]]:
    """(what, state): versions, GPUs, the hub, optional packages. Never raises."""
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
    except Exception as error:  # whatever the client raises, the answer is the same
        return (
            f"{constants.ENDPOINT} does not answer ({type(error).__name__}); "
            "folders, the local cache and the demo work"
        )
    return f"{constants.ENDPOINT} answers"


# What is examined.


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
        return path.suffix.lower() == ".gguf" or is_gguf(path)
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
    words.

    Matrices have a spectral size of about one, biases and gains are away from 0 and 1, so that every
    parameter matters.
    """
    with torch.device("meta"):
        whole = sum(parameter.numel() for parameter in build_model(config).parameters())
    smaller, cuts = (config, []) if whole <= LARGE else shrink_config(config)
    model, generator = build_model(smaller).float(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    kept = sum(parameter.numel() for parameter in model.parameters())
    if not cuts:
        return model, f"random weights: there are none here, only a configuration ({kept:,} parameters)"
    said = f"{', '.join(cuts)}; {kept:,} of {whole:,} parameters"
    return model, f"random weights, and smaller than the configuration: {said}"


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

    depth = config.num_hidden_layers
    by_layer = {
        name: value
        for name, value in settings.items()
        if isinstance(value, list) and len(value) == depth and not isinstance(value[0], list)
    }
    kinds = [tuple(map(str, kind)) for kind in zip(*by_layer.values(), strict=True)]
    layers = min(depth, max([2, *(kinds.index(kind) + 1 for kind in kinds)]))
    settings.update({name: value[:layers] for name, value in by_layer.items()})
    if "attention_types" in settings:  # GPT-Neo's own way to write the list of layers
        settings["attention_types"] = [[settings["attention_layers"][:layers], 1]]
    put("num_hidden_layers", layers)
    cuts.append(f"{layers} of {depth} layers")
    if config.vocab_size > 1000:
        put("vocab_size", 1000)
        cuts.append(f"1,000 of {config.vocab_size:,} tokens")
        settings.update(dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
    # At most two key heads, shared by at most four queries each as they were by more.
    heads = config.num_attention_heads
    shared = [
        name
        for name in ("num_key_value_heads", "num_kv_heads")
        if isinstance(getattr(config, name, None), int)
    ]
    keys = min((getattr(config, name) for name in shared), default=heads)
    few = min(keys, 2)
    if (fewer := few * min(heads // keys, 4)) < heads:
        for name in WIDTHS:
            if isinstance(value := getattr(config, name, None), int):
                put(name, value * fewer // heads)
        for name, count in {"num_attention_heads": fewer, **dict.fromkeys(shared, few)}.items():
            put(name, count)
        cuts.append(f"{fewer} of {heads} heads and their share of the width")
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    if experts > (active := 2 * getattr(config, "num_experts_per_tok", experts)):
        put("num_local_experts" if hasattr(config, "num_local_experts") else "num_experts", active)
        cuts.append(f"{active} of {experts} experts")
    settings.pop("quantization_config", None)
    return type(config).from_dict(settings), cuts


# The whole examination of one model, and how it reads.


@dataclass(frozen=True)
class Examination:
    """What was examined and found.

    Attributes:
        about: the model, a line each.
        sites: role → (modules, number of sites, shapes, units).
        findings: one a check.
    """

    about: tuple[str, ...]
    sites: dict[str, tuple[str, int, str, str]]
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.passed is False]

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
            verdict = {True: "pass", False: "FAIL", None: ""}[f.passed]
            yield f"{f.name:50} {verdict:4} {figure:>9} {limit:>6} {f.seconds:5.1f} s  {f.note}".rstrip()


def examine(name: str, *, dtype: str = "auto", device: str = "auto", progress: bool = False) -> Examination:
    """Examine a hub id, a folder, a config.json alone, or "demo".

    Args:
        progress: show how many checks are done.

    Raises:
        UserError: no such model, no access to it, no such device.
        UnsupportedModel: an architecture or a module that no rule is known for, by name.
    """
    return examine_specimen(load_specimen(name, dtype=dtype, device=device), progress=progress)


CHECKS = 9


def examine_specimen(of: Specimen, *, progress: bool = False) -> Examination:
    """Examine a model at hand. It is left as it was."""
    model, ids = of.model, [one[: context_length(of.model)] for one in of.ids]
    with lrp_rules(model):  # refuses what it does not know, before anything is computed
        pass
    size = f"{model.num_parameters():,} parameters"
    about = (
        f"{model_id(model)}: {model.config.model_type} ({type(model).__name__}), {size}, "
        f"{spelt(model.dtype)} on {device_of(model)}, attention "
        f"{model.config._attn_implementation or 'its own'}"
    )
    with Progress(CHECKS, "examining", "check", show=progress) as shown:
        findings = tuple(shown.each(run_checks(model, ids)))
    return Examination((about, *of.notes), _count_sites(model), findings)


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
