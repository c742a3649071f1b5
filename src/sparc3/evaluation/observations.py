"""What a metric observed: one figure per unit (prompt, window), before any average. Kept on disk, one file a variant."""

import math
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import DamagedFile
from ..files import read_json, write_json
from ..schema import typed

FORMAT = "sparc3.evaluation/1"


@dataclass(frozen=True)
class Observations:
    """One metric on one variant: its value is Σ sums / Σ weights over the units that were measured.

    Attributes:
        metric: "perplexity", "toxicity.mean", ...
        split: which split the units are of.
        unit: what the value is in.
        direction: which way is better, "lower" or "higher".
        sums: numerator of each unit, in a fixed order; None where the unit could not be measured.
        weights: denominator of each unit.
        failures: how many single measurements failed (a unit may hold several); they are in no sum.
        exponential: whether the value is exp of the ratio, as for perplexity.
    """

    metric: str
    split: str
    unit: str
    direction: str
    sums: tuple[float | None, ...]
    weights: tuple[float, ...]
    failures: int = 0
    exponential: bool = False


def finite(value: float) -> float | None:
    """A measured number, or None for a NaN or Inf, which is a failure and no number."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Evaluation:
    """Everything observed on one variant of the model, and the texts it wrote on the way.

    Attributes:
        made_from: fingerprint of the model variant, the samples and the settings.
        texts: metric → [{"prompt", "continuations": [{"text", "score"}]}].
    """

    variant: str
    observations: tuple[Observations, ...]
    texts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    made_from: str = ""
    seconds: float = 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        content = read_json(path, FORMAT)
        try:
            made = cls(**{key: value for key, value in content.items() if key != "format"})
            observations = typed(tuple[Observations, ...], [asdict(Observations(**o)) for o in content["observations"]])
            return replace(typed(cls, asdict(replace(made, observations=()))), observations=observations)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"{path}: not as {FORMAT} has it ({error}); make it again") from None
