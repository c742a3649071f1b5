"""The checks: each tests one promise and measures how well it is kept. The relevance ledger shows where
the relevance of a target logit ends up."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attribution.attribute import attribute
from ..attribution.patching import freeze, lrp_rules
from ..attribution.relevance import checkpoint_layers, target_of
from ..circuits.ablate import ablated
from ..circuits.circuit import Circuit
from ..errors import NonFinite, Sparc3Error, UnsupportedModel
from ..models.fingerprint import describe
from ..models.offloading import copy_model, device_of, is_offloaded, named_values, value_of
from ..models.sites import family_of, layers_of, sites_of
from ..samples.batches import Encoded, make_batch
from .second_opinion import Flow, all_sites, exact_copy, is_quantised, record_flows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Finding:
    """What one check measured.

    Attributes:
        name: what was checked.
        value: the figure; None without one.
        limit: the largest figure that passes; None if the finding is only for information.
        note: additional information.
        seconds: duration, including the copy of the model for the first check that needs one.
    """

    name: str
    value: float | None
    limit: float | None = None
    note: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def is_passed(self) -> bool | None:
        """Whether the check passed; None for information. A NaN, or no figure at all, does not pass."""
        if self.limit is None:
            return None
        return self.value is not None and self.value <= self.limit


LIMITS = {torch.float64: (1e-6, 1e-5, 1e-5), torch.float32: (1e-3, 1e-2, 1e-3)}
"""dtype of the copy → limits for the ledger's gap, AttnLRP's difference and a batch's difference. Scores
themselves are float32."""

COARSE = (0.2, 0.2, 0.2)
"""The same if only 16 bits or quantised weights fit into memory."""

Ids = list[list[int]]
Figure = tuple[float | None, float | None, str]
"""Result of a check: value, limit and note, as in `Finding`."""


def run_checks(model: "PreTrainedModel", ids: Ids) -> Iterator[Finding]:
    """Each check's finding, as soon as it is available; a check that raises an error fails with its
    message."""
    start = time.perf_counter()

    def check(name: str, measure: Callable[..., Figure], *arguments: Any) -> Finding:
        nonlocal start
        try:
            figure = measure(*arguments)
        except UnsupportedModel:
            raise
        except Sparc3Error as error:
            figure = None, 0.0, str(error)
        previous, start = start, time.perf_counter()
        return Finding(name, *figure, seconds=start - previous)

    # Checks of the model itself come first, so that model and copy are in memory together only as long as
    # needed.
    yield check("forward values are the same under the rules", forward_unchanged, model, ids)
    yield check("the model is restored bit for bit", model_is_restored, model, ids)
    exact = exact_copy(model)
    yield check("CP-LRP's ledger adds up to the logit", ledger_balances, exact, ids)
    recorded = record_flows(exact, ids[0], all_sites(exact))
    yield check("AttnLRP equals its rules on torch's functions", attnlrp_agrees, exact, ids, recorded)
    yield check("a batch gives what its samples give", batched_is_single, exact, ids)
    # A CPU takes five to ten times as long in 16 bits, and the first text is enough to show an overflow.
    for dtype in (torch.bfloat16, torch.float16):
        yield check(
            f"relevance is finite in {dtype_name(dtype)}", low_precision, model, exact, ids[:1], dtype
        )
    yield check("share of neurons' relevance at the first position", first_position, exact, ids, recorded)
    yield check("largest activation, in medians", largest_activation, model, ids)


def forward_unchanged(model: "PreTrainedModel", ids: Ids) -> Figure:
    """The rules change only gradients; forward values of experts and fused attention may be rounded
    differently."""
    batch, worst = torch.tensor(ids[:1], device=device_of(model)), 0.0
    with torch.no_grad():
        without_rules = model(batch, use_cache=False).logits
        for cp in (False, True):
            with lrp_rules(model, cp=cp):
                with_rules = model(batch, use_cache=False).logits
            worst = max(worst, float((with_rules - without_rules).abs().max() / without_rules.abs().max()))
    may_differ = family_of(model).experts or model.config._attn_implementation not in ("sdpa", "eager", None)
    return worst, _limits(model)[2] if may_differ else 0.0, "largest difference of a logit"


def model_is_restored(model: "PreTrainedModel", ids: Ids) -> Figure:
    """Values, flags, hooks and attributes of every module are the same after attribution and an ablation."""
    before = _state(model)
    attribute(model, ids[:1], neuron="signed", non_finite="skip" if model.dtype == torch.float16 else "error")
    if not is_quantised(model):
        members = {site.name: (0, site.out - 1) for site in sites_of(model, ("mlp.up",))}
        with ablated(model, Circuit("neuron", members, describe(model), {})), torch.no_grad():
            model(torch.tensor(ids[:1], device=device_of(model)), use_cache=False)
    after = _state(model)
    differing = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    note = f"changed: {min(differing)}" if differing else "parameters, buffers, attributes, hooks"
    return float(len(differing)), 0.0, note


def _state(model: "PreTrainedModel") -> dict[str, Any]:
    """The state of a model. Objects are compared by address, and kept alive here, so that no new object
    can get the same address."""
    state: dict[str, Any] = {"config": (id(model.config), model.config, model.config._attn_implementation)}
    for name, tensor in [*named_values(model), *model.named_buffers()]:
        state[f"{name} (value)"] = _digest(tensor)
    for name, tensor in model.named_parameters():
        state[f"{name} (flag)"] = tensor.requires_grad
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            key_of_attribute = f"{name or 'the model'} (attribute {key})"
            hooks = tuple(value) if "hook" in key and isinstance(value, dict) else ()
            state[key_of_attribute] = (id(value), hooks, value)
    return state


def _digest(tensor: Tensor) -> str:
    if hasattr(tensor, "__tensor_flatten__"):
        return "".join(_digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def ledger_balances(exact: "PreTrainedModel", ids: Ids) -> Figure:
    """In CP mode relevance is conserved: embeddings, positions and biases add up to the target logit."""
    ledgers = [relevance_ledger(exact, sequence) for sequence in ids]
    gaps = [
        abs(ledger.target - ledger.embeddings - ledger.positions - ledger.biases)
        / max(abs(ledger.target), 1e-300)
        for ledger in ledgers
    ]
    first = ledgers[0]
    parts = f"{first.embeddings:.4g} + positions {first.positions:.4g} + biases {first.biases:.4g}"
    return max(gaps), _limits(exact)[0], f"logit {first.target:.4g} = embeddings {parts}"


def attnlrp_agrees(exact: "PreTrainedModel", ids: Ids, recorded: Mapping[str, Flow]) -> Figure:
    """Signed relevance of all sites' outputs and of heads agrees with `second_opinion` on the first
    sequence."""
    sites = all_sites(exact)
    neurons = attribute(exact, ids[:1], neuron="signed", sites=tuple(family_of(exact).roles))
    heads = attribute(exact, ids[:1], unit="head", sites=("attn.o",))
    head_relevance = {
        site.name: recorded[site.name].heads(site.heads) for site in sites if site.role == "attn.o"
    }
    worst = max(
        distance(neurons, {site.name: recorded[site.name].signed_relevance for site in sites}),
        distance(heads, head_relevance),
    )
    return worst, _limits(exact)[1], "neurons of all sites, heads"


def batched_is_single(exact: "PreTrainedModel", ids: Ids) -> Figure:
    """Padding and batching do not change relevance."""
    one_by_one, batched = (
        attribute(exact, ids, neuron="signed", sites=tuple(family_of(exact).roles), batch_tokens=tokens)
        for tokens in (1, 10**6)
    )
    return distance(batched, one_by_one), _limits(exact)[2], f"{len(ids)} samples of unequal length"


def _relevance(model: "PreTrainedModel", ids: Ids) -> dict[str, Tensor]:
    """Signed relevance of all sites' outputs. Attention is included, because its overflow reaches no
    neuron in the first layer. Raises NonFinite."""
    return dict(attribute(model, ids, neuron="signed", sites=tuple(family_of(model).roles), target="next"))


def low_precision(model: "PreTrainedModel", exact: "PreTrainedModel", ids: Ids, dtype: torch.dtype) -> Figure:
    """Relevance is finite in 16 bits; the note says how far that of neurons is from the exact copy's,
    including the rounding of weights."""
    if model.dtype != dtype and is_quantised(model):
        return None, None, "not tried: quantised weights keep the dtype in which they were loaded"
    low_model = model if model.dtype == dtype else copy_model(model).to(dtype)
    limit = 0.0 if dtype == torch.bfloat16 else None
    try:
        scores = [_relevance(each, ids) for each in (low_model, exact)]
    except NonFinite as error:
        return 1.0, limit, str(error)
    names = [site.name for site in sites_of(model, ("mlp.up",))]
    actual, expected = ({name: values[name] for name in names} for values in scores)
    sizes = [torch.cat([value.abs().cpu() for value in values.values()]) for values in (actual, expected)]
    count = max(1, round(0.05 * len(sizes[0])))
    strongest = [set(values.topk(count).indices.tolist()) for values in sizes]
    common = len(strongest[0] & strongest[1]) / count
    gap = f"{distance(actual, expected):.2g} from {dtype_name(exact.dtype)}"
    return 0.0, limit, f"{gap}; {common:.0%} of the strongest 5 % of neurons in common"


def first_position(exact: "PreTrainedModel", ids: Ids, recorded: Mapping[str, Flow]) -> Figure:
    """The share of all relevance (absolute, by position) at the first position; for information."""
    up_flows = [recorded[site.name] for site in sites_of(exact, ("mlp.up",))]
    neurons = torch.stack([(flow.of_z * flow.z).abs().sum(1).cpu() for flow in up_flows]).sum(0)
    tokens = relevance_ledger(exact, ids[0], cp=False).tokens.abs()
    share = float(tokens[0] / tokens.sum())
    note = f"of the input tokens' relevance {share:.2g}; an even share is {1 / len(tokens):.2g}"
    return float(neurons[0] / neurons.sum()), None, note


def largest_activation(model: "PreTrainedModel", ids: Ids) -> Figure:
    """Massive activations (Sun et al. 2024): the largest entry of the residual stream as a multiple of its
    median; for information."""
    ratios: list[tuple[float, int, int]] = []

    def measure(_: nn.Module, args: Any, output: Any) -> None:
        sizes = (output[0] if isinstance(output, tuple) else output)[0].float().abs()
        ratio = float(sizes.max() / sizes.median().clamp(min=1e-30))
        ratios.append((ratio, len(ratios), int(sizes.amax(-1).argmax())))

    with ExitStack() as stack, torch.no_grad():
        for layer in layers_of(model):
            stack.callback(layer.register_forward_hook(measure).remove)
        model(torch.tensor(ids[:1], device=device_of(model)), use_cache=False)
    ratio, index, position = max(ratios)
    return ratio, None, f"after layer {index}, at position {position}"


def distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest ‖actual − expected‖ / ‖expected‖ of all sites."""
    pairs = [(actual[site].double().cpu(), value.double().cpu()) for site, value in expected.items()]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs)


