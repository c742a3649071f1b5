"""Formats of sample files: detect the format, unpack gzip and zstd, and read CSV, TSV, Parquet and JSON
arrays."""

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
"""The first bytes of every zstd file."""
COLUMNS = ("text", "prompt", "input_ids", "messages", "conversations", "chosen")
"""A table must have one of these columns, unless another is named. `target`, `contrast`, `completion` and
`continuation` are read in addition."""
UNREADABLE = (".bz2", ".xz", ".zip", ".arrow", ".feather", ".xlsx", ".tar")
START = 65_536
"""Number of bytes from which a format is detected by content."""
MAX_LINE = 10_000_000
"""Size of the longest allowed sample, in bytes: a longer one is a mistake or an attack."""


def unpack(file: BinaryIO, path: str | os.PathLike[str]) -> BinaryIO:
    """The open file itself; for gzip or zstd, its unpacked content in a temporary file that is removed when
    closed.

    Raises:
        UserError: the packed file is truncated or damaged, or pyarrow was built without zstd.
    """
    start = file.read(len(ZSTD))
    file.seek(0)
    kind = "gzip" if start.startswith(GZIP) else "zstd" if start == ZSTD else None
    if kind is None:
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller reads it)
    try:
        with file, _open_packed(file, kind, path) as packed_file:
            shutil.copyfileobj(packed_file, unpacked)
    except (OSError, EOFError, zlib.error) as error:
        unpacked.close()
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole {kind} file ({reason}); download it again") from None
    unpacked.seek(0)
    return cast(BinaryIO, unpacked)


def _open_packed(file: BinaryIO, kind: str, path: str | os.PathLike[str]) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise UserError(f"{path}: pyarrow was built without zstd, so it cannot read .zst files; unpack it")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")


def plain_name(path: str | os.PathLike[str]) -> str:
    """The file's name in lower case, without .gz or .zst."""
    name = Path(path).name.lower()
    return next((name.removesuffix(packed) for packed in PACKED if name.endswith(packed)), name)


def detect_format(file: BinaryIO, path: str | os.PathLike[str]) -> str:
    """The format of a file of samples: "json lines", "json array", "csv", "tsv", "parquet" or "text".

    The suffix decides (in upper or lower case, ignoring `.gz` and `.zst`); without a known suffix, the
    content does.

    Raises:
        UserError: an unsupported format.
    """
    suffix = Path(plain_name(path)).suffix
    if suffix in UNREADABLE:
        raise UserError(
            f"{path}: {suffix} files are not supported; convert it to JSON lines, CSV, Parquet or text"
        )
    file.seek(0)
    start = file.read(START)
    file.seek(0)
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
    file: BinaryIO, format: str, path: str | os.PathLike[str], column: str | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV, TSV, Parquet or JSON array file, each with its line (CSV, TSV) or its number from 1.

    Args:
        column: the column with the texts, if it is none of COLUMNS.

    Raises:
        UserError: a file that does not follow its format, or has no rows or no column of texts.
    """
    try:
        if format == "parquet":
            import pyarrow.parquet

            rows = list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1))
        elif format == "json array":
            rows = list(enumerate(_objects(file, path), 1))
        else:
            rows = list(_records(file, DELIMITERS["." + format]))
    except (ValueError, csv.Error, RecursionError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as {format} ({reason}); check the file") from None
    if not rows:
        raise UserError(f"{path} has no rows; give at least one")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if column is None and not set(columns) & set(COLUMNS):
        names = ", ".join(map(str, columns))
        raise UserError(
            f"{path} has no column named text, prompt or messages, but {names}; name one with the key column"
        )
    return rows


def _records(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table with a header; an empty cell counts as absent. If the header does not contain the
    delimiter, others are tried: spreadsheets write semicolons in locales with a decimal comma."""
    limit_before = csv.field_size_limit(MAX_LINE)  # a limit of the whole process, so it is restored
    try:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        header = lines.readline()
        lines.seek(0)
        delimiter = next(
            (candidate for candidate in (delimiter, ";", "\t", ",") if candidate in header), delimiter
        )
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has more or fewer cells than the header")
            yield reader.line_num, {key: cell for key, cell in row.items() if cell != ""}
    finally:
        csv.field_size_limit(limit_before)


def _objects(file: BinaryIO, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    items = json.loads(file.read().decode("utf-8-sig"))
    rows = [{"text": item} if isinstance(item, str) else item for item in items]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, item {number} is neither an object nor a string; check the file")
    return rows


def _is_object(line: bytes) -> bool:
    """Whether a line is a JSON object; for a line longer than START, its beginning decides."""
    if len(line) >= START - 64:
        return line.startswith((b'{"', b'{ "'))
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_list(start: bytes) -> bool:
    """Whether a text that begins with a bracket looks like a JSON array of objects or strings."""
    inner = start[1:].lstrip()
    return inner.startswith((b"{", b'"')) and (len(start) >= START - 64 or start.rstrip().endswith(b"]"))
