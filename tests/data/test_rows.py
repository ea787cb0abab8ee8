"""Rows from every kind of source, and the errors for bad ones."""

import datetime
import json
import math
import os
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from tinyruns import make_spec

from sdkit.data.rows import drop_duplicates, drop_overlap, fingerprint, load_rows, positions
from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.specs import (
    ColumnTemplate,
    DataSpec,
    DiskSource,
    HubSource,
    InlineSource,
    JsonLinesSource,
    JsonSource,
    ParquetSource,
    ReasoningGymSource,
    Table,
)
from sdkit.language.tasksets import data_in_full

PAIRS = [{"q": f"What is {i}?", "a": str(i), "m": {"n": i}} for i in range(4)]


def spec(source, limit=None, **columns):
    return DataSpec(source=source, columns=Table(columns or {"prompt": "q"}), limit=limit)


def inline(*rows, **columns):
    return spec(InlineSource(rows=tuple(Table(row) for row in rows)), **columns)


def write_lines(tmp_path, *texts):
    (tmp_path / "d.jsonl").write_text("\n".join(texts) + "\n")
    return JsonLinesSource(path="d.jsonl")


def load_error(data, base="/", **more):
    with pytest.raises(BadData) as caught:
        load_rows(data, base, **more)
    return caught.value


def user_message(text):
    return {"role": "user", "content": text}


@pytest.fixture
def sources(tmp_path):
    """The same rows in every kind of file."""
    import datasets

    (tmp_path / "d.jsonl").write_text("\n\n".join(json.dumps(row) for row in PAIRS))
    (tmp_path / "d.json").write_text(json.dumps(PAIRS, indent=1))
    dataset = datasets.Dataset.from_list(PAIRS)
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
    return {
        "jsonl": JsonLinesSource(path="d.jsonl"),
        "json": JsonSource(path="d.json"),
        "parquet": ParquetSource(path="d.parquet"),
        "one": DiskSource(path="one"),
        "two": DiskSource(path="two", split="train"),
        "inline": InlineSource(rows=tuple(Table(row) for row in PAIRS)),
    }


def test_every_source_gives_the_same_rows(sources, tmp_path):
    fingerprints = {}
    for name, source in sources.items():
        rows = load_rows(spec(source, prompt="q", answer="a", meta="m"), tmp_path)
        assert [row.index for row in rows] == [0, 1, 2, 3]
        assert rows[3].messages == (user_message("What is 3?"),)
        assert rows[3].columns == {"prompt": "What is 3?", "answer": "3", "meta": {"n": 3}}
        assert dict(rows[3].raw) == PAIRS[3]
        fingerprints[name] = fingerprint(rows)
        assert len(load_rows(spec(source, limit=2), tmp_path)) == 2
        assert len(load_rows(spec(source, limit=9), tmp_path)) == 4
    assert len(set(fingerprints.values())) == 1


def test_limit_leaves_later_lines_unread(tmp_path):
    source = write_lines(tmp_path, '{"q": "a"}', "{bad")
    assert len(load_rows(spec(source, limit=1), tmp_path)) == 1


def test_line_separators_inside_text_do_not_split_a_line(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "a\u2028b"}\r\n', encoding="utf-8-sig")
    rows = load_rows(spec(JsonLinesSource(path="d.jsonl")), tmp_path)
    assert rows[0].prompt_text == "a\u2028b"


def test_saved_dataset_with_several_splits_needs_a_split(sources, tmp_path):
    error = load_error(spec(DiskSource(path="two")), tmp_path)
    assert error.message == "two holds the splits 'train', 'test', not null"
    assert error.hint == "write split: train"
    assert "'trian'" in load_error(spec(DiskSource(path="two", split="trian")), tmp_path).message
    assert "one split" in load_error(spec(DiskSource(path="one", split="test")), tmp_path).message


@pytest.mark.parametrize("kind", [JsonLinesSource, JsonSource, ParquetSource, DiskSource])
def test_missing_file_is_reported(kind, tmp_path):
    error = load_error(spec(kind(path="none.x")), tmp_path)
    assert error.message.startswith("cannot read none.x")


