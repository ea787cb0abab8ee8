"""Data: files, rows and columns."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sdkit.language import specs
from sdkit.language.errors import Path, counted, did_you_mean, outside, shorten, spelled
from sdkit.language.files import file_names
from sdkit.language.row_text import describe_value, is_empty
from sdkit.language.rules.base import Context, Finding, columns_of, data_of, run_rule, slots
from sdkit.language.source import EXPANDED_BY_HAND
from sdkit.language.templates import TemplateError, fields, parse


@run_rule("rows have a prompt")
def prompt_column(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The column `prompt` is what the student is asked."""
    for path, data in data_of(spec):
        if data.columns is None and path != ("data",):
            continue
        if "prompt" not in (data.columns or {}):
            inverted = next((name for name, column in (data.columns or {}).items() if column == "prompt"), "NAME")
            hint = f"add columns: {{prompt: {inverted}}}, {inverted} being the source's column"
            yield (*path, "columns"), "no column is named 'prompt'", hint


@run_rule("column slots use columns of the data")
def slot_column(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A slot of kind column uses a name declared under data.columns."""
    known = columns_of(spec, spec.data)
    for path, slot in slots(spec, specs.ColumnSlot):
        if slot.name not in known:
            hint = did_you_mean(slot.name, known) or f"add data.columns.{slot.name}"
            yield (*path, "name"), f"column {shorten(slot.name)} {outside(known)}", hint


@run_rule("inline rows have a text prompt")
def inline_prompt(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A prompt is text or a list of messages, and not empty.  Rows from files are checked when they are read."""
    for path, data in data_of(spec):
        column = columns_of(spec, data).get("prompt")
        if not isinstance(data.source, specs.InlineSource) or not isinstance(column, str):
            continue
        for i, row in enumerate(data.source.rows[: data.limit]):
            where, prompt = (*path, "source", "rows", i, column), row.get(column, "")
            if column in row and (is_empty(prompt) or prompt == []):
                yield where, "the prompt is empty", None
            elif not isinstance(prompt, str | list | tuple):
                yield where, f"the prompt is {describe_value(prompt)}, not text or a list of messages", None


@run_rule("the completion column is in the data")
def dataset_column(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """With `sampled_by: dataset` or `mixture`, completions come from a column of the training rows."""
    column, known = spec.rollout.sampled_by.completion_column, columns_of(spec, spec.data)
    if column and column not in known:
        path = ("rollout", "sampled_by", "column")
        message = f"{context.stated(path, column)}, which {outside(known)}"
        yield path, message, did_you_mean(column, known) or f"add data.columns.{column}"


@run_rule("columns exist in the source")
def source_column(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """For sources whose columns are known in advance, a wrong name is reported before any data is read."""
    for path, data in data_of(spec):
        known = _source_columns(data)
        if known is None:
            continue
        written_at = path if data.columns else ("data",)
        where = "" if data.columns else f" of {spelled(path)}"
        for name, column in columns_of(spec, data).items():
            for wanted in (w for w in _wanted(column) if known.isdisjoint((w, w.partition(".")[0]))):
                message = f"source column {shorten(wanted)}{where} {outside(sorted(known))}"
                yield (*written_at, "columns", name), message, did_you_mean(wanted, known)


def _source_columns(data: specs.DataSpec) -> set[str] | None:
    """The columns that every row has; None if they are unknown before reading."""
    if isinstance(data.source, specs.ReasoningGymSource):
        return {"question", "answer", "metadata"}
    if isinstance(data.source, specs.InlineSource):
        return set.intersection(*(set(row) for row in data.source.rows))
    return None


def _wanted(column: specs.Column) -> list[str]:
    match column:
        case str():
            return [column]
        case specs.LastTurn():
            return [column.last_turn]
        case specs.ChatTurns():
            return [column.turns]
        case specs.JsonColumn():
            return [column.json]
    try:
        return [field.name for field in fields(parse(column.template))]
    except TemplateError:
        return []


@run_rule("data files exist")
def data_path(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A path starts at the folder of the file that names it, or on the command line at the working directory.  A file with an `origin` may be fetched later, before the run."""
    for path, data in data_of(spec):
        source = data.source
        where = (*path, "source", "path")
        there = isinstance(source, specs.FileSource) and os.path.exists(context.file(source.path))
        if isinstance(source, specs.FileSource) and source.origin and not there:
            continue
        if isinstance(source, specs.LocalFile):
            if not there:
                yield where, f"there is no file {source.path}", _folder_hint(context, where, source.path)
            elif os.path.isdir(context.file(source.path)):
                yield where, f"{source.path} is a folder, not a file", None
            elif not os.path.isfile(context.file(source.path)):
                yield where, f"{source.path} is a pipe or a device, not a file", None
        elif isinstance(source, specs.HubSource) and os.path.isfile(context.file(source.path)):
            hint = "use kind: jsonl, json, csv or parquet, as the file is"
            yield where, f"{source.path} is a file, not a data set of the hub", hint
        elif isinstance(source, specs.DiskSource) and not os.path.isdir(context.file(source.path)):
            yield where, f"there is no folder {source.path}", _folder_hint(context, where, source.path)


def _folder_hint(context: Context, where: Path, path: str) -> str | None:
    if os.path.islink(context.file(path)):
        return f"{path} is a link that leads nowhere"
    if "://" in path:
        return "sdkit reads files of this machine, and data sets of the hub with kind: hub"
    if "$" in path:
        return f"variables are not expanded: {EXPANDED_BY_HAND}"
    if any(character in path for character in "*?["):
        return "a source is one file, so write the files into one"
    start = context.start_of(where, path)
    folder, name = os.path.split(context.file(path))
    if not os.path.isdir(folder or "."):
        return "; ".join(filter(None, [f"there is no folder {os.path.dirname(path)} either", start]))
    return did_you_mean(name, file_names(folder or ".")) or start


@run_rule("a rollout batch does not repeat prompts", "warning")
def few_rows(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """With fewer rows than prompts per batch, every batch contains some prompt twice."""
    source, limit = spec.data.source, spec.data.limit
    rows = limit
    if isinstance(source, specs.InlineSource):
        rows = min(len(source.rows), limit or len(source.rows))
    elif isinstance(source, specs.ReasoningGymSource):
        rows = min(source.size, limit or source.size)
    if rows and rows < spec.training.prompts_per_step:
        prompts = spec.training.prompts_per_step
        message = f"prompts_per_step is {prompts}, but the data has {counted(rows, 'row')}"
        yield ("training", "prompts_per_step"), message, None
