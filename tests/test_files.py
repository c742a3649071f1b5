"""Files of samples: the name or the content says the format, and what fits no format is refused by name."""

import gzip
import json
from pathlib import Path

import pytest

from sparc3.errors import UserError
from sparc3.samples.reference_set import ReferenceSet
from sparc3.samples.sources import corpus, overlap

ROWS = [{"text": "one, two", "completion": " three"}, {"text": "four"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = 'text,completion\n"one, two", three\nfour,\n'


def _texts(path: Path) -> list[tuple[str | None, str | None]]:
    return [(sample.text, sample.completion) for sample in ReferenceSet.load(path)]


WANTED = [("one, two", " three"), ("four", None)]


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.JSONL",
        "a.jl",
        "a.jsonlines",
        "a.ndjson",
        "a",
        "a.jsonl~",
        "a.bak",
        "a.json",
        "a.Jsonl.GZ",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_lines_by_whatever_name(tmp_path: Path, name: str, encoding: str) -> None:
    raw = LINES.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    assert _texts(tmp_path / name) == WANTED


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.csv.gz"])
def test_tables(tmp_path: Path, name: str, end: str) -> None:
    text = "text\tcompletion\none, two\t three\nfour\t\n" if "tsv" in name else TABLE
    raw = text.replace("\n", end).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert _texts(tmp_path / name) == WANTED


@pytest.mark.parametrize("name", ["a.json", "a", "a.JSON.gz"])
def test_json_arrays(tmp_path: Path, name: str) -> None:
    raw = json.dumps(ROWS, indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert _texts(tmp_path / name) == WANTED


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == WANTED


def test_plain_text_stays_text(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", LINES),
        ("b", "[brackets] begin\nthis text\n"),
        ("c", "{braces}\n"),
        ("d", '["\n'),
    ):
        (tmp_path / name).write_text(text)
        assert [text for text, _ in _texts(tmp_path / name)] == text.splitlines()


def test_a_text_inside_gzip_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"first line\r\nsecond line\n"))
    assert list(corpus(str(tmp_path / "notes.txt.gz"))) == ["first line\nsecond line\n"]


def test_wikitext_as_a_raw_file_has_the_rows_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw.gz").write_bytes(gzip.compress(b" \n = Heading = \n \n A paragraph . \n"))
    rows = ["", " = Heading = \n", "", " A paragraph . \n"]
    assert corpus(str(tmp_path / "wiki.test.raw.gz")) == rows
    assert corpus(str(tmp_path / "wiki.test.raw.gz"), count=3) == rows[:3]


@pytest.mark.parametrize(
    ("name", "raw", "named"),
    [
        ("a.csv", b"id,comment\n1,x\n", "comment"),
        ("a.csv", b"text,b\nx\n", "line 2"),
        ("a.csv", b"text\n", "a.csv"),
        ("a.parquet", b"not one", "a.parquet"),
        ("a.json", b"[1, 2]", "item 1"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "a.jsonl.zst"),
        ("a.jsonl.bz2", b"BZh9", ".bz2"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-12], "a.jsonl.gz"),
    ],
)
def test_what_fits_nothing_is_refused_by_name(tmp_path: Path, name: str, raw: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as refused:
        ReferenceSet.load(tmp_path / name)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2 + 3 =", "2 - 3 =", False),
        ("I write C++", "I write C#", False),
        ("so good 🙂", "so good 🙁", False),
        ("की", "का", False),
        ("Hello  There ", "hello there", True),
        ("cafe\u0301", "caf\u00e9", True),
    ],
)
def test_prompts_are_the_same_up_to_case_and_white_space(one: str, other: str, same: bool) -> None:
    first, second = (ReferenceSet.of([text]).samples for text in (one, other))
    assert bool(overlap(first, second)) == same