def test_unreadable_parquet_file_is_reported(tmp_path):
    (tmp_path / "d.parquet").write_text("text")
    assert "cannot read d.parquet" in load_error(spec(ParquetSource(path="d.parquet")), tmp_path).message


def test_wrong_kind_of_json_names_the_right_one(tmp_path):
    source = write_lines(tmp_path, '{"q": "a"}', '{"q": "b"}')
    assert "kind: jsonl" in load_error(spec(JsonSource(path="d.jsonl")), tmp_path).hint
    write_lines(tmp_path, '{"q": "a"}')
    assert "kind: jsonl" in load_error(spec(JsonSource(path="d.jsonl")), tmp_path).hint
    write_lines(tmp_path, "", '[{"q": "a"},', '{"q": "b"}]')
    assert load_error(spec(source), tmp_path).hint == "use kind: json"


def test_file_without_rows_is_refused(tmp_path):
    assert load_error(spec(write_lines(tmp_path, "", "")), tmp_path).message == "d.jsonl has no rows"


def test_unreachable_hub_is_an_environment_error():
    with pytest.raises(BadEnvironment, match="cannot reach the hub for nobody/nothing"):
        load_rows(spec(HubSource(path="nobody/nothing")), "/")


def gym(task="chain_sum", size=3, **options):
    source = ReasoningGymSource(task=task, size=size, seed=7, options=Table(options))
    return spec(source, prompt="question", answer="answer")


def test_reasoning_gym_rows_keep_the_complete_entry():
    rows = load_rows(gym(min_terms=2, max_terms=2), "/")
    assert len(rows) == 3
    assert set(rows[0].raw) == {"question", "answer", "metadata"}
    assert rows[0].columns["answer"] == rows[0].raw["answer"]
    assert fingerprint(rows) == fingerprint(load_rows(gym(min_terms=2, max_terms=2), "/"))
    assert fingerprint(rows) != fingerprint(load_rows(gym(min_terms=3, max_terms=3), "/"))


def test_reasoning_gym_errors_suggest_the_nearest_name():
    assert load_error(gym(task="chain_sums")).hint == 'did you mean "chain_sum"?'
    assert load_error(gym(min_term=2)).hint == 'did you mean "min_terms"?'
    assert "'min_terms', 'max_terms'" in load_error(gym(colour=2)).hint
    assert "no option 'seed'" in load_error(gym(seed=2)).message
    assert "max_terms must be >= min_terms" in load_error(gym(min_terms=9, max_terms=2)).message


