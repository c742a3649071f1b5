"""Reads a run folder once: a missing file gives None or an empty value, a damaged file raises an error that
names it."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..circuits.circuit import NAMES, Circuit
from ..errors import DamagedFile, UserError
from ..results import FORMAT, Budget, Difference, Measurement, Provenance, Results, Search, Variant
from ..samples.chat import Turn, show
from ..samples.reference_set import ReferenceSet
from ..scores import Scores
from ..settings import typed
from ..storage import parse_json, read_json, read_text
from ..verdict import SIDE_EFFECTS, behaviour_of

T = TypeVar("T")
EVALUATION = "sparc3.evaluation/1"
CARDS = "sparc3.cards/1"
TOKENS = "sparc3.tokens/1"
SEARCH = "sparc3.tune/1"

CLASSES = 8
"""Colours and shapes that the page has for other methods (`charts._SHAPES` and page.css)."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, and its score; None where it has none."""

    text: str
    score: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt with what one variant wrote after it."""

    prompt: str
    continuations: list[Continuation]


Texts = dict[str, list[Prompt]]
"""Kind ("toxicity", "repetition") → prompts with their continuations."""


@dataclass(frozen=True)
class Fired:
    """A prompt up to the token at which a unit fired."""

    prompt: str = ""
    token: str = ""
    activation: float | None = None


@dataclass(frozen=True)
class UnitCard:
    """One removed unit as cards.json has it; `strength`: where each unit has its own; `alone`: metric →
    figure with this unit alone removed."""

    module: str
    index: int
    layer: int | None = None
    strength: float | None = None
    general: float | None = None
    undesired: float | None = None
    promotes: list[str] = field(default_factory=list)
    suppresses: list[str] = field(default_factory=list)
    fired: list[Fired] = field(default_factory=list)
    alone: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenMap:
    """What the tokens of a sample did to its target `y`, as tokens.json has it; `positions`: where the target
    tokens are predicted; `against`: the tokens whose logits are subtracted."""

    tokens: list[str]
    relevance: list[float]
    positions: list[int]
    targets: list[str]
    against: list[str]
    y: float


@dataclass(frozen=True)
class Point:
    """One method at one number of units."""

    method: str
    count: int
    measurement: Measurement

    @property
    def variant(self) -> str:
        return self.measurement.variant

    @property
    def value(self) -> float:
        assert self.measurement.value is not None
        return self.measurement.value


@dataclass(frozen=True)
class RunFolder:
    """Everything the report is made from.

    Attributes:
        path: the folder itself.
        texts: variant ("original", "ablated") → what it wrote.
        samples: name of a reference set → number of samples in it.
        chats: prompt of a chat as `texts` have it → its turns.
        search: what a search under a budget tried (tune.json); None without one.
    """

    path: Path
    results: Results
    provenance: Provenance
    circuit: Circuit | None
    scores: Scores | None
    texts: dict[str, Texts]
    cards: list[UnitCard]
    token_maps: list[TokenMap]
    recipe: str | None
    environment: dict[str, Any]
    samples: dict[str, int]
    chats: dict[str, tuple[Turn, ...]]
    search: Search | None

    @property
    def model(self) -> dict[str, Any]:
        """What the results, or else the circuit, say of the model; "" where neither does."""
        said = self.provenance.model or (self.circuit.model if self.circuit else {})
        return {key: said.get(key) or "" for key in ("id", "architecture", "fingerprint")}

    @property
    def unit(self) -> str:
        """What was removed: "neuron", "head", "weight"; "unit" where no file says."""
        said = self.circuit or self.scores
        return said.unit if said else self.provenance.unit or "unit"

    @property
    def units(self) -> str:
        return f"{self.unit}s"

    def number_of(self, count: int) -> str:
        """ "1 neuron", "1,000 neurons"."""
        return f"{count:,} {self.unit if count == 1 else self.units}"

    @property
    def count(self) -> int:
        """How many units the circuit removes; 0 without one."""
        return len(self.circuit) if self.circuit else 0

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Module → number of units in it."""
        if self.scores is not None:
            return {name: tensor.numel() for name, tensor in self.scores.items()}
        return self.provenance.sizes

    @cached_property
    def total(self) -> int:
        """Units of all modules; 0 where no file says."""
        return sum(self.sizes.values())

    @property
    def method(self) -> str | None:
        """The method the circuit was found with; None where no file says."""
        scored = (self.circuit.provenance.get("scores") or {}) if self.circuit else {}
        said = self.scores.provenance.get("method") if self.scores else self.provenance.method
        return scored.get("method") or said

    def find(self, metric: str, variant: str) -> Measurement | None:
        """The figure of a metric on a variant; None where there is none."""
        found = (m for m in self.results if (m.metric, m.variant) == (metric, variant))
        return next((m for m in found if m.value is not None), None)

    def find_pair(self, metric: str | None) -> tuple[Measurement, Measurement] | None:
        """A metric on the original and on the circuit's model; None unless both were measured."""
        pair = [self.find(metric, variant) for variant in ("original", "ablated")] if metric else []
        return (pair[0], pair[1]) if pair and pair[0] and pair[1] else None

    def difference(self, metric: str, to: str = "ablated", from_: str = "original") -> Difference | None:
        named = (metric, from_, to)
        return next((d for d in self.results.differences if (d.metric, d.from_, d.to) == named), None)

    def points(self, metric: str) -> list[Point]:
        """Every method at every count that the metric was measured on, counts ascending."""
        rows = [(Variant.parse(m.variant), m) for m in self.results if m.metric == metric]
        found = [Point(v.method, v.count, m) for v, m in rows if v.count is not None and m.value is not None]
        return sorted(found, key=lambda point: point.count)

    @cached_property
    def methods(self) -> list[str]:
        """All methods measured at some count: the one the circuit was found with first, random last."""
        found = dict.fromkeys(
            v.method for m in self.results if (v := Variant.parse(m.variant)).count is not None
        )
        return sorted(found, key=lambda method: (method != self.method, method == "random"))

    @cached_property
    def colours(self) -> dict[str, str]:
        """Method → the class it is drawn in: m0 for the circuit's own, mr for random, else m1 … m8."""
        others = [method for method in self.methods if method not in (self.method, "random")]
        given = {method: f"m{index % CLASSES + 1}" for index, method in enumerate(others)}
        return {**({self.method: "m0"} if self.method else {}), **given, "random": "mr"}

    def last_points(self, metric: str) -> dict[str, Point]:
        """Method → its largest count that was measured."""
        last = {point.method: point for point in self.points(metric)}
        return {method: last[method] for method in self.methods if method in last}

    def rival_points(self, metric: str) -> list[Point]:
        """Other methods at the circuit's own count; empty without a circuit."""
        others = [point for point in self.points(metric) if point.method != self.method]
        return [point for point in others if self.circuit and point.count == self.count]

    def find_null(self, metric: str) -> Point | None:
        """As many random units as the circuit has; None where they were not measured."""
        return next((point for point in self.rival_points(metric) if point.method == "random"), None)

    @property
    def null_units(self) -> str:
        """ "100 random neurons"."""
        return f"{self.count:,} random {self.unit if self.count == 1 else self.units}"

    def harm(self, variant: str, damage: str = "perplexity") -> float | None:
        """A variant's relative increase of perplexity, or its KL divergence; None where not measured."""
        after, before = self.find(damage, variant), self.find(damage, "original")
        if after is None or after.value is None or damage == "kl":
            return after.value if after else None
        return after.value / before.value - 1 if before and before.value else None

    def budget(self, damage: str) -> float | None:
        """What the search was allowed to cost; None without a search, or without a bound on this damage."""
        asked = self.search.budget if self.search else Budget()
        return asked.max_perplexity_increase if damage == "perplexity" else asked.max_kl

    def budgeted(self, metric: str) -> list[tuple[Variant, Measurement]]:
        """Every other method at the count that was its best in the search, within the budget."""
        names = [one.variant for one in self.search.rivals] if self.search else []
        return [(Variant.parse(name), m) for name in names if (m := self.find(metric, name))]

    @cached_property
    def rival_texts(self) -> dict[str, Texts]:
        """Variant → what it wrote, of every other method: at the count nearest to the circuit's, then at its
        best within the search's budget."""
        nearest: dict[str, Point] = {}
        for point in self.points(self.behaviour or "") if self.circuit else ():
            held = nearest.get(point.method, point)
            nearest[point.method] = min(held, point, key=lambda p: abs(math.log((p.count or 1) / self.count)))
        names = [nearest[method].variant for method in self.methods if method in nearest]
        names = [name for name in names if Variant.parse(name).method != self.method]
        names += [str(variant) for variant, _ in self.budgeted(self.behaviour or "")]
        found: dict[str, Texts] = {}
        for name in dict.fromkeys(names):
            texts = _read_texts(self.path, name)
            found |= {name: texts} if texts else {}
        return found

    @cached_property
    def behaviour(self) -> str | None:
        """The metric the run is about: the one it names, else the first on both that is no side effect."""
        return behaviour_of(self.results)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order they were measured, side effects last."""
        found = dict.fromkeys(m.metric for m in self.results)
        return sorted(found, key=lambda metric: SIDE_EFFECTS.index(metric) if metric in SIDE_EFFECTS else -1)

    @cached_property
    def drawn(self) -> list[str]:
        """The metrics that a figure tells something of: the behaviour, side effects, then the rest."""
        mattering = {"correct": (self.behaviour, *SIDE_EFFECTS[:-1]), "compress": ("perplexity",)}
        first = [metric for metric in mattering.get(self.provenance.job, ()) if metric in self.metrics]
        return [m for m in dict.fromkeys([*first, *self.metrics]) if m and not m.startswith("sparsity")]


def read_folder(path: str | os.PathLike[str]) -> RunFolder:
    """Read the files of a finished run.

    Raises:
        UserError: the folder has no results.json.
        DamagedFile: a file does not follow its format.
    """
    folder = Path(path)
    where = folder / "results.json"
    if not where.is_file():
        raise UserError(
            f"{folder} has no results.json, so there is nothing to report. Name the folder of a finished run."
        )
    results = Results.load(where)
    try:
        provenance = results.read_provenance()
    except ValueError as error:
        said = " ".join(str(error).split())
        raise DamagedFile(f"{where}: the provenance does not follow the format {FORMAT}: {said}") from None
    written = {name: _read_texts(folder, name) for name in ("original", "ablated")}
    return RunFolder(
        path=folder,
        results=results,
        provenance=provenance,
        circuit=next((Circuit.load(file) for name in NAMES if (file := folder / name).is_file()), None),
        scores=_read_if_present(folder / "scores" / "contrast.safetensors", Scores.load),
        texts={name: texts for name, texts in written.items() if texts},
        cards=_read_part(folder / "cards.json", CARDS, "cards", list[UnitCard]) or [],
        token_maps=_read_part(folder / "tokens.json", TOKENS, "maps", list[TokenMap]) or [],
        recipe=_read_if_present(folder / "recipe.yaml", read_text),
        environment=_read_environment(folder / "environment.json"),
        samples={
            file.stem: sum(1 for line in file.read_bytes().splitlines() if line.strip())
            for file in sorted((folder / "samples").glob("*.jsonl"))
        },
        chats={
            show(sample.turns): sample.turns
            for file in sorted((folder / "samples").glob("evaluation-*.jsonl"))
            for sample in ReferenceSet.load(file)
            if sample.turns
        },
        search=_read_search(folder / "tune.json", provenance.tune, results),
    )


def _read_if_present(path: Path, read: Callable[[Path], T]) -> T | None:
    return read(path) if path.is_file() else None


def _read_texts(folder: Path, variant: str) -> Texts | None:
    """What a variant wrote; of several seeds or draws the first."""
    files = [folder / "evaluation" / f"{variant}{draw}.json" for draw in ("", ".0", ".seed0", ".seed0.0")]
    return next((_read_part(file, EVALUATION, "texts", Texts) for file in files if file.is_file()), None)


def _read_part(path: Path, format: str, key: str, kind: type[T]) -> T | None:
    """What a JSON file holds under a key; None where there is no such file, or nothing under the key."""
    found = read_json(path, format).get(key) if path.is_file() else None
    try:
        return None if found is None else typed(kind, found)
    except ValueError:
        raise DamagedFile(f"{path}: the {key} do not follow the format {format}. Make them again.") from None


def _read_search(path: Path, summary: Search | None, results: Results) -> Search | None:
    """The search in tune.json if it chose this run's circuit; otherwise the summary in results.json."""
    if summary is None:
        return None
    found = read_json(path, SEARCH) if path.is_file() else {}
    same = found.get("best") == results.provenance["tune"]["best"]
    try:
        chosen = typed(Search, found) if same else summary
        tried = [one.figures for one in chosen.candidates]
        tried += [one.figures for trials in chosen.others.values() for one in trials]
        good = bool(tried) and all("perplexity" in figures for figures in tried)
        good = good and chosen.original["perplexity"] > 0 and chosen.aim in chosen.original
    except (KeyError, ValueError):
        good = False
    if not good:
        where = path if same else path.with_name("results.json")
        raise DamagedFile(f"{where}: the search does not follow the format {SEARCH}. Run the search again.")
    return chosen


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        return typed(dict[str, Any], parse_json(read_text(path)) if path.is_file() else {})
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{path} is not a JSON object ({' '.join(str(error).split())}). Make it again."
        ) from None
