"""Samples: what relevance is computed on and prompts are taken from. The first of the four nouns that are
written to disk."""

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
from .chat import Turn, turns_of
from .formats import MAX_LINE, format_of, read_table, unpack

FORMAT = "sparc3.samples/1"
BLOCK = 2**20
MARK, BOM = b"<|endoftext|>", b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Sample:
    """One reference sample or prompt: a text, or the token ids themselves.

    Attributes:
        text: the text (of a prompt: the prompt).
        input_ids: token ids, instead of a text.
        target: a string that is one token, for the targets `label` and `contrast`.
        contrast: another one, for the target `contrast`.
        completion: what follows the text, for the target `completion`; of a chat, the assistant's turn.
        line: of its file; no part of what the sample is.
        turns: of a chat, who says what before that; the text is what the model's template makes of them.
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
        """What a prompt says, whatever its template: prompts of the same words are the same prompt."""
        return self.text if self.turns is None else "\n".join(content for _, content in self.turns)

    @property
    def written(self) -> bool:
        """Whether some of it is text, which only a tokenizer can read."""
        parts = (self.text, self.target, self.contrast, self.completion, self.turns)
        return any(part is not None for part in parts)

    def row(self) -> dict[str, Any]:
        """The sample as a JSONL object: only what is there."""
        row = {key: value for key, value in asdict(self).items() if value is not None and key != "line"}
        if turns := row.pop("turns", None):
            row["messages"] = [{"role": role, "content": content} for role, content in turns]
            if rendered := row.pop("text", None):
                row["rendered"] = rendered
        return row


@dataclass(frozen=True)
class ReferenceSet:
    """The samples that relevance is computed on, and where they came from."""

    samples: tuple[Sample, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def where(self, index: int) -> str:
        """What a message calls a sample: its line in the file it came from, or its place in the set."""
        line, name = self.samples[index].line, self.source.get("source")
        return f"sample {index}" if line is None else f"{f'{name}, ' if name else ''}line {line}"

    @property
    def repeated(self) -> int:
        """How many samples are the same as an earlier one; each counts again in every mean. Blank lines are
        not counted."""
        written = [sample for sample in self.samples if sample.text is None or sample.text.strip()]
        return len(written) - len(set(written))

    @property
    def fingerprint(self) -> str:
        """Names the content: the same samples in the same order have the same one."""
        return fingerprint([sample.row() for sample in self.samples])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSONL, one sample a line, and beside it `<name>.source.json`, which says where they came
        from."""
        about = {"format": FORMAT, "source": self.source, "fingerprint": self.fingerprint}
        lines = [sample.line for sample in self.samples]
        write_json(Path(path).with_suffix(".source.json"), about | ({"lines": lines} if any(lines) else {}))
        rows = (json.dumps(sample.row(), ensure_ascii=False) for sample in self.samples)
        write_text(path, "".join(f"{row}\n" for row in rows))

    @classmethod
    def load(cls, path: str | os.PathLike[str], column: str | None = None) -> "ReferenceSet":
        """Read JSONL or a text file. Raises UserError for a missing or empty file, naming a line that does
        not fit."""
        samples = tuple(
            replace(sample_of(row, f"{path}, line {number}"), line=number)
            for number, row in Rows(path, column)
        )
        beside = Path(path).with_suffix(".source.json")
        if not beside.is_file():
            return cls(samples, {"source": Path(path).name})
        about = read_json(beside, FORMAT)
        found = cls(samples, dict(about.get("source") or {}))
        if found.fingerprint != about.get("fingerprint"):
            raise DamagedFile(
                f"{path} does not match {beside.name}; make it again, or remove that file if you changed "
                "the samples"
            )
        # What a run keeps names the lines of the file that the samples came from.
        lines = about.get("lines") or [None] * len(samples)
        return replace(found, samples=tuple(map(lambda s, line: replace(s, line=line), samples, lines)))

    @classmethod
    def of(cls, samples: "ReferenceSet | Iterable[str | Sequence[int] | Sample]") -> "ReferenceSet":
        """A ReferenceSet of texts, token-id lists or Samples. Raises UserError where there is none."""
        if isinstance(samples, str):
            raise UserError(
                "samples is a single string; give a list of strings, or load a file with ReferenceSet.load"
            )
        if isinstance(samples, Mapping):  # a tokenizer's output: going through it would give its keys
            raise UserError("samples is a mapping; give a list, such as its 'input_ids' without padding")
        made = []
        for index, item in enumerate(samples):
            if isinstance(item, str | Sample):
                made.append(Sample(item) if isinstance(item, str) else item)
                continue
            try:
                made.append(Sample(input_ids=tuple(map(int, item))))
            except (TypeError, ValueError):
                raise UserError(f"sample {index} is neither a text nor a list of token ids") from None
        if not made:
            raise UserError("the reference set is empty; give at least one sample")
        return samples if isinstance(samples, ReferenceSet) else cls(tuple(made))


