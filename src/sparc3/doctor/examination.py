"""The whole examination of one model, and how it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..attribution.patching import lrp_rules
from ..errors import Sparc3Error, UnsupportedModel
from ..models import context_length, model_id, sites_of
from ..offloading import device_of, named_values
from . import checks
from .exact import exact_copy
from .findings import Finding
from .second_opinion import flows
from .specimen import Specimen, specimen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    return examination(specimen(name, dtype=dtype, device=device))


def examination(of: Specimen) -> Examination:
    """Examine a model at hand. It is left as it was."""
    model, ids = of.model, [one[: context_length(of.model)] for one in of.ids]
    with lrp_rules(model):  # refuses what it does not know, before anything is computed
        pass
    return Examination((*_about(model), *of.notes), _sites(model), tuple(_findings(model, ids)))


def _findings(model: "PreTrainedModel", ids: list[list[int]]) -> Iterator[Finding]:
    # First what looks at the model itself, then what needs a copy, so that the two are not in memory longer than needed.
    yield _tried("forward values are the same under the rules", partial(checks.forward_unchanged, model, ids))
    yield _tried("the model is restored bit for bit", partial(checks.restored, model, ids))
    exact = exact_copy(model)
    yield _tried("CP-LRP's ledger adds up to the logit", partial(checks.ledger_balances, exact, ids))
    seen = flows(exact, ids[0], sites_of(exact, checks.roles_of(exact)))
    yield _tried("AttnLRP equals its rules on torch's functions", partial(checks.attnlrp_agrees, exact, ids, seen))
    yield _tried("a batch gives what its samples give", partial(checks.batched_is_single, exact, ids))
    for dtype in (torch.bfloat16, torch.float16):
        yield _tried(f"relevance is finite in {checks.spelt(dtype)}", partial(checks.low_precision, model, exact, ids, dtype))
    yield checks.first_position(exact, ids, seen)
    yield checks.largest_activation(model, ids)


def _tried(name: str, check: Callable[[], Finding]) -> Finding:
    """A check that cannot be made is one that fails, and says why."""
    try:
        return check()
    except UnsupportedModel:
        raise
    except Sparc3Error as error:
        return Finding(name, None, 0.0, str(error))


def _about(model: "PreTrainedModel") -> list[str]:
    parameters = sum(value.numel() for _, value in named_values(model))
    return [
        f"{model_id(model)}: {model.config.model_type} ({type(model).__name__}), {parameters:,} parameters, "
        f"{checks.spelt(model.dtype)} on {device_of(model)}, attention {model.config._attn_implementation or 'its own'}"
    ]


def _sites(model: "PreTrainedModel") -> dict[str, tuple[str, int, str, str]]:
    rows = {}
    for role in checks.roles_of(model):
        sites = sites_of(model, (role,))
        first = sites[0]
        modules = first.name.replace(".0.", ".*.", 1).replace("#0", "#*")
        shapes = sorted({f"{site.out} x {site.inp}" for site in sites})
        units = {"mlp.up": f"{sum(site.out for site in sites):,} neurons", "attn.o": f"{sum(site.heads for site in sites):,} heads"}
        weights = f"{sum(site.out * site.inp for site in sites):,} weights"
        rows[role] = (modules, len(sites), ", ".join(shapes), ", ".join([*([units[role]] if role in units else []), weights]))
    return rows
