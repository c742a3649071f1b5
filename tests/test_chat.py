"""Chat messages become the text of the model's own template, in every shape that data sets have."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sparc3 import ReferenceSet, Sample, UserError, attribute, evaluate, run
from sparc3.evaluation.perplexity import _make_window
from sparc3.models.load import load_model
from sparc3.samples.chat import parse_turns
from sparc3.samples.sources import Request, gather
from sparc3.samples.tokens import read_sample

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED = (("user", "Who is angry?"),)
USER, ANSWER = {"role": "user", "content": "Who is angry?"}, {"role": "assistant", "content": "Tom is."}


@pytest.fixture
def chatty() -> tuple[Any, Any]:
    model, tokenizer = load_model("demo", device="cpu")
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.mark.parametrize(
    ("row", "answer", "completion"),
    [
        ({"messages": [USER, ANSWER]}, "chosen", "Tom is."),
        ({"messages": [USER]}, "chosen", None),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Who is angry?"},
                    {"from": "gpt", "value": "Tom is."},
                ]
            },
            "chosen",
            "Tom is.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who is angry?"}]}]},
            "chosen",
            None,
        ),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]},
            "rejected",
            "No.",
        ),
        ({"prompt": [USER], "chosen": "Tom is.", "rejected": "No."}, "chosen", "Tom is."),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}, "rejected", "No."),
        ({"prompt": [USER], "completion": [ANSWER]}, "chosen", "Tom is."),
        ({"messages": json.dumps([USER, ANSWER])}, "chosen", "Tom is."),
    ],
)
def test_the_shapes_of_data_sets(row: dict[str, Any], answer: str, completion: str | None) -> None:
    assert parse_turns(row, answer, "line 1") == (ASKED, completion)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([USER, ANSWER], Sample(turns=ASKED, completion="Tom is.")),
        ([5, 6], Sample(input_ids=(5, 6))),
        ("Tom", Sample(text="Tom")),
        ({"text": "Tom", "toxicity": 0.5}, Sample(text="Tom")),
    ],
)
def test_a_named_column_may_hold_a_chat_or_token_ids(value: Any, expected: Sample, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"mine": value, "messages": [USER], "text": "x"}) + "\n")
    assert ReferenceSet.load(path, column="mine").samples == (expected,)


@pytest.mark.parametrize("column", ["messages", "conversations", "chosen"])
@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.csv", "a.jsonl.gz"])
def test_tables_of_chats(name: str, column: str, tmp_path: Path) -> None:
    path, rows = tmp_path / name, [{"id": "1", column: [USER, ANSWER]}, {"id": "2", column: [USER, ANSWER]}]
    if name.endswith("json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith("parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    elif name.endswith("csv"):
        with open(path, "w", newline="") as opened:
            writer = csv.DictWriter(opened, ["id", column])
            writer.writeheader()
            writer.writerows({**row, column: json.dumps(row[column])} for row in rows)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert [(s.turns, s.completion) for s in ReferenceSet.load(path)] == [(ASKED, "Tom is.")] * 2


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "message 1"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images"),
        ({"messages": [ANSWER]}, "assistant"),
        ({"messages": [USER], "text": "x"}, '"text"'),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 1"),
    ],
)
def test_what_is_no_chat_is_one_line_with_its_place(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [USER]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"(?s)line 2.*{named}"):
        ReferenceSet.load(tmp_path / "c.jsonl")


def test_a_chat_is_read_as_the_template_writes_it_with_one_bos(chatty: tuple[Any, Any]) -> None:
    _, tokenizer = chatty
    read = read_sample(Sample(turns=ASKED, completion="Tom is."), tokenizer)
    whole = "<s>[user] Who is angry?\n[assistant] Tom is."
    assert (*read.prompt, *read.completion) == tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert read.prompt.count(tokenizer.bos_token_id) == 1
    assert read.text == "user: Who is angry?"


def test_plain_prompts_become_a_users_turn_and_are_the_same_prompt(
    chatty: tuple[Any, Any], tmp_path: Path
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Who is angry?\nWho is glad?\n")
    found = gather(Request(str(path), 2, chat=True), chatty[1])
    assert [sample.text for sample in found] == [
        f"<s>[user] {text}\n[assistant] " for text in ("Who is angry?", "Who is glad?")
    ]
    assert [sample.words for sample in found] == ["Who is angry?", "Who is glad?"]
    again = gather(Request(str(path), 1, chat=True, taken=frozenset({"Who is angry?"})), chatty[1])
    assert [sample.words for sample in again] == ["Who is glad?"]
    found.save(tmp_path / "saved.jsonl")
    assert ReferenceSet.load(tmp_path / "saved.jsonl").fingerprint == found.fingerprint
    assert [s.turns for s in ReferenceSet.load(tmp_path / "saved.jsonl")] == [s.turns for s in found]


def test_attribute_of_messages_equals_that_of_their_tokens(chatty: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = chatty
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    ids = tokenizer("<s>[user] Who is angry?\n[assistant] ", add_special_tokens=False)["input_ids"]
    chat = attribute(model, ReferenceSet.load(tmp_path / "c.jsonl"), tokenizer=tokenizer)
    plain = attribute(model, [ids], tokenizer=tokenizer)
    assert all((chat[name] == plain[name]).all() for name in chat)


def test_an_answer_is_asked_for_and_not_the_thoughts_before_it(chatty: tuple[Any, Any]) -> None:
    _, tokenizer = chatty
    plain = read_sample(Sample(turns=ASKED), tokenizer)
    thinks = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    tokenizer.chat_template = TEMPLATE + thinks
    assert read_sample(Sample(turns=ASKED), tokenizer) == plain


def test_no_template_and_an_unknown_role_are_one_line(chatty: tuple[Any, Any]) -> None:
    model, tokenizer = chatty
    with pytest.raises(UserError, match="judge"):
        attribute(model, [Sample(turns=(("judge", "Well?"),))], tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="template"):
        attribute(model, [Sample(turns=ASKED)], tokenizer=tokenizer)


def test_metrics_ask_and_judge_the_answer_alone(chatty: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = chatty
    path = tmp_path / "p.txt"
    path.write_text("".join(f"Tom number {i} was angry and yelled\n" for i in range(40)))
    shared = {"source": str(path), "count": 4, "scorer": "lexicon", "generations": 1, "max_new_tokens": 6}
    metrics = {"toxicity": {**shared, "chat": True}, "fluency": {"of": "toxicity"}}
    found = evaluate(model, tokenizer, metrics)
    figures = {m.metric: m for m in found.measurements}
    assert figures["fluency"].n + figures["fluency"].failures == 4


def test_fluency_reads_an_answer_after_the_rendered_prompt(chatty: tuple[Any, Any]) -> None:
    _, tokenizer = chatty
    whole = tokenizer("<s>[user] Who is angry?\n[assistant] Tom is.", add_special_tokens=False)["input_ids"]
    answer = read_sample(Sample(turns=ASKED, completion="Tom is."), tokenizer).completion
    assert _make_window(tokenizer, Sample(turns=ASKED), "Tom is.", 100) == (tuple(whole), len(answer))


def test_a_recipe_on_chats(tmp_path: Path) -> None:
    folder = tmp_path / "chatty"
    model, tokenizer = load_model("demo", device="cpu")
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, word in (("angry", "You fool."), ("polite", "Thank you.")):
        rows = [
            {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": word}]}
            for i in range(6)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.txt").write_text("".join(f"Please say {i}\n" for i in range(5)))
    recipe = {
        "name": "chat",
        "model": {"id": str(folder), "device": "cpu"},
        "references": {
            "general": {"source": str(tmp_path / "polite.jsonl"), "count": 6},
            "undesired": {"source": str(tmp_path / "angry.jsonl"), "count": 6},
        },
        "attribution": {"target": "completion:1", "neuron": "signed"},
        "selection": {"count": 5, "protect": False},
        "evaluation": {
            "toxicity": {
                "source": str(tmp_path / "test.txt"),
                "count": 3,
                "chat": True,
                "scorer": "lexicon",
                "generations": 1,
                "max_new_tokens": 4,
            }
        },
        "compare": {"random_draws": 1},
    }
    run(recipe, tmp_path / "run")
    first = json.loads((tmp_path / "run/samples/undesired.jsonl").read_text().splitlines()[0])
    assert first["completion"] == "You fool."
    assert first["rendered"].endswith("[assistant] ")
    assert '<span class="role">user</span><span>Please say' in (tmp_path / "run/report.html").read_text()
