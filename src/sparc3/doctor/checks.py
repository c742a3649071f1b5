"""The checks: each looks at one promise and says by how much it is kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attribution.attribute import attribute
from ..attribution.patching import lrp_rules
from ..circuits.ablate import ablated
from ..circuits.circuit import Circuit
from ..errors import NonFinite
from ..models.families import ROLES
from ..models.fingerprint import describe
from ..models.offloading import copy_model, device_of, named_values
from ..models.sites import family_of, layers_of, sites_of
from .completeness import relevance_ledger
from .second_opinion import Flow, quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Finding:
    """What one check measured.

    Attributes:
        name: what was looked at.
        value: the figure; None where there is none.
        limit: the largest figure that passes; None where the finding is for information only.
        note: anything to add.
    """

    name: str
    value: float | None
    limit: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the check passed; None for information. A NaN, or no figure at all, does not pass."""
        if self.limit is None:
            return None
        return self.value is not None and self.value <= self.limit

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: ""}[self.passed]


LIMITS = {torch.float64: (1e-6, 1e-5, 1e-5), torch.float32: (1e-3, 1e-2, 1e-3)}
"""dtype of the copy → largest gap of the ledger, difference of AttnLRP, difference of a batch. Scores
themselves are float32."""

COARSE = (0.2, 0.2, 0.2)
"""The same where nothing better than 16 bits or quantised weights fits into memory."""

Ids = list[list[int]]


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """‖found − wanted‖ / ‖wanted‖ over all sites, the largest."""
    pairs = [(found[site].double().cpu(), value.double().cpu()) for site, value in wanted.items()]
    return max(float((one - other).norm() / other.norm().clamp(min=1e-300)) for one, other in pairs)


def roles_of(model: "PreTrainedModel") -> tuple[str, ...]:
    return tuple(role for role in ROLES if role in family_of(model).roles)


def ledger_balances(exact: "PreTrainedModel", ids: Ids) -> Finding:
    """In CP mode nothing is lost: embeddings, positions and biases together get the target logit."""
    gaps, parts = [], ""
    for one in ids:
        book = relevance_ledger(exact, one)
        total = book.embeddings + book.positions + book.biases
        gaps.append(abs(book.target - total) / max(abs(book.target), 1e-300))
        parts = (
            parts
            or f"logit {book.target:.4g} = embeddings {book.embeddings:.4g} + positions {book.positions:.4g} "
            f"+ biases {book.biases:.4g}"
        )
    return Finding("CP-LRP's ledger adds up to the logit", max(gaps), _limits(exact)[0], parts)


def attnlrp_agrees(exact: "PreTrainedModel", ids: Ids, seen: Mapping[str, Flow]) -> Finding:
    """Signed relevance of the outputs of all sites, and that of heads, against `second_opinion` on the first
    sequence."""
    sites = sites_of(exact, roles_of(exact))
    neurons = attribute(exact, ids[:1], neuron="signed", sites=roles_of(exact))
    heads = attribute(exact, ids[:1], unit="head", sites=("attn.o",))
    worst = distance(neurons, {site.name: seen[site.name].signed for site in sites})
    of_heads = {site.name: seen[site.name].heads(site.heads) for site in sites if site.role == "attn.o"}
    worst = max(worst, distance(heads, of_heads))
    return Finding(
        "AttnLRP equals its rules on torch's functions",
        worst,
        _limits(exact)[1],
        "neurons of all sites, heads",
    )


def batched_is_single(exact: "PreTrainedModel", ids: Ids) -> Finding:
    """Padding and batches change nothing."""
    alone, together = (
        attribute(exact, ids, neuron="signed", sites=roles_of(exact), batch_tokens=tokens)
        for tokens in (1, 10**6)
    )
    return Finding(
        "a batch gives what its samples give",
        distance(together, alone),
        _limits(exact)[2],
        f"{len(ids)} samples of unequal length",
    )


def forward_unchanged(model: "PreTrainedModel", ids: Ids) -> Finding:
    """The rules change what flows back, and nothing else; experts and fused attention may be rounded
    otherwise."""
    batch = torch.tensor(ids[:1], device=device_of(model))
    with torch.no_grad():
        plain = model(batch, use_cache=False).logits
        worst = 0.0
        for cp in (False, True):
            with lrp_rules(model, cp=cp):
                worst = max(
                    worst,
                    float((model(batch, use_cache=False).logits - plain).abs().max() / plain.abs().max()),
                )
    rounded = family_of(model).experts or model.config._attn_implementation not in ("sdpa", "eager", None)
    limit = _limits(model)[2] if rounded else 0.0
    return Finding(
        "forward values are the same under the rules", worst, limit, "largest difference of a logit"
    )


