"""Stored evaluations: read back as they were, and never wrong or half written."""

import json

from sdkit.runs.evaluations import EvaluationResult
from sdkit.runs.score_cache import read_scores, store_scores

RECORDS = [
    {"suite": "form", "decoding": "greedy", "row": i, "prompt": f"p{i}", "scores": {"right": 0.1 * i}, "panel": "form"}
    for i in range(3)
]
RESULT = EvaluationResult(scores={("form", "greedy", "right"): (0.0, 0.1, 0.2)}, records=RECORDS, tokens=7)
FACTS = {"weights": "abc", "decoding": (0.0, 1)}


def test_scores_come_back_as_they_were(tmp_path):
    assert read_scores(tmp_path, FACTS) is None
    store_scores(tmp_path, FACTS, RESULT)
    stored = read_scores(tmp_path, FACTS)
    assert stored is not None
    assert (stored.scores, stored.tokens) == (RESULT.scores, RESULT.tokens)
    assert stored.records == RECORDS
    assert stored.panel == {"form": "form"}
    assert read_scores(tmp_path, {**FACTS, "weights": "abd"}) is None


def test_damaged_file_counts_as_none_and_is_replaced(tmp_path):
    store_scores(tmp_path, FACTS, RESULT)
    [file] = tmp_path.rglob("*.json")
    whole = file.read_text()
    for damaged in (whole[:50], "[]", json.dumps({"facts": json.loads(whole)["facts"]}), whole.replace("abc", "abd")):
        file.write_text(damaged)
        assert read_scores(tmp_path, FACTS) is None
        store_scores(tmp_path, FACTS, RESULT)
        assert read_scores(tmp_path, FACTS) is not None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [file.name]  # no partial file is left


def test_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    store_scores(tmp_path / "file", FACTS, RESULT)
    assert read_scores(tmp_path / "file", FACTS) is None
