"""Results: what was measured on which variant of the model. The fourth noun on disk (`results.json`,
`sparc3.results/1`)."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import DamagedFile, UserError
from .settings import typed
from .storage import read_json, write_json

FORMAT = "sparc3.results/1"


@dataclass(frozen=True)
class Measurement:
    """One figure of one variant of the model.

    Attributes:
        metric: "perplexity", "toxicity.mean", ...
        variant: "original", "ablated", or "<method>@<count>".
        value: the figure; None where every unit failed.
        ci95: 95 % bootstrap interval over the units; None where there is a single unit.
        n: number of units (prompts, windows) that were measured.
        failures: number of units that could not be measured; they are in no mean.
        unit: what `value` is in.
        direction: which way is better, "lower" or "higher".
    """

    metric: str
    variant: str
    split: str
    value: float | None
    ci95: tuple[float, float] | None
    n: int
    failures: int
    unit: str
    direction: str


@dataclass(frozen=True)
class Difference:
    """`to` − `from` of one metric, paired over the units that both measured.

    Attributes:
        relative: value divided by the figure of `from_`.
        ci95: 95 % interval of value, by a paired bootstrap.
        p: two-sided p of a paired sign-flip permutation test; the smallest it can be is 1 / (draws + 1).
    """

    metric: str
    from_: str
    to: str
    value: float
    relative: float | None
    ci95: tuple[float, float] | None
    p: float | None

    @property
    def holds_zero(self) -> bool | None:
        """Whether the interval includes zero; None without an interval."""
        return None if self.ci95 is None else self.ci95[0] <= 0 <= self.ci95[1]

    @property
    def is_nothing(self) -> bool:
        """Whether no unit changed: neither the figure nor any resample of it."""
        return self.value == 0 and self.ci95 is not None and self.ci95 == (0, 0)


@dataclass(frozen=True)
class Results:
    """Measurements, their differences, and where they came from."""

    measurements: tuple[Measurement, ...]
    differences: tuple[Difference, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    def find(self, metric: str, variant: str = "original") -> Measurement:
        """The measurement of a metric on a variant. Raises UserError where there is none."""
        for measurement in self.measurements:
            if (measurement.metric, measurement.variant) == (metric, variant):
                return measurement
        raise UserError(f"no measurement of '{metric}' on '{variant}'; there are: {self._names()}")

    def difference(self, metric: str, to: str = "ablated", from_: str = "original") -> Difference:
        """The difference of a metric between two variants. Raises UserError where there is none."""
        for difference in self.differences:
            if (difference.metric, difference.from_, difference.to) == (metric, from_, to):
                return difference
        raise UserError(f"no difference of '{metric}' from '{from_}' to '{to}'; there are: {self._names()}")

    def _names(self) -> str:
        return ", ".join(sorted({f"{m.metric} on {m.variant}" for m in self.measurements})) or "none"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write readable JSON with a checksum of itself."""
        differences = [
            {("from" if key == "from_" else key): value for key, value in asdict(d).items()}
            for d in self.differences
        ]
        measurements = [asdict(m) for m in self.measurements]
        write_json(
            path,
            {
                "format": FORMAT,
                "measurements": measurements,
                "differences": differences,
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Results":
        """Read what `save` wrote. Raises UserError for another kind of file, DamagedFile where its content
        makes no sense."""
        content = read_json(path, FORMAT, by_hand=("format", "measurements", "differences", "provenance"))
        try:
            differences = [
                {("from_" if key == "from" else key): value for key, value in d.items()}
                for d in content["differences"]
            ]
            return cls(
                typed(tuple[Measurement, ...], [asdict(Measurement(**m)) for m in content["measurements"]]),
                typed(tuple[Difference, ...], [asdict(Difference(**d)) for d in differences]),
                typed(dict[str, Any], content["provenance"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(f"{path}: not as {FORMAT} has it ({error}); make it again") from None