class Rows(Sequence[tuple[int, dict[str, Any]]]):
    """The rows of a file of samples, each with the number of its line.

    JSON lines and text are read row by row, when a row is asked for: what is kept in memory is where each
    begins. A text file with <|endoftext|> marks has one text between two marks, any other one text a line.
    CSV, TSV, Parquet and JSON arrays are read whole, and their numbers are those of the rows where a format
    has no lines. Where a column is named, it is each row's text.

    Raises:
        UserError: no such file, a row longer than MAX_LINE, no row at all; and, when a row is asked for, one
            that is not JSON or not UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str], column: str | None = None) -> None:
        self.path, self.column, self.opened = path, column, open_file(path)
        form = format_of(self.opened, path)
        if column and form == "text":
            raise UserError(
                f"{path} is plain text, which has no column '{column}'; leave the key column out, or give "
                f"a table or JSON lines"
            )
        self.json = form == "json lines"
        self.table: list[tuple[int, dict[str, Any]]] | None = None
        if form not in ("json lines", "text"):
            self.table = [
                (number, self._named(row, f"{path}, line {number}"))
                for number, row in read_table(self.opened, form, path, column)
            ]
            return
        separator = MARK if not self.json and _is_marked(self.opened) else b"\n"
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
            return [self[place] for place in range(*index.indices(len(self)))]
        if self.table is not None:
            return self.table[index]
        number, where = self.numbers[index], f"{self.path}, line {self.numbers[index]}"
        self.opened.seek(self.starts[index])
        text = _decode(self.opened.read(self.sizes[index]), where)
        if self.json:
            return number, self._named(_json_row(text, where), where)
        return number, {"text": text.strip("\n")}

    def _named(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """The row with the named column as its text, token ids or messages; a label in it
        (RealToxicityPrompts' prompt) stays where it was."""
        if self.column is None:
            return row
        if row.get(self.column) is None:
            raise UserError(
                f"{where} has no column '{self.column}'; it has: {', '.join(map(str, row))}; check the key "
                f"column"
            )
        value = row[self.column]
        key = "text"
        if isinstance(value, dict):
            value = value.get("text")
        elif isinstance(value, list):
            key = "messages" if value and isinstance(value[0], dict) else "input_ids"
        others = dict.fromkeys(("text", "input_ids", "messages", "conversations"))
        return {**row, **others, key: value}


def read_whole(path: str | os.PathLike[str]) -> str:
    """The text of a file. Raises UserError where it is no text or longer than LARGEST."""
    with open_file(path) as opened:
        raw = opened.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise UserError(f"{path} is longer than {LARGEST:,} bytes; give a smaller file")
    return _decode(raw.removeprefix(BOM), str(path))


def _decode(raw: bytes, where: str) -> str:
    """Text however its lines end. Raises UserError where it is not UTF-8 or contains NUL bytes."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text; convert the file first") from None
    if "\0" in text:
        raise UserError(f"{where} contains NUL bytes, so this is not a text file; convert it first")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds many texts: a table, JSON, or text with marks. Any other text file may be one text
    or a text a line."""
    with open_file(path) as opened:
        return format_of(opened, path) != "text" or _is_marked(opened)


def _is_marked(opened: BinaryIO) -> bool:
    opened.seek(0)
    held = b""
    while block := opened.read(BLOCK):
        if MARK in held + block:
            return True
        held = block[-len(MARK) :]
    return False


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A file the user named, as bytes; gzip is unpacked. Raises UserError where it is missing, a folder, or
    cannot be read."""
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


def _pieces(opened: BinaryIO, separator: bytes, path: str) -> Iterator[tuple[int, bytes]]:
    """What stands between separators, with the place it begins at; of a file of any size only one piece is in
    memory."""
    opened.seek(0)
    held = opened.read(BLOCK)
    begin = len(BOM) if held.startswith(BOM) else 0
    start, held = begin, held[begin:]
    while True:
        *whole, rest = held.split(separator)
        for piece in whole:
            _require_short(piece, start, path)
            yield start, piece
            start += len(piece) + len(separator)
        _require_short(rest, start, path)
        block = opened.read(BLOCK)
        if not block:
            yield start, rest
            return
        held = rest + block


def _require_short(piece: bytes, start: int, path: str) -> None:
    if len(piece) > MAX_LINE:
        raise UserError(
            f"{path} has a sample of more than {MAX_LINE:,} bytes, which begins at byte {start:,}; split it"
        )


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; write {{"text": …}}')
    return row


def toxicity_of(row: dict[str, Any], part: str, where: str) -> float | None:
    """How toxic a row's prompt or continuation is by its own label; None where the label is null, as some of
    RealToxicityPrompts' are.

    Read are `prompt.toxicity` inside the part or as a column's name, `prompt_toxicity`, and, of a prompt,
    `toxicity` of the row itself.

    Raises:
        UserError: there is no such label, or it is no number between 0 and 1.
    """
    inside = row.get(part)
    labels = [inside["toxicity"]] if isinstance(inside, dict) and "toxicity" in inside else []
    names = (f"{part}.toxicity", f"{part}_toxicity", *(("toxicity",) if part == "prompt" else ()))
    labels += [row[name] for name in names if name in row]
    if not labels:
        raise UserError(
            f"{where} has no toxicity of its {part}, by which it is to be chosen; add {part}_toxicity, or "
            f"leave choose_by out"
        )
    found = labels[0]
    if found is None or found == "" or found != found:  # NaN is what a table has for nothing
        return None
    try:
        value = math.nan if isinstance(found, bool) else float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise UserError(
            f"{where}: the toxicity of its {part} is {short(found)}, and must be a number from 0 to 1"
        )
    return value


def _read_chat(row: dict[str, Any], turns: tuple[Turn, ...], completion: str | None, where: str) -> Sample:
    """A chat. What a file of ours has as `rendered` is the text that the model's template made."""
    for key in ("text", "input_ids"):
        if row.get(key) is not None:
            raise UserError(f'{where} has both messages and "{key}"; keep the one that is meant')
    texts: dict[str, Any] = {key: row.get(key) for key in ("rendered", "target", "contrast")} | {
        "completion": completion
    }
    _require_texts(
        texts | {f"message {number}": content for number, (_, content) in enumerate(turns, 1)}, where
    )
    return Sample(texts["rendered"], None, texts["target"], texts["contrast"], completion, turns=turns)


def _require_texts(values: dict[str, Any], where: str) -> None:
    for key, value in values.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f'{where}: "{key}" must be a string')
        if value is not None and re.search("[\ud800-\udfff]", value):
            raise UserError(
                f'{where}: "{key}" contains half a character (a lone surrogate); correct the program that '
                "wrote it"
            )


