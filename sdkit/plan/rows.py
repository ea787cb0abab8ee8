"""Counts the rows of a training data set without loading it."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import assert_never

from sdkit.language.files import UnreadableFile, irregular_kind, read_file
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
    Source,
)

MAX_BYTES = 2**30
"""Larger files are not read."""


def count_rows(data: DataSpec, base: Path) -> int | None:
    """Returns the number of rows that a run reads, before those held out are dropped; None if it takes loading to tell."""
    rows = _source_rows(data.source, base)
    return rows if rows is None or data.limit is None else min(rows, data.limit)


def _source_rows(source: Source, base: Path) -> int | None:
    match source:
        case InlineSource(rows=rows):
            return len(rows)
        case ReasoningGymSource(size=size):
            return size
        case JsonLinesSource(path=path):
            return _count_lines(base / path)
        case JsonSource(path=path):
            return _count_items(base / path)
        case CsvSource(path=path, delimiter=delimiter):
            return _count_csv_rows(base / path, delimiter)
        case ParquetSource(path=path):
            return _parquet_rows(base / path)
        case HubSource() | DiskSource():
            return None
        case _:
            assert_never(source)


def _count_lines(path: Path) -> int | None:
    try:
        return sum(bool(line.strip()) for line in read_file(path, MAX_BYTES).split(b"\n"))
    except UnreadableFile:
        return None


def _count_items(path: Path) -> int | None:
    try:
        rows = json.loads(read_file(path, MAX_BYTES))
    except (UnreadableFile, ValueError, RecursionError):
        return None
    return len(rows) if isinstance(rows, list) else None


def _count_csv_rows(path: Path, delimiter: str) -> int | None:
    try:
        text = read_file(path, MAX_BYTES).decode()
        return max(sum(map(bool, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))) - 1, 0)
    except (UnreadableFile, UnicodeDecodeError, csv.Error):
        return None


def _parquet_rows(path: Path) -> int | None:
    """The number of rows in the file's footer; the rows are not read."""
    if irregular_kind(path) or not os.path.exists(path):
        return None
    try:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    except Exception:  # of a damaged file, which the run reports
        return None
