"""Weight relevance: Σ_t ĝ_t a_tᵀ streams from each site's backward step straight into the site's running total, and never into `.grad`.

R_W = W ⊙ Σ_t ĝ_t a_tᵀ (docs/method.md, 3), and W is the same for every sample: it is multiplied in once, at the end (`weighted`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..errors import NonFinite
from ..experts import by_sample, tokens_of
from ..memory import give_back
from ..models import Site
from .sums import Sums
from .watching import watched

PIECE = 2**22
"""Elements of one sample's matrix that are handled at once on a CPU: more would be memory, fewer would be threads that wait for each other."""


def weight_hook(site: Site, batch: Batch, sums: Sums, *, first: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook; in the backward pass it adds the site's Σ_t ĝ_t a_tᵀ, or each sample's absolute value, to the site's total.

    Args:
        first: whether no earlier site of its layer is watched, so that the backward pass leaves the layer's sites with it.
    """

    def arrived(tokens: Tensor | None, grad: Tensor, a: Tensor) -> None:
        by = (tokens, batch.ids.shape, batch.lengths, sums.settings.skip_positions)
        _stream(site, batch, sums, by_sample(site.of(grad), *by), by_sample(a, *by))
        if first:
            give_back()

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return watched(output, args[0], partial(arrived, tokens_of(args)), copied=site.role == "mlp.down")  # Falcon adds to it in place

    return hook


def _stream(site: Site, batch: Batch, sums: Sums, grad: list[Tensor], a: list[Tensor]) -> None:
    """Add a batch, of each sample ĝ [T, out] and a [T, in], less what was in already when an earlier try at these samples ran out of memory."""
    fresh = [row for row, sample in enumerate(batch.samples) if (sample.index, site.name) not in sums.streamed]
    pairs = [(grad[row], a[row]) for row in fresh]
    for row, (g, x) in zip(fresh, pairs, strict=True):
        if not (g.sum(dtype=torch.float32) + x.sum(dtype=torch.float32)).isfinite():
            raise NonFinite(
                f"the relevance of sample {batch.samples[row].index} is not finite at {site.name}; look at that sample, leave it out, "
                "or load the model in bfloat16 or float32"
            )
    if grad[0].device.type == "cpu" and grad[0].dtype in (torch.float16, torch.bfloat16):
        pairs = [(g.float(), x.float()) for g, x in pairs]
    if pairs:
        add = add_absolute_ if sums.settings.reduce == "mean_abs" else add_signed_
        add(sums.matrix(site), pairs)
    sums.streamed.update((batch.samples[row].index, site.name) for row in fresh)


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
    """total [out, in] += |Σ_t ĝ_t a_tᵀ| of each sample apart."""
    for rows in _pieces(total, pairs[0][0].device):
        part = total[rows]
        for g, a in pairs:
            part += (g[:, rows].T @ a).abs_().to(part.device)


def _pieces(total: Tensor, device: torch.device) -> list[slice]:
    """Row ranges of a total: some megabytes at once on a CPU, all of them on a GPU."""
    out, inp = total.shape
    step = max(16, PIECE // inp) if device.type == "cpu" else out
    return [slice(start, min(start + step, out)) for start in range(0, out, step)]


def weighted(site: Site, total: Tensor, divisor: int, reduce: str) -> Tensor:
    """Scores [out, in] of a total, which is changed in place: W ⊙ total / divisor, without its sign where the reduction takes it."""
    if not total.numel():  # CP-LRP holds the site constant
        return torch.zeros(site.out, site.inp)
    total.mul_(site.weight.detach().to(total.device))
    if divisor != 1:
        total.div_(divisor)
    return total if reduce == "mean" else total.abs_()
