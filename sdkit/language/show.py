"""Formats the resolved spec as YAML with the origin of each value in a comment."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sdkit.language.errors import Path, Place, printable
from sdkit.language.load import CheckedSpec
from sdkit.language.overlay import LoadedSpec
from sdkit.language.paths import meanings
from sdkit.language.resolved import resolved
from sdkit.language.scalars import scalar

_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def annotated(checked: CheckedSpec, *, show_paths: bool = False) -> str:
    """Returns every value of the spec, defaults included, with `# file:line` or `# default`.  Reads back as the same spec.

    With `show_paths`, the comment on a relative path also has what it means.
    """
    notes = meanings(checked.spec, checked.base) if show_paths else {}
    lines = list(_lines(resolved(checked.spec), (), checked.loaded, notes))
    width = min(max((len(text) for text, _ in lines), default=0), 72)
    return "\n".join(f"{text.ljust(width)}  # {origin}" if origin else text for text, origin in lines)


def _lines(value: Any, path: Path, loaded: LoadedSpec, notes: Mapping[Path, str]) -> Iterator[tuple[str, str]]:
    indent = "  " * len(path)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in items:
        here = (*path, name)
        head = f"{indent}{_key(name)}:" if isinstance(name, str) else f"{indent}-"
        if isinstance(child, dict | list) and child and not _flat(child):
            yield head, ""
            yield from _lines(child, here, loaded, notes)
        else:
            note = f" → {printable(notes[here])}" if here in notes else ""
            yield f"{head} {_text(child)}", _origin(here, child, loaded) + note


def _key(name: str) -> str:
    plain = re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) and scalar(name) == name
    return name if plain else _quoted(name)


def _text(value: Any) -> str:
    """A value as JSON, which is also YAML.  Writes 1e-06 as 1.0e-06, since YAML 1.1 parsers read the former as text."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str):
        return _quoted(value)
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def _quoted(text: str) -> str:
    """A quoted string that escapes characters YAML forbids or takes for line breaks."""
    quoted = json.dumps(text, ensure_ascii=False)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)


def _flat(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _origin(path: Path, value: Any, loaded: LoadedSpec) -> str:
    if loaded.written(path):
        return _format_place(loaded.place(path))
    # A `kind` written as a bare word has the place of the map itself.
    if path[-1] == "kind" and loaded.is_bare(path[:-1]):
        return _format_place(loaded.place(path[:-1]))
    return "default"


def _format_place(place: Place) -> str:
    return f"{printable(place.file)}:{place.line}"
