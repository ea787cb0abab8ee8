"""Reads rows from a source and maps their columns to chat prompts.  Knows nothing of tokens, teachers or rewards.

Error messages name a line of a JSON Lines or CSV file as `file:line`, counted from 1, and a row of any other source by
its index, counted from 0, which is `Row.index`.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.batches import Row
from sdkit.data.chats import tools_of
from sdkit.data.columns import ParsedColumn, chat_of, in_column, is_in, parse_column, read_columns, sources
from sdkit.data.sources import Raw, RawRows, read_source, source_name
from sdkit.language.errors import BadData, first_of, listed, nearest
from sdkit.language.row_text import Fault, is_empty, text_of
from sdkit.language.specs import Column, DataSpec
from sdkit.seeds import derive


def load_rows(data: DataSpec, base: Path, needed: Collection[str] = (), texts: Collection[str] = ()) -> list[Row]:
    """Returns the rows of a source, with their columns under sdkit's names and their prompts as chat.

    `base` is the folder that relative paths start from.  Columns in `needed` must not be empty; those in `texts` must be text
    or empty.  A column template with a null field gives null.  Raises BadData that lists the faults of all rows, and
    BadEnvironment if a package or the hub is unavailable.
    """
    columns = data.columns
    if columns is None or "prompt" not in columns:
        raise BadData("the data have no column for 'prompt'", hint="write columns: {prompt: …}")
    for name in needed:
        if name not in columns:
            raise BadData(f"the run needs a column '{name}', but columns name only {listed(columns)}")
    name, raw_rows = source_name(data.source), read_source(data.source, base, data.limit)
    if not raw_rows:
        raise BadData(f"{name} has no rows")
    mapped = map_rows(raw_rows, columns, needed, texts)
    if faults := [*(column.message(name) for column in mapped.absent), *mapped.faults]:
        raise BadData(first_of(faults))
    return mapped.rows


@frozen
class AbsentColumn:
    """A column of the source that a spec names and no row has."""

    name: str
    users: Sequence[str]  # sdkit's columns that need it
    available: Sequence[str]

    def message(self, source: str) -> str:
        """Says what is missing, and what the source has."""
        hint = f"; did you mean '{self.close}'?" if self.close else ""
        return f"{source} has no column '{self.name}'{hint} (it has {listed(self.available)})"

    @property
    def close(self) -> str | None:
        """The column of the source with the most similar name."""
        return nearest(self.name, self.available)


@frozen
class MappedRows:
    """Rows with their columns under sdkit's names, and what is wrong with the others."""

    rows: list[Row]
    absent: list[AbsentColumn]
    faults: list[str]  # each with the location of its row


def map_rows(
    raw_rows: RawRows, columns: Mapping[str, Column], needed: Collection[str] = (), texts: Collection[str] = ()
) -> MappedRows:
    """Maps the columns of rows, as `load_rows` does."""
    templates = {key: parse_column(key, column) for key, column in columns.items()}
    absent = _absent_columns(templates, raw_rows)
    gone = {column.name for column in absent}
    present = {n: c for n, c in templates.items() if not gone.intersection(sources(c))}
    rows, faults = [], []
    for index, (place, raw) in enumerate(raw_rows):
        try:
            rows.append(_row(index, raw, present, needed, texts))
        except Fault as fault:
            faults.append(f"{place}: {fault}")
    return MappedRows(rows, absent, faults)


def _row(
    index: int, raw: Raw | Fault, columns: Mapping[str, ParsedColumn], needed: Iterable[str], texts: Iterable[str]
) -> Row:
    if isinstance(raw, Fault):
        raise raw
    mapped = read_columns(columns, raw)
    empty = [name for name in needed if name in mapped and is_empty(mapped[name])]
    if empty:
        raise Fault(f"{listed(empty)} must not be empty")
    for name in texts:
        in_column(name, text_of, mapped.get(name))
    messages = chat_of(mapped) if "prompt" in mapped else ()
    tools = tools_of(mapped.get("tools"))
    return Row(index=index, messages=messages, columns=mapped, raw=raw, tools=tools)


def fingerprint(rows: Iterable[Row]) -> str:
    """Returns the SHA-256 of the messages and columns of the rows, in order; the same in every process."""
    digest = hashlib.sha256()
    for row in rows:
        content = _jsonable({"messages": row.messages, "columns": row.columns})
        digest.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def drop_overlap(train: Sequence[Row], held_out: Iterable[Row], columns: Sequence[str] = ()) -> tuple[list[Row], int]:
    """Returns the training rows whose task is not held out, and the number dropped.

    A task is a prompt, without case, white space, Unicode form and system message, and the values of `columns`.
    """
    excluded = {_task(row, columns) for row in held_out}
    kept = [row for row in train if _task(row, columns) not in excluded]
    return kept, len(train) - len(kept)


def drop_duplicates(rows: Sequence[Row], columns: Sequence[str] = ()) -> tuple[list[Row], int]:
    """Returns the first row of each task, and the number dropped: repeats would make confidence intervals too narrow."""
    first = {_task(row, columns): row for row in reversed(rows)}
    kept = [row for row in rows if first[_task(row, columns)] is row]
    return kept, len(rows) - len(kept)


def _task(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    texts = (m["content"] for m in row.messages if m["role"] != "system")
    prompt = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    return (*prompt, *(json.dumps(row.columns.get(name), sort_keys=True, default=str) for name in columns))


def positions(start: int, n: int, rows: int, seed: int, shuffle: bool) -> list[int]:
    """Returns the row indices at steps start .. start + n of an endless iteration over epochs.

    Each epoch visits every row once; with `shuffle`, in its own order derived from `seed`.  A pure function, so resuming
    needs only the position.
    """
    steps = (divmod(step, rows) for step in range(start, start + n))
    return [_epoch_order(rows, seed, epoch)[i] if shuffle else i for epoch, i in steps]


@lru_cache(maxsize=4)
def _epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(derive(seed, "data order", epoch)).shuffle(order)
    return tuple(order)


def _absent_columns(columns: Mapping[str, ParsedColumn], raw_rows: RawRows) -> list[AbsentColumn]:
    """The source columns that no row has; none if no row could be read."""
    rows = [raw for _, raw in raw_rows if isinstance(raw, Mapping)]
    available = list(dict.fromkeys(key for raw in rows for key in raw))
    users: dict[str, list[str]] = {}
    for name, column in columns.items():
        for key in sources(column):
            users.setdefault(key, []).append(name)
    return [AbsentColumn(key, by, available) for key, by in users.items() if rows and not is_in(key, available)]
