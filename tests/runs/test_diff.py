"""`sdkit diff`: settings, derived numbers, code, data and environment of two specs or runs."""

import json

import pytest

from sdkit.language.load import load_spec
from sdkit.language.show import annotated

RUN_FILE = """
method: grpo
model: {path: bundled:smollm2-135m-instruct}
data: {source: {kind: jsonl, path: rows.jsonl}, columns: {prompt: q, answer: a}}
rollout: {max_new_tokens: 10}
rewards: {right: {file: reward.py, function: right}}
optimizer: {lr: 1.0e-5}
training: {steps: 3, prompts_per_step: 2}
"""


@pytest.fixture(autouse=True)
def wide_tables(monkeypatch):
    """Temporary folders with long names must not break lines."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def spec(tmp_path):
    def write(folder, reward="return 1.0", rows='{"q": "1 + 1", "a": "2"}', **changes):
        folder = tmp_path / folder
        folder.mkdir()
        text = RUN_FILE
        for old, new in changes.values():
            text = text.replace(old, new)
        (folder / "run.yaml").write_text(text)
        (folder / "rows.jsonl").write_text(rows + "\n")
        (folder / "reward.py").write_text(f"def right(completion, row):\n    {reward}\n")
        return folder / "run.yaml"

    return write


@pytest.fixture
def run(tmp_path, spec):
    """A run directory of the spec, as far as it is compared."""

    def write(folder, code=None, rows="0" * 64, **changes):
        checked = load_spec(path := spec(f"{folder}-spec", **changes))
        run = tmp_path / folder
        run.mkdir()
        (run / "resolved.yaml").write_text(annotated(checked))
        facts = {"base": str(path.parent), "versions": {"torch": "1"}, "code": code or {}, "models": {}}
        (run / "provenance.json").write_text(json.dumps(facts | {"data": {"train": rows}}))
        return run

    return write


def rows_of(out):
    """Title → setting → values."""
    tables, title = {}, None
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if line.startswith("│"):
            tables[title][cells[0]] = cells[1:]
        elif line.strip() and line[0] not in "┏┃┡└":
            title = line.strip()
            tables.setdefault(title, {})
    return {title: rows for title, rows in tables.items() if rows}


def test_a_spec_is_the_same_as_itself_and_as_its_copy(sdkit, spec):
    first, copy = spec("a"), spec("b")
    for second in (first, copy):
        code, out, _ = sdkit("diff", first, second)
        assert (code, " ".join(out.split())) == (0, f"{first} and {second} are the same")


def test_settings_and_the_numbers_that_follow(sdkit, spec):
    code, out, err = sdkit("diff", spec("a"), spec("b", length=("max_new_tokens: 10", "max_new_tokens: 20")))
    assert (code, err) == (0, "")
    assert rows_of(out) == {
        "settings": {"rollout.max_new_tokens": ["10", "20"]},
        "derived numbers": {
            "completion tokens per step, at most": ["160", "320"],
            "completion tokens of the run, at most": ["480", "960"],
        },
    }


def test_code_and_data_of_one_name_are_compared_by_content(sdkit, spec):
    other = spec("b", reward="return 0.0", rows='{"q": "1 + 1", "a": "3"}')
    tables = rows_of(sdkit("diff", spec("a"), other)[1])
    assert {title: list(rows) for title, rows in tables.items()} == {
        "code": ["code.reward.py"],
        "data": ["data files.rows.jsonl"],
    }


def test_runs_are_compared_as_recorded(sdkit, run):
    first = run("a", code={"reward.py": "1" * 64})
    tables = rows_of(sdkit("diff", first, run("b", code={"reward.py": "2" * 64}, rows="3" * 64))[1])
    assert {title: list(rows) for title, rows in tables.items()} == {
        "code": ["code.reward.py"],
        "data": ["data.train"],
    }


def test_what_only_a_run_records_is_not_compared_with_a_spec(sdkit, run, spec):
    out = sdkit("diff", run("a"), spec("b"))[1]
    assert "not compared: data and models" in out
    assert not rows_of(out).keys() & {"data", "models", "settings"}


def test_beside_a_method_page_only_its_keys_are_compared(sdkit, spec):
    tables = rows_of(sdkit("diff", spec("a"), "grpo")[1])
    assert tables == {"settings": {"rollout.max_new_tokens": ["10", "8192"]}}


def test_long_texts_are_shown_where_they_differ(sdkit):
    tables = rows_of(sdkit("diff", "sdpo", "sdpo_rich_feedback")[1])
    first, second = tables["settings"]["teacher.sees.template"]
    assert first.startswith("'…")
    assert "{feedback}" in second


def test_what_cannot_be_read_is_refused(sdkit, spec, tmp_path):
    assert sdkit("diff", spec("a"), "nowhere.yaml")[0] == 2
    code, _, err = sdkit("diff", tmp_path, "grpo")
    assert (code, "is not a run directory" in err) == (2, True)
