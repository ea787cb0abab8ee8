"""Records of a run directory, written and read."""

import pytest

from sdkit.language.errors import UnreadableInput
from sdkit.runs.directory import RunDirectory, read_lines


def test_unicode_line_separators_round_trip(tmp_path):
    run = RunDirectory(tmp_path)
    records = [{"completion": "one\u2028two\x85three"}, {"completion": "four"}]
    run.lines("rollouts", 0, records)
    assert run.records("rollouts", 0) == records


def test_incomplete_last_line_is_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UnreadableInput, match=r"metrics\.jsonl:2: not a JSON object"):
        read_lines(path)