def test_missing_reasoning_gym_has_a_hint(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(BadEnvironment) as caught:
        load_rows(gym(), "/")
    assert caught.value.hint == "pip install reasoning-gym"


def test_column_template_reads_nested_keys():
    template = ColumnTemplate(template="{{{m.n}}} {q}")
    row = load_rows(inline({"q": "{a} {{", "m": {"n": 0}}, prompt=template), "/")[0]
    assert row.prompt_text == "{0} {a} {{"


def test_column_template_joins_a_list_of_texts_by_lines():
    template = ColumnTemplate(template="<{lines}> {numbers}")
    row = load_rows(inline({"lines": ["a", "b"], "numbers": 12}, prompt=template), "/")[0]
    assert row.prompt_text == "<a\nb> 12"


@pytest.mark.parametrize("kind", [JsonLinesSource, JsonSource, ParquetSource, DiskSource])
def test_missing_file_is_named_with_its_origin(kind, tmp_path):
    with pytest.raises(BadData) as caught:
        load_rows(spec(kind(path="d", origin="the archive"), prompt="q"), tmp_path)
    assert (caught.value.message, caught.value.hint) == ("there is no d", "take it from the archive")


def test_null_in_a_template_makes_the_column_null():
    template = ColumnTemplate(template="see {m.n}")
    data = inline({"q": "a", "m": {"n": None}}, {"q": "b", "m": None}, prompt="q", context=template)
    assert [row.columns["context"] for row in load_rows(data, "/")] == [None, None]


def test_column_that_no_row_has_is_reported_once():
    rows = [{"question": "a", "answer": "b"}] * 3
    error = load_error(inline(*rows, prompt="qestion", answer="answer", other="zzz"))
    assert error.message.splitlines() == [
        "data.source.rows has no column 'qestion'; did you mean 'question'? (it has 'question', 'answer')",
        "data.source.rows has no column 'zzz' (it has 'question', 'answer')",
    ]


def test_columns_default_to_those_of_the_training_data():
    data = DataSpec(source=InlineSource(rows=(Table({"q": "a"}),)))
    run = make_spec("/", data=inline({"q": "b"}, prompt="q"))
    assert load_rows(data_in_full(run, data), "/")[0].prompt_text == "a"
    assert "'prompt'" in load_error(data).message
    assert "'prompt'" in load_error(inline({"q": "a"}, answer="q")).message


def test_needed_columns_must_not_be_empty():
    data = inline(*({"q": "a", "d": d} for d in ("x", "", None, " ")), prompt="q", demonstration="d")
    assert load_error(data, needed=["demonstration"]).message.splitlines() == [
        f"data.source.rows row {i}: 'demonstration' must not be empty" for i in (1, 2, 3)
    ]
    assert "'demonstration'" in load_error(inline({"q": "a"}), needed=["demonstration"]).message


def test_system_column_comes_first():
    rows = inline({"q": "a", "s": "S"}, {"q": "b", "s": ""}, {"q": "c", "s": None}, **SYSTEM)
    loaded = load_rows(rows, "/")
    assert loaded[0].messages == ({"role": "system", "content": "S"}, user_message("a"))
    assert loaded[1].messages == (user_message("b"),)
    assert loaded[2].messages == (user_message("c"),)


SYSTEM = {"prompt": "q", "system": "s"}


def test_chat_is_used_unchanged():
    chat = [user_message("a"), {"role": "assistant", "content": "b", "tool_calls": None}, user_message("c")]
    row = load_rows(inline({"q": chat, "s": "S"}, **SYSTEM), "/")[0]
    assert [m["content"] for m in row.messages] == ["S", "a", "b", "c"]
    assert row.messages[2] == {"role": "assistant", "content": "b"}
    assert row.prompt_text == "c"


SYSTEM_TURN = {"role": "system", "content": "own"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        (None, "the prompt is empty"),
        ([], "the prompt is empty"),
        (7, "the prompt is 7, not text"),
        ({"a": 1}, "the prompt is a map, not text"),
        (["hi"], "message 0 of the prompt is not {role: …, content: …}"),
        ([{"role": "user"}], "message 0 of the prompt is not"),
        ([user_message("a") | {"name": "x"}], "message 0 of the prompt is not"),
        ([{"role": "bot", "content": "x"}], "has the role 'bot', not 'system', 'user', 'assistant' or 'tool'"),
        (
            [{"role": "tool", "content": "x"}],
            "message 0 of the prompt is a tool's result, but no tool call precedes it",
        ),
        ([user_message(["a"])], "message 0 of the prompt holds a list, not text"),
        ([user_message("a"), SYSTEM_TURN, user_message("b")], "message 1 of the prompt is a system message"),
        ([user_message("a"), {"role": "assistant", "content": "b"}], "role 'assistant', not 'user'"),
        ([user_message(" ")], "the last message of the prompt is empty"),
        ([SYSTEM_TURN, user_message("a")], "a system message of its own"),
    ],
)
def test_bad_prompt_is_refused(prompt, message):
    assert message in load_error(inline({"q": prompt, "s": "S"}, **SYSTEM)).message


def test_system_message_must_be_text():
    assert "'system' is 3, not text" in load_error(inline({"q": "a", "s": 3}, **SYSTEM)).message


def test_every_bad_line_is_named_with_its_number(tmp_path):
    source = write_lines(
        tmp_path, '{"q": "fine"}', "", "{q: 1}", '{"q": ""}', "3", '{"p": "x"}', '{"q": "a"', '{"q": 3}'
    )  # fmt: skip
    assert load_error(spec(source), tmp_path).message.splitlines() == [
        "d.jsonl:3: not JSON: expecting property name enclosed in double quotes at column 2",
        "d.jsonl:4: the prompt is empty",
        "d.jsonl:5: 3, not a map",
        "d.jsonl:6: no 'q' (write null where a row has none)",
        "d.jsonl:7: not JSON: expecting ',' delimiter at column 10",
        "d.jsonl:8: the prompt is 3, not text or a list of messages",
    ]


