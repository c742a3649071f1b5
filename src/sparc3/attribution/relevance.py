"""Relevance by (modified) gradients: `lrp`, `cp-lrp`, `relp`, `gim` and `gradient`. One forward, one backward
with respect to inputs.

No weight ever gets a gradient: a hook on each site's output gathers what it needs during the backward pass.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..errors import NonFinite
from ..models.experts import arrange_by_position, split_by_sample, tokens_of
from ..models.memory import limit_fragmentation, logits_at, return_memory
from ..models.offloading import device_of, is_offloaded
from ..models.sites import Site, layers_of, shadow
from ..samples.batches import Batch, Encoded
from . import rules
from .packing import pack_positions
from .patching import freeze, lrp_rules
from .sums import Settings, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROWS = 1536
"""Rows of W ⊙ G handled at once, a few megabytes. With fewer rows, products of short samples run at a third
of the speed."""


def lrp(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """AttnLRP (Achtibat et al. 2024)."""
    return _relevance(model, batches, sites, settings, sums, rules.ATTN_LRP)


def cp_lrp(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """CP-LRP (Ali et al. 2022): queries, keys and gates are constants."""
    return _relevance(model, batches, sites, settings, sums, rules.CP_LRP)


def relp(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """The rules of RelP (Jafari et al. 2025): queries and keys are constants, a gate has half."""
    return _relevance(model, batches, sites, settings, sums, rules.RELP)


def gim(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """Gradient interaction modifications (Edin et al. 2025)."""
    return _relevance(model, batches, sites, replace(settings, epsilon=0.0), sums, rules.GIM)


def gradient(
    model: "PreTrainedModel", batches: Iterable[Batch], sites: list[Site], settings: Settings, sums: Sums
) -> Generator[Batch, None, None]:
    """Weight × gradient, no rules."""
    return _relevance(model, batches, sites, replace(settings, epsilon=0.0), sums, None)


def _relevance(
    model: "PreTrainedModel",
    batches: Iterable[Batch],
    sites: list[Site],
    settings: Settings,
    sums: Sums,
    rule_set: rules.RuleSet | None,
) -> Generator[Batch, None, None]:
    """Add each batch's relevance to `sums`, and yield the batch when it is in."""
    with prepare_model(model, settings, rule_set):
        for batch in batches:
            gathered: dict[str, Tensor] = {}
            receive = receivers(sites, batch, settings, gathered, sums)
            with pack_positions(model, batch), hook_sites(sites, settings, receive):
                y = target_of(model, batch)
                if y.requires_grad:  # not if CP-LRP holds constant everything that the sites compute
                    y.backward()
                del y  # and with it the graph, before the next batch needs the memory
            sums.add(batch, gathered)
            yield batch


@contextmanager
def prepare_model(
    model: "PreTrainedModel", settings: Settings, rule_set: rules.RuleSet | None
) -> Iterator[None]:
    """Inside, the model is ready for backward passes under the rules, or with plain gradients for None."""
    checkpointing = settings.gradient_checkpointing
    with ExitStack() as stack:
        stack.enter_context(freeze(model))
        if rule_set:
            stack.enter_context(lrp_rules(model, rule_set=replace(rule_set, epsilon=settings.epsilon)))
        if checkpointing in (True, "offload"):
            stack.enter_context(checkpoint_layers(model, offload=checkpointing == "offload"))
        if device_of(model).type == "cpu":
            stack.enter_context(limit_fragmentation(layers_of(model)))
        yield


def target_of(model: "PreTrainedModel", batch: Batch, predicted: Tensor | None = None) -> Tensor:
    """Σ over the batch of y, the target scalar of each sample (docs/method.md, 2). Logits are computed at
    target positions only. `predicted`, from `predict`, replaces the tokens that the model predicts now."""
    return sum_targets(_target_logits(model, batch), batch.samples, predicted)


