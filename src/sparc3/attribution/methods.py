"""The methods, by name. A method is a function (model, batches, sites, settings, sums) that adds to sums,
batch by batch."""

import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError, unknown
from ..models.sites import Site
from ..samples.batches import OF_WORDS, Batch
from .activations import activation, wanda
from .integrated_gradients import integrated_gradients
from .relevance import cp_lrp, gim, gradient, lrp, relp, weight_times_sums
from .sums import Settings, Sums

Run = Callable[..., Generator[Batch, None, None]]


@dataclass(frozen=True)
class Method:
    """One way to score units.

    Attributes:
        name: its name in recipes and on the command line.
        run: goes through the batches and adds to the sums; None for a method that needs no samples.
        finish: (site, total, sums) → the site's scores; the only place where anything is divided.
        units: the units it can score.
        roles: the sites it can score; None for all.
        why: the reason, for messages, why it cannot score other units or sites.
        targeted: whether it explains a target logit, which the samples must then provide.
        weighs: whether its scores use the weights' values for every unit (see `needs_weight`).
        numbered: whether a number may follow its name: random:SEED, ig:STEPS.
    """

    name: str
    run: Run | None
    finish: Callable[[Site, Tensor, Sums], Tensor]
    units: tuple[str, ...]
    roles: tuple[str, ...] | None = None
    why: str = ""
    targeted: bool = False
    weighs: bool = False
    numbered: bool = False


def _mean(site: Site, total: Tensor, sums: Sums) -> Tensor:
    """Mean over samples, or over target tokens if samples can have several (docs/method.md, 2 and 5)."""
    per_token = sums.settings.target.partition(":")[0] in {"completion", "next", "logprob", *OF_WORDS}
    divisor = sums.tokens if sums.settings.reduce == "rms" else sums.targets if per_token else sums.samples
    if sums.settings.unit == "weight":
        return weight_times_sums(site, total, divisor, sums.settings.reduce)
    mean = total / divisor
    if sums.settings.reduce == "rms":
        return mean.sqrt()
    return mean.abs() if sums.settings.reduce == "abs_mean" else mean


def _wanda(site: Site, total: Tensor, sums: Sums) -> Tensor:
    """|W_ij| · ‖a_j‖₂ (Sun et al. 2024, Eq. 1); a neuron's score is the sum over its row. `total` is Σ a_j²
    over all tokens."""
    if sums.settings.unit == "weight":
        return _absolute_weight(site).mul_(total.sqrt().float())
    return site.weight.detach().to("cpu", torch.float64).abs() @ total.sqrt()


def _magnitude(site: Site, total: Tensor, sums: Sums) -> Tensor:
    """|W_ij|; Σ_j |W_ij| of a neuron; Σ |W| over the columns of attn.o that read a head."""
    if sums.settings.unit == "weight":
        return _absolute_weight(site)
    weight = site.weight.detach().to("cpu", torch.float64).abs()
    return weight.sum(1) if sums.settings.unit == "neuron" else weight.sum(0).view(site.heads, -1).sum(1)


def _absolute_weight(site: Site) -> Tensor:
    """A copy of |W| [out, in] in float32 on the CPU."""
    return site.weight.detach().to("cpu", torch.float32, copy=True).abs_()


def _random(site: Site, total: Tensor, sums: Sums) -> Tensor:
    # A seed per site, so that a site's scores do not depend on which other sites are scored; by CRC-32,
    # because Python's hash() of a string differs from process to process.
    seed = zlib.crc32(f"{sums.settings.seed}/{site.name}".encode())
    generator = torch.Generator().manual_seed(seed)
    if sums.settings.unit == "weight":
        return torch.rand(site.out, site.inp, generator=generator)
    count = site.out if sums.settings.unit == "neuron" else site.heads
    return torch.rand(count, generator=generator, dtype=torch.float64)


ALL = ("neuron", "head", "weight")
_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method under its name. Raises UserError where the name is taken."""
    if method.name in _METHODS:
        raise UserError(f"method '{method.name}' already exists; choose another name")
    _METHODS[method.name] = method


for _method in (
    Method("lrp", lrp, _mean, ALL, targeted=True),
    Method("cp-lrp", cp_lrp, _mean, ALL, targeted=True),
    Method("relp", relp, _mean, ALL, targeted=True),
    Method("gim", gim, _mean, ALL, targeted=True),
    Method("gradient", gradient, _mean, ALL, targeted=True),
    Method("ig", integrated_gradients, _mean, ALL, targeted=True, numbered=True),
    Method(
        "wanda",
        wanda,
        _wanda,
        ("neuron", "weight"),
        weighs=True,
        why="Wanda weighs a weight by its input, and a head has no weight of its own",
    ),
    Method(
        "activation",
        activation,
        lambda site, total, sums: total / sums.tokens,
        ("neuron",),
        ("mlp.up",),
        why="an activation belongs to a neuron of mlp.up",
    ),
    Method("magnitude", None, _magnitude, ALL, weighs=True),
    Method("random", None, _random, ALL, numbered=True),
):
    register(_method)


def methods() -> list[str]:
    return sorted(_METHODS)


def require_method(name: str) -> Method:
    """The method called `name`; "random:3" is random with seed 3. Raises UserError for an unknown one."""
    base, colon, number = name.partition(":")
    if base not in _METHODS or (colon and not (_METHODS[base].numbered and number.isdigit())):
        raise unknown("method", name, _METHODS)
    return _METHODS[base]


def needs_weight(method: Method, settings: Settings) -> bool:
    """Whether the scores need the values of the weights. Relevance of signed neurons and of heads does not:
    it needs activations and gradients only."""
    uses_weight = settings.unit == "weight" or (settings.unit == "neuron" and settings.neuron == "abs")
    return method.weighs or (method.targeted and uses_weight)


def settings_for(settings: Settings, roles: tuple[str, ...]) -> tuple[Method, Settings]:
    """The method, and the settings that it gets. Raises UserError for a unit, sites or options that the
    method does not support."""
    method = require_method(settings.method)
    if settings.unit not in method.units:
        why = f": {method.why}" if method.why else ""
        raise UserError(
            f"method {method.name} cannot score unit '{settings.unit}'{why}; it scores "
            f"{', '.join(method.units)}"
        )
    for role in roles:
        if settings.unit == "head" and role != "attn.o":
            raise UserError(f"heads are scored at attn.o, not at '{role}'; use --sites attn.o")
        if method.roles and role not in method.roles:
            raise UserError(
                f"method {method.name} cannot score site '{role}': {method.why}; use "
                f"{', '.join(method.roles)}"
            )
    signed = settings.unit == "neuron" and settings.neuron == "signed"
    if settings.reduce == "rms" and method.targeted and settings.unit != "weight" and not signed:
        raise UserError(
            f"reduce rms is for unit weight and for signed neurons, not for unit {settings.unit} with neuron "
            f"{settings.neuron}; use mean, mean_abs or abs_mean"
        )
    if settings.unit == "weight" and method.targeted and settings.non_finite == "skip":
        raise UserError(
            "unit weight does not support non_finite skip, because a sample cannot be removed from its "
            "running sums; use non_finite error, and leave out the sample that it names"
        )
    return method, replace(settings, seed=int(settings.method.partition(":")[2] or 0))
