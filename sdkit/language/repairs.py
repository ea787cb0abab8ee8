"""Hints for values of a wrong type: how to write what the user meant.  Imported only when a spec has such a value."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from sdkit.language.errors import Path, listed
from sdkit.language.introspection import Key, is_spec, keys_of, kinds_of, options_of
from sdkit.language.scalars import compact, scalar
from sdkit.language.source import EXPANDED_BY_HAND
from sdkit.language.suggestions import file_source, spaced


def parse_unquoted(text: str) -> Any:
    """Returns the value that the text has as a plain YAML scalar."""
    try:
        return scalar(text)
    except ValueError:
        return text


def scalar_hint(data: Any, wanted: tuple[type, ...]) -> str | None:
    """Returns how to turn the data into one of the wanted scalar types; None if there is no way."""
    if isinstance(data, str):
        parsed = parse_unquoted(data)
        if type(parsed) in wanted or (type(parsed) is int and float in wanted):
            return "remove the quotes"
        if bool in wanted and data.lower() in ("on", "yes", "y", "off", "no", "n"):
            return f"write {'true' if data.lower() in ('on', 'yes', 'y') else 'false'}"
        plain = data.replace("_", "").replace(",", "")
        if (int in wanted or float in wanted) and type(parse_unquoted(plain)) in (int, float):
            return f"write {plain}"
        if data.startswith("$"):
            return f"variables are not expanded: {EXPANDED_BY_HAND}"
    elif bool in wanted and type(data) is int and data in (0, 1):
        return f"write {'true' if data else 'false'}"
    elif isinstance(data, bool | int | float) and str in wanted:
        return f'put it in quotes: "{compact(data)}"'
    elif isinstance(data, float) and int in wanted and data.is_integer():
        return f"write {int(data)}"
    return None


def list_hint(data: Any, length: int | None) -> str | None:
    """Returns the list that a scalar is probably meant to be; `length` is that of a list of a fixed length."""
    if isinstance(data, dict) or data is None:
        return None
    return "write [" + ", ".join([compact(data, flow=True), *["…"] * ((length or 1) - 1)]) + "]"


def map_hint(cls: type, data: Any, path: Path) -> str | None:
    """Returns what to write in place of a scalar or a list where a map with the keys of `cls` is expected."""
    if isinstance(data, list):
        return "remove the dash before its keys" if len(data) == 1 and isinstance(data[0], dict) else None
    keys = keys_of(cls)
    name = path[-1] if path else None
    if isinstance(data, str) and name:
        if pair := spaced(data, keys):
            return f"write {name}: {{{pair}}}"
        if source := "source" in keys and file_source(data):
            return source.replace("source: ", f"{name}: {{source: ", 1) + "}"
        if key := _key_for(keys, data):
            return f"write {name}: {{{key}: {compact(data)}}}"
    return f"its keys are {listed(keys)}" if data is not None and path else None


def _key_for(keys: Mapping[str, Key], text: str) -> str | None:
    """The key that the text is the value of: the one that has it as a choice, else the only required text."""
    choosing = [name for name, key in keys.items() if any(_offers(option, text) for option in options_of(key.type))]
    required = [name for name, key in keys.items() if key.required and str in options_of(key.type)]
    return next(iter(choosing or required[:1]), None)


def _offers(option: Any, text: str) -> bool:
    """Whether the text is one of an option's choices: a kind, or a literal."""
    if typing.get_origin(option) is typing.Literal:
        return text in typing.get_args(option)
    return is_spec(option) and getattr(option, "kind", None) == text


def table_hint(tp: Any, data: Any, path: Path) -> str | None:
    """Returns what to write in place of a value that is no table, whose entries are of type `tp`."""
    if data is None or not path:
        return None
    name = str(path[-1])
    if isinstance(data, list) and len(data) == 1 and isinstance(data[0], dict):
        return nameless_hint(data[0], name) if is_nameless_entry(tp, data[0]) else "remove the dash before its keys"
    if isinstance(data, str) and any(_offers(option, data) for option in options_of(tp)):
        return f"write {name}: {{NAME: {data}}}"
    return f"write {name}: {{NAME: {{…}}}}" if any(map(is_spec, options_of(tp))) else f"write {name}: {{NAME: …}}"


def is_nameless_entry(tp: Any, data: Mapping[str, Any]) -> bool:
    """Whether the map is one entry of a table with entries of type `tp`, written without its name."""
    options = [option for option in options_of(tp) if is_spec(option)]
    if kinds := kinds_of(options):
        return isinstance(data.get("kind"), str) and data["kind"] in kinds
    keys = keys_of(options[0]) if len(options) == 1 else {}
    return bool(data) and data.keys() <= keys.keys() and not all(isinstance(value, dict) for value in data.values())


def nameless_hint(data: Mapping[str, Any], name: str) -> str:
    """Returns the entry with a name to be filled in, or its outline if it is long."""
    entry = compact(dict(data), flow=True)
    return f"write {name}: {{NAME: {entry if len(entry) <= 60 else '{…}'}}}"
