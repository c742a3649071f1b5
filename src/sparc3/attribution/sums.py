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
    """Whether no value is NaN or infinite: a finite sum says so in one pass, and only where it overflows is
    each value looked at."""
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
    def of(cls, options: "AttributionOptions") -> "Settings":
        """The options that are a method's business; batches, truncation and sites are `attribute`'s."""
        own = [one.name for one in fields(cls) if one.name not in ("seed", "words")]
        words = fingerprint(list(options.words)) if options.target in OF_WORDS else ""
        return cls(**{name: getattr(options, name) for name in own}, words=words)


@dataclass
class Sums:
    """Sums over samples, with the counts that divide them: on the CPU in float64, those of weights where and
    as the settings say.

    Attributes:
        totals: site name → sum over the samples so far.
        samples, tokens, targets: numbers of samples, of their tokens that were summed over, of their target
            tokens.
        skipped: places, in the reference set, of samples left out because their relevance was not finite.
        streamed: (place of a sample that is not done yet, site whose total holds it already).
    """

    settings: Settings
    totals: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    skipped: list[int] = field(default_factory=list)
    streamed: set[tuple[int, str]] = field(default_factory=set)

    def add(self, batch: Batch, gathered: Mapping[str, Tensor]) -> None:
        """Add one row a sample from each site, leaving out samples that are not finite where the settings say
        so.

        Raises:
            NonFinite: a NaN or Inf, named by sample and site, where the settings say error.
        """
        rows = {name: value.detach().to("cpu", torch.float64) for name, value in gathered.items()}
        good = torch.ones(len(batch.samples), dtype=torch.bool)
        for name, value in rows.items():
            finite = value.isfinite().flatten(1).all(1)
            if not finite.all() and self.settings.non_finite == "error":
                bad = batch.samples[int((~finite).nonzero()[0])].index
                raise NonFinite(
                    f"the relevance of sample {bad} is not finite at {name}; look at that sample, load the "
                    "model in bfloat16 or float32, or leave such samples out with --non-finite skip"
                )
            good &= finite
        for name, value in rows.items():
            kept = value[good].abs() if self.settings.reduce == "mean_abs" else value[good]
            self.totals[name] = self.totals.get(name, 0) + kept.sum(0)
        done = {sample.index for sample in batch.samples}
        self.streamed = {(index, name) for index, name in self.streamed if index not in done}
        for sample, counts in zip(batch.samples, good.tolist(), strict=True):
            if counts:
                self.samples += 1
                self.tokens += len(sample.ids) - self.settings.skip_positions
                self.targets += len(sample.positions)
            else:
                self.skipped.append(sample.index)

    def absorb(self, other: "Sums") -> None:
        """Add sums over other samples to these."""
        for name, total in other.totals.items():
            held = self.totals.get(name)
            here = self.settings.sums_device if self.settings.unit == "weight" else "cpu"
            self.totals[name] = total.to(here) if held is None else held.add_(total.to(held.device))
        self.samples += other.samples
        self.tokens += other.tokens
        self.targets += other.targets
        self.skipped += other.skipped

    def matrix(self, site: Site) -> Tensor:
        """The running total [out, in] of a site's weights, zero at first; what streams is added to it in
        place."""
        if site.name not in self.totals:
            dtype, device = getattr(torch, self.settings.sums_dtype), self.settings.sums_device
            self.totals[site.name] = torch.zeros(site.out, site.inp, dtype=dtype, device=device)
        return self.totals[site.name]

    def over_ranks(self, names: list[str]) -> "Sums":
        """The sums of all ranks together; each rank gets the same. `names` are the sites, which a rank
        without a sample lacks."""
        if distributed.world() == 1:
            return self
        held = {name: (total.shape, total.dtype) for name, total in self.totals.items()}
        kinds = {name: kind for part in distributed.gather(held) for name, kind in part.items()}
        totals = {}
        for name in filter(kinds.__contains__, names):
            shape, dtype = kinds[name]
            total = self.totals.pop(name, None)
            totals[name] = torch.zeros(shape, dtype=dtype) if total is None else total.cpu()
        counts = torch.tensor([self.samples, self.tokens, self.targets])
        distributed.sum_([*totals.values(), counts])
        skipped = sorted(index for part in distributed.gather(self.skipped) for index in part)
        samples, tokens, targets = (int(count) for count in counts)
        return Sums(self.settings, totals, samples, tokens, targets, skipped)
