"""Reads the columns that a spec names from raw rows, and the chat of a prompt.  Knows nothing of files or tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdkit.batches import Message
from sdkit.data.chats import messages_of
from sdkit.data.sources import Raw, parse_json
from sdkit.language.errors import BadData
from sdkit.language.row_text import Fault, Turns, check_value, describe_value, is_empty, is_missing, lines_of, text_of
from sdkit.language.specs import ChatTurns, Column, ColumnTemplate, JsonColumn, LastTurn
from sdkit.language.templates import Field, Template, TemplateError, fields, fill, parse

ParsedColumn = str | Template | LastTurn | ChatTurns | JsonColumn
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
        case ChatTurns():
            return [column.turns]
        case JsonColumn():
            return [column.json]
        case _:
            return [field.name for field in fields(column)]


def is_in(name: str, available: Sequence[str]) -> bool:
    """Whether a source with these columns has the column `name`, which may lead into a map: `column.key`."""
    return name in available or name.partition(".")[0] in available


def read_columns(columns: Mapping[str, ParsedColumn], raw: Raw) -> dict[str, Any]:
    """Returns a row's values under sdkit's names.  Where a column takes the last turns of the prompt's chat, the prompt ends
    before them.  Raises Fault.
    """
    values = {name: _value(name, column, raw) for name, column in columns.items()}
    prompt = columns.get("prompt")
    if isinstance(prompt, str | JsonColumn):
        same = [c for c in columns.values() if isinstance(c, LastTurn | ChatTurns) and sources(c) == sources(prompt)]
        if any(isinstance(column, ChatTurns) for column in same):
            chat = _chat_of("prompt", values["prompt"])
            values["prompt"] = chat[: _first_answer("prompt", chat)]
            if not values["prompt"]:
                raise Fault("the chat begins with the assistant's turn, so there is no prompt")
        elif same:
            values["prompt"] = _chat_of("prompt", values["prompt"])[:-1]
    return values


def in_column(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """Reads a value with `read`; a fault names the column."""
    try:
        return read(value)
    except Fault as fault:
        raise Fault(f"'{name}' is {fault}") from None


def _value(name: str, column: ParsedColumn, raw: Raw) -> Any:
    """The value of a column in a row: the source's value unchanged, parsed JSON, a chat's last turn or turns, or a template's
    text.
    """
    match column:
        case str():
            return _checked(name, _named(raw, column))
        case JsonColumn():
            return _checked(name, _parsed(name, _named(raw, column.json)))
        case LastTurn():
            return _last_turn(name, _named(raw, column.last_turn))
        case ChatTurns():
            return _turns(name, _named(raw, column.turns))
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


def _chat_of(name: str, value: Any) -> tuple[Message, ...]:
    chat = _parsed(name, value)
    if not isinstance(chat, list | tuple) or not chat:
        raise Fault(f"'{name}' takes turns of {describe_value(chat)}, not of a list of messages")
    return messages_of(chat, f"'{name}'")


def _last_turn(name: str, value: Any) -> str:
    """The text of the assistant's turn that ends a chat."""
    last = _chat_of(name, value)[-1]
    if last.get("tool_calls"):
        raise Fault(f"'{name}' is the last turn of a chat that ends with a tool call (a column {{turns: …}} takes it)")
    text = in_column(name, text_of, last)
    if text is None or is_empty(text):
        raise Fault(f"'{name}' is the last turn of a chat that ends with an empty one")
    return text


def _turns(name: str, value: Any) -> Turns:
    """The messages of a chat from the first assistant's turn on."""
    chat = _chat_of(name, value)
    turns = Turns(chat[(first := _first_answer(name, chat)) :])
    for i, message in enumerate(turns, first):
        if message["role"] == "assistant" and i > first and chat[i - 1]["role"] == "assistant":
            raise Fault(f"message {i} of '{name}' is an assistant's turn, and so is the one before it")
        if message["role"] != "tool" and is_empty(message["content"]) and not message.get("tool_calls"):
            raise Fault(f"message {i} of '{name}' is empty")
    return turns


def _first_answer(name: str, chat: Sequence[Message]) -> int:
    """The place of the first assistant's turn."""
    place = next((i for i, message in enumerate(chat) if message["role"] == "assistant"), None)
    if place is None:
        raise Fault(f"'{name}' takes the turns of a chat without an assistant's turn")
    return place


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
    messages = messages_of(prompt, "the prompt")
    if messages[-1]["role"] == "assistant":
        raise Fault(
            "the prompt ends with a message of role 'assistant', not 'user' (a column {last_turn: …} takes that message)"
        )
    if messages[-1]["role"] not in ("user", "tool"):
        raise Fault(f"the prompt ends with a message of role '{messages[-1]['role']}', not 'user'")
    if not any(message["role"] == "user" for message in messages):
        raise Fault("the prompt has no message of the role 'user'")
    if messages[-1]["role"] == "user" and is_empty(messages[-1]["content"]):
        raise Fault("the last message of the prompt is empty")
    return messages