def _limits(exact: "PreTrainedModel") -> tuple[float, float, float]:
    return COARSE if is_quantised(exact) else LIMITS.get(exact.dtype, COARSE)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Ledger:
    """Relevance of the largest logit at the last position, by the part of the model where it ends up.

    Attributes:
        target: the logit.
        tokens: relevance of each input token's embedding [T], float64, on the CPU.
        positions: relevance of all learned position embeddings; 0 without them.
        biases: relevance of all biases.
    """

    target: float
    tokens: Tensor
    positions: float
    biases: float

    @property
    def embeddings(self) -> float:
        return float(self.tokens.sum())

    @property
    def gap(self) -> float:
        """|target − sum of the parts|, relative to the larger of |target| and Σ |part|, so that parts
        which cancel do not inflate it."""
        parts = (self.embeddings, self.positions, self.biases)
        return abs(self.target - sum(parts)) / max(abs(self.target), sum(map(abs, parts)), 1e-300)


def relevance_ledger(model: "PreTrainedModel", ids: Sequence[int], *, cp: bool = True) -> Ledger:
    """The ledger of one sequence of token ids.

    CP mode conserves relevance, so the parts must add up to the logit. AttnLRP (cp=False) loses relevance
    in the softmax and need not balance; its `tokens` are the usual input heatmap.

    Raises:
        UnsupportedModel: a module without a rule.
    """
    batch = make_batch([Encoded(0, tuple(ids), (len(ids) - 1,))], device_of(model))
    parts = {part: torch.zeros(1, dtype=torch.float64) for part in ("tokens", "positions", "biases")}
    checkpointing = checkpoint_layers(model) if is_offloaded(model) else nullcontext()
    with freeze(model), lrp_rules(model, cp=cp), checkpointing, _record_relevance(model, parts):
        y = target_of(model, batch)
        y.backward()
    return Ledger(float(y.detach()), parts["tokens"], float(parts["positions"].sum()), float(parts["biases"]))


