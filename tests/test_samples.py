"""Sources and readers: exact lengths, seeds that matter, splits that never meet, lines that are named."""

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparc3 import ReferenceSet, Sample, UserError
from sparc3.demo.text import INSULTS, KINDS, texts
from sparc3.samples import sources as S
from sparc3.samples.batches import encode
from sparc3.samples.reference_set import Rows as FileRows
from sparc3.samples.sources import Request, corpus, gather, overlap, stream

Rows = Callable[..., Path]


def test_samples_come_back_as_saved(tmp_path: Path) -> None:
    made = ReferenceSet(
        (
            Sample(text="a\u2028b", completion=" c"),
            Sample(input_ids=(1, 2)),
            Sample(text="x", target=" y", contrast=" z"),
        ),
        {"source": "s"},
    )
    made.save(tmp_path / "s.jsonl")
    assert ReferenceSet.load(tmp_path / "s.jsonl") == made


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nonsense", "line 2 "),
        ("[1]", "line 2 .*JSON object"),
        ('{"txt": "a"}', 'line 2 .*"text".* or "input_ids"'),
        ('{"text": 3}', 'line 2: "text"'),
        ('{"input_ids": []}', 'line 2: "input_ids"'),
        ('{"text": ""}', "line 2.*empty"),
        ('{"text": "a", "input_ids": [1]}', 'line 2 has both .*"input_ids"'),
        ('{"prompt": null}', 'line 2 .*"text".* or "input_ids"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        ReferenceSet.load(path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, said in (("none.jsonl", "none.jsonl"), ("empty.jsonl", "empty.jsonl")):
        with pytest.raises(UserError, match=said):
            ReferenceSet.load(tmp_path / name)
    with pytest.raises(UserError, match="empty"):
        ReferenceSet.of([])


def test_realtoxicityprompts_rows_are_read_as_they_are(jsonl: Rows) -> None:
    rows = [
        {
            "prompt": {"text": f"p{i}", "toxicity": i / 10},
            "continuation": {"text": f" c{i}", "toxicity": 1 - i / 10},
        }
        for i in range(10)
    ] + [{"prompt": {"text": "none", "toxicity": None}, "continuation": {"text": "x", "toxicity": None}}]
    path = str(jsonl("rtp.jsonl", rows))
    whole = ReferenceSet.load(path)
    assert (whole.samples[3].text, whole.samples[3].completion) == ("p3", " c3")
    named = list(zip(map(str, range(len(rows))), rows, strict=True))
    high = S.toxic_prompts(named, Request(path, 10, choose_by="prompt", min_toxicity=0.5), None, None)
    assert {s.text for s in high} <= {f"p{i}" for i in range(5, 10)}
    low = S.toxic_prompts(named, Request(path, 10, choose_by="continuation", max_toxicity=0.3), None, None)
    assert {s.text for s in low} <= {"p7", "p8", "p9"}
    completed = S.toxic_prompts(
        named,
        Request(path, 10, choose_by="completion", min_toxicity=0.9),
        None,
        lambda prompts: [(f" made {p}", 0.95 if p == "p1" else None) for p in prompts],
    )
    assert completed in ([Sample(text="p1", completion=" made p1")], [])


def test_splits_of_one_set_never_meet(jsonl: Rows) -> None:
    rows = [
        {
            "prompt": {"text": f"prompt number {i}", "toxicity": 1.0},
            "continuation": {"text": "x", "toxicity": 0.0},
        }
        for i in range(300)
    ]
    path = str(jsonl("rtp.jsonl", rows))
    reference = gather(Request(path, 100, choose_by="prompt", min_toxicity=0.5))
    test = gather(Request(path, 60, split="test", choose_by="prompt", min_toxicity=0.5))
    assert not overlap(reference, test)
    assert overlap([Sample(text="The  same prompt ")], [Sample(text="the same prompt")]) == [
        "the same prompt"
    ]


def test_c4_is_cut_exactly_and_by_the_seed(
    demo: tuple[Any, Any], jsonl: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading code of the hub's C4, on a local file through the same API of `datasets`."""
    documents = [{"text": t.text} for t in itertools.islice(texts("story", "train"), 400)]
    path = jsonl("c4.json", documents)
    local = lambda seed, **where: stream(seed, path="json", data_files=str(path), split="train")  # noqa: E731
    monkeypatch.setattr(S, "stream", local)
    ask = lambda *seeds: gather(Request("c4", 10, seq_len=32, seeds=seeds), demo[1])  # noqa: E731
    one, again, other, both = ask(0), ask(0), ask(1), ask(0, 1)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert len(both) == 20
    assert both.samples[:10] == one.samples
    assert {len(s.input_ids or ()) for s in both} == {32}
    with pytest.raises(UserError, match=r"\d+ samples.* 10"):
        gather(Request("c4", 10, seq_len=4000), demo[1])


def test_other_hub_sources_read_through_the_same_api(
    demo: tuple[Any, Any], jsonl: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiki = [
        {"text": line} for t in itertools.islice(texts("story", "test"), 60) for line in (t.text + "\n", "")
    ]
    rtp = [
        {"prompt": {"text": f"p {i}", "toxicity": i / 100}, "continuation": {"text": "c", "toxicity": 0.1}}
        for i in range(100)
    ]
    files = {
        "Salesforce/wikitext": jsonl("wiki.json", wiki),
        "allenai/real-toxicity-prompts": jsonl("rtp.json", rtp),
    }
    monkeypatch.setattr(
        S,
        "stream",
        lambda seed, **where: stream(seed, path="json", data_files=str(files[where["path"]]), split="train"),
    )
    assert corpus("wikitext2") == [row["text"] for row in wiki]
    assert corpus("wikitext2", count=3) == [row["text"] for row in wiki[:3]]
    cut = gather(Request("wikitext2", 5, seq_len=64), demo[1])
    assert {len(s.input_ids or ()) for s in cut} == {64}
    toxic = gather(Request("realtoxicityprompts", 10, choose_by="prompt", min_toxicity=0.8))
    assert len(toxic) == 10


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"reach .*allenai/c4"):
        next(stream(0, path="allenai/c4", name="en", split="train"))


def test_demo_texts_are_a_function_of_their_place() -> None:
    for kind in [*KINDS, "general"]:
        first = [t.text for t in itertools.islice(texts(kind, "test"), 30)]
        assert first == [t.text for t in itertools.islice(texts(kind, "test"), 30)]
        used = {t.prompt for t in itertools.islice(texts(kind, "reference"), 300)}
        assert not used & {t.prompt for t in itertools.islice(texts(kind, "test"), 300)}
    said = lambda kind: [  # noqa: E731
        any(word in t.completion for word in INSULTS) for t in itertools.islice(texts(kind, "test"), 200)
    ]
    assert sum(said("angry")) > 170
    assert not any(said("polite") + said("general") + said("ioi"))


@pytest.mark.parametrize(
    ("target", "sample", "said"),
    [
        ("label", Sample(text="a"), '"target"'),
        ("contrast", Sample(text="a", target=" Tom"), '"contrast"'),
        ("completion", Sample(text="a"), '"completion"'),
        ("label", Sample(text="a", target=" Tom Anna"), "2 tokens"),
        ("next", Sample(input_ids=(1,)), "sample 0 .*target next"),
        ("predicted", Sample(input_ids=(99999,)), "99999"),
    ],
)
def test_samples_that_lack_what_the_target_needs_are_named(
    demo: tuple[Any, Any], target: str, sample: Sample, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        encode(ReferenceSet((sample,)), demo[1], target, context=512, vocabulary=len(demo[1]))


def test_too_long_is_counted_and_truncated_only_when_told() -> None:
    long = ReferenceSet(
        (Sample(input_ids=tuple(range(9))), Sample(input_ids=(1, 2)), Sample(input_ids=tuple(range(12))))
    )
    with pytest.raises(UserError, match=r"\b2 of 3 samples.*\b8 tokens.*\b12\b"):
        encode(long, None, "predicted", context=8, vocabulary=20)
    cut = encode(long, None, "next", context=8, vocabulary=20, truncate=True)
    assert [len(e.ids) for e in cut] == [8, 2, 8]
    assert cut[0].tokens == tuple(range(1, 9))


def test_json_lines_survive_odd_separators(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(
        json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert ReferenceSet.load(path).samples[0].text == "one\u2028two\u0085three"


LABELLED = {
    "as RealToxicityPrompts": [
        {"prompt": {"text": "{}", "toxicity": 0.9}},
        {"prompt": {"text": "{}", "toxicity": None}},
    ],
    "flat": [{"prompt": "{}", "toxicity": 0.9}, {"text": "{}", "toxicity": None}],
    "by name": [{"prompt": "{}", "prompt_toxicity": 0.9}, {"text": "{}", "prompt.toxicity": ""}],
    "strings": [{"prompt": {"text": "{}", "toxicity": "0.9"}}, {"prompt": "{}", "toxicity": "0.1"}],
    "string continuation": [
        {"prompt": {"text": "{}", "toxicity": 1}, "continuation": " bad"},
        {"prompt": "{}", "toxicity": 0.2},
    ],
    "null continuation": [
        {"prompt": {"text": "{}", "toxicity": 1}, "continuation": None},
        {"prompt": "{}", "toxicity": 0},
    ],
}


def _filled(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, text) for key, inner in value.items()}
    return value.format(text) if isinstance(value, str) else value


@pytest.mark.parametrize("shape", LABELLED)
def test_labels_are_read_in_every_shape(jsonl: Rows, shape: str) -> None:
    """The first of each pair fits, the second does not or has no label."""
    rows = [
        _filled(row, f"{kind} person {i}")
        for i in range(20)
        for kind, row in zip("ab", LABELLED[shape], strict=True)
    ]
    path = str(jsonl("labelled.jsonl", rows))
    found = gather(Request(path, 8, choose_by="prompt", min_toxicity=0.5))
    assert {sample.text[0] for sample in found if sample.text} == {"a"}
    assert {sample.completion for sample in found} == {" bad" if shape == "string continuation" else None}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "c"}, "prompt_toxicity"),
        ({"prompt": {"text": "c", "toxicity": "high"}}, "high"),
        ({"prompt": "c", "toxicity": 90}, "90"),
        ({"prompt": "c", "toxicity": True}, "True"),
        ({"prompt": {"text": "c", "toxicity": {"score": 1}}}, "score"),
        ({"input_ids": [1, 2], "toxicity": 0.9}, "token ids"),
    ],
)
def test_a_label_that_cannot_be_read_is_named_with_its_line(
    jsonl: Rows, row: dict[str, Any], named: str
) -> None:
    rows = [{"prompt": f"p {i}", "toxicity": 0.1} for i in range(5)]
    path = str(jsonl("labelled.jsonl", [*rows, row]))
    for split in ("test", "reference"):  # the row is in one of them
        with pytest.raises(UserError) as refused:
            gather(Request(path, 3, split=split, choose_by="prompt", min_toxicity=0.5))
        if "line 6" in str(refused.value):
            assert named in str(refused.value)
            return
    raise AssertionError("no message names the line")


