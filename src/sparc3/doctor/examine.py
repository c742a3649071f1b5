"""One line of the doctor's table."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from .. import __version__
from ..attribution.patching import lrp_rules
from ..errors import Sparc3Error, UnsupportedModel, UserError
from ..models.fingerprint import model_id
from ..models.hub import require_hub
from ..models.load import context_length
from ..models.offloading import device_of, named_values
from ..models.sites import sites_of
from . import checks
from .checks import Finding
from .second_opinion import exact_copy, flows
from .specimen import Specimen, load_specimen

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
    import torch

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
        yield f"{'check':50} {'':4} {'figure':>9} {'limit':>6}"
        for f in self.findings:
            figure, limit = ("-" if x is None else f"{x:.2g}" for x in (f.value, f.limit))
            yield f"{f.name:50} {f.verdict:4} {figure:>9} {limit:>6}  {f.note}".rstrip()


def examine(name: str, *, dtype: str = "auto", device: str = "auto") -> Examination:
    """Examine a hub id, a folder, a config.json alone, or "demo".

    Raises:
        UserError: no such model, no access to it, no such device.
        UnsupportedModel: an architecture or a module that no rule is known for, by name.
    """
    return examine_specimen(load_specimen(name, dtype=dtype, device=device))


def examine_specimen(of: Specimen) -> Examination:
    """Examine a model at hand. It is left as it was."""
    model, ids = of.model, [one[: context_length(of.model)] for one in of.ids]
    with lrp_rules(model):  # refuses what it does not know, before anything is computed
        pass
    return Examination(
        (*_describe_model(model), *of.notes), _count_sites(model), tuple(_run_checks(model, ids))
    )


def _run_checks(model: "PreTrainedModel", ids: list[list[int]]) -> Iterator[Finding]:
    # First what looks at the model itself, then what needs a copy, so that the two are not in memory longer
    # than needed.
    yield _try_check(
        "forward values are the same under the rules", partial(checks.forward_unchanged, model, ids)
    )
    yield _try_check("the model is restored bit for bit", partial(checks.restored, model, ids))
    exact = exact_copy(model)
    yield _try_check("CP-LRP's ledger adds up to the logit", partial(checks.ledger_balances, exact, ids))
    seen = flows(exact, ids[0], sites_of(exact, checks.roles_of(exact)))
    yield _try_check(
        "AttnLRP equals its rules on torch's functions", partial(checks.attnlrp_agrees, exact, ids, seen)
    )
    yield _try_check("a batch gives what its samples give", partial(checks.batched_is_single, exact, ids))
    for dtype in (torch.bfloat16, torch.float16):
        yield _try_check(
            f"relevance is finite in {checks.spelt(dtype)}",
            partial(checks.low_precision, model, exact, ids, dtype),
        )
    yield checks.first_position(exact, ids, seen)
    yield checks.largest_activation(model, ids)


def _try_check(name: str, check: Callable[[], Finding]) -> Finding:
    """A check that cannot be made is one that fails, and says why."""
    try:
        return check()
    except UnsupportedModel:
        raise
    except Sparc3Error as error:
        return Finding(name, None, 0.0, str(error))


def _describe_model(model: "PreTrainedModel") -> list[str]:
    parameters = sum(value.numel() for _, value in named_values(model))
    return [
        f"{model_id(model)}: {model.config.model_type} ({type(model).__name__}), {parameters:,} parameters, "
        f"{checks.spelt(model.dtype)} on {device_of(model)}, attention "
        f"{model.config._attn_implementation or 'its own'}"
    ]


def _count_sites(model: "PreTrainedModel") -> dict[str, tuple[str, int, str, str]]:
    rows = {}
    for role in checks.roles_of(model):
        sites = sites_of(model, (role,))
        first = sites[0]
        modules = first.name.replace(".0.", ".*.", 1).replace("#0", "#*")
        shapes = sorted({f"{site.out} x {site.inp}" for site in sites})
        units = {
            "mlp.up": f"{sum(site.out for site in sites):,} neurons",
            "attn.o": f"{sum(site.heads for site in sites):,} heads",
        }
        weights = f"{sum(site.out * site.inp for site in sites):,} weights"
        rows[role] = (
            modules,
            len(sites),
            ", ".join(shapes),
            ", ".join([*([units[role]] if role in units else []), weights]),
        )
    return rows