def restored(model: "PreTrainedModel", ids: Ids) -> Finding:
    """Values, flags, hooks and attributes of every module, before and after attribution and an ablation."""
    before = _state(model)
    attribute(model, ids[:1], neuron="signed", non_finite="skip" if model.dtype == torch.float16 else "error")
    if not quantised(model):
        members = {site.name: (0, site.out - 1) for site in sites_of(model, ("mlp.up",))}
        with ablated(model, Circuit("neuron", members, describe(model), {})), torch.no_grad():
            model(torch.tensor(ids[:1], device=device_of(model)), use_cache=False)
    after = _state(model)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    note = f"changed: {min(changed)}" if changed else "parameters, buffers, attributes, hooks"
    return Finding("the model is restored bit for bit", float(len(changed)), 0.0, note)


def _state(model: "PreTrainedModel") -> dict[str, Any]:
    found: dict[str, Any] = {"config": (_Same(model.config), model.config._attn_implementation)}
    for name, tensor in [*named_values(model), *model.named_buffers()]:
        found[f"{name} (value)"] = _digest(tensor)
    for name, tensor in model.named_parameters():
        found[f"{name} (flag)"] = tensor.requires_grad
    for name, module in model.named_modules():
        hooks = {
            key: tuple(value)
            for key, value in module.__dict__.items()
            if "hook" in key and isinstance(value, dict)
        }
        found[f"{name or 'the model'} (attributes)"] = (
            {key: _Same(value) for key, value in module.__dict__.items()},
            hooks,
        )
    return found


class _Same:
    """Equal to itself alone; held on to, so that nothing new can take its address."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _digest(tensor: Tensor) -> str:
    if hasattr(tensor, "__tensor_flatten__"):
        return "".join(_digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return hashlib.blake2b(
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, digest_size=16
    ).hexdigest()


def low_precision(
    model: "PreTrainedModel", exact: "PreTrainedModel", ids: Ids, dtype: torch.dtype
) -> Finding:
    """Whether relevance is finite in 16 bits, and how far it is from what the exact copy gives (rounded
    weights included)."""
    low = model if model.dtype == dtype or quantised(model) else copy_model(model).to(dtype)
    name = f"relevance is finite in {spelt(dtype)}"
    limit = 0.0 if dtype == torch.bfloat16 else None
    try:
        found, wanted = (attribute(m, ids, neuron="signed", target="next") for m in (low, exact))
        attribute(low, ids, unit="head", sites=("attn.o",), target="next")
    except NonFinite as error:
        return Finding(name, 1.0, limit, str(error))
    note = (
        f"{distance(found, wanted):.2g} from {spelt(exact.dtype)}; {_count_common(found, wanted):.0%} of the "
        "strongest 5 % of neurons in common"
    )
    return Finding(name, 0.0, limit, note)


def _count_common(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], share: float = 0.05) -> float:
    one, other = (
        torch.cat([value.flatten().abs() for value in scores.values()]) for scores in (found, wanted)
    )
    count = max(1, round(share * len(one)))
    strongest = [set(values.topk(count).indices.tolist()) for values in (one, other)]
    return len(strongest[0] & strongest[1]) / count


def first_position(exact: "PreTrainedModel", ids: Ids, seen: Mapping[str, Flow]) -> Finding:
    """How much of all relevance (absolute, by position) sits at the first position; for information."""
    tokens = relevance_ledger(exact, ids[0], cp=False).tokens.abs()
    neurons = sum(
        (seen[site.name].of_z * seen[site.name].z).abs().sum(1).cpu() for site in sites_of(exact, ("mlp.up",))
    )
    assert isinstance(neurons, Tensor)
    share = float(neurons[0] / neurons.sum())
    share = float(tokens[0] / tokens.sum())
    note = f"of the input tokens' relevance {share:.2g}; an even share is {1 / len(tokens):.2g}"
    return Finding("share of neurons' relevance at the first position", share, None, note)


def largest_activation(model: "PreTrainedModel", ids: Ids) -> Finding:
    """Massive activations (Sun et al. 2024): the largest entry of a residual stream as a multiple of the
    median; for information."""
    found: list[tuple[float, int, int]] = []

    def measure(layer: int, hidden: Tensor) -> None:
        sizes = hidden[0].float().abs()
        found.append(
            (float(sizes.max() / sizes.median().clamp(min=1e-30)), layer, int(sizes.amax(-1).argmax()))
        )

    hooks = [
        layer.register_forward_hook(
            lambda _, args, out, index=index: measure(index, out[0] if isinstance(out, tuple) else out)
        )
        for index, layer in enumerate(layers_of(model))
    ]
    try:
        with torch.no_grad():
            model(torch.tensor(ids[:1], device=device_of(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    ratio, layer, position = max(found)
    return Finding(
        "largest activation, in medians", ratio, None, f"after layer {layer}, at position {position}"
    )


def _limits(exact: "PreTrainedModel") -> tuple[float, float, float]:
    return COARSE if quantised(exact) else LIMITS.get(exact.dtype, COARSE)


def spelt(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