def test_a_named_column_holds_the_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "id,question,toxicity\n" + "".join(f"{i},how {i}?,0.9\n" for i in range(30))
    )
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": i, "question": f"how {i}?", "toxicity": 0.9}) + "\n" for i in range(30))
    )
    wanted = {f"how {i}?" for i in range(30)}
    for name in ("a.csv", "a.jsonl"):
        path = str(tmp_path / name)
        assert {sample.text for sample in gather(Request(path, 30, column="question"))} == wanted
        assert set(corpus(path, column="question")) == wanted
        chosen = gather(Request(path, 5, choose_by="prompt", min_toxicity=0.5, column="question"))
        assert {sample.text for sample in chosen} <= wanted
        with pytest.raises(UserError, match="answer"):
            gather(Request(path, 30, column="answer"))
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="question"):
        gather(Request(str(tmp_path / "a.txt"), 1, column="question"))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv"])
def test_a_spreadsheets_csv_has_semicolons(name: str, tmp_path: Path) -> None:
    rows = 'prompt;toxicity\n"one, or; two\nand three";0.9\nfour, five;0.1\n'.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    found = ReferenceSet.load(tmp_path / name)
    assert [(s.text, s.line) for s in found] == [("one, or; two\nand three", 3), ("four, five", 4)]
    assert [row["toxicity"] for _, row in FileRows(tmp_path / name)] == ["0.9", "0.1"]


