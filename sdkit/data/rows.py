"""Reads rows from a source and maps their columns to chat prompts.  Knows nothing of tokens, teachers or rewards.

Error messages name a line of a JSON Lines file as `file:line`, counted from 1, and a row of any other source by its
index, counted from 0, which is `Row.index`.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdkit.batches import Message, Row
from sdkit.data.sources import Raw, RawRows, read_source, source_name
from sdkit.language.errors import BadData, first_of, listed, nearest, shorten
from sdkit.language.row_text import Fault, check_value, describe_value, is_empty, is_missing, lines_of, text_of
from sdkit.language.specs import ColumnTemplate, DataSpec, Table
from sdkit.language.templates import Field, Template, TemplateError, fields, fill, parse
from sdkit.seeds import derive


def load_rows(
    data: DataSpec,
    base: Path,
    fallback_columns: Table[str | ColumnTemplate] | None = None,
    needed: Collection[str] = (),
    texts: Collection[str] = (),
) -> list[Row]:
    """Returns the rows of a source, with their columns under sdkit's names and their prompts as chat.

    `base` is the folder that relative paths start from; `fallback_columns` are used if the data name no columns.
    Columns in `needed` must not be empty; those in `texts` must be text or empty.  A column template with a null field
    gives null.  Raises BadData that lists the faults of all rows, and BadEnvironment if a package or the hub is
    unavailable.
    """
    columns = data.columns if data.columns is not None else fallback_columns
    if columns is None or "prompt" not in columns:
        raise BadData("the data have no column for 'prompt'", hint="write columns: {prompt: …}")
    for name in needed:
        if name not in columns:
            raise BadData(f"the run needs a column '{name}', but columns name only {listed(columns)}")
    name, raw_rows = source_name(data.source), read_source(data.source, base, data.limit)
    if not raw_rows:
        raise BadData(f"{name} has no rows")
    templates = {key: _parse_column(key, column) for key, column in columns.items()}
    present, faults = _drop_absent(templates, raw_rows, name)
    rows = []
    for index, (place, raw) in enumerate(raw_rows):
        try:
            rows.append(_row(index, raw, present, needed, texts))
        except Fault as fault:
            faults.append(f"{place}: {fault}")
    if faults:
        raise BadData(first_of(faults))
    return rows


def _row(
    index: int, raw: Raw | Fault, columns: Mapping[str, str | Template], needed: Iterable[str], texts: Iterable[str]
) -> Row:
    if isinstance(raw, Fault):
        raise raw
    mapped = {name: _value(name, column, raw) for name, column in columns.items()}
    empty = [name for name in needed if name in mapped and is_empty(mapped[name])]
    if empty:
        raise Fault(f"{listed(empty)} must not be empty")
    for name in texts:
        _in_column(name, text_of, mapped.get(name))
    messages = _messages(mapped) if "prompt" in mapped else ()
    return Row(index=index, messages=messages, columns=mapped, raw=raw)


def _in_column(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """Reads a value with `read`; a fault names the column."""
    try:
        return read(value)
    except Fault as fault:
        raise Fault(f"'{name}' is {fault}") from None


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


def drop_overlap(train: Sequence[Row], held_out: Iterable[Row]) -> tuple[list[Row], int]:
    """Returns the training rows whose prompt is not held out, and the number dropped.

    Prompts are compared without case, white space, Unicode form and system message.
    """
    excluded = {_normalized_prompt(row) for row in held_out}
    kept = [row for row in train if _normalized_prompt(row) not in excluded]
    return kept, len(train) - len(kept)


def drop_duplicates(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Returns the first row of each prompt, and the number dropped: repeats would make confidence intervals too narrow."""
    first = {_normalized_prompt(row): row for row in reversed(rows)}
    kept = [row for row in rows if first[_normalized_prompt(row)] is row]
    return kept, len(rows) - len(kept)


def _normalized_prompt(row: Row) -> tuple[str, ...]:
    texts = (m["content"] for m in row.messages if m["role"] != "system")
    return tuple(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)


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


