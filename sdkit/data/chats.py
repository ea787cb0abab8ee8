"""Chats of data rows as messages: OpenAI's shape (`role`, `content`, `tool_calls`) and ShareGPT's (`from`, `value`).

Knows nothing of columns, tokens or chat templates.  A message has a role and a content; an assistant's turn may have
`tool_calls`, each with an object of arguments; a message of the role `tool` has a `name` and a `tool_call_id` where they are
known.  Such messages are read again unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.batches import Message
from sdkit.data.sources import parse_json
from sdkit.language.errors import shorten
from sdkit.language.row_text import Fault, content_text, describe_value, is_empty, text_of

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""Role by the name that ShareGPT's `from` gives it; the value of a `function_call` is JSON."""
KEYS = {"assistant": {"tool_calls"}, "tool": {"name", "tool_call_id"}}
"""Keys that a message of a role may have besides `role` and `content`."""


def messages_of(chat: Sequence[Any], name: str) -> tuple[Message, ...]:
    """Returns the messages of a chat; `name` says in faults what it is.  Raises Fault for the first bad message."""
    messages: list[Message] = []
    for i, raw in enumerate(chat):
        at = f"message {i} of {name}"
        message = _message(raw, at)
        if message["role"] == "system" and i:
            raise Fault(f"{at} is a system message, but not the first")
        messages.append(_of_its_call(message, messages, at, strict="from" not in raw))
    return tuple(messages)


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns the JSON schemas of a row's column `tools`, as chat templates take them: a list, or JSON text of one.

    Raises Fault.
    """
    tools = _parsed(value, "'tools'") if isinstance(value, str) and not is_empty(value) else value
    if tools is None or tools == "" or is_empty(tools):
        return ()
    if not isinstance(tools, list | tuple):
        raise Fault(f"'tools' is {describe_value(tools)}, not a list of functions")
    return tuple(_tool(i, tool) for i, tool in enumerate(tools))


def _tool(i: int, tool: Any) -> Mapping[str, Any]:
    given = _given(tool)
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Fault(f"tool {i} is not {{type: function, function: {{name: …, parameters: …}}}}")
    return {"type": "function", "function": _given(function) if function is given else function}


def _given(value: Any) -> dict[str, Any]:
    """The entries of a map that have a value; files of one schema for all rows write null or an empty list for the others."""
    entries = value if isinstance(value, Mapping) else {}
    return {key: entry for key, entry in entries.items() if entry is not None and (entry != [] or key == "content")}


def _message(raw: Any, at: str) -> Message:
    given = _given(raw)
    if "from" in given:
        return _sharegpt(given, at)
    role = given.get("role")
    if role == "assistant" and given.get("tool_calls"):
        given.setdefault("content", "")
    extra = KEYS.get(role, set()) if isinstance(role, str) else set()
    if not {"role", "content"} <= given.keys() or given.keys() - {"role", "content", *extra}:
        raise Fault(f"{at} is not {{role: …, content: …}}")
    if role not in ROLES:
        raise Fault(f"{at} has the role {shorten(role)}, not {', '.join(map(repr, ROLES[:-1]))} or {ROLES[-1]!r}")
    try:
        given["content"] = _text(content_text(given["content"]))
    except Fault as fault:
        raise Fault(f"{at} holds {fault}") from None
    if "tool_calls" in given:
        given["tool_calls"] = _calls(given["tool_calls"], at)
    return given


def _sharegpt(given: Mapping[str, Any], at: str) -> Message:
    """A message of ShareGPT's shape."""
    source, value = given["from"], given.get("value")
    if given.keys() - {"from", "value", "weight"} or not isinstance(source, str):
        raise Fault(f"{at} is not {{from: …, value: …}}")
    if source not in SHAREGPT_ROLES:
        raise Fault(f"{at} is from {shorten(source)}, which is none of {', '.join(SHAREGPT_ROLES)}")
    if given.get("weight", 1) != 1:
        raise Fault(f"{at} has the weight {shorten(given['weight'])}: the turns of a chat all count")
    role = SHAREGPT_ROLES[source]
    if source == "function_call":
        calls = _parsed(value, at)
        return {"role": role, "content": "", "tool_calls": _calls(calls if isinstance(calls, list) else [calls], at)}
    if not isinstance(value, str):
        raise Fault(f"{at} holds {describe_value(value)}, not text")
    return {"role": role, "content": _text(value)}


def _text(text: str) -> str:
    return text_of(text) or ""


def _parsed(value: Any, at: str) -> Any:
    """The value of JSON text; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        parsed = parse_json(value)
    except (json.JSONDecodeError, RecursionError):
        raise Fault(f"{at} holds {shorten(value)}, which is not JSON") from None
    if isinstance(parsed, Fault):
        raise Fault(f"{at} holds {parsed}")
    return parsed


def _calls(calls: Any, at: str) -> list[Mapping[str, Any]]:
    """The tool calls of a turn, `{type: function, function: {name: …, arguments: {…}}}`, with an `id` where they have one."""
    if not isinstance(calls, list | tuple) or not calls:
        raise Fault(f"{at} has tool_calls that are {describe_value(calls)}, not a list of calls")
    return [_call(call, f"tool call {i} in {at}") for i, call in enumerate(calls)]


def _call(call: Any, at: str) -> Mapping[str, Any]:
    given = _given(call)
    function = _given(given.get("function", given))
    if not isinstance(name := function.get("name"), str) or not name:
        raise Fault(f"{at} is not {{function: {{name: …, arguments: …}}}}")
    arguments = _parsed(function.get("arguments") or {}, at)
    if not isinstance(arguments, Mapping):
        raise Fault(f"{at} has arguments that are {describe_value(arguments)}, not an object")
    identity = {"id": given["id"]} if "id" in given and given is not function else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _of_its_call(message: Message, before: Sequence[Message], at: str, *, strict: bool) -> Message:
    """A tool's result with the name of the tool whose result it is; other messages unchanged.

    Raises Fault for a result without a call.  Unless `strict`, a call may be text of the turn.
    """
    if message["role"] != "tool":
        return message
    results = next((i for i, earlier in enumerate(reversed(before)) if earlier["role"] != "tool"), len(before))
    turn = before[-1 - results] if results < len(before) else {}
    calls = turn.get("tool_calls", ())
    if turn.get("role") != "assistant" or (strict and not calls):
        raise Fault(f"{at} is a tool's result, but no tool call precedes it")
    if (identity := message.get("tool_call_id")) is not None and any("id" in call for call in calls):
        call = next((call for call in calls if call.get("id") == identity), None)
        if call is None:
            raise Fault(
                f"{at} is the result of the tool call {shorten(identity)}, which the turn before it does not make"
            )
    elif calls and results >= len(calls):
        raise Fault(f"{at} is a tool's result, but the turn before it makes only {len(calls)} calls")
    else:
        call = calls[results] if calls else None
    return {**message, "name": message.get("name", call["function"]["name"])} if call else message
