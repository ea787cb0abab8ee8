"""Reads the columns that a spec names from raw rows, and the chat of a prompt.  Knows nothing of files or tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdkit.batches import Message
from sdkit.data.sources import Raw, parse_json
from sdkit.language.errors import BadData, shorten
from sdkit.language.row_text import (
    Fault,
    check_value,
    content_text,
    describe_value,
    is_empty,
    is_missing,
    lines_of,
    text_of,
)
from sdkit.language.specs import Column, ColumnTemplate, JsonColumn, LastTurn
from sdkit.language.templates import Field, Template, TemplateError, fields, fill, parse

ParsedColumn = str | Template | LastTurn | JsonColumn
"""A column as a spec names it, with its template parsed."""


def parse_column(name: str, column: Column) -> ParsedColumn:
    """Returns the column with its template parsed.  Raises BadData."""
    if not isinstance(column, ColumnTemplate):
        return column
    try:
        return parse(column.template)
    except TemplateError as error:
        raise BadData(f"the template of column '{name}': {error}") from error


def sources(column: ParsedColumn) -> list[str]:
    """Returns the names of the source's columns that a column uses, as the spec writes them."""
    match column:
        case str():
            return [column]
        case LastTurn():
            return [column.last_turn]
        case JsonColumn():
            return [column.json]
        case _:
            return [field.name for field in fields(column)]


def is_in(name: str, available: Sequence[str]) -> bool:
    """Whether a source with these columns has the column `name`, which may lead into a map: `column.key`."""
    return name in available or name.partition(".")[0] in available


def read_columns(columns: Mapping[str, ParsedColumn], raw: Raw) -> dict[str, Any]:
    """Returns a row's values under sdkit's names.  Where a column takes the last turn of the prompt's chat, the prompt
    ends before it.  Raises Fault.
    """
    values = {name: _value(name, column, raw) for name, column in columns.items()}
    taken = {column.last_turn for column in columns.values() if isinstance(column, LastTurn)}
    prompt = columns.get("prompt")
    if isinstance(prompt, str | JsonColumn) and taken.intersection(sources(prompt)):
        values["prompt"] = _chat_of("prompt", values["prompt"])[:-1]
    return values


def in_column(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """Reads a value with `read`; a fault names the column."""
    try:
        return read(value)
    except Fault as fault:
        raise Fault(f"'{name}' is {fault}") from None


def _value(name: str, column: ParsedColumn, raw: Raw) -> Any:
    """The value of a column in a row: the source's value unchanged, parsed JSON, a chat's last turn, or a template's text."""
    match column:
        case str():
            return _checked(name, _named(raw, column))
        case JsonColumn():
            return _checked(name, _parsed(name, _named(raw, column.json)))
        case LastTurn():
            return _last_turn(name, _named(raw, column.last_turn))
    values = {field: _look_up(raw, field) for field in fields(column)}
    texts = {field: in_column(str(field), lines_of, value) for field, value in values.items()}
    if None in texts.values():
        return None
    return fill(column, lambda field: texts[field])


def _checked(name: str, value: Any) -> Any:
    in_column(name, check_value, value)
    return value


def _named(raw: Raw, name: str) -> Any:
    """The value of the source's column `name`; `column.key` leads into a map where no column has that name."""
    head, *path = [name] if name in raw else name.split(".")
    return _look_up(raw, Field(head, tuple(path)))


def _look_up(raw: Raw, field: Field) -> Any:
    value: Any = raw
    for key in (field.name, *field.path):
        if isinstance(value, str):
            value = _parsed(str(field), value)
        if value is None:
            return None
        if not isinstance(value, Mapping) or key not in value:
            raise Fault(f"no '{field}' (write null where a row has none)")
        value = value[key]
    return value


def _parsed(name: str, value: Any) -> Any:
    """The value of a text of JSON; other values unchanged, and nothing for an empty text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except json.JSONDecodeError as error:
        raise Fault(f"'{name}' is not JSON: {error.msg.lower()} at column {error.colno}") from None
    except RecursionError:
        raise Fault(f"'{name}' is nested too deeply") from None


def _chat_of(name: str, value: Any) -> Sequence[Any]:
    chat = _parsed(name, value)
    if not isinstance(chat, list | tuple) or not chat:
        raise Fault(f"'{name}' takes the last turn of {describe_value(chat)}, not of a list of messages")
    return chat


def _last_turn(name: str, value: Any) -> str:
    """The text of the assistant's turn that ends a chat."""
    last = _chat_of(name, value)[-1]
    text = in_column(name, text_of, last if isinstance(last, Mapping) else None)
    if text is None or is_empty(text):
        raise Fault(f"'{name}' is the last turn of a chat that ends with an empty one")
    return text


def chat_of(values: Raw) -> tuple[Message, ...]:
    """Returns the chat of a row's columns `prompt` and `system`.  Raises Fault."""
    prompt, system = values["prompt"], values.get("system")
    if is_empty(prompt) or (isinstance(prompt, list | tuple) and not prompt):
        raise Fault("the prompt is empty")
    if isinstance(prompt, str):
        content = in_column("prompt", text_of, prompt)
        chat: tuple[Message, ...] = ({"role": "user", "content": content},)
    elif isinstance(prompt, list | tuple):
        chat = _messages(prompt)
    else:
        raise Fault(f"the prompt is {describe_value(prompt)}, not text or a list of messages")
    if is_missing(system) or system == "":
        return chat
    if not isinstance(system, str):
        raise Fault(f"'system' is {describe_value(system)}, not text")
    system = in_column("system", text_of, system)
    if chat[0]["role"] == "system":
        raise Fault("the prompt brings a system message of its own, and 'system' is another")
    return ({"role": "system", "content": system}, *chat)


def _messages(prompt: Sequence[Any]) -> tuple[Message, ...]:
    messages = tuple(_message(i, message) for i, message in enumerate(prompt))
    if messages[-1]["role"] == "assistant":
        raise Fault(
            "the prompt ends with a message of role 'assistant', not 'user' (a column {last_turn: …} takes that message)"
        )
    if messages[-1]["role"] != "user":
        raise Fault(f"the prompt ends with a message of role '{messages[-1]['role']}', not 'user'")
    if is_empty(messages[-1]["content"]):
        raise Fault("the last message of the prompt is empty")
    return messages


def _message(i: int, message: Any) -> Message:
    entries = message if isinstance(message, Mapping) else {}
    if {key for key, value in entries.items() if value is not None} != {"role", "content"}:
        raise Fault(f"message {i} of the prompt is not {{role: …, content: …}}")
    role = entries["role"]
    if role not in ("system", "user", "assistant"):
        raise Fault(f"message {i} of the prompt has the role {shorten(role)}, not 'system', 'user' or 'assistant'")
    if role == "system" and i:
        raise Fault(f"message {i} of the prompt is a system message, but not the first")
    try:
        content = content_text(entries["content"])
    except Fault as fault:
        raise Fault(f"message {i} of the prompt holds {fault}") from None
    in_column("prompt", text_of, content)
    return {"role": role, "content": content}
