"""Checks the first row of each local data file against a spec, as a run would read it, without torch or the user's code.

The rewards that compare a completion with a column read their right answer; no other reward is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path as Folder
from typing import Any

from attrs import frozen

from sdkit.batches import Row
from sdkit.data.rows import AbsentColumn, map_rows
from sdkit.data.sources import read_first, source_name
from sdkit.language import columns as reads
from sdkit.language.errors import BadData, BadEnvironment, Path, Problem, listed, outside, shorten, spelled
from sdkit.language.load import CheckedSpec
from sdkit.language.row_text import describe_value
from sdkit.language.scalars import compact
from sdkit.language.specs import (
    CsvSource,
    DataSpec,
    ExperimentSpec,
    LocalFile,
    RoutedEnvironment,
    RoutedWeights,
    Source,
)
from sdkit.language.suggestions import file_kind
from sdkit.rewards.answers import check_right_answer

CODE = "first_row"


@frozen
class FirstRows:
    """What is wrong with the first rows of a spec's data, and a line on each data set that is right."""

    problems: list[Problem]
    descriptions: list[str]


def check_first_rows(checked: CheckedSpec) -> FirstRows:
    """Reads the first row of the training data and of every suite, where they are local files."""
    first_rows = FirstRows([], [])
    if not checked.ok or not isinstance(checked.spec, ExperimentSpec):
        return first_rows
    spec = checked.spec
    needed, texts = reads.required_columns(spec), reads.text_columns(spec, None)
    row = _check(first_rows, checked, ("data",), spec.data, needed, texts)
    _check_values(first_rows, checked, row, reads.training_rewards(spec))
    for path, _, suite in spec.placed_suites():
        row = _check(first_rows, checked, (*path, "data"), suite.data, [], reads.text_columns(spec, suite))
        _check_values(first_rows, checked, row, reads.suite_rewards(spec, suite))
    return first_rows


def _check(
    first_rows: FirstRows, checked: CheckedSpec, path: Path, data: DataSpec, needed: Sequence[str], texts: set[str]
) -> Row | None:
    """Reports what keeps a run from reading the row; returns the row if nothing does."""
    assert isinstance(checked.spec, ExperimentSpec)
    columns = data.columns or checked.spec.data.columns or {}

    def report(where: Path, message: str, hint: str | None = None) -> None:
        first_rows.problems.append(Problem(where, message, CODE, hint, checked.loaded.place(where)))

    source = (*path, "source", "path")
    try:
        raw_rows = read_first(data.source, Folder(checked.loaded.folder))
        mapped = map_rows(raw_rows, columns, needed, texts)
    except BadEnvironment:  # without the package that reads the file, the row is not checked
        return None
    except BadData as error:
        report(source, error.message, error.hint or _other_kind(data.source))
        return None
    written_at = path if data.columns else ("data",)
    for column in mapped.absent:
        for user in column.users:
            report((*written_at, "columns", user), *_absence(data.source, column))
    for fault in mapped.faults:
        report(source, fault, _other_kind(data.source))
    readable = mapped.rows if not mapped.absent else []
    for row in readable:
        if _is_chat_as_text(row.columns["prompt"]):
            where = (*written_at, "columns", "prompt")
            hint = f"write prompt: {{json: {columns['prompt']}}}"
            message = "the prompt is a text that holds a chat as JSON, and the model would read the JSON"
            first_rows.problems.append(Problem(where, message, CODE, hint, checked.loaded.place(where), "warning"))
        first_rows.descriptions.append(f"{spelled(path)}: {'; '.join(_describe(row, columns))}")
    return next(iter(readable), None)


def _check_values(first_rows: FirstRows, checked: CheckedSpec, row: Row | None, rewards: Iterable[str]) -> None:
    """Reports a right answer that a reward cannot compare with, and a value that no route of the teacher has."""
    spec = checked.spec
    assert isinstance(spec, ExperimentSpec)
    if row is None:
        return

    def report(path: Path, message: str, hint: str | None = None) -> None:
        problem = Problem(path, message, CODE, hint, checked.loaded.place(path))
        if problem not in first_rows.problems:  # training rows and suites may be the same
            first_rows.problems.append(problem)

    used = [leaf for name in rewards for leaf in reads.leaf_rewards(spec.rewards, name)]
    for name, reward in spec.rewards.items():
        if reward in used:
            try:
                check_right_answer(reward, row)
            except BadData as error:
                report(("rewards", name), error.message)
    parts = {("teacher", "weights"): spec.teacher and spec.teacher.weights, ("environment",): spec.environment}
    for path, part in parts.items():
        if isinstance(part, RoutedWeights | RoutedEnvironment) and (value := row.text(part.by)) not in part.routes:
            message = f"row {row.index}: {part.by} is {shorten(value)}, which {outside(part.routes)}"
            report((*path, "by"), message, f"{spelled(path)}.routes must have every value")


def _absence(source: Source, column: AbsentColumn) -> tuple[str, str | None]:
    hint = f'did you mean "{column.close}"?' if column.close else _other_kind(source)
    if isinstance(source, CsvSource) and (delimiter := _other_delimiter(column)):
        hint = f"add delimiter: {json.dumps(delimiter)} to the source"
    if "{" in column.name:
        hint = f"write {{template: {compact(column.name, flow=True)}}}"
    return f"{source_name(source)} has no column '{column.name}', only {listed(column.available)}", hint


def _other_delimiter(column: AbsentColumn) -> str | None:
    """The character that stands between the names of columns where a file seems to have one column only."""
    header = column.available[0] if len(column.available) == 1 else ""
    return next((mark for mark in ";\t|," if column.name in header.split(mark) and mark in header), None)


def _other_kind(source: Source) -> str | None:
    """A hint where the file's name ends as files of another kind of source do."""
    kind = file_kind(source.path) if isinstance(source, LocalFile) else None
    return f"use kind: {kind}" if kind and kind != source.kind else None


def _is_chat_as_text(prompt: Any) -> bool:
    try:
        chat = json.loads(prompt) if isinstance(prompt, str) and prompt.lstrip().startswith("[") else None
    except ValueError:
        return False
    return isinstance(chat, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in chat)


def _describe(row: Row, columns: Any) -> Iterator[str]:
    """What each column of a row is, the prompt first."""
    roles = ", ".join(message["role"] for message in row.messages)
    yield "prompt is text" if roles == "user" else f"prompt is a chat ({roles})"
    yield from (f"{name} is {describe_value(row.columns[name])}" for name in columns if name != "prompt")