def test_bytes_that_are_not_utf8_are_reported(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"q": "a"}\n{"q": "\xff"}\n')
    assert load_error(spec(JsonLinesSource(path="d.jsonl")), tmp_path).message == "d.jsonl:2: not UTF-8"


def test_rows_of_other_files_are_counted_from_zero(tmp_path):
    (tmp_path / "d.json").write_text('[{"q": "a"}, 5, {"q": null}]')
    assert load_error(spec(JsonSource(path="d.json")), tmp_path).message.splitlines() == [
        "d.json row 1: 5, not a map",
        "d.json row 2: the prompt is empty",
    ]


def test_only_twenty_problems_are_shown():
    shown = load_error(inline(*[{"q": ""}] * 24)).message.splitlines()
    assert len(shown) == 21
    assert shown[-1] == "… and 4 more"


def assistant_message(text, role="assistant"):
    return {"role": role, "content": text}


TEXTS = [
    ("a", "a"),
    (12, "12"),
    (-0.5, "-0.5"),
    (np.int64(3), "3"),
    (np.float32(0.1), "0.1"),
    (pa.scalar("a"), "a"),
    (Decimal("1E+2"), "100"),
    (Decimal("2.50"), "2.50"),
    (assistant_message("a"), "a"),
    ([assistant_message("a")], "a"),
    ([assistant_message("a") | {"tool_calls": None}], "a"),
    (None, None),
    (math.nan, None),
    (np.float32("nan"), None),
    (Decimal("NaN"), None),
]
NO_TEXTS = [
    (True, "true, which has no one spelling"),
    (np.bool_(False), "false, which has no one spelling"),
    (b"a", "bytes, not text"),
    (["a", "b"], "a list, not text"),
    (["a"], "a list, not text"),
    ([], "a list, not text"),
    ([1, 2], "a list, not text"),
    ({"a": 1}, "a map, not text"),
    ([assistant_message("a"), assistant_message("b")], "a list of maps, not text; of a chat"),
    ([assistant_message("a", "user")], "the role 'user', not 'assistant'"),
    (assistant_message("a") | {"reasoning_content": "r"}, "a map, not text"),
    (assistant_message(["a"]), "an assistant message that holds a list, not text"),
    (datetime.date(2024, 1, 2), "a date or time, not text"),
    (datetime.timedelta(1), "a duration, not text"),
    (math.inf, "inf, not a finite number"),
    (Decimal("Infinity"), "Infinity, not a finite number"),
    (10**5000, "a number of too many digits"),
    (np.array([1]), "a value of type ndarray, not text"),
    ("a\0b", "text with a NUL character"),
    ("a\ud83d", "half a character"),
]


@pytest.mark.parametrize(("value", "text"), TEXTS)
def test_value_is_converted_to_text(value, text):
    data = inline({"q": "a", "d": value}, prompt="q", demonstration="d", shown=SHOWN)
    row = load_rows(data, "/", texts=["demonstration"])[0]
    assert row.text("demonstration") == text
    assert row.columns["shown"] == (None if text is None else f"<{text}>")
    assert row.columns["demonstration"] is value


SHOWN = ColumnTemplate(template="<{d}>")


@pytest.mark.parametrize(("value", "message"), NO_TEXTS, ids=range(len(NO_TEXTS)))
def test_values_without_a_text_are_refused(value, message):
    expected = f"data.source.rows row 1: 'd' is .*{message}"
    good = {"q": "a", "d": "x"}
    data = inline(good, {"q": "a", "d": value}, prompt="q", d="d")
    assert re.search(expected, load_error(data, texts=["d"]).message)
    if not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        data = inline(good, {"q": "a", "d": value}, prompt="q", shown=SHOWN)
        assert re.search(expected, load_error(data).message)


