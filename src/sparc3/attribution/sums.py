"""Running sums: what a method adds to, what shards add up, what is divided once at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import distributed
from ..errors import NonFinite
from ..models.sites import Site
from ..samples.batches import OF_WORDS, Batch
from ..storage import fingerprint

if TYPE_CHECKING:
    from .options import AttributionOptions


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum proves it in one pass; only where it overflows is
    each value examined."""
    return bool(values.sum().isfinite() or values.isfinite().all())


@dataclass(frozen=True)
class Settings:
    """What a method sees of the `AttributionOptions`; shard files and their fingerprints hold these names.
    `words` is the fingerprint of the target's words."""

    method: str
    unit: str
    target: str
    neuron: str
    reduce: str
    seed: int = 0
    non_finite: str = "error"
    sums_dtype: str = "float32"
    sums_device: str = "cpu"
    skip_positions: int = 0
    gradient_checkpointing: bool | str = False
    epsilon: float = 0.0
    words: str = ""

    @classmethod
    def from_options(cls, options: "AttributionOptions") -> "Settings":
        """The options that concern a method; `attribute` itself handles batches, truncation and sites."""
        names = [setting.name for setting in fields(cls) if setting.name not in ("seed", "words")]
        words = fingerprint(list(options.words)) if options.target in OF_WORDS else ""
        return cls(**{name: getattr(options, name) for name in names}, words=words)


@dataclass
class Sums:
    """Sums over samples, with the counts that divide them. They are on the CPU in float64; sums of weights
    have the settings' device and dtype.

    Attributes:
        totals: site name → sum over the samples so far.
        samples, tokens, targets: numbers of samples, of their tokens that were summed over, and of their
            target tokens.
        skipped: indices, in the reference set, of samples left out because their relevance was not finite.
        streamed: (index of an unfinished sample, site whose total already includes it).
    """

    settings: Settings
    totals: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    skipped: list[int] = field(default_factory=list)
    streamed: set[tuple[int, str]] = field(default_factory=set)

    def add(self, batch: Batch, gathered: Mapping[str, Tensor]) -> None:
        """Add one row per sample from each site; with non_finite "skip", leave out samples that are not
        finite.

        Raises:
            NonFinite: a NaN or Inf, named by sample and site, with non_finite "error".
        """
        rows = {name: value.detach().to("cpu", torch.float64) for name, value in gathered.items()}
        is_finite = torch.ones(len(batch.samples), dtype=torch.bool)
        for name, value in rows.items():
            finite = value.isfinite().flatten(1).all(1)
            if not finite.all() and self.settings.non_finite == "error":
                index = batch.samples[int((~finite).nonzero()[0])].index
                raise NonFinite(
                    f"the relevance of sample {index} is not finite at {name}; look at that sample, load the "
                    "model in bfloat16 or float32, or leave such samples out with --non-finite skip"
                )
            is_finite &= finite
        for name, value in rows.items():
            values = value[is_finite].abs() if self.settings.reduce == "mean_abs" else value[is_finite]
            self.totals[name] = self.totals.get(name, 0) + values.sum(0)
        # With their batch complete, these samples are no longer unfinished.
        done = {sample.index for sample in batch.samples}
        self.streamed = {(index, name) for index, name in self.streamed if index not in done}
        for sample, is_counted in zip(batch.samples, is_finite.tolist(), strict=True):
            if is_counted:
                self.samples += 1
                self.tokens += len(sample.ids) - self.settings.skip_positions
                self.targets += len(sample.positions)
            else:
                self.skipped.append(sample.index)

    def absorb(self, other: "Sums") -> None:
        """Add sums over other samples to these."""
        for name, total in other.totals.items():
            current = self.totals.get(name)
            device = self.settings.sums_device if self.settings.unit == "weight" else "cpu"
            self.totals[name] = (
                total.to(device) if current is None else current.add_(total.to(current.device))
            )
        self.samples += other.samples
        self.tokens += other.tokens
        self.targets += other.targets
        self.skipped += other.skipped

    def matrix(self, site: Site) -> Tensor:
        """The running total [out, in] of a site's weights, zero at first, to which the backward pass adds in
        place."""
        if site.name not in self.totals:
            dtype, device = getattr(torch, self.settings.sums_dtype), self.settings.sums_device
            self.totals[site.name] = torch.zeros(site.out, site.inp, dtype=dtype, device=device)
        return self.totals[site.name]

    def sum_over_ranks(self, names: list[str]) -> "Sums":
        """The sums of all ranks together, the same on each rank. `names` are the sites, which a rank without
        a sample does not know."""
        if distributed.world() == 1:
            return self
        own_kinds = {name: (total.shape, total.dtype) for name, total in self.totals.items()}
        kinds = {name: kind for part in distributed.gather(own_kinds) for name, kind in part.items()}
        totals = {}
        # The order of `names` is the same on every rank, as all_reduce pairs the ranks' tensors by order.
        for name in filter(kinds.__contains__, names):
            shape, dtype = kinds[name]
            # Removed here, so that a matrix on the GPU is freed once its copy is on the CPU.
            total = self.totals.pop(name, None)
            totals[name] = torch.zeros(shape, dtype=dtype) if total is None else total.cpu()
        counts = torch.tensor([self.samples, self.tokens, self.targets])
        distributed.sum_([*totals.values(), counts])
        skipped = sorted(index for part in distributed.gather(self.skipped) for index in part)
        samples, tokens, targets = (int(count) for count in counts)
        return Sums(self.settings, totals, samples, tokens, targets, skipped)
