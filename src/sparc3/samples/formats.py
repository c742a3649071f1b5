"""Formats of sample files: which one a file has, gzip or zstd around it, and reading CSV, TSV, Parquet and
JSON arrays."""

import csv
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import UserError
from ..storage import GZIP

JSON_LINES = (".jsonl", ".ndjson", ".jl", ".jsonlines")
PLAIN_TEXT = (".txt", ".text", ".raw", ".md")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
PACKED = (".gz", ".zst")
ZSTD = b"\x28\xb5\x2f\xfd"
"""How every zstd file begins."""
COLUMNS = ("text", "prompt", "input_ids", "messages", "conversations", "chosen")
"""A table has one of these columns, unless another is named; `target`, `contrast`, `completion` and
`continuation` are read beside it."""
UNREADABLE = (".bz2", ".xz", ".zip", ".arrow", ".feather", ".xlsx", ".tar")
START = 65_536
"""Bytes that are looked at to tell a format by its content."""
MAX_LINE = 10_000_000
"""Longest sample that is read, in bytes: more is a mistake or an attack."""


def unpack(opened: BinaryIO, path: str | os.PathLike[str]) -> BinaryIO:
    """The bytes of an open file; of a gzip or zstd file those inside it, in a temporary file that goes when
    it is closed.

    Raises:
        UserError: the packed file is truncated or damaged, or pyarrow was built without zstd.
    """
    start = opened.read(len(ZSTD))
    opened.seek(0)
    kind = "gzip" if start.startswith(GZIP) else "zstd" if start == ZSTD else None
    if kind is None:
        return opened
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller reads it)
    try:
        with opened, _unpacking(opened, kind, path) as packed:
            shutil.copyfileobj(packed, unpacked)
    except (OSError, EOFError, zlib.error) as error:
        unpacked.close()
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole {kind} file ({reason}); download it again") from None
    unpacked.seek(0)
    return cast(BinaryIO, unpacked)


def _unpacking(opened: BinaryIO, kind: str, path: str | os.PathLike[str]) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=opened)
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise UserError(f"{path}: .zst files are not read, since pyarrow was built without zstd; unpack it")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(opened), "zstd")


def plain_name(path: str | os.PathLike[str]) -> str:
    """The file's name in lower case, without the suffix of what it is packed in."""
    name = Path(path).name.lower()
    return next((name.removesuffix(packed) for packed in PACKED if name.endswith(packed)), name)


def format_of(opened: BinaryIO, path: str | os.PathLike[str]) -> str:
    """The format of a file of samples: "json lines", "json array", "csv", "tsv", "parquet" or "text".

    The name decides where it says it (in any case, `.gz` and `.zst` apart); a name that says nothing leaves
    it to the content.

    Raises:
        UserError: a format that is not read, named with what to do.
    """
    suffix = Path(plain_name(path)).suffix
    if suffix in UNREADABLE:
        raise UserError(
            f"{path}: {suffix} files are not supported; convert it to JSON lines, CSV, Parquet or text"
        )
    opened.seek(0)
    start = opened.read(START)
    opened.seek(0)
    if suffix in PARQUET or start.startswith(b"PAR1"):
        return "parquet"
    if suffix in DELIMITERS:
        return suffix[1:]
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix in JSON_LINES or suffix == ".json":
        return "json array" if first.startswith(b"[") else "json lines"
    if suffix not in PLAIN_TEXT:
        if _is_object(first.split(b"\n", 1)[0]):
            return "json lines"
        if first.startswith(b"[") and _is_list(first):
            return "json array"
    return "text"


def read_table(
    opened: BinaryIO, form: str, path: str | os.PathLike[str], column: str | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV, TSV, Parquet or JSON array file, each with its line (CSV, TSV) or its number from 1.

    Args:
        column: the one that holds the texts, where it is none of COLUMNS.

    Raises:
        UserError: a file that is not as its format has it, without rows, or without a column of texts.
    """
    try:
        if form == "parquet":
            import pyarrow.parquet

            rows = list(enumerate(pyarrow.parquet.read_table(opened).to_pylist(), 1))
        elif form == "json array":
            rows = list(enumerate(_objects(opened, path), 1))
        else:
            rows = list(_records(opened, DELIMITERS["." + form]))
    except (ValueError, csv.Error, RecursionError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as {form} ({reason}); check the file") from None
    if not rows:
        raise UserError(f"{path} has no rows; give at least one")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if column is None and not set(columns) & set(COLUMNS):
        held = ", ".join(map(str, columns))
        raise UserError(
            f"{path} has no column named text, prompt or messages, but {held}; name one with the key column"
        )
    return rows


def _records(opened: BinaryIO, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table with a header; an empty cell counts as absent. Where the header has none of the
    delimiter, it may have another: spreadsheets write CSV with semicolons where the comma is decimal."""
    limit_before = csv.field_size_limit(MAX_LINE)  # of the whole process
    try:
        lines = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        header = lines.readline()
        lines.seek(0)
        delimiter = next((each for each in (delimiter, ";", "\t", ",") if each in header), delimiter)
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has another number of cells than the header")
            yield reader.line_num, {key: cell for key, cell in row.items() if cell != ""}
    finally:
        csv.field_size_limit(limit_before)


def _objects(opened: BinaryIO, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    items = json.loads(opened.read().decode("utf-8-sig"))
    rows = [{"text": item} if isinstance(item, str) else item for item in items]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, item {number} is neither an object nor a string; check the file")
    return rows


def _is_object(line: bytes) -> bool:
    """Whether a line is a JSON object; one longer than what was looked at is taken by how it begins."""
    if len(line) >= START - 64:
        return line.startswith((b'{"', b'{ "'))
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_list(start: bytes) -> bool:
    """Whether a text that begins with a bracket begins a JSON array of objects or strings."""
    inner = start[1:].lstrip()
    return inner.startswith((b"{", b'"')) and (len(start) >= START - 64 or start.rstrip().endswith(b"]"))