def test_only_columns_used_as_text_must_be_text(make_row):
    values = {"tests": [{"input": "1", "output": "2"}], "meta": {"n": [1, None]}, "yes": True}
    columns = {"prompt": "q", **{name: name for name in values}}
    row = load_rows(inline({"q": "a", **values}, **columns), "/")[0]
    assert {name: row.columns[name] for name in values} == values
    with pytest.raises(BadData, match="row 0: 'meta' is a map, not text"):
        row.text("meta")


def test_missing_value_counts_as_empty():
    data = inline({"q": "a", "d": math.nan}, prompt="q", d="d")
    assert "'d' must not be empty" in load_error(data, needed=["d"]).message
    assert load_error(inline({"q": math.nan})).message == "data.source.rows row 0: the prompt is empty"


DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "1" * 5000
UNREADABLE = [
    (r'{"q": "a", "d": "\ud83d"}', "'d' is text with half a character"),
    (r'{"q": "a \udc00", "d": "b"}', "'prompt' is text with half a character"),
    (r'{"q": "a", "d": {"k": ["\ud83d"]}}', "half a character"),
    (r'{"q": "a", "d": {"\ud83d": 1}}', "half a character"),
    (r'{"q": "a\u0000", "d": "b"}', "NUL"),
    ('{"q": "a\0", "d": "b"}', "not JSON: invalid control character"),
    (f'{{"q": "a", "d": {DIGITS}}}', "a number of 5000 digits"),
    (f'{{"q": "a", "d": [{{"n": -{DIGITS}}}]}}', "digits"),
    (f'{{"q": "a", "d": {DEEP}}}', "nested too deeply"),
    (f'{{"q": "a", "d": {"[" * 300}{"]" * 300}}}', "nested more than 100 levels deep"),
    ('{"q": "a", "q": "b", "d": "c"}', "has the key 'q' twice"),
    ('{"q": "a", "d": {"k": 1, "k": 2}}', "has the key 'k' twice"),
]


