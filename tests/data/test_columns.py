"""Chats that end with an answer, content lists, JSON text, nested columns, and CSV files."""

import json

import pytest

from sdkit.data.rows import load_rows
from sdkit.language.errors import BadData
from sdkit.language.load import load_spec
from sdkit.language.specs import CsvSource, DataSpec, InlineSource, JsonColumn, LastTurn, Table
from sdkit.train.first_row import check_first_rows

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]
ANSWER = LastTurn(last_turn="messages")


def inline(row, **columns):
    return DataSpec(source=InlineSource(rows=(Table(row),)), columns=Table(columns))


def only_row(data, base="/"):
    (row,) = load_rows(data, base)
    return row


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (CHAT, "messages"),
        (json.dumps(CHAT), JsonColumn(json="messages")),
        ({"chat": CHAT}, "messages.chat"),
        ({"chat": json.dumps(CHAT)}, JsonColumn(json="messages.chat")),
        (json.dumps({"chat": CHAT}), "messages.chat"),
    ],
)
def test_last_turn_is_taken_out_of_the_prompt(messages, prompt):
    name = prompt if isinstance(prompt, str) else prompt.json
    row = only_row(inline({"messages": messages}, prompt=prompt, demonstration=LastTurn(last_turn=name)))
    assert list(row.messages) == CHAT[:-1]
    assert row.columns["demonstration"] == "4"
    assert row.prompt_text == "2 + 2?"


def test_prompt_of_another_column_is_kept():
    row = only_row(inline({"messages": CHAT, "q": "2 + 2?"}, prompt="q", demonstration=ANSWER))
    assert [m["content"] for m in row.messages] == ["2 + 2?"]
    assert row.columns["demonstration"] == "4"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:2], "'demonstration' is a message of the role 'user', not 'assistant'"),
        ([], "'demonstration' takes turns of a list, not of a list of messages"),
        ("2 + 2?", "'demonstration' is not JSON"),
        ([CHAT[1], {"role": "assistant", "content": " "}], "ends with an empty one"),
        (CHAT[-1:], "the prompt is empty"),
    ],
)
def test_chat_without_a_last_turn_is_refused(messages, message):
    with pytest.raises(BadData, match=message):
        load_rows(inline({"messages": messages}, prompt="messages", demonstration=ANSWER), "/")


def test_chat_that_ends_with_an_answer_says_how_to_take_it():
    with pytest.raises(BadData, match=r"a column \{last_turn: …\} takes that message"):
        load_rows(inline({"messages": CHAT}, prompt="messages"), "/")


def parts(*texts):
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


def test_content_lists_become_text():
    chat = [{"role": "user", "content": parts("a", "b")}, {"role": "assistant", "content": parts("c")}]
    row = only_row(inline({"messages": chat}, prompt="messages", demonstration=ANSWER))
    assert (row.prompt_text, row.columns["demonstration"]) == ("a\nb", "c")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "a list with a part of type 'image_url'"),
        ({"type": "text", "text": "a", "cache_control": {}}, "a list with a part of type 'text'"),
        ("a", "a list, not text"),
    ],
)
def test_content_that_is_not_text_is_refused(part, message):
    with pytest.raises(BadData, match=message):
        load_rows(inline({"q": [{"role": "user", "content": [part]}]}, prompt="q"), "/")


def test_nested_columns():
    row = {"q": "a", "info": {"answer": 4}, "text": '{"answer": 5}', "info.flat": "6", "none": None}
    columns = {"a": "info.answer", "b": "text.answer", "c": "info.flat", "d": "none.answer"}
    loaded = only_row(inline(row, prompt="q", **columns))
    assert [loaded.columns[name] for name in "abcd"] == [4, 5, "6", None]
    for name, message in {"info.anwser": "no 'info.anwser'", "inof.answer": "no column 'inof.answer'"}.items():
        with pytest.raises(BadData, match=message):
            load_rows(inline(row, prompt="q", a=name), "/")


def csv_data(**columns):
    return DataSpec(source=CsvSource(path="d.csv"), columns=Table(columns))


def test_csv_rows(tmp_path):
    text = '\ufeffq,a,chat\r\n"one, ""two""\nthree",,"[]"\r\n\r\nfour,5,\r\n'
    (tmp_path / "d.csv").write_bytes(text.encode())
    rows = load_rows(csv_data(prompt="q", answer="a", chat=JsonColumn(json="chat")), tmp_path)
    assert [row.columns for row in rows] == [
        {"prompt": 'one, "two"\nthree', "answer": "", "chat": []},
        {"prompt": "four", "answer": "5", "chat": None},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,a\none\n", "d.csv:2: 1 cell, but 2 columns"),
        ('q,a\n"x\ny",1\none,2,3\n', "d.csv:4: 3 cells, but 2 columns"),
        ("q,q\none,two\n", "d.csv has the column 'q' twice"),
        ('q\n"one\n', "d.csv:2: not CSV: unexpected end of data"),
        ("q,a\n", "d.csv has no rows"),
        ("", "d.csv has no rows"),
        ("a\none\n", "d.csv has no column 'q'"),
    ],
)
def test_bad_csv_is_refused(tmp_path, text, message):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(BadData, match=message):
        load_rows(csv_data(prompt="q"), tmp_path)


def test_chat_as_text_is_warned_about(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": json.dumps(CHAT[:2])}))
    (tmp_path / "run.yaml").write_text(
        """
method: sft
model: {path: bundled:smollm2-135m-instruct}
data:
  source: {kind: jsonl, path: rows.jsonl}
  columns: {prompt: q, demonstration: q}
optimizer: {lr: 1e-5}
training: {steps: 1, prompts_per_step: 1}
"""
    )
    checked = load_spec(tmp_path / "run.yaml")
    (problem,) = check_first_rows(checked).problems
    assert (problem.severity, problem.hint) == ("warning", "write prompt: {json: q}")
    again = load_spec(tmp_path / "run.yaml", ["data.columns={prompt: {json: q}, demonstration: q}"])
    assert check_first_rows(again).problems == []