def _parse_column(name: str, column: str | ColumnTemplate) -> str | Template:
    if isinstance(column, str):
        return column
    try:
        return parse(column.template)
    except TemplateError as error:
        raise BadData(f"the template of column '{name}': {error}") from error


def _sources(column: str | Template) -> list[str]:
    """The source columns that a column uses."""
    return [column] if isinstance(column, str) else [field.name for field in fields(column)]


def _drop_absent(
    columns: Mapping[str, str | Template], raw_rows: RawRows, name: str
) -> tuple[dict[str, str | Template], list[str]]:
    """Returns the columns that some row has, and a fault for each source column that none has."""
    rows = [raw for _, raw in raw_rows if isinstance(raw, Mapping)]
    available = list(dict.fromkeys(key for raw in rows for key in raw))
    wanted = dict.fromkeys(key for column in columns.values() for key in _sources(column))
    absent = [key for key in wanted if rows and key not in available]
    faults = []
    for key in absent:
        close = nearest(key, available)
        hint = f"; did you mean '{close}'?" if close else ""
        faults.append(f"{name} has no column '{key}'{hint} (it has {listed(available)})")
    present = {n: c for n, c in columns.items() if not set(absent).intersection(_sources(c))}
    return present, faults


def _value(name: str, column: str | Template, raw: Raw) -> Any:
    """The value of a column in a row: the source's value unchanged, or the text of a template."""
    if isinstance(column, str):
        value = _look_up(raw, Field(column))
        _in_column(name, check_value, value)
        return value
    values = {field: _look_up(raw, field) for field in fields(column)}
    texts = {field: _in_column(str(field), lines_of, value) for field, value in values.items()}
    if None in texts.values():
        return None
    return fill(column, lambda field: texts[field])


def _look_up(raw: Raw, field: Field) -> Any:
    value: Any = raw
    for key in (field.name, *field.path):
        if value is None:
            return None
        if not isinstance(value, Mapping) or key not in value:
            raise Fault(f"no '{field}' (write null where a row has none)")
        value = value[key]
    return value


def _messages(mapped: Raw) -> tuple[Message, ...]:
    prompt, system = mapped["prompt"], mapped.get("system")
    if is_empty(prompt) or (isinstance(prompt, list | tuple) and not prompt):
        raise Fault("the prompt is empty")
    if isinstance(prompt, str):
        content = _in_column("prompt", text_of, prompt)
        chat: tuple[Message, ...] = ({"role": "user", "content": content},)
    elif isinstance(prompt, list | tuple):
        chat = _chat(prompt)
    else:
        raise Fault(f"the prompt is {describe_value(prompt)}, not text or a list of messages")
    if is_missing(system) or system == "":
        return chat
    if not isinstance(system, str):
        raise Fault(f"'system' is {describe_value(system)}, not text")
    system = _in_column("system", text_of, system)
    if chat[0]["role"] == "system":
        raise Fault("the prompt brings a system message of its own, and 'system' is another")
    return ({"role": "system", "content": system}, *chat)


def _chat(prompt: Sequence[Any]) -> tuple[Message, ...]:
    for i, message in enumerate(prompt):
        entries = message if isinstance(message, Mapping) else {}
        if {key for key, value in entries.items() if value is not None} != {"role", "content"}:
            raise Fault(f"message {i} of the prompt is not {{role: …, content: …}}")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise Fault(f"message {i} of the prompt has the role {shorten(role)}, not 'system', 'user' or 'assistant'")
        if role == "system" and i:
            raise Fault(f"message {i} of the prompt is a system message, but not the first")
        if not isinstance(content, str):
            raise Fault(f"message {i} of the prompt holds {describe_value(content)}, not text")
        _in_column("prompt", text_of, content)
    if prompt[-1]["role"] != "user":
        raise Fault(f"the prompt ends with a message of role '{prompt[-1]['role']}', not 'user'")
    if is_empty(prompt[-1]["content"]):
        raise Fault("the last message of the prompt is empty")
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt)