def sample_of(row: dict[str, Any], where: str, answer: str = "chosen") -> Sample:
    """A Sample of a row of ours, of RealToxicityPrompts, or of any set with a `text` or `prompt` column, or
    messages.

    Args:
        answer: "chosen" or "rejected": which of a preference set's answers follows the messages.
    """
    if (chat := turns_of(row, answer, where)) is not None:
        return _read_chat(row, *chat, where)
    prompt, continuation = (
        value.get("text") if isinstance(value := row.get(key), dict) else value
        for key in ("prompt", "continuation")
    )
    text = prompt if row.get("text") is None else row["text"]
    completion = continuation if row.get("completion") is None else row["completion"]
    ids = row.get("input_ids")
    if text is not None and ids is not None:
        raise UserError(f'{where} has both a text and "input_ids"; keep the one that is meant')
    if text is None and ids is None:
        held = ", ".join(map(str, row)) or "nothing"
        raise UserError(
            f'{where} has no "text", "prompt" or "input_ids", but {held}; name the one of the texts with the '
            "key column"
        )
    if ids is not None and not (
        isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
    ):
        raise UserError(f'{where}: "input_ids" must be a non-empty list of token ids')
    target, contrast = row.get("target"), row.get("contrast")
    _require_texts({"text": text, "target": target, "contrast": contrast, "completion": completion}, where)
    if text is not None and not text:
        raise UserError(f'{where}: "text" is empty; leave the line out')
    return Sample(text, None if ids is None else tuple(ids), target, contrast, completion)
