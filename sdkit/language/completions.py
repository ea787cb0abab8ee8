"""What the shell can complete in an override, `key.path=value`: the keys of a spec, and the values of a key.

Works on the data of a spec as written, which may have problems.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from attrs import frozen

from sdkit.language.explain import METHOD
from sdkit.language.introspection import Key, default_kind, entry_type, is_spec, keys_of, kinds_of, members, options_of
from sdkit.language.overlay import packaged_methods
from sdkit.language.resolved import resolved, without_defaults
from sdkit.language.scalars import compact
from sdkit.language.specs import ExperimentSpec, Schedule, Table

Word = tuple[str, str]
"""A completion, and a help text."""


def override_words(incomplete: str, data: Any) -> list[Word]:
    """Returns how the incomplete override can go on, to the next dot, or to the end once its key is complete.

    `data` is the spec that it overrides, or None if that is not known.
    """
    path, equals, _ = incomplete.partition("=")
    entries = _entries(path, data)
    if equals:
        return [word for entry in entries if entry.path == path for word in entry.assignments()]
    words = [word for entry in entries if entry.path.startswith(path) for word in entry.words()]
    # A shell adds a space after the only completion, so show what can follow it as well.
    if len(words) == 1:
        [(only, help)] = words
        return [(only, help), *override_words(only, data)]
    return words


def value_words(path: str, data: Any) -> list[Word]:
    """Returns the values that the key at `path` can take, without the key."""
    return [(word.partition("=")[2], help) for word, help in override_words(f"{path}=", data)]


@frozen
class _Entry:
    """A key at a path of a spec."""

    path: str
    key: Key
    current: Any

    @property
    def is_list(self) -> bool:
        return any(get_origin(option) is tuple for option in options_of(self.key.type))

    @property
    def has_keys(self) -> bool:
        """Whether the path can go on: into a map, a table, or a list of maps."""
        options = [o for o in options_of(self.key.type) if o is not Schedule or isinstance(self.current, dict)]
        if self.is_list:
            options += members(entry_type(self.key.type))
        return self.key.name != "kind" and any(is_spec(option) or get_origin(option) is Table for option in options)

    def words(self) -> Iterator[Word]:
        if self.has_keys:
            yield f"{self.path}.", self.key.help
        if not self.has_keys or self.is_list or list(self.values()):
            yield f"{self.path}=", self.key.help

    def assignments(self) -> list[Word]:
        return [(f"{self.path}={value}", "") for value in dict.fromkeys(self.values())]

    def values(self) -> Iterator[str]:
        """The choices of a key and, for a number or text, its value in the spec and its default."""
        if self.key.name == "method":
            yield from packaged_methods()
        for option in members(self.key.type):
            if get_origin(option) is Literal:
                yield from (str(choice) for choice in get_args(option))
            elif option is bool:
                yield from ("true", "false")
            elif option is types.NoneType:
                yield "null"
        for kind, cls in kinds_of(options_of(self.key.type)).items():
            if self.key.name == "kind" or not any(key.required for key in keys_of(cls).values()):
                yield kind
        default = None if self.key.required else without_defaults(self.key.default, self.key.type)
        yield from (compact(value) for value in (self.current, default) if type(value) in (int, float, str))


def _entries(path: str, data: Any) -> list[_Entry]:
    """The keys at the level of the last part of `path`."""
    *above, _ = path.split(".")
    level = [_Entry("", Key("", "", ExperimentSpec, None, None, ""), data)]
    for part in above:
        level = [below for entry in level for below in _below(entry) if below.path.rpartition(".")[2] == part]
    return [below for entry in level for below in _below(entry)]


def _below(entry: _Entry) -> Iterator[_Entry]:
    """The keys of the map, or the entries of the table or list, that an entry is."""
    prefix = f"{entry.path}." if entry.path else ""
    options, data = options_of(entry.key.type), entry.current
    for option in options:
        origin = get_origin(option)
        if origin in (Table, tuple):
            items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
            for name, value in items:
                yield _Entry(f"{prefix}{name}", Key(str(name), "", get_args(option)[0], None, None, ""), value)
    if kinds := kinds_of(options):
        yield _Entry(f"{prefix}kind", Key("kind", "", entry.key.type, None, None, "the choice"), None)
        options = _chosen(kinds, data)
    given = data if isinstance(data, dict) else {}
    seen: set[str] = set()
    for cls in filter(is_spec, options):
        for key in [*([METHOD.key] if cls is ExperimentSpec else []), *keys_of(cls).values()]:
            if key.name not in seen:
                seen.add(key.name)
                default = None if key.required or isinstance(key.default, Table) else resolved(key.default)
                yield _Entry(f"{prefix}{key.name}", key, given.get(key.name, default))


def _chosen(kinds: dict[str, type], data: Any) -> list[Any]:
    """The class of the kind that the data has, or all of them if it has none."""
    kind = data.get("kind") if isinstance(data, dict) else data
    if isinstance(kind, str) and kind in kinds:
        return [kinds[kind]]
    default = default_kind(frozenset(kinds.values())) if isinstance(data, dict) else None
    return [default] if default else list(kinds.values())