def sum_targets(logits: Tensor, samples: Sequence[Encoded], predicted: Tensor | None = None) -> Tensor:
    """Σ of the samples' y, from the logits [targets, vocabulary] at all their target positions in order."""
    if among := samples[0].among:
        mass = to_float32(logits).log_softmax(-1)[:, list(among)].logsumexp(-1)  # log Σ_v p(v)
        return (mass if samples[0].log else mass.exp()).sum()
    if samples[0].log:
        logits = to_float32(logits).log_softmax(-1)
    ranks = torch.arange(len(logits), device=logits.device)
    if samples[0].tokens is None:
        return logits[ranks, logits.detach().argmax(-1) if predicted is None else predicted].sum()
    tokens = [token for sample in samples for token in sample.tokens or ()]
    y = logits[ranks, torch.tensor(tokens, device=logits.device)].sum()
    against = [token for sample in samples for token in sample.against or ()]
    return y - logits[ranks, torch.tensor(against, device=logits.device)].sum() if against else y


@torch.no_grad()
def predict(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """The token with the largest logit at each target position, sample after sample."""
    return _target_logits(model, batch).argmax(-1)


def _target_logits(model: "PreTrainedModel", batch: Batch) -> Tensor:
    rows = [row for row, sample in enumerate(batch.samples) for _ in sample.positions]
    columns = [position for sample in batch.samples for position in sample.positions]
    return logits_at(model, batch.ids, rows, columns)


Receive = Callable[[Tensor | None, Tensor, Tensor], None]
"""Called in the backward pass with the tokens that reach a site (`tokens_of`), the modified gradient there,
and the activation to multiply it by: the site's input, or its output for signed neurons."""


@contextmanager
def hook_sites(sites: list[Site], settings: Settings, receive: Mapping[str, Receive]) -> Iterator[None]:
    """Hook the sites for one forward and backward pass; each hook calls its site's `receive`."""
    with ExitStack() as stack:
        for site in sites:
            if settings.unit == "head":
                hook = site.hook_module.register_forward_pre_hook(_watch_input(receive[site.name]))
            else:
                hook = site.hook_module.register_forward_hook(
                    _watch_output(site, settings, receive[site.name])
                )
            stack.callback(hook.remove)
        yield


def _watch_input(receive: Receive) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, args: (watch_gradient(args[0], (args[0],), partial(receive, None)), *args[1:])


def _watch_output(
    site: Site, settings: Settings, receive: Receive
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    signed = settings.unit == "neuron" and settings.neuron == "signed"

    def tell(tokens: Tensor | None, grad: Tensor, factors: Tensor, z: Tensor | None = None) -> None:
        grad = site.select_features(grad)
        receive(tokens, grad if z is None else rules.absorb(grad, z, settings.epsilon), factors)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        z = site.select_features(output)
        # The ε-rule lies between a site's output and its weights: for signed neurons the gradient at the
        # output is used as it is, for weights it is damped by z / (z + ε sign z) first.
        factors = (z,) if signed else (args[0], z) if settings.epsilon else (args[0],)
        copied = site.role == "mlp.down"  # Falcon adds to it in place
        return watch_gradient(output, factors, partial(tell, tokens_of(args)), copied=copied)

    return hook


def receivers(
    sites: list[Site], batch: Batch, settings: Settings, gathered: dict[str, Tensor], sums: Sums
) -> dict[str, Receive]:
    """Each site's `Receive`: it puts one row per sample into `gathered`, or adds relevance of weights to
    `sums`. Rows stay zero at sites that no gradient reaches, because CP-LRP holds them constant."""
    receive: dict[str, Receive] = {}
    for index, site in enumerate(sites):
        if settings.unit == "weight":
            first = not index or sites[index - 1].layer != site.layer
            receive[site.name] = partial(_add_weights, site, batch, sums, first)
        else:
            width = site.heads if settings.unit == "head" else site.out
            gathered[site.name] = torch.zeros(len(batch.samples), width)
            receive[site.name] = partial(_gather_rows, site, batch, settings, gathered)
    return receive


def _gather_rows(
    site: Site,
    batch: Batch,
    settings: Settings,
    gathered: dict[str, Tensor],
    tokens: Tensor | None,
    grad: Tensor,
    a: Tensor,
) -> None:
    """Relevance of each sample's heads, Σ_t Σ_{d ∈ head} a_td ∂̂y/∂a_td at the input of attn.o, or neurons
    (docs/method.md, 4)."""
    skip, shape = settings.skip_positions, batch.ids.shape
    if settings.unit == "neuron" and settings.neuron == "abs":
        g, x = (split_by_sample(tensor, tokens, shape, batch.lengths, skip) for tensor in (grad, a))
        gathered[site.name] = absolute_rows(site.weight.to(grad.device), g, x)
        return
    relevance = arrange_by_position(to_float32(grad) * to_float32(a), tokens, shape)[:, skip:]
    relevance = (relevance.square() if settings.reduce == "rms" else relevance).sum(1)
    if settings.unit == "head":
        relevance = relevance.view(len(relevance), site.heads, -1).sum(2)
    gathered[site.name] = relevance


def to_float32(x: Tensor) -> Tensor:
    """At least float32, in which everything is summed."""
    return x if x.dtype == torch.float64 else x.float()


def absolute_rows(weight: Tensor, grad: Iterable[Tensor], a: Iterable[Tensor]) -> Tensor:
    """Σ_j |W_ij Σ_t ĝ_ti a_tj| of each sample: [B, out], from weight [out, in] and each sample's grad [T,
    out] and a [T, in]."""
    pairs = _match_dtypes(zip(grad, a, strict=True))
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    sums = torch.empty(len(pairs), weight.shape[0], dtype=dtype, device=weight.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        for sample, (g, x) in enumerate(pairs):  # all samples while these rows of W are in cache
            # torch.linalg.vector_norm(ord=1) takes several times as long on a CPU.
            piece = (g[:, rows].T @ x).mul_(weight[rows]).abs_()
            sums[sample, rows] = piece.sum(1, dtype=dtype)
    return sums


def _match_dtypes(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The pairs, in float32 where a CPU would multiply in 16 bits, which is slow."""
    return [
        (g.float(), a.float()) if g.device.type == "cpu" and g.dtype.itemsize == 2 else (g, a)
        for g, a in pairs
    ]


# Observing the gradient of a tensor, and recomputing layers in the backward pass instead of keeping their
# activations.


class _Watch(torch.autograd.Function):
    """The identity, whose backward calls `receive`. The extra tensors go through `save_for_backward`, so that
    a checkpointed layer recomputes them instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, receive: Callable[..., None], lowest: bool, copied: bool, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.arrived, ctx.lowest, ctx.count = receive, lowest, len(tensors)
        return x.clone() if copied else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.arrived(grads[0], *ctx.saved_tensors)
        return (None if ctx.lowest else grads[0], None, None, None, *[None] * ctx.count)


def watch_gradient(
    x: Tensor, saved: Sequence[Tensor], receive: Callable[..., None], *, copied: bool = False
) -> Tensor:
    """x; in the backward pass `receive` gets its gradient and the kept tensors. Set `copied` where the next
    operation changes x in place.

    If x needs no gradient, nothing before it does: the graph starts at x, and the backward pass ends there.
    """
    lowest = not x.requires_grad
    z = x.detach().requires_grad_() if lowest else x
    return _Watch.apply(z, receive, lowest, copied, *(tensor.detach() for tensor in saved))  # type: ignore[no-untyped-call, no-any-return]


@contextmanager
def checkpoint_layers(
    model: "PreTrainedModel",
    recompute_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    offload: bool = False,
) -> Iterator[None]:
    """Inside, a decoder layer keeps only its input, and is computed again when the backward pass reaches it.

    transformers' own gradient checkpointing is for training: it needs train mode, in which dropout is on.

    Args:
        within: makes the context for the second computation of a layer.
        offload: keep the inputs on the CPU (in pinned memory if the model is on a GPU), and bring each back
            when its layer is computed again.
    """
    pinned = device_of(model).type == "cuda"
    with ExitStack() as stack:
        # With early stop, torch leaves a recomputed layer midway, and accelerate's post-forward hook, which
        # moves the layer's weights back, would never run.
        stack.enter_context(set_checkpoint_early_stop(not is_offloaded(model)))
        for layer in layers_of(model):
            checkpointed = partial(
                checkpoint,
                layer.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), recompute_context()),
            )
            stack.enter_context(
                shadow(
                    layer,
                    "forward",
                    partial(_keep_input_on_cpu, checkpointed, pinned) if offload else checkpointed,
                )
            )
        if offload and pinned:
            stack.callback(torch.accelerator.empty_host_cache)  # else PyTorch keeps the pinned memory
        yield


def _keep_input_on_cpu(checkpointed: Callable[..., Any], pinned: bool, *args: Any, **kwargs: Any) -> Any:
    """Call a checkpointed layer and keep its input, the only tensor it saves, on the CPU."""
    with save_on_cpu(pin_memory=pinned):
        return checkpointed(*args, **kwargs)


# Weight relevance: Σ_t ĝ_t a_tᵀ streams from each site's backward step straight into the site's running
# total, and never into `.grad`.
#
# R_W = W ⊙ Σ_t ĝ_t a_tᵀ (docs/method.md, 3), and W is the same for every sample: it is multiplied in once, at
# the end (`weight_times_sums`).


PIECE = 2**22
"""Elements of one sample's matrix handled at once on a CPU: more would need memory, fewer would leave threads
waiting for each other."""


def _add_weights(
    site: Site, batch: Batch, sums: Sums, first: bool, tokens: Tensor | None, grad: Tensor, a: Tensor
) -> None:
    """Add the site's Σ_t ĝ_t a_tᵀ, or each sample's absolute value of it, to its total. `first`: it is the
    first hooked site of its layer, hence the last that the backward pass visits there."""
    layout = (tokens, batch.ids.shape, batch.lengths, sums.settings.skip_positions)
    _stream(site, batch, sums, split_by_sample(grad, *layout), split_by_sample(a, *layout))
    if first:
        return_memory()


def _stream(site: Site, batch: Batch, sums: Sums, grad: list[Tensor], a: list[Tensor]) -> None:
    """Add a batch, given each sample's ĝ [T, out] and a [T, in], except samples that were added before an
    earlier attempt at this batch ran out of memory."""
    pairs = []
    for sample, g, x in zip(batch.samples, grad, a, strict=True):
        if (sample.index, site.name) in sums.streamed:
            continue
        if not (g.sum(dtype=torch.float32) + x.sum(dtype=torch.float32)).isfinite():
            raise NonFinite(
                f"the relevance of sample {sample.index} is not finite at {site.name}; look at "
                "that sample, leave it out, or load the model in bfloat16 or float32"
            )
        pairs.append((g, x))
    if pairs:
        pairs = _match_dtypes(pairs)
        if sums.settings.reduce == "rms":  # Σ_t (ĝ_ti a_tj)² is a product too, of the squares
            pairs = [(to_float32(g).square(), to_float32(x).square()) for g, x in pairs]
        add = add_absolute_ if sums.settings.reduce == "mean_abs" else add_signed_
        add(sums.matrix(site), pairs)
    sums.streamed.update((sample.index, site.name) for sample in batch.samples)


def add_signed_(total: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """total [out, in] += Σ_t ĝ_t a_tᵀ over all samples' pairs of ĝ [T, out] and a [T, in], as one product."""
    g = pairs[0][0] if len(pairs) == 1 else torch.cat([g for g, _ in pairs])
    a = pairs[0][1] if len(pairs) == 1 else torch.cat([a for _, a in pairs])
    if (g.dtype, g.device) == (total.dtype, total.device):
        total.addmm_(g.T, a)
        return
    for rows in _pieces(total, g.device):
        total[rows] += (g[:, rows].T @ a).to(total.device)


def add_absolute_(total: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """total [out, in] += |Σ_t ĝ_t a_tᵀ| of each sample separately."""
    for rows in _pieces(total, pairs[0][0].device):
        part = total[rows]
        for g, a in pairs:
            part += (g[:, rows].T @ a).abs_().to(part.device)


def _pieces(total: Tensor, device: torch.device) -> list[slice]:
    """Row ranges of a total: a few megabytes at once on a CPU, all rows on a GPU."""
    out, inp = total.shape
    step = max(16, PIECE // inp) if device.type == "cpu" else out
    return [slice(start, min(start + step, out)) for start in range(0, out, step)]


def weight_times_sums(site: Site, total: Tensor, divisor: int, reduce: str) -> Tensor:
    """Scores [out, in] from a total, which is changed in place: W ⊙ total / divisor, its absolute value for
    mean_abs and abs_mean, or |W| ⊙ √(total / divisor) for rms."""
    if not total.numel():  # CP-LRP holds the site constant
        return torch.zeros(site.out, site.inp)
    if reduce == "rms":
        return total.div_(divisor).sqrt_().mul_(site.weight.detach().to(total.device).abs())
    total.mul_(site.weight.detach().to(total.device))
    if divisor != 1:
        total.div_(divisor)
    return total if reduce == "mean" else total.abs_()
