"""Tool calls against the schemas of the tools, and their results as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.data.call_formats import names_of
from sdkit.language.errors import listed, shorten
from sdkit.spans import Call, Message

TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
MADE_UP: Mapping[str, Any] = {"integer": 1, "number": 1.0, "boolean": True, "object": {}, "null": None}
"""A value of each type but text and lists."""


def call_fault(tools: Sequence[Mapping[str, Any]], call: Call) -> str | None:
    """Returns why a call fits no tool: an unknown tool, missing or unknown arguments, or one of another type."""
    tool = next((tool["function"] for tool in tools if tool["function"]["name"] == call.name), None)
    if tool is None:
        return f"there is no tool {shorten(call.name)}; the tools are {listed(names_of(tools))}"
    parameters = tool["parameters"]
    known = parameters["properties"]
    missing = [name for name in parameters.get("required", ()) if name not in call.arguments]
    unknown = [name for name in call.arguments if name not in known]
    if missing or unknown:
        faults = [f"without {listed(missing)}"] * bool(missing) + [f"with {listed(unknown)}"] * bool(unknown)
        return f"{call.name} cannot be called {' and '.join(faults)}; its arguments are {listed(known) or 'none'}"
    for name, value in call.arguments.items():
        if not _fits(value, known[name]):
            return f"{name} of {call.name} is {shorten(value)}, which is not {_wanted(known[name])}"
    return None


def made_up_arguments(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a value of its schema for each required argument of a tool."""
    parameters = tool["function"]["parameters"]
    return {name: _made_up(parameters["properties"][name]) for name in parameters.get("required", ())}


def _made_up(schema: Mapping[str, Any]) -> Any:
    if "anyOf" in schema:
        return _made_up(schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][0]
    kinds = schema.get("type", "string")
    kind = kinds if isinstance(kinds, str) else kinds[0]
    if kind == "array":
        return [_made_up(schema["items"])] if "items" in schema else []
    return MADE_UP.get(kind, "text")


def result_message(call: Call, result: str, tools: Sequence[Mapping[str, Any]]) -> Message:
    """Returns a call's result, under the tool's name if there is such a tool."""
    return Message(role="tool", content=result, name=call.name if call.name in names_of(tools) else None)


def error_text(message: str) -> str:
    """Returns an error as a tool's result."""
    return json.dumps({"error": message}, ensure_ascii=False)


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has the schema's type and is among its choices; what a list or an object contains is not compared."""
    if "anyOf" in schema:
        return (value is None and schema.get("nullable", False)) or any(_fits(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if value is None and schema.get("nullable"):
        return True
    kinds = schema.get("type")
    names = [kinds] if isinstance(kinds, str) else kinds or list(TYPES)
    accepted = tuple(kind for name in names for kind in TYPES.get(name, (object,)))
    return isinstance(value, accepted) and (not isinstance(value, bool) or bool in accepted or object in accepted)


def _wanted(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {listed(schema['enum'])}"
    kinds = schema.get("type", "a value of its schema")
    return kinds if isinstance(kinds, str) else " or ".join(kinds)
