"""Rows: from a source, through the columns, to chat prompts.  Knows nothing of tokens, teachers or rewards.

Messages name a line of a JSON Lines file as `file:line`, counted from 1, and a row of any other source by its index,
counted from 0, which is `Row.index`.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from sdkit.batches import Message, Row
from sdkit.data.sources import Raw, RawRows, read_source, source_name
from sdkit.language.errors import BadData, first_of, listed, nearest, shorten
from sdkit.language.row_text import (
    Fault,
    check_value,
    is_empty,
    is_missing,
    lines_of,
    say_what,
    text_of,
)
from sdkit.language.specs import (
    ColumnTemplate,
    DataSpec,
    Table,
)
from sdkit.language.templates import Field, Template, TemplateError, fields, fill, parse
from sdkit.seeds import derive

Columns = Mapping[str, str | ColumnTemplate]


# ── rows ──────────────────────────────────────────────────────────────────────────────────────


def load_rows(
    data: DataSpec,
    base: Path,
    fallback_columns: Table[str | ColumnTemplate] | None = None,
    needed: Collection[str] = (),
    texts: Collection[str] = (),
) -> list[Row]:
    """The rows of a source with sdkit's names for their columns, and their prompts as chat.

    `base` is the folder that relative paths start from, `fallback_columns` stand in where the data state none, and
    the columns in `needed` must not be empty, those in `texts` must have a text where they are not.  A column template
    with a null in it gives null.  Raises BadData that names every fault of every row at once, and BadEnvironment where
    a package or the hub is out of reach.
    """
    columns = data.columns if data.columns is not None else fallback_columns
    if columns is None or "prompt" not in columns:
        raise BadData("the data have no column for 'prompt'", hint="write columns: {prompt: …}")
    for name in needed:
        if name not in columns:
            raise BadData(
                f"the run needs a column '{name}', but columns name only {listed(columns)}"
            )
    name, found = source_name(data.source), read_source(data.source, base, data.limit)
    if not found:
        raise BadData(f"{name} has no rows")
    templates = {key: _template(key, column) for key, column in columns.items()}
    present, faults = _present(templates, found, name)
    rows = []
    for index, (place, raw) in enumerate(found):
        try:
            rows.append(_row(index, raw, present, needed, texts))
        except Fault as fault:
            faults.append(f"{place}: {fault}")
    if faults:
        _give_up(faults)
    return rows


def _row(
    index: int,
    raw: Raw | Fault,
    columns: Mapping[str, str | Template],
    needed: Iterable[str],
    texts: Iterable[str],
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
    """What `read` makes of a value; its fault names the column."""
    try:
        return read(value)
    except Fault as fault:
        raise Fault(f"'{name}' is {fault}") from None


def _give_up(faults: Sequence[str]) -> NoReturn:
    raise BadData(first_of(faults))


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 of the messages and columns of the rows, in order; the same in every process."""
    digest = hashlib.sha256()
    for row in rows:
        content = _plain({"messages": row.messages, "columns": row.columns})
        digest.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def drop_overlap(train: Sequence[Row], held_out: Iterable[Row]) -> tuple[list[Row], int]:
    """The training rows whose prompt is not held out, and how many were dropped.

    Case, white space, Unicode form and the system message make no difference.
    """
    taken = {_normalised(row) for row in held_out}
    kept = [row for row in train if _normalised(row) not in taken]
    return kept, len(train) - len(kept)