@pytest.mark.parametrize(("line", "message"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_unreadable_lines_are_named(tmp_path, line, message):
    source = write_lines(tmp_path, '{"q": "fine", "d": "x"}', line)
    error_message = load_error(spec(source, prompt="q", d="d"), tmp_path).message
    assert error_message.startswith("d.jsonl:2: ")
    assert message in error_message
    (tmp_path / "d.json").write_text(f'[{{"q": "fine", "d": "x"}},\n{line}]')
    error_message = load_error(spec(JsonSource(path="d.json"), prompt="q", d="d"), tmp_path).message
    assert error_message.startswith(("d.json row 1: ", "d.json:2:", "d.json is nested too deeply"))
    assert message in error_message


def test_values_of_unused_columns_may_be_unreadable(tmp_path):
    source = write_lines(tmp_path, f'{{"q": "a", "d": {DIGITS}, "e": "\\ud83d"}}')
    assert load_rows(spec(source, prompt="q"), tmp_path)[0].prompt_text == "a"


def test_nan_in_json_counts_as_missing(tmp_path):
    source = write_lines(tmp_path, '{"q": "a", "d": NaN}')
    row = load_rows(spec(source, prompt="q", d="d"), tmp_path, texts=["d"])[0]
    assert row.text("d") is None
    write_lines(tmp_path, '{"q": "a", "d": -Infinity}')
    assert "'d' is -inf" in load_error(spec(source, prompt="q", d="d"), tmp_path, texts=["d"]).message


def test_unreadable_parquet_row_is_named(tmp_path):
    import pyarrow.parquet

    bad = pa.array([b"a", b"\xff"]).view(pa.utf8())
    pyarrow.parquet.write_table(pa.table({"q": bad}), tmp_path / "d.parquet")
    message = load_error(spec(ParquetSource(path="d.parquet")), tmp_path).message
    assert message.startswith("d.parquet row 1: cannot be read: 'utf-8' codec")


def test_parquet_values_are_converted_to_text(tmp_path):
    import pyarrow.parquet

    columns = {"q": ["a", "b"], "d": [[assistant_message("x")], None], "n": [1.5, math.nan], "b": [b"x", b"y"]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    data = spec(ParquetSource(path="d.parquet"), prompt="q", d="d", n="n", b="b")
    rows = load_rows(data, tmp_path, texts=["d", "n"])
    assert [(row.text("d"), row.text("n")) for row in rows] == [("x", "1.5"), (None, None)]
    assert "d.parquet row 0: 'b' is bytes" in load_error(data, tmp_path, texts=["b"]).message


def test_saved_format_changes_no_value(sources, tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list([{"q": "a", "d": 3}]).with_format("numpy")
    dataset.save_to_disk(tmp_path / "formatted")
    row = load_rows(spec(DiskSource(path="formatted"), prompt="q", d="d"), tmp_path)[0]
    assert type(row.columns["d"]) is int


@pytest.mark.parametrize("kind", [JsonLinesSource, JsonSource, ParquetSource])
def test_pipe_is_refused_as_data_file(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    error = load_error(spec(kind(path="pipe")), tmp_path)
    assert error.message == "cannot read pipe: this is a pipe or a device, not a regular file"


def test_epoch_visits_every_row_once():
    walk = positions(0, 30, 10, seed=3, shuffle=True)
    epochs = [walk[0:10], walk[10:20], walk[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert positions(0, 10, 10, seed=4, shuffle=True) != epochs[0]


@pytest.mark.parametrize("shuffle", [True, False])
def test_positions_do_not_depend_on_the_steps_before(shuffle):
    all_positions = positions(0, 40, 7, seed=1, shuffle=shuffle)
    for start in range(0, 40, 9):
        part = positions(start, 9, 7, seed=1, shuffle=shuffle)
        assert part[: 40 - start] == all_positions[start : start + 9]


def test_order_without_shuffle_is_the_files():
    assert positions(2, 4, 3, seed=1, shuffle=False) == [2, 0, 1, 2]


def test_shuffled_order_never_changes_between_versions():
    assert positions(0, 5, 5, seed=0, shuffle=True) == [2, 4, 3, 0, 1]


def test_overlap_ignores_case_and_white_space(make_row):
    system = {"role": "system", "content": "S"}
    train = [make_row("What  is 2?"), make_row("what is 3?", before=(system,)), make_row("x")]
    remaining, dropped = drop_overlap(train, [make_row(" what is 2?\n"), make_row("What is 3?")])
    assert remaining == [train[2]]
    assert dropped == 2


def test_duplicates_keep_the_first_of_each_prompt(make_row):
    rows = [make_row("a"), make_row("b"), make_row(" A "), make_row("b")]
    remaining, dropped = drop_duplicates(rows)
    assert [row is first for row, first in zip(remaining, rows, strict=False)] == [True, True]
    assert (len(remaining), dropped) == (2, 2)


def test_fingerprint_depends_on_content_and_order(make_row):
    a, b = make_row("a", answer="1"), make_row("b", answer="2")
    assert fingerprint([a, b]) == fingerprint([make_row("a", answer="1"), b])
    different = [[b, a], [a], [make_row("a", answer="3"), b]]
    assert len({fingerprint(rows) for rows in [[a, b], *different]}) == 4
    assert len(fingerprint([])) == 64


def test_sciknoweval_loads(real_data):
    columns = {"prompt": "prompt", "system": "system", "answer": "answer"}
    train = load_rows(spec(JsonLinesSource(path="biology-train.json"), **columns), real_data / "sciknoweval")  # fmt: skip
    test = load_rows(spec(JsonLinesSource(path="biology-test.json"), **columns), real_data / "sciknoweval")  # fmt: skip
    assert (len(train), len(test)) == (450, 50)
    assert [m["role"] for m in train[0].messages] == ["system", "user"]
    assert {row.columns["answer"] for row in train} <= set("ABCD")
    remaining, dropped = drop_overlap(train, test)
    assert len(remaining) + dropped == 450
    error = load_error(spec(JsonSource(path="biology-test.json"), **columns), real_data / "sciknoweval")
    assert "kind: jsonl" in error.hint


def test_tooluse_loads(real_data):
    columns = {"prompt": "prompt", "answer": "answer"}
    rows = load_rows(spec(JsonLinesSource(path="tooluse/test.json"), **columns), real_data)
    assert len(rows) == 68
    assert rows[0].prompt_text.startswith("Your task is to answer")
