"""Results: what was measured on which variant of the model, saved as results.json (`sparc3.results/1`)."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ConfigDict

from .errors import DamagedFile, UserError
from .settings import parse_typed
from .storage import read_json, write_json

FORMAT = "sparc3.results/1"
Number = int | float
"""A figure that the file keeps as it is: 11 does not become 11.0."""


@dataclass(frozen=True)
class Variant:
    """A measured version of the model: "original", "ablated", "wanda@40", "random@40.2" for one of several
    draws.

    Attributes:
        method: the method that chose the units; the whole name of a variant without a count.
        count: number of changed units; None if the name has no count.
        draw: the draw ("2") or reference set ("seed2"); "" if there is one, or if all are pooled.
    """

    method: str
    count: int | None = None
    draw: str = ""

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """The variant of this name; a name of any other form becomes the method."""
        method, separator, rest = name.rpartition("@")
        count, dot, draw = rest.partition(".")
        # isdecimal() also accepts the digits of other scripts, which str() would not write back.
        is_counted = (
            bool(separator and method) and count.isdecimal() and count.isascii() and bool(draw) == bool(dot)
        )
        return cls(method, int(count), draw) if is_counted else cls(name)

    def __str__(self) -> str:
        count_text = "" if self.count is None else f"@{self.count}"
        return f"{self.method}{count_text}{'.' if self.draw else ''}{self.draw}"


@dataclass(frozen=True)
class Measurement:
    """One figure of one variant of the model.

    Attributes:
        metric: "perplexity", "toxicity.mean", ...
        variant: "original", "ablated", or "<method>@<count>".
        value: the figure; None if every unit failed.
        ci95: 95 % bootstrap interval over the units; None for a single unit.
        n: number of units (prompts, windows) that were measured.
        failures: number of units that could not be measured; no mean includes them.
        unit: the unit of `value`.
        direction: which is better, "lower" or "higher".
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


# The provenance of results. The file contains only the sections that a run writes.


class Section(BaseModel):
    """A part of a provenance. Unknown keys are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: only fields that were set, in the order of the class."""
        return self.model_dump(exclude_unset=True)


@dataclass(frozen=True)
class Check:
    """One line of a run's checks; `ok` is None for a figure without a judgement."""

    name: str
    value: Any = ""
    ok: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an effect is shown: `kind` is a key of `verdict.SAID`; the sentence; the criteria behind it."""

    kind: str
    said: str
    criteria: list[Check] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A stage of the run and its duration."""

    name: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Power:
    """The smallest change of a metric that `n` units show with 80 % power.

    Attributes:
        relative: whether `detects` is a share of the original's figure.
        said: the same as a sentence.
    """

    metric: str
    n: int
    detects: Number
    relative: bool = False
    said: str = ""


@dataclass(frozen=True)
class Overlap:
    """Units that another variant's circuit, of `size`, shares with the run's own; `expected` by chance."""

    variant: str
    size: int
    both: Number
    expected: Number | None = None


@dataclass(frozen=True)
class Protected:
    """A unit kept out of every selection; the ratio is None if perplexity without it is not finite."""

    module: str
    index: int
    perplexity_ratio: Number | None


@dataclass(frozen=True)
class ScorerMeans:
    """One scorer's means over the texts before and after; None if nothing was scored."""

    before: float | None
    before_ci95: tuple[float, float] | None
    after: float | None
    after_ci95: tuple[float, float] | None
    change: float | None
    change_ci95: tuple[float, float] | None
    p: float | None
    n: int
    failures: int


class Scorers(Section):
    """Two scorers of the same `n` continuations, and how far they agree."""

    first: str
    second: str
    n: int = 0
    pearson: float | None = None
    spearman: float | None = None
    same_verdict: float | None = None
    means: list[ScorerMeans]


@dataclass(frozen=True)
class Trial:
    """A count of another method, tried in a search: metric → figure, and whether it is within the budget."""

    count: int
    figures: dict[str, Number]
    within: bool = False


@dataclass(frozen=True)
class Candidate:
    """One combination that a search tried.

    Attributes:
        targets: reference set → target.
        circuit: fingerprint of the circuit.
        figures: metric → value on validation samples; without the aim if the damage was far above the budget.
        perplexity_increase: relative to the original.
        within: whether it is within the budget.
        rounds: number of rounds of selection.
        strength: the circuit's strength.
        damage: the damage at which its strengths were fitted.
        repair: the repair with which they were fitted.
        pareto: whether no other candidate is at least as good in both aim and perplexity, and better in one.
    """

    targets: dict[str, str]
    neuron: str
    contrast: str
    penalty: Number | None
    normalize: str | None
    count: int
    circuit: str
    figures: dict[str, Number] = field(default_factory=dict)
    perplexity_increase: float = 0.0
    within: bool = False
    pareto: bool = False
    rounds: int = 1
    strength: Number = 1.0
    damage: Number | None = None
    repair: Number = 0.0


@dataclass(frozen=True)
class Rival:
    """The best of the `of` counts of another method that a search tried, within its budget."""

    variant: str
    figures: dict[str, Number]
    of: int = 0


@dataclass(frozen=True)
class Budget:
    """The damage that a search allows; None for no bound."""

    max_perplexity_increase: Number | None = None
    max_kl: Number | None = None
    max_fluency_increase: Number | None = None


class Search(Section):
    """A search under a budget.

    Attributes:
        aim: the metric to improve.
        samples: metric → number of validation samples.
        original: metric → the original's figure.
        others: method → every count that was tried.
        tried: number of all candidates, if `candidates` lists only the Pareto front.
    """

    aim: str
    budget: Budget = Budget()
    split: str = "validation"
    samples: dict[str, int] = {}
    original: dict[str, Number]
    best: Candidate
    candidates: list[Candidate] = []
    rivals: list[Rival] = []
    others: dict[str, list[Trial]] = {}
    tried: int | None = None