def test_ends_of_lines_inside_a_row_of_wikitext_stay(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_text(" one\u2028two\x85three \n \n four \n", encoding="utf-8")
    assert corpus(str(tmp_path / "a.raw")) == [" one\u2028two\x85three \n", "", " four \n"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "a.raw.gz"])
def test_a_text_that_is_not_utf_8_is_one_line(name: str, tmp_path: Path) -> None:
    raw = "Größe ".encode("latin-1") * 50
    if name.endswith("zst"):
        import pyarrow

        raw = pyarrow.compress(raw, "zstd", asbytes=True)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(UserError, match=name):
        corpus(str(tmp_path / name))


def test_columns_of_another_name_are_named(jsonl: Rows) -> None:
    path = jsonl("queries.jsonl", [{"query": "how?", "response": "so"}])
    with pytest.raises(UserError, match=r"line 1.*query, response.*column"):
        ReferenceSet.load(path)
    assert [s.text for s in ReferenceSet.load(path, column="query")] == ["how?"]


def test_zstd_is_unpacked(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    for name, raw in (
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.csv", b"text\none\ntwo\n"),
        ("a.txt", b"one\ntwo\n"),
    ):
        with pyarrow.CompressedOutputStream(str(tmp_path / f"{name}.zst"), "zstd") as packed:
            packed.write(raw)
        assert [sample.text for sample in ReferenceSet.load(tmp_path / f"{name}.zst")] == ["one", "two"]
    assert list(corpus(str(tmp_path / "a.txt.zst"))) == ["one\ntwo\n"]
