"""A run folder, read once: what is missing is None or empty, what is damaged is an error that names the file."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..circuit import Circuit
from ..errors import DamagedFile, UserError
from ..files import read_json, read_text
from ..results import Measurement, Results
from ..scores import Scores

T = TypeVar("T")
EVALUATION = "sparc3.evaluation/1"
CARDS = "sparc3.cards/1"
SIDE_EFFECTS = ("perplexity", "kl", "fluency", "sparsity")


@dataclass(frozen=True)
class RunFolder:
    """Everything the report is made from.

    Attributes:
        texts: variant ("original", "ablated") → kind ("toxicity", "repetition") → prompts with their continuations.
        samples: name of a reference set → number of samples in it.
    """

    results: Results
    circuit: Circuit | None
    scores: Scores | None
    texts: dict[str, dict[str, list[dict[str, Any]]]]
    cards: list[dict[str, Any]]
    recipe: str | None
    environment: dict[str, Any]
    samples: dict[str, int]

    @property
    def provenance(self) -> dict[str, Any]:
        return self.results.provenance

    @property
    def unit(self) -> str:
        """What was removed: "neuron", "head", "weight"; "unit" where no file says."""
        return self.circuit.unit if self.circuit else self.scores.unit if self.scores else str(self.provenance.get("unit") or "unit")

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
        return scored.get("method") or (self.scores.provenance.get("method") if self.scores else self.provenance.get("method"))

    def measured(self, metric: str, variant: str) -> Measurement | None:
        return next((m for m in self.results if (m.metric, m.variant) == (metric, variant) and m.value is not None), None)

    def metrics(self) -> list[str]:
        """Names of all metrics, in the order they were measured, side effects last."""
        found = dict.fromkeys(m.metric for m in self.results)
        return sorted(found, key=lambda metric: SIDE_EFFECTS.index(metric) if metric in SIDE_EFFECTS else -1)


def read_folder(path: str | os.PathLike[str]) -> RunFolder:
    """Raises UserError where there is no results.json, DamagedFile where a file is not what it says."""
    folder = Path(path)
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder} holds no results.json, so there is nothing to report; name the folder of a finished run")
    variants = ("original", "ablated")
    texts = {name: found for name in variants if (found := _if_there(folder / "evaluation" / f"{name}.json", _texts))}
    samples = {file.stem: _lines(file) for file in sorted((folder / "samples").glob("*.jsonl"))}
    return RunFolder(
        results=Results.load(folder / "results.json"),
        circuit=_if_there(folder / "circuit.json", Circuit.load),
        scores=_if_there(folder / "scores" / "contrast.safetensors", Scores.load),
        texts=texts,
        cards=_if_there(folder / "cards.json", _cards) or [],
        recipe=_if_there(folder / "recipe.yaml", read_text),
        environment=_if_there(folder / "environment.json", _environment) or {},
        samples=samples,
    )


def _if_there(path: Path, read: Callable[[Path], T]) -> T | None:
    return read(path) if path.is_file() else None


def _lines(path: Path) -> int:
    with open(path, "rb") as opened:
        return sum(1 for line in opened if line.strip())


def _texts(path: Path) -> dict[str, list[dict[str, Any]]]:
    found = read_json(path, EVALUATION).get("texts") or {}
    good = isinstance(found, dict) and all(_is_prompt(row) for rows in found.values() for row in rows)
    if not good:
        raise DamagedFile(f"{path}: its texts are not as {EVALUATION} has them; make it again")
    return found


def _is_prompt(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not isinstance(row.get("continuations"), list):
        return False
    return all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in row["continuations"])


def _cards(path: Path) -> list[dict[str, Any]]:
    found = read_json(path, CARDS).get("cards")
    if not isinstance(found, list) or not all(isinstance(card, dict) and "module" in card and "index" in card for card in found):
        raise DamagedFile(f"{path}: its cards are not as {CARDS} has them; make it again")
    return found


def _environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedFile(f"{path} is not JSON ({error}); make it again") from None
    if not isinstance(found, dict):
        raise DamagedFile(f"{path} does not hold an object; make it again")
    return found
