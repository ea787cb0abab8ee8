"""The number of training rows, counted without loading them, and what a plan says about it."""

import json

import pytest

from sdkit.data.sources import count_rows
from sdkit.language.load import load_spec
from sdkit.language.specs import (
    CsvSource,
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
from sdkit.plan.accelerators import Machine
from sdkit.plan.plan import make_plan
from sdkit.plan.text import render_plan

RUN = """
method: sdft
model: {path: org/model, dtype: float32}
data:
  source: {kind: inline, rows: [{q: a, d: b}, {q: c, d: d}, {q: e, d: f}]}
  columns: {prompt: q, demonstration: d}
rollout: {backend: transformers}
optimizer: {lr: 1.0e-5}
training: {steps: 6, prompts_per_step: 2}
"""


@pytest.fixture
def files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rows.jsonl").write_text('{"a": "\u2028"}\n\n{"a": 2}\n')
    (tmp_path / "rows.json").write_text(json.dumps([{"a": 1}, {"a": 2}]))
    (tmp_path / "map.json").write_text("{}")
    (tmp_path / "rows.csv").write_text('a;b\n1;"two\nlines"\n\n3;4\n')
    (tmp_path / "damaged.parquet").write_text("rows")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        (InlineSource(rows=(Table({"a": 1}), Table({"a": 2}))), 2),
        (ReasoningGymSource(task="chain_sum", size=2), 2),
        (JsonLinesSource(path="rows.jsonl"), 2),
        (JsonSource(path="rows.json"), 2),
        (CsvSource(path="rows.csv", delimiter=";"), 2),
        (ParquetSource(path="rows.parquet"), 2),
        (JsonLinesSource(path="missing.jsonl"), None),
        (JsonLinesSource(path="."), None),
        (JsonSource(path="map.json"), None),
        (ParquetSource(path="damaged.parquet"), None),
        (ParquetSource(path="missing.parquet"), None),
        (HubSource(path="org/rows"), None),
        (DiskSource(path="rows"), None),
    ],
)
def test_rows_of_a_source(files, source, rows):
    assert count_rows(DataSpec(source=source), files) == rows
    assert count_rows(DataSpec(source=source, limit=1), files) == (rows and 1)


def planned(tmp_path, *overrides):
    (tmp_path / "run.yaml").write_text(RUN)
    spec = load_spec(tmp_path / "run.yaml", overrides).spec
    return render_plan(spec, make_plan(spec, Machine(), None, rows=count_rows(spec.data, tmp_path)))


def test_plan_says_how_often_a_run_uses_each_row(tmp_path):
    assert "  rows: 3; the run uses each 4 times\n" in planned(tmp_path)


def test_plan_warns_of_a_batch_larger_than_the_data(tmp_path):
    text = planned(tmp_path, "training.prompts_per_step=6")
    assert "training.prompts_per_step is more than the 3 rows: a batch holds each row 2 times" in text


def test_plan_converts_epochs_to_steps(tmp_path):
    text = planned(tmp_path, "training.steps=null", "training.epochs=2")
    assert "  rollout batches: 3\n" in text
    assert "2 epochs of 3 rows are 3 steps" in text