@contextmanager
def _record_relevance(model: "PreTrainedModel", parts: dict[str, Tensor]) -> Iterator[None]:
    """Inside, hooks on the embeddings, where the graph then starts, and on every module with a bias add their
    relevance to `parts`."""
    inputs: dict[nn.Module, str] = {model.get_input_embeddings(): "tokens"}
    if (positions := family_of(model).positions) is not None:
        inputs[model.get_submodule(positions)] = "positions"

    def add(part: str, grad: Tensor | None, value: Tensor) -> None:
        if grad is not None:  # None for queries, keys and gates in CP mode
            relevance = grad.double() * value.detach().to(grad.device).double()
            flow = relevance.sum().reshape(1) if part == "biases" else relevance.sum(-1).sum(0)
            parts[part] = parts[part] + flow.cpu()

    def watch_input(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        value = output.detach().requires_grad_()
        value.register_hook(lambda grad: add(inputs[module], grad, value))
        return value

    def watch_bias(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: add("biases", grad, value_of(module, "bias")))

    with ExitStack() as stack:
        for module in model.modules():
            if module in inputs:
                stack.callback(module.register_forward_hook(watch_input).remove)
            elif module._parameters.get("bias") is not None:
                stack.callback(module.register_forward_hook(watch_bias).remove)
        yield
