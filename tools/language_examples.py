"""The examples in docs/language.md: each is part of a spec that the tests load, so none can go out of date."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import attrs

from sdkit.language.introspection import Key, entry_type, is_spec, keys_of
from sdkit.language.load import load_spec
from sdkit.language.resolved import without_defaults
from sdkit.language.scalars import compact
from sdkit.language.specs import Table

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("sdkit/methods", "specs", "specs/papers", "tests/ok")
"""Where examples come from; an example from a shipped file, one of the first three, has a link to it."""
RUN_FILE = "specs/sft.yaml"
LONGEST = 320  # characters


@attrs.frozen
class Use:
    """An object in a spec: its key, its name or number if it is in a table or list, and the file."""

    value: Any
    key: Key
    name: str | int | None
    file: Path

    @property
    def data(self) -> Any:
        """The value as plain data, without the keys that have their defaults."""
        return without_defaults(self.value, self.key.type if self.name is None else entry_type(self.key.type))

    @property
    def text(self) -> str:
        """The key with the value as YAML."""
        if isinstance(self.data, str) and self.name is None:
            return f"{self.key.name}: {self.data}"
        entry = {str: {self.name: self.data}, int: [self.data]}.get(type(self.name), self.data)
        return compact({self.key.name: entry})


@cache
def uses() -> dict[type, list[Use]]:
    """The uses of each spec class, in the order of `FOLDERS`."""
    found: dict[type, list[Use]] = {}

    def visit(spec: Any, file: Path) -> None:
        for key in keys_of(type(spec)).values():
            value = getattr(spec, key.field)
            entries = [(None, value)]
            if isinstance(value, Table | tuple):
                entries = list(value.items() if isinstance(value, Table) else enumerate(value))
            for name, entry in entries:
                if is_spec(type(entry)):
                    found.setdefault(type(entry), []).append(Use(entry, key, name, file))
                    visit(entry, file)

    for folder in FOLDERS:
        for file in sorted((ROOT / folder).glob("*.yaml")):
            if spec := load_spec(file).spec:
                visit(spec, file)
    return found


def run_file() -> str:
    """A whole run file."""
    return f"A whole run file, [`{RUN_FILE}`](../{RUN_FILE}):\n\n" + _fenced((ROOT / RUN_FILE).read_text("utf-8"))


def example(cls: type, key: Key) -> str:
    """The use under `key` with the most keys that is short enough, or else the shortest.

    Raises ValueError if no spec has one.
    """
    candidates = [use for use in uses().get(cls, []) if use.key.name == key.name and use.data]
    shipped = [use for use in candidates if use.file.parent != ROOT / FOLDERS[-1]]
    if not candidates:
        raise ValueError(f"no spec has {key.name}: {cls.__name__}; add one to tests/ok/examples.yaml")
    best = min(shipped or candidates, key=_rank)
    # A bare kind says nothing about its file: it may be there by default.
    linked = shipped and not isinstance(best.data, str)
    source = f"From [`{best.file.stem}`](../{best.file.relative_to(ROOT)}):\n\n" if linked else ""
    return source + _fenced(best.text)


def _rank(use: Use) -> tuple[bool, int, int]:
    too_long = len(use.text) > LONGEST
    keys = 0 if too_long or isinstance(use.data, str) else len(use.data)
    return too_long, -keys, len(use.text)


def _fenced(text: str) -> str:
    return f"```yaml\n{text.rstrip()}\n```"
