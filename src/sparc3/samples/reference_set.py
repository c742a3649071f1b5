"""Samples: the texts on which relevance is computed, and the prompts of metrics, saved as JSONL
(`sparc3.samples/1`)."""

import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedFile, UserError
from ..settings import short
from ..storage import LARGEST, fingerprint, parse_json, read_json, write_json, write_text
from .chat import Turn, parse_turns
from .formats import MAX_LINE, detect_format, read_table, unpack

FORMAT = "sparc3.samples/1"
BLOCK = 2**20
MARK, BOM = b"<|endoftext|>", b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Sample:
    """One reference sample or prompt: a text, or token ids.

    Attributes:
        text: the text, or the prompt.
        input_ids: token ids instead of a text.
        target: a string that is a single token, for the targets `label` and `contrast`.
        contrast: another one, for the target `contrast`.
        completion: what follows the text, for the target `completion`; in a chat, the assistant's turn.
        line: its line in a file, which is ignored in comparisons.
        turns: in a chat, the turns before the completion; `text` is then their rendering by the template.
    """

    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    target: str | None = None
    contrast: str | None = None
    completion: str | None = None
    line: int | None = field(default=None, compare=False, repr=False)
    turns: tuple[Turn, ...] | None = None

    @property
    def words(self) -> str | None:
        """The prompt's words without its template, by which prompts are compared."""
        return self.text if self.turns is None else "\n".join(content for _, content in self.turns)

    @property
    def has_text(self) -> bool:
        """Whether any part is text, which needs a tokenizer."""
        parts = (self.text, self.target, self.contrast, self.completion, self.turns)
        return any(part is not None for part in parts)

    def row(self) -> dict[str, Any]:
        """The sample as a JSONL object, without absent parts."""
        row = {key: value for key, value in asdict(self).items() if value is not None and key != "line"}
        if turns := row.pop("turns", None):
            row["messages"] = [{"role": role, "content": content} for role, content in turns]
            if rendered := row.pop("text", None):
                row["rendered"] = rendered
        return row