def drop_duplicates(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The first row of every prompt, and how many were dropped: a repeated prompt would narrow an interval unduly."""
    first = {_normalised(row): row for row in reversed(rows)}
    kept = [row for row in rows if first[_normalised(row)] is row]
    return kept, len(rows) - len(kept)


def _normalised(row: Row) -> tuple[str, ...]:
    texts = (m["content"] for m in row.messages if m["role"] != "system")
    return tuple(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)


def positions(start: int, n: int, rows: int, seed: int, shuffle: bool) -> list[int]:
    """Indices of the rows at places start .. start + n of an endless walk, epoch after epoch.

    Each epoch visits every row once, in an order of its own drawn from `seed`.  A pure function, so that resuming
    needs the place alone.
    """
    walk = (divmod(place, rows) for place in range(start, start + n))
    return [_order(rows, seed, epoch)[i] if shuffle else i for epoch, i in walk]


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(derive(seed, "data order", epoch)).shuffle(order)
    return tuple(order)


# ── columns ───────────────────────────────────────────────────────────────────────────────────


def _template(name: str, column: str | ColumnTemplate) -> str | Template:
    if isinstance(column, str):
        return column
    try:
        return parse(column.template)
    except TemplateError as error:
        raise BadData(f"the template of column '{name}': {error}") from error


def _sources(column: str | Template) -> list[str]:
    """The columns of the source that a column is made of."""
    return [column] if isinstance(column, str) else [field.name for field in fields(column)]


def _present(
    columns: Mapping[str, str | Template], found: RawRows, name: str
) -> tuple[dict[str, str | Template], list[str]]:
    """The columns that some row has, and a fault for each that none has."""
    rows = [raw for _, raw in found if isinstance(raw, Mapping)]
    available = list(dict.fromkeys(key for raw in rows for key in raw))
    wanted = dict.fromkeys(key for column in columns.values() for key in _sources(column))
    absent = [key for key in wanted if rows and key not in available]
    faults = []
    for key in absent:
        like = nearest(key, available)
        meant = f"; did you mean '{like}'?" if like else ""
        faults.append(f"{name} has no column '{key}'{meant} (it has {listed(available)})")
    present = {n: c for n, c in columns.items() if not set(absent).intersection(_sources(c))}
    return present, faults


def _value(name: str, column: str | Template, raw: Raw) -> Any:
    """A column of a row: the source's value as it is, or the text of a template."""
    if isinstance(column, str):
        value = _walk(raw, Field(column))
        _in_column(name, check_value, value)
        return value
    values = {field: _walk(raw, field) for field in fields(column)}
    texts = {field: _in_column(str(field), lines_of, value) for field, value in values.items()}
    if None in texts.values():
        return None
    return fill(column, lambda field: texts[field])


def _walk(raw: Raw, field: Field) -> Any:
    value: Any = raw
    for key in (field.name, *field.path):
        if value is None:
            return None
        if not isinstance(value, Mapping) or key not in value:
            raise Fault(f"no '{field}' (write null where a row has none)")
        value = value[key]
    return value


# ── messages ──────────────────────────────────────────────────────────────────────────────────


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
        raise Fault(f"the prompt is {say_what(prompt)}, not text or a list of messages")
    if is_missing(system) or system == "":
        return chat
    if not isinstance(system, str):
        raise Fault(f"'system' is {say_what(system)}, not text")
    system = _in_column("system", text_of, system)
    if chat[0]["role"] == "system":
        raise Fault("the prompt brings a system message of its own, and 'system' is another")
    return ({"role": "system", "content": system}, *chat)


def _chat(prompt: Sequence[Any]) -> tuple[Message, ...]:
    for i, message in enumerate(prompt):
        given = message if isinstance(message, Mapping) else {}
        if {key for key, value in given.items() if value is not None} != {"role", "content"}:
            raise Fault(f"message {i} of the prompt is not {{role: …, content: …}}")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise Fault(
                f"message {i} of the prompt has the role {shorten(role)}, "
                "not 'system', 'user' or 'assistant'"
            )
        if role == "system" and i:
            raise Fault(f"message {i} of the prompt is a system message, but not the first")
        if not isinstance(content, str):
            raise Fault(f"message {i} of the prompt holds {say_what(content)}, not text")
        _in_column("prompt", text_of, content)
    if prompt[-1]["role"] != "user":
        raise Fault(f"the prompt ends with a message of role '{prompt[-1]['role']}', not 'user'")
    if is_empty(prompt[-1]["content"]):
        raise Fault("the last message of the prompt is empty")
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt)
