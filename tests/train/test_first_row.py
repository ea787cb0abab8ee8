"""The first row of local data, checked without reading the rest."""

import json
import sys

import pytest

from sdkit.data import sources
from sdkit.language.load import load_spec
from sdkit.train.first_row import FirstRows, check_first_rows

RUN = """
method: sdft
model: {{path: bundled:smollm2-135m-instruct}}
data:
  source: {{kind: {kind}, path: rows}}
  columns: {{prompt: q, demonstration: d, answer: a}}
rewards: {{right: number}}
optimizer: {{lr: 1e-5}}
training: {{steps: 1, prompts_per_step: 1}}
rollout: {{max_new_tokens: 8}}
teacher: {{sees: {{max_prompt_tokens: 64}}}}
"""
GOOD = {"q": [{"role": "system", "content": "S"}, {"role": "user", "content": "1 + 1?"}], "d": "two", "a": 2}


def write(path, kind, rows):
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "saved_dataset":
        import datasets

        datasets.Dataset.from_list(rows).with_format("numpy").save_to_disk(path)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def first_rows(tmp_path):
    """Returns a function that checks a spec on these rows."""

    def check(*rows, kind="jsonl", overrides=()):
        write(tmp_path / "rows", kind, rows)
        (tmp_path / "run.yaml").write_text(RUN.format(kind=kind))
        checked = load_spec(tmp_path / "run.yaml", overrides)
        assert checked.ok
        return check_first_rows(checked)

    return check


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved_dataset"])
def test_columns_are_described(first_rows, kind):
    found = first_rows(GOOD, {**GOOD, "a": None}, kind=kind)
    assert found.problems == []
    assert found.descriptions == ["data: prompt is a chat (system, user); demonstration is text; answer is 2"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved_dataset"])
def test_wrong_column_is_reported_where_it_is_written(first_rows, kind):
    (problem,) = first_rows({"question": "1 + 1?", "d": "two", "a": 2}, kind=kind).problems
    assert problem.path == ("data", "columns", "prompt")
    assert problem.message == "rows has no column 'q', only 'question', 'd', 'a'"
    assert (problem.place.line, problem.place.column) == (6, 21)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": []}, "rows:1: the prompt is empty"),
        ({"q": 7}, "rows:1: the prompt is 7, not text or a list of messages"),
        ({"d": ["two"]}, "rows:1: 'demonstration' is a list, not text"),
        ({"a": True}, "rows:1: 'answer' is true, which has no one spelling: write it as text"),
    ],
)
def test_unusable_first_row_is_reported(first_rows, changes, message):
    (problem,) = first_rows({**GOOD, **changes}).problems
    assert (problem.path, problem.message) == (("data", "source", "path"), message)


def test_file_that_is_no_data_is_reported(first_rows, tmp_path):
    source = f"data.source={{kind: json, path: {tmp_path / 'rows'}}}"
    assert [p.hint for p in first_rows(GOOD, overrides=[source]).problems] == [
        "use kind: jsonl where each line is an object"
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_only_the_start_of_a_large_file_is_read(first_rows, monkeypatch, kind):
    monkeypatch.setattr(sources, "START", len(json.dumps(GOOD)) + 10)
    found = first_rows(GOOD, *[{"q": None}] * 50, kind=kind)
    assert (found.problems, len(found.descriptions)) == ([], 1)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_first_row_longer_than_the_start_is_not_checked(first_rows, monkeypatch, kind):
    monkeypatch.setattr(sources, "START", 10)
    found = first_rows({**GOOD, "q": 7}, kind=kind)
    assert (found.problems, found.descriptions) == ([], [])


def test_rewards_and_packages_of_the_user_are_not_loaded(first_rows, tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\ndef right(completion, row):\n    return 1.0\n")
    override = f"rewards={{right: {{kind: file, file: {tmp_path / 'mine.py'}, function: right}}}}"
    assert first_rows(GOOD, overrides=[override]).problems == []


def test_first_row_of_a_saved_split_is_read_without_its_package(first_rows, tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([GOOD] * 3)
    datasets.DatasetDict({"train": rows.select([]), "test": rows}).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    source = f"data.source={{kind: saved_dataset, path: {tmp_path / 'saved'}, split: SPLIT}}"
    assert len(first_rows(GOOD, overrides=[source.replace("SPLIT", "test")]).descriptions) == 1
    assert first_rows(GOOD, overrides=[source.replace("SPLIT", "train")]) == FirstRows([], [])
    (problem,) = first_rows(GOOD, overrides=[source.replace("SPLIT", "tset")]).problems
    assert problem.message.endswith("holds the splits 'train', 'test', not 'tset'")
    assert problem.place


def test_saved_columns_that_need_decoding_are_not_checked(first_rows, tmp_path):
    import datasets

    features = datasets.Features({"q": datasets.Value("string"), "d": datasets.Json(), "a": datasets.Value("int64")})
    rows = datasets.Dataset.from_list([{"q": "1 + 1?", "d": ["two"], "a": 2}], features=features)
    rows.save_to_disk(tmp_path / "saved")
    found = first_rows(GOOD, overrides=[f"data.source={{kind: saved_dataset, path: {tmp_path / 'saved'}}}"])
    assert found == FirstRows([], [])


def test_folder_without_a_data_set_is_reported(first_rows, tmp_path):
    source = f"data.source={{kind: saved_dataset, path: {tmp_path}}}"
    (problem,) = first_rows(GOOD, overrides=[source]).problems
    assert problem.message.endswith("no data set of save_to_disk: dataset_info.json or state.json is missing")


def test_answer_that_no_reward_can_compare_is_reported_at_the_reward(first_rows):
    (problem,) = first_rows({**GOOD, "a": "two"}).problems
    assert problem.path == ("rewards", "right")
    assert problem.message == "row 0: 'two' in the column 'answer' is not a number"
    assert (problem.place.line, problem.place.column) == (7, 18)
    letters = ["rewards={all: {kind: weighted, parts: {letter: 1}}, letter: choice}"]
    assert [p.path for p in first_rows(GOOD, overrides=letters).problems] == [("rewards", "letter")]