@dataclass(frozen=True)
class ReferenceSet:
    """The samples on which relevance is computed, and their source."""

    samples: tuple[Sample, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def where(self, index: int) -> str:
        """A sample's name in messages: its line in its file, or its index in the set."""
        line, name = self.samples[index].line, self.source.get("source")
        return f"sample {index}" if line is None else f"{f'{name}, ' if name else ''}line {line}"

    @property
    def repeats(self) -> int:
        """The number of samples that repeat an earlier one, not counting blank lines. Repetitions count
        again in every mean."""
        samples = [sample for sample in self.samples if sample.text is None or sample.text.strip()]
        return len(samples) - len(set(samples))

    @property
    def fingerprint(self) -> str:
        """Identifies the content: the same samples in the same order have the same fingerprint."""
        return fingerprint([sample.row() for sample in self.samples])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSONL, one sample per line, and next to it `<name>.source.json` with their source."""
        source_info = {"format": FORMAT, "source": self.source, "fingerprint": self.fingerprint}
        lines = [sample.line for sample in self.samples]
        write_json(
            Path(path).with_suffix(".source.json"), source_info | ({"lines": lines} if any(lines) else {})
        )
        # The samples are written last: if that is cut short, no file of samples exists yet without its
        # source.
        rows = (json.dumps(sample.row(), ensure_ascii=False) for sample in self.samples)
        write_text(path, "".join(f"{row}\n" for row in rows))

    @classmethod
    def load(cls, path: str | os.PathLike[str], column: str | None = None) -> "ReferenceSet":
        """Read a file of samples (`Rows`). Raises UserError for a missing or empty file, or an invalid
        line, which it names."""
        samples = tuple(
            replace(parse_sample(row, f"{path}, line {number}"), line=number)
            for number, row in Rows(path, column)
        )
        source_path = Path(path).with_suffix(".source.json")
        if not source_path.is_file():
            return cls(samples, {"source": Path(path).name})
        source_info = read_json(source_path, FORMAT)
        reference_set = cls(samples, dict(source_info.get("source") or {}))
        if reference_set.fingerprint != source_info.get("fingerprint"):
            raise DamagedFile(
                f"{path} does not match {source_path.name}; create both again, or remove {source_path.name} "
                "if you changed the samples"
            )
        # A run's copy of the samples records their lines in the original file, for messages.
        lines = source_info.get("lines") or [None] * len(samples)
        return replace(
            reference_set, samples=tuple(map(lambda s, line: replace(s, line=line), samples, lines))
        )

    @classmethod
    def of(cls, samples: "ReferenceSet | Iterable[str | Sequence[int] | Sample]") -> "ReferenceSet":
        """A ReferenceSet of texts, token-id lists or Samples. Raises UserError if there are none."""
        if isinstance(samples, str):
            raise UserError(
                "samples is a single string; give a list of strings, or load a file with ReferenceSet.load"
            )
        if isinstance(samples, Mapping):  # a tokenizer's output: iterating over it would give its keys
            raise UserError("samples is a mapping; give a list, such as its 'input_ids' without padding")
        converted = []
        for index, item in enumerate(samples):
            if isinstance(item, str | Sample):
                converted.append(Sample(item) if isinstance(item, str) else item)
                continue
            try:
                converted.append(Sample(input_ids=tuple(map(int, item))))
            except (TypeError, ValueError):
                raise UserError(f"sample {index} is neither a text nor a list of token ids") from None
        if not converted:
            raise UserError("the reference set is empty; give at least one sample")
        return samples if isinstance(samples, ReferenceSet) else cls(tuple(converted))


class Rows(Sequence[tuple[int, dict[str, Any]]]):
    """The rows of a file of samples, each with its line number.

    JSON lines and text are read row by row on access: only the rows' offsets are in memory. A text file with
    <|endoftext|> marks has one text between two marks; any other has one text per line. CSV, TSV, Parquet and
    JSON arrays are read completely; formats without lines have row numbers instead. `column` names the column
    with the texts.

    Raises:
        UserError: a missing file, a row longer than MAX_LINE, or no rows; and, on access, a row that is not
            JSON or not UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str], column: str | None = None) -> None:
        self.path, self.column, self.opened = path, column, open_file(path)
        format = detect_format(self.opened, path)
        if column and format == "text":
            raise UserError(
                f"{path} is plain text, which has no column '{column}'; leave the key column out, or give "
                f"a table or JSON lines"
            )
        self.json = format == "json lines"
        self.table: list[tuple[int, dict[str, Any]]] | None = None
        if format not in ("json lines", "text"):
            self.table = [
                (number, self._apply_column(row, f"{path}, line {number}"))
                for number, row in read_table(self.opened, format, path, column)
            ]
            return
        separator = MARK if not self.json and _is_marked(self.opened) else b"\n"
        # Unsigned 64-bit numbers: 24 bytes a row, however long its text.
        self.starts, self.sizes, self.numbers = array("Q"), array("Q"), array("Q")
        number = 1
        for start, piece in _pieces(self.opened, separator, str(path)):
            if piece.strip():
                self.starts.append(start)
                self.sizes.append(len(piece))
                self.numbers.append(number)
            number += piece.count(b"\n") if separator == MARK else 1
        if not self.starts:
            raise UserError(f"{path} contains no samples; write one JSON object or one text per line")

    def __len__(self) -> int:
        return len(self.starts if self.table is None else self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.table is not None:
            return self.table[index]
        number, label = self.numbers[index], f"{self.path}, line {self.numbers[index]}"
        self.opened.seek(self.starts[index])
        text = _decode(self.opened.read(self.sizes[index]), label)
        if self.json:
            return number, self._apply_column(_json_row(text, label), label)
        return number, {"text": text.strip("\n")}

    def _apply_column(self, row: dict[str, Any], label: str) -> dict[str, Any]:
        """The row with the named column as its text, token ids or messages. The column itself stays too,
        as it may have a label inside (RealToxicityPrompts' prompt)."""
        if self.column is None:
            return row
        if row.get(self.column) is None:
            raise UserError(
                f"{label} has no column '{self.column}'; it has: {', '.join(map(str, row))}; check the key "
                f"column"
            )
        value = row[self.column]
        key = "text"
        if isinstance(value, dict):
            value = value.get("text")
        elif isinstance(value, list):
            key = "messages" if value and isinstance(value[0], dict) else "input_ids"
        cleared = dict.fromkeys(("text", "input_ids", "messages", "conversations"))
        return {**row, **cleared, key: value}


def read_whole(path: str | os.PathLike[str]) -> str:
    """The text of a file. Raises UserError if it is not text, or longer than LARGEST."""
    with open_file(path) as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise UserError(f"{path} is longer than {LARGEST:,} bytes; give a smaller file")
    return _decode(raw.removeprefix(BOM), str(path))


def _decode(raw: bytes, label: str) -> str:
    """The text with "\\n" as line ends. Raises UserError if it is not UTF-8 or contains NUL bytes."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{label} is not UTF-8 text; convert the file first") from None
    if "\0" in text:
        raise UserError(f"{label} contains NUL bytes, so this is not a text file; convert it first")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a file certainly has many texts: a table, JSON, or text with marks. Any other text file may
    be one text, or one text per line."""
    with open_file(path) as file:
        return detect_format(file, path) != "text" or _is_marked(file)


def _is_marked(file: BinaryIO) -> bool:
    file.seek(0)
    tail = b""
    while block := file.read(BLOCK):
        if MARK in tail + block:
            return True
        tail = block[-len(MARK) :]  # a mark may lie across two blocks
    return False


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A user's file, opened for reading bytes and unpacked. Raises UserError if it is missing, a folder, or
    unreadable."""
    try:
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        if not Path(path).is_file():
            raise UserError(f"no such file: {path}; check the path")
        return unpack(open(path, "rb"), path)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check the path"
        ) from None


def _pieces(file: BinaryIO, separator: bytes, path: str) -> Iterator[tuple[int, bytes]]:
    """The pieces between separators with their offsets; only one piece is in memory at a time."""
    file.seek(0)
    buffer = file.read(BLOCK)
    offset = len(BOM) if buffer.startswith(BOM) else 0
    start, buffer = offset, buffer[offset:]
    while True:
        *pieces, rest = buffer.split(separator)
        for piece in pieces:
            _require_short(piece, start, path)
            yield start, piece
            start += len(piece) + len(separator)
        _require_short(rest, start, path)
        block = file.read(BLOCK)
        if not block:
            yield start, rest
            return
        buffer = rest + block


def _require_short(piece: bytes, start: int, path: str) -> None:
    if len(piece) > MAX_LINE:
        raise UserError(
            f"{path} has a sample of more than {MAX_LINE:,} bytes, which begins at byte {start:,}; split it"
        )


def _json_row(line: str, label: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label} is not valid JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f'{label} is not a JSON object; write {{"text": …}}')
    return row


def read_toxicity(row: dict[str, Any], part: str, label: str) -> float | None:
    """The toxicity label of a row's prompt or continuation; None for a null label, as in some rows of
    RealToxicityPrompts.

    The label is `toxicity` inside the part, or a column `prompt.toxicity` or `prompt_toxicity`, or, for a
    prompt, the column `toxicity`.

    Raises:
        UserError: there is no such label, or it is not a number from 0 to 1.
    """
    part_value = row.get(part)
    labels = [part_value["toxicity"]] if isinstance(part_value, dict) and "toxicity" in part_value else []
    names = (f"{part}.toxicity", f"{part}_toxicity", *(("toxicity",) if part == "prompt" else ()))
    labels += [row[name] for name in names if name in row]
    if not labels:
        raise UserError(
            f"{label} has no toxicity of its {part}, which choose_by needs; add {part}_toxicity, or leave "
            f"choose_by out"
        )
    score = labels[0]
    if score is None or score == "" or score != score:  # tables use NaN for missing values
        return None
    try:
        value = math.nan if isinstance(score, bool) else float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise UserError(
            f"{label}: the toxicity of its {part} is {short(score)}, but must be a number from 0 to 1"
        )
    return value


def _read_chat(row: dict[str, Any], turns: tuple[Turn, ...], completion: str | None, label: str) -> Sample:
    """A chat. `rendered`, in files that we wrote, is the template's rendering of the messages."""
    for key in ("text", "input_ids"):
        if row.get(key) is not None:
            raise UserError(f'{label} has both messages and "{key}"; keep only one of them')
    texts: dict[str, Any] = {key: row.get(key) for key in ("rendered", "target", "contrast")} | {
        "completion": completion
    }
    _require_texts(
        texts | {f"message {number}": content for number, (_, content) in enumerate(turns, 1)}, label
    )
    return Sample(texts["rendered"], None, texts["target"], texts["contrast"], completion, turns=turns)


def _require_texts(values: dict[str, Any], label: str) -> None:
    for key, value in values.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f'{label}: "{key}" must be a string')
        if value is not None and re.search("[\ud800-\udfff]", value):
            raise UserError(
                f'{label}: "{key}" contains half a character (a lone surrogate); fix the program that wrote '
                "it"
            )


