"""Samples: what relevance is computed on and prompts are taken from. The first of the four nouns that are written to disk."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DamagedFile, UserError
from .files import fingerprint, read_json, read_text, write_json, write_text

if TYPE_CHECKING:
    pass

FORMAT = "sparc3.samples/1"
MAX_LINE = 10_000_000
"""Longest JSONL line that is read, in characters: more is a mistake or an attack."""


@dataclass(frozen=True)
class Sample:
    """One reference sample or prompt: a text, or the token ids themselves.

    Attributes:
        text: the text (of a prompt: the prompt).
        input_ids: token ids, instead of a text.
        target: a string that is one token, for the targets `label` and `contrast`.
        contrast: another one, for the target `contrast`.
        completion: what follows the text, for the target `completion`.
    """

    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    target: str | None = None
    contrast: str | None = None
    completion: str | None = None

    def row(self) -> dict[str, Any]:
        """The sample as a JSONL object: only what is there."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ReferenceSet:
    """The samples that relevance is computed on, and where they came from."""

    samples: tuple[Sample, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def fingerprint(self) -> str:
        """Names the content: the same samples in the same order have the same one."""
        return fingerprint([sample.row() for sample in self.samples])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSONL, one sample a line, and beside it `<name>.source.json`, which says where they came from."""
        write_json(Path(path).with_suffix(".source.json"), {"format": FORMAT, "source": self.source, "fingerprint": self.fingerprint})
        write_text(path, "".join(json.dumps(sample.row(), ensure_ascii=False) + "\n" for sample in self.samples))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ReferenceSet":
        """Read JSONL or a text file. Raises UserError for a missing or empty file, naming a line that does not fit."""
        rows = read_rows(path)
        samples = tuple(sample_of(row, f"{path}, line {number}") for number, row in rows)
        beside = Path(path).with_suffix(".source.json")
        if not beside.is_file():
            return cls(samples, {"source": Path(path).name})
        found = cls(samples, read_json(beside, FORMAT)["source"])
        if found.fingerprint != read_json(beside, FORMAT).get("fingerprint"):
            raise DamagedFile(f"{path} is not what {beside.name} says; make it again, or remove that file if you changed the samples")
        return found

    @classmethod
    def of(cls, samples: "ReferenceSet | Iterable[str | Sequence[int] | Sample]") -> "ReferenceSet":
        """A ReferenceSet of texts, token-id lists or Samples. Raises UserError where there is none."""
        if isinstance(samples, ReferenceSet):
            found = samples
        else:
            if isinstance(samples, str):
                raise UserError("samples is a single string; give a list of strings, or load a file with ReferenceSet.load")
            made = []
            for index, item in enumerate(samples):
                if isinstance(item, Sample):
                    made.append(item)
                elif isinstance(item, str):
                    made.append(Sample(text=item))
                else:
                    try:
                        made.append(Sample(input_ids=tuple(int(token) for token in item)))
                    except (TypeError, ValueError):
                        raise UserError(f"sample {index} is neither a text nor a list of token ids") from None
            found = cls(tuple(made))
        if not found.samples:
            raise UserError("the reference set is empty; give at least one sample")
        return found


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file, or of a text file, with the number of the line each began on.

    A text file with <|endoftext|> marks has one text between two marks, any other one text a line.
    """
    text = read_text(path)
    rows: list[tuple[int, dict[str, Any]]] = []
    if Path(path).suffix in (".jsonl", ".json", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > MAX_LINE:
                raise UserError(f"{path}, line {number} has {len(line):,} characters, more than {MAX_LINE:,}; split the sample")
            if line.strip():
                rows.append((number, _json_row(line, f"{path}, line {number}")))
    else:
        rows = [(number, {"text": piece}) for number, piece in _texts_of(text) if piece.strip()]
    if not rows:
        raise UserError(f"{path} holds no sample; give one JSON object a line, or one text a line")
    return rows


def _texts_of(text: str) -> Iterator[tuple[int, str]]:
    number = 1
    marked = "<|endoftext|>" in text
    for piece in text.split("<|endoftext|>") if marked else text.split("\n"):
        yield number, piece.strip("\n")
        number += piece.count("\n") if marked else 1


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write {{\"text\": …}}")
    return row


def sample_of(row: dict[str, Any], where: str) -> Sample:
    """A Sample of a row of ours, of RealToxicityPrompts, or of any set with a `text` or `prompt` column."""
    prompt, continuation = row.get("prompt"), row.get("continuation")
    text = row.get("text", prompt.get("text") if isinstance(prompt, dict) else prompt)
    completion = row.get("completion", continuation.get("text") if isinstance(continuation, dict) else None)
    ids = row.get("input_ids")
    if (text is None) == (ids is None):
        raise UserError(f"{where} needs either \"text\" or \"input_ids\"")
    if ids is not None and not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
        raise UserError(f"{where}: \"input_ids\" must be a non-empty list of token ids")
    for key, value in (("text", text), ("target", row.get("target")), ("contrast", row.get("contrast")), ("completion", completion)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: \"{key}\" must be a string")
    if text is not None and not text:
        raise UserError(f"{where}: \"text\" is empty")
    return Sample(text, tuple(ids) if ids is not None else None, row.get("target"), row.get("contrast"), completion)
