"""Reads and writes scalars by YAML 1.2's core schema: `1e-6` is a number, `off` is text."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def scalar(text: str) -> Any:
    """Parses a plain scalar by YAML 1.2's core schema.  Raises ValueError for a number that is not finite or too long."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.fullmatch(text):
        if len(text) > 40:
            raise ValueError("this number has too many digits")
        number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if abs(number) >= 10**39:  # so that it is no longer when written out in decimal
            raise ValueError("this number has too many digits")
        return number
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError(f"{text} is too large for a number")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    return text


def dump(data: Any) -> str:
    """Formats plain data as YAML that `read_text` reads back unchanged."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        try:
            plain = value.isprintable() and scalar(value) == value
        except ValueError:
            plain = False
        style = None if plain else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def compact(data: Any, flow: bool | None = None) -> str:
    """Formats plain data as YAML with maps and lists of scalars on one line each, or all of it on one line with `flow`."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style = None if re.fullmatch(r"[\w./][\w./ -]*", value) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
        plain = re.sub(r"^(-?\d+)e-0?", r"\1.0e-", json.dumps(value))
        return dumper.represent_scalar("tag:yaml.org,2002:float", plain)

    Dumper.add_representer(str, text)
    Dumper.add_representer(float, number)
    result = yaml.dump(data, Dumper=Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10**6)
    return result.removesuffix("\n").removesuffix("\n...")