def parse_sample(row: dict[str, Any], label: str, answer: str = "chosen") -> Sample:
    """A Sample from a row of our own files, of RealToxicityPrompts, or of any data set with messages or a
    column `text` or `prompt`.

    Args:
        answer: "chosen" or "rejected": the answer of a preference set that follows the messages.
    """
    if (chat := parse_turns(row, answer, label)) is not None:
        return _read_chat(row, *chat, label)
    prompt, continuation = (
        value.get("text") if isinstance(value := row.get(key), dict) else value
        for key in ("prompt", "continuation")
    )
    text = prompt if row.get("text") is None else row["text"]
    completion = continuation if row.get("completion") is None else row["completion"]
    ids = row.get("input_ids")
    if text is not None and ids is not None:
        raise UserError(f'{label} has both a text and "input_ids"; keep only one of them')
    if text is None and ids is None:
        columns = ", ".join(map(str, row)) or "nothing"
        raise UserError(
            f'{label} has no "text", "prompt" or "input_ids", but {columns}; name the column of the texts '
            "with the key column"
        )
    if ids is not None and not (
        isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
    ):
        raise UserError(f'{label}: "input_ids" must be a non-empty list of token ids')
    target, contrast = row.get("target"), row.get("contrast")
    _require_texts({"text": text, "target": target, "contrast": contrast, "completion": completion}, label)
    if text is not None and not text:
        raise UserError(f'{label}: "text" is empty; leave the line out')
    return Sample(text, None if ids is None else tuple(ids), target, contrast, completion)