@dataclass(frozen=True)
class SampleRow:
    """A metric of a pruning from the first `samples` of one draw."""

    method: str
    samples: int
    seed: int
    metric: str
    value: float | None


@dataclass(frozen=True)
class SeedFigures:
    """A metric of a variant by each seed's reference set alone, with its mean and standard error."""

    variant: str
    metric: str
    values: list[float]
    mean: float
    sem: float


@dataclass(frozen=True)
class Distribution:
    """A method's scores by size: role → how many are below 10^exponents[0], then between each two."""

    samples: int
    exponents: list[Number]
    roles: dict[str, list[int]]


class Provenance(Section):
    """Where results came from. The job correct writes no `job`, `method` or `unit`; its circuit has them.

    Attributes:
        headline: the metric that the run is about, if it is not the first one measured.
        ranks, seeds, enough: of the job discover: rankings, number of reference sets, required accuracy.
        ablation: of the job discover: what removed units are set to, "zero" or "mean".
        scope: of the job compress.
        sizes: module → number of its units.
        metrics, samples: metric → its settings, and the fingerprint of its samples.
        lexicon: words to mask.
        margins: metric → the relative change up to which it counts as flat, if the recipe sets one.
        protected: None if the run did not look for protected units.
    """

    recipe: str = ""
    job: str = "correct"
    made_from: str = ""
    headline: str | None = None
    model: dict[str, Any] = {}
    method: str | None = None
    unit: str | None = None
    scope: str | None = None
    enough: Number = 0.9
    ranks: list[str] = []
    seeds: int = 1
    ablation: str = "zero"
    circuit: str | None = None
    count: int | None = None
    sizes: dict[str, int] = {}
    metrics: dict[str, dict[str, Any]] = {}
    samples: dict[str, Any] = {}
    lexicon: list[str] = []
    checks: list[Check] = []
    verdict: Verdict | None = None
    margins: dict[str, Number] = {}
    stages: list[Stage] = []
    power: list[Power] = []
    scorers: Scorers | None = None
    protected: list[Protected] | None = None
    tune: Search | None = None
    warnings: list[str] = []
    version: str = ""
    overlaps: list[Overlap] = []
    by_samples: list[SampleRow] = []
    by_seed: list[SeedFigures] = []
    distributions: dict[str, Distribution] = {}


@dataclass(frozen=True)
class Results:
    """Measurements, their differences, and where they came from."""

    measurements: tuple[Measurement, ...]
    differences: tuple[Difference, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    def find(self, metric: str, variant: str = "original") -> Measurement:
        """The measurement of a metric on a variant. Raises UserError if there is none."""
        for m in self.measurements:
            if (m.metric, m.variant) == (metric, variant):
                return m
        raise UserError(f"no measurement of '{metric}' on '{variant}'; available: {self._names()}")

    def difference(self, metric: str, to: str = "ablated", from_: str = "original") -> Difference:
        """The difference of a metric between two variants. Raises UserError if there is none."""
        for d in self.differences:
            if (d.metric, d.from_, d.to) == (metric, from_, to):
                return d
        raise UserError(f"no difference of '{metric}' from '{from_}' to '{to}'; available: {self._names()}")

    def read_provenance(self) -> Provenance:
        """`provenance` as typed sections, ignoring null values. Raises ValueError for an invalid one."""
        return parse_typed(
            Provenance, {key: value for key, value in self.provenance.items() if value is not None}
        )

    def _names(self) -> str:
        return ", ".join(sorted({f"{m.metric} on {m.variant}" for m in self.measurements})) or "none"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write readable JSON that includes its own checksum."""
        content: dict[str, Any] = {"format": FORMAT, "measurements": list(map(asdict, self.measurements))}
        content["differences"] = [_rename(asdict(d), "from_", "from") for d in self.differences]
        write_json(path, {**content, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Results":
        """Read what `save` wrote. Raises UserError for another kind of file, DamagedFile for invalid
        content."""
        content = read_json(path, FORMAT, by_hand=("format", "measurements", "differences", "provenance"))
        try:
            measurements = [Measurement(**m) for m in content["measurements"]]
            differences = [Difference(**_rename(d, "from", "from_")) for d in content["differences"]]
            return cls(
                parse_typed(tuple[Measurement, ...], list(map(asdict, measurements))),
                parse_typed(tuple[Difference, ...], list(map(asdict, differences))),
                parse_typed(dict[str, Any], content["provenance"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(f"{path} does not follow {FORMAT} ({error}); make it again") from None


def _rename(row: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The row with one key renamed, in the same order."""
    return {(new if key == old else key): value for key, value in row.items()}


# Selection rules that both the run and its report use.


def pareto_front(points: Sequence[tuple[float, float] | None]) -> set[int]:
    """Indices of the points that no other point dominates. A point dominates another if it is not larger in
    either coordinate and smaller in one; None is ignored."""
    present = [(index, point) for index, point in enumerate(points) if point is not None]
    return {
        index
        for index, (x, y) in present
        if not any(a <= x and b <= y and (a, b) != (x, y) for _, (a, b) in present)
    }


def find_sparsest(removed: Sequence[Number], accuracies: Sequence[float], enough: float) -> Number:
    """The largest removal (share or number) at which, and below which, the accuracy is at least `enough`;
    0 if there is none.

    Args:
        removed: the removals, ascending.
        accuracies: the accuracy after each.
    """
    accurate = takewhile(lambda point: point[1] >= enough, zip(removed, accuracies, strict=True))
    return max((amount for amount, _ in accurate), default=0)
