"""Read a run folder once. A missing file gives None or an empty value; a damaged file raises an error that
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
from ..samples.reference_set import Rows, parse_sample
from ..scores import Scores
from ..settings import parse_typed
from ..storage import parse_json, read_json, read_text
from ..verdict import SIDE_EFFECTS, behaviour_of

T = TypeVar("T")
EVALUATION = "sparc3.evaluation/1"
CARDS = "sparc3.cards/1"
TOKENS = "sparc3.tokens/1"
SEARCH = "sparc3.tune/1"

CLASSES = 8
"""Number of colours and shapes that the page has for other methods (`charts._SHAPES` and page.css)."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, and its score; None without one."""

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
    """One removed unit in cards.json; `strength`: its own, if each unit has one; `alone`: metric → figure
    with only this unit removed."""

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
    """The tokens of a sample in tokens.json with their relevance to its target `y`; `positions`: where the
    target tokens are predicted; `against`: the tokens whose logits are subtracted."""

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
        """id, architecture and fingerprint of the model, from the results or else the circuit; "" if
        unknown."""
        info = self.provenance.model or (self.circuit.model if self.circuit else {})
        return {key: info.get(key) or "" for key in ("id", "architecture", "fingerprint")}

    @property
    def unit(self) -> str:
        """What was removed: "neuron", "head", "weight"; "unit" if unknown."""
        source = self.circuit or self.scores
        return source.unit if source else self.provenance.unit or "unit"

    @property
    def units(self) -> str:
        return f"{self.unit}s"

    def write_count(self, count: int) -> str:
        """ "1 neuron", "1,000 neurons"."""
        return f"{count:,} {self.unit if count == 1 else self.units}"

    @property
    def count(self) -> int:
        """The number of units in the circuit; 0 without one."""
        return len(self.circuit) if self.circuit else 0

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Module → number of units in it."""
        if self.scores is not None:
            return {name: tensor.numel() for name, tensor in self.scores.items()}
        return self.provenance.sizes

    @cached_property
    def total(self) -> int:
        """The number of units in all modules; 0 if unknown."""
        return sum(self.sizes.values())

    @property
    def method(self) -> str | None:
        """The method that found the circuit; None if unknown."""
        score_info = (self.circuit.provenance.get("scores") or {}) if self.circuit else {}
        fallback = self.scores.provenance.get("method") if self.scores else self.provenance.method
        return score_info.get("method") or fallback

    def find(self, metric: str, variant: str) -> Measurement | None:
        """The measurement of a metric on a variant; None without a figure."""
        matching = (m for m in self.results if (m.metric, m.variant) == (metric, variant))
        return next((m for m in matching if m.value is not None), None)

    def find_pair(self, metric: str | None) -> tuple[Measurement, Measurement] | None:
        """A metric on the original and on the circuit's model; None unless both were measured."""
        pair = [self.find(metric, variant) for variant in ("original", "ablated")] if metric else []
        return (pair[0], pair[1]) if pair and pair[0] and pair[1] else None

    def difference(self, metric: str, to: str = "ablated", from_: str = "original") -> Difference | None:
        key = (metric, from_, to)
        return next((d for d in self.results.differences if (d.metric, d.from_, d.to) == key), None)

    def points(self, metric: str) -> list[Point]:
        """Every method at every count that the metric was measured on, counts ascending."""
        rows = [(Variant.parse(m.variant), m) for m in self.results if m.metric == metric]
        points = [Point(v.method, v.count, m) for v, m in rows if v.count is not None and m.value is not None]
        return sorted(points, key=lambda point: point.count)

    @cached_property
    def methods(self) -> list[str]:
        """All methods measured at some count: first the one that found the circuit, last random."""
        methods = dict.fromkeys(
            v.method for m in self.results if (v := Variant.parse(m.variant)).count is not None
        )
        return sorted(methods, key=lambda method: (method != self.method, method == "random"))

    @cached_property
    def colours(self) -> dict[str, str]:
        """Method → its CSS class in charts: m0 for the circuit's own, mr for random, else m1 … m8."""
        others = [method for method in self.methods if method not in (self.method, "random")]
        # With more methods than classes, the first classes are used again.
        classes = {method: f"m{index % CLASSES + 1}" for index, method in enumerate(others)}
        return {**({self.method: "m0"} if self.method else {}), **classes, "random": "mr"}

    def last_points(self, metric: str) -> dict[str, Point]:
        """Method → the point of its largest measured count."""
        last = {point.method: point for point in self.points(metric)}
        return {method: last[method] for method in self.methods if method in last}

    def rival_points(self, metric: str) -> list[Point]:
        """Other methods at the circuit's own count; empty without a circuit."""
        others = [point for point in self.points(metric) if point.method != self.method]
        return [point for point in others if self.circuit and point.count == self.count]

    def find_null(self, metric: str) -> Point | None:
        """The point of as many random units as the circuit has; None if not measured."""
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
        """The search's budget for this damage; None without a search or a bound."""
        budget = self.search.budget if self.search else Budget()
        return budget.max_perplexity_increase if damage == "perplexity" else budget.max_kl

    def rivals_under_budget(self, metric: str) -> list[tuple[Variant, Measurement]]:
        """Every other method at its best count in the search, within the budget."""
        names = [rival.variant for rival in self.search.rivals] if self.search else []
        return [(Variant.parse(name), m) for name in names if (m := self.find(metric, name))]

    @cached_property
    def rival_texts(self) -> dict[str, Texts]:
        """Variant → what it wrote, for every other method: at the count nearest to the circuit's, then at its
        best count within the search's budget."""
        nearest: dict[str, Point] = {}
        for point in self.points(self.behaviour or "") if self.circuit else ():
            closest = nearest.get(point.method, point)
            # Distances are ratios: from 100 units, 10 are as far away as 1,000.
            nearest[point.method] = min(
                closest, point, key=lambda p: abs(math.log((p.count or 1) / self.count))
            )
        names = [nearest[method].variant for method in self.methods if method in nearest]
        names = [name for name in names if Variant.parse(name).method != self.method]
        names += [str(variant) for variant, _ in self.rivals_under_budget(self.behaviour or "")]
        texts_by_name: dict[str, Texts] = {}
        for name in dict.fromkeys(names):
            texts = _read_texts(self.path, name)
            texts_by_name |= {name: texts} if texts else {}
        return texts_by_name

    @cached_property
    def behaviour(self) -> str | None:
        """The metric that the run is about (`behaviour_of`)."""
        return behaviour_of(self.results)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order they were measured, side effects last."""
        names = dict.fromkeys(m.metric for m in self.results)
        return sorted(names, key=lambda metric: SIDE_EFFECTS.index(metric) if metric in SIDE_EFFECTS else -1)

    @cached_property
    def chart_metrics(self) -> list[str]:
        """The metrics with charts: the behaviour, side effects, then the rest without sparsity."""
        by_job = {"correct": (self.behaviour, *SIDE_EFFECTS[:-1]), "compress": ("perplexity",)}
        first = [metric for metric in by_job.get(self.provenance.job, ()) if metric in self.metrics]
        return [m for m in dict.fromkeys([*first, *self.metrics]) if m and not m.startswith("sparsity")]


def read_folder(path: str | os.PathLike[str]) -> RunFolder:
    """Read the files of a finished run.

    Raises:
        UserError: the folder has no results.json.
        DamagedFile: a file does not follow its format.
    """
    folder = Path(path)
    path_of_results = folder / "results.json"
    if not path_of_results.is_file():
        raise UserError(
            f"{folder} has no results.json, so there is nothing to report. Name the folder of a finished run."
        )
    results = Results.load(path_of_results)
    try:
        provenance = results.read_provenance()
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DamagedFile(
            f"{path_of_results}: the provenance does not follow the format {FORMAT}: {reason}"
        ) from None
    texts_by_variant = {name: _read_texts(folder, name) for name in ("original", "ablated")}
    return RunFolder(
        path=folder,
        results=results,
        provenance=provenance,
        circuit=next((Circuit.load(file) for name in NAMES if (file := folder / name).is_file()), None),
        scores=_read_if_present(folder / "scores" / "contrast.safetensors", Scores.load),
        texts={name: texts for name, texts in texts_by_variant.items() if texts},
        cards=_read_part(folder / "cards.json", CARDS, "cards", list[UnitCard]) or [],
        token_maps=_read_part(folder / "tokens.json", TOKENS, "maps", list[TokenMap]) or [],
        recipe=_read_if_present(folder / "recipe.yaml", read_text),
        environment=_read_environment(folder / "environment.json"),
        samples={
            file.stem: sum(1 for line in file.read_bytes().splitlines() if line.strip())
            for file in sorted((folder / "samples").glob("*.jsonl"))
        },
        chats=_read_chats(folder),
        search=_read_search(folder / "tune.json", provenance.tune, results),
    )


def _read_chats(folder: Path) -> dict[str, tuple[Turn, ...]]:
    """What a prompt is shown as → its turns, of all chats that the run was measured on.

    Rows of text are passed over unread: those of WikiText are empty where it has an empty line.
    """
    samples = [
        parse_sample(row, f"{file}, line {number}")
        for file in sorted((folder / "samples").glob("evaluation-*.jsonl"))
        for number, row in Rows(file)
        if "messages" in row
    ]
    return {show(sample.turns): sample.turns for sample in samples if sample.turns}


def _read_if_present(path: Path, read: Callable[[Path], T]) -> T | None:
    return read(path) if path.is_file() else None


def _read_texts(folder: Path, variant: str) -> Texts | None:
    """What a variant wrote, with the first of several seeds or draws; None if there are no texts."""
    files = [folder / "evaluation" / f"{variant}{draw}.json" for draw in ("", ".0", ".seed0", ".seed0.0")]
    return next((_read_part(file, EVALUATION, "texts", Texts) for file in files if file.is_file()), None)


def _read_part(path: Path, format: str, key: str, kind: type[T]) -> T | None:
    """The value of a key in a JSON file; None if there is no such file or key."""
    content = read_json(path, format).get(key) if path.is_file() else None
    try:
        return None if content is None else parse_typed(kind, content)
    except ValueError:
        raise DamagedFile(
            f"{path}: the {key} do not follow the format {format}. Run the run again."
        ) from None


def _read_search(path: Path, summary: Search | None, results: Results) -> Search | None:
    """The search in tune.json if it chose this run's circuit; otherwise the summary in results.json."""
    if summary is None:
        return None
    content = read_json(path, SEARCH) if path.is_file() else {}
    # tune.json has every trial, but another search in the same folder may have replaced it since.
    is_current = content.get("best") == results.provenance["tune"]["best"]
    try:
        search = parse_typed(Search, content) if is_current else summary
        all_figures = [trial.figures for trial in search.candidates]
        all_figures += [trial.figures for trials in search.others.values() for trial in trials]
        is_valid = bool(all_figures) and all("perplexity" in figures for figures in all_figures)
        is_valid = is_valid and search.original["perplexity"] > 0 and search.aim in search.original
    except (KeyError, ValueError):
        is_valid = False
    if not is_valid:
        damaged = path if is_current else path.with_name("results.json")
        raise DamagedFile(f"{damaged}: the search does not follow the format {SEARCH}. Run the search again.")
    return search


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        return parse_typed(dict[str, Any], parse_json(read_text(path)) if path.is_file() else {})
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{path} is not a JSON object ({' '.join(str(error).split())}). Make it again."
        ) from None
