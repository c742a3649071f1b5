"""Reads a run folder once: a missing file gives None or an empty value, a damaged file raises an error that
names it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..circuits.circuit import NAMES, Circuit
from ..errors import DamagedFile, UserError
from ..results import Difference, Measurement, Results
from ..scores import Scores
from ..storage import read_json, read_text

T = TypeVar("T")
EVALUATION = "sparc3.evaluation/1"
CARDS = "sparc3.cards/1"
SEARCH = "sparc3.tune/1"
SIDE_EFFECTS = ("perplexity", "kl", "fluency", "sparsity")


@dataclass(frozen=True)
class RunFolder:
    """Everything the report is made from.

    Attributes:
        path: the folder itself.
        texts: variant ("original", "ablated") → kind ("toxicity", "repetition") → prompts with their
            continuations.
        samples: name of a reference set → number of samples in it.
        search: what a search under a budget tried (tune.json); empty without one.
    """

    path: Path
    results: Results
    circuit: Circuit | None
    scores: Scores | None
    texts: dict[str, dict[str, list[dict[str, Any]]]]
    cards: list[dict[str, Any]]
    recipe: str | None
    environment: dict[str, Any]
    samples: dict[str, int]
    search: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        return self.results.provenance

    @property
    def model(self) -> dict[str, Any]:
        """What the results, or else the circuit, say of the model; empty where neither does."""
        return self.provenance.get("model") or (self.circuit.model if self.circuit else {}) or {}

    @property
    def unit(self) -> str:
        """What was removed: "neuron", "head", "weight"; "unit" where no file says."""
        return (
            self.circuit.unit
            if self.circuit
            else self.scores.unit
            if self.scores
            else str(self.provenance.get("unit") or "unit")
        )

    @property
    def job(self) -> str:
        """What the run was for: "correct", "discover" or "compress"."""
        return str(self.provenance.get("job") or "correct")

    @property
    def sizes(self) -> dict[str, int]:
        """Module → number of units in it."""
        if self.scores is not None:
            return {name: tensor.numel() for name, tensor in self.scores.items()}
        return {str(name): int(size) for name, size in dict(self.provenance.get("sizes") or {}).items()}

    @property
    def method(self) -> str | None:
        """The method the circuit was found with; None where no file says."""
        scored = (self.circuit.provenance.get("scores") or {}) if self.circuit else {}
        return scored.get("method") or (
            self.scores.provenance.get("method") if self.scores else self.provenance.get("method")
        )

    def find_measurement(self, metric: str, variant: str) -> Measurement | None:
        return next(
            (m for m in self.results if (m.metric, m.variant) == (metric, variant) and m.value is not None),
            None,
        )

    def difference(self, metric: str, to: str = "ablated", from_: str = "original") -> Difference | None:
        return next(
            (d for d in self.results.differences if (d.metric, d.from_, d.to) == (metric, from_, to)), None
        )

    @property
    def behaviour(self) -> str | None:
        """The metric the run is about: the one its provenance names, else the first measured on both that is
        not a side effect."""
        both = [
            metric
            for metric in self.metrics()
            if self.find_measurement(metric, "original") and self.find_measurement(metric, "ablated")
        ]
        named = self.provenance.get("headline")
        if named in both:
            return str(named)
        return next((metric for metric in both if metric not in SIDE_EFFECTS), both[0] if both else None)

    def metrics(self) -> list[str]:
        """Names of all metrics, in the order they were measured, side effects last."""
        found = dict.fromkeys(m.metric for m in self.results)
        return sorted(found, key=lambda metric: SIDE_EFFECTS.index(metric) if metric in SIDE_EFFECTS else -1)

    def drawn(self) -> list[str]:
        """Names of the metrics that a figure tells something of: what the run is about, its side effects,
        then the rest."""
        mattering = {"correct": (self.behaviour, *SIDE_EFFECTS[:-1]), "compress": ("perplexity",)}.get(
            self.job, ()
        )
        first = [metric for metric in mattering if metric]
        ordered = dict.fromkeys([*(m for m in first if m in self.metrics()), *self.metrics()])
        return [metric for metric in ordered if not metric.startswith("sparsity")]


def read_folder(path: str | os.PathLike[str]) -> RunFolder:
    """Read the files of a finished run.

    Raises:
        UserError: the folder has no results.json.
        DamagedFile: a file does not follow its format.
    """
    folder = Path(path)
    if not (folder / "results.json").is_file():
        raise UserError(
            f"{folder} has no results.json, so there is nothing to report. Name the folder of a finished run."
        )
    results = Results.load(folder / "results.json")
    variants = ("original", "ablated")
    texts = {
        name: found
        for name in variants
        if (found := _read_if_present(folder / "evaluation" / f"{name}.json", _read_texts))
    }
    samples = {file.stem: _count_lines(file) for file in sorted((folder / "samples").glob("*.jsonl"))}
    return RunFolder(
        path=folder,
        results=results,
        circuit=next((Circuit.load(file) for name in NAMES if (file := folder / name).is_file()), None),
        scores=_read_if_present(folder / "scores" / "contrast.safetensors", Scores.load),
        texts=texts,
        cards=_read_if_present(folder / "cards.json", _read_cards) or [],
        recipe=_read_if_present(folder / "recipe.yaml", read_text),
        environment=_read_if_present(folder / "environment.json", _read_environment) or {},
        samples=samples,
        search=_read_search(folder / "tune.json", results),
    )


def _read_if_present(path: Path, read: Callable[[Path], T]) -> T | None:
    return read(path) if path.is_file() else None


def _count_lines(path: Path) -> int:
    with open(path, "rb") as opened:
        return sum(1 for line in opened if line.strip())


def _read_texts(path: Path) -> dict[str, list[dict[str, Any]]]:
    found = read_json(path, EVALUATION).get("texts") or {}
    good = isinstance(found, dict) and all(_is_prompt(row) for rows in found.values() for row in rows)
    if not good:
        raise DamagedFile(
            f"{path}: the texts do not follow the format {EVALUATION}. Run the evaluation again."
        )
    return found


def _is_prompt(row: Any) -> bool:
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("prompt"), str)
        or not isinstance(row.get("continuations"), list)
    ):
        return False
    return all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in row["continuations"])


def _read_cards(path: Path) -> list[dict[str, Any]]:
    found = read_json(path, CARDS).get("cards")
    if not isinstance(found, list) or not all(
        isinstance(card, dict) and "module" in card and "index" in card for card in found
    ):
        raise DamagedFile(f"{path}: the cards do not follow the format {CARDS}. Make them again.")
    return found


def _read_search(path: Path, results: Results) -> dict[str, Any]:
    """The search in tune.json if it chose this run's circuit; otherwise the summary in results.json."""
    summary = dict(results.provenance.get("tune") or {})
    found = _read_if_present(path, lambda where: read_json(where, SEARCH)) or {}
    same = bool(summary) and found.get("best") == summary.get("best")
    try:
        chosen = found if same else summary
        places = [
            (float(one["figures"]["perplexity"]), int(one["count"]))
            for one in [*(chosen.get("candidates") or []), *_other_methods_rows(chosen)]
        ]
        good = not chosen or (
            bool(places)
            and float(chosen["original"]["perplexity"]) > 0
            and str(chosen["aim"]) in chosen["original"]
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise DamagedFile(
            f"{path if same else path.with_name('results.json')}: the search does not follow the format "
            f"{SEARCH}. Run the search again."
        )
    return chosen


def _other_methods_rows(search: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for rows in dict(search.get("others") or {}).values() for row in rows]


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedFile(f"{path} is not valid JSON ({error}). Make it again.") from None
    if not isinstance(found, dict):
        raise DamagedFile(f"{path} does not hold a JSON object. Make it again.")
    return found
