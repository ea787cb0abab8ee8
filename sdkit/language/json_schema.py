"""JSON Schema (draft 2020-12) of run files, method pages and sequence files, for editors.

The schema says what `structure` checks: keys, types, choices and ranges.  It leaves out what JSON Schema cannot say,
such as a limit in bytes, and the rules.  A run file that names a method page may override parts of it, so below
`rollout`, `teacher`, `losses` and `route` such a file needs neither the required keys nor `kind`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import evolve

from sdkit.language.introspection import Key, default_kind, keys_of, kinds_of, members, options_of
from sdkit.language.overlay import METHOD_HELP, PAGE_PATH, RUN_KEYS, packaged_methods
from sdkit.language.resolved import without_defaults
from sdkit.language.source import MAX_KEY_LENGTH
from sdkit.language.specs import NOT_EMPTY, ExperimentSpec, MethodSpec, Range, Schedule, SequenceSpec, Table
from sdkit.language.structure import MAX_ENTRIES

Json = dict[str, Any]
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def json_schema() -> Json:
    """Returns one schema for run files, method pages and sequence files, as JSON values."""
    definitions = _Definitions()
    method = {"description": METHOD_HELP, "anyOf": [{"enum": packaged_methods()}, {"pattern": PAGE_PATH}]}
    page = definitions.object(MethodSpec, "method page", partial=False)
    run_file = definitions.object(ExperimentSpec, "run file", partial=False)
    over_a_page = definitions.object(ExperimentSpec, "run file", partial=True)
    over_a_page["properties"] = {"method": method, **over_a_page["properties"]}
    sequence = definitions.object(SequenceSpec, "sequence file", partial=False)
    files = {"method_page": page, "run_file": run_file, "run_file_over_a_page": over_a_page, "sequence_file": sequence}
    definitions.schemas |= files
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sdkit run file, method page or sequence file",
        "type": "object",
        # An editor completes the keys of an empty file from these.
        "properties": {name: {"description": key["description"]} for name, key in over_a_page["properties"].items()},
        "if": {"required": ["method"]},
        "then": {"$ref": "#/$defs/run_file_over_a_page"},
        "else": {
            "if": {"required": ["stages"]},
            "then": {"$ref": "#/$defs/sequence_file"},
            "else": {
                "if": {"anyOf": [{"required": [key]} for key in RUN_KEYS]},
                "then": {"$ref": "#/$defs/run_file"},
                "else": {"$ref": "#/$defs/method_page"},
            },
        },
        "$defs": dict(sorted(definitions.schemas.items())),
    }


class _Definitions:
    """Builds schemas of types.  `partial` ones are for overrides of a method page, which fills in what they lack."""

    def __init__(self) -> None:
        self.schemas: dict[str, Json] = {}

    def object(self, cls: Any, title: str, *, partial: bool) -> Json:
        """Returns the schema of a spec class written as a map, without `kind`.  Editors show its title."""
        keys = keys_of(cls).values()
        of_page = keys_of(MethodSpec) if cls is ExperimentSpec else keys_of(cls)
        required = [key.name for key in keys if key.required and not (partial and key.name in of_page)]
        return {
            "title": title,
            "description": inspect.cleandoc(cls.__doc__ or ""),
            "type": "object",
            "properties": {key.name: self.key(key, partial=partial and key.name in of_page) for key in keys},
            **({"required": required} if required else {}),
            "additionalProperties": False,
        }

    def key(self, key: Key, *, partial: bool) -> Json:
        """Returns the schema of a key's value, with its help and default."""
        default = {}
        if not key.required and key.default is not None:
            default["default"] = without_defaults(key.default, key.type)
        return {"description": key.help, **default, **self._value(key.type, key, partial)}

    def _value(self, tp: Any, key: Key, partial: bool) -> Json:
        options = options_of(tp)
        if kinds := kinds_of(options):
            branches = self._kinds(kinds, partial)
        else:
            branches = _scalars([option for option in options if option in TYPES], key.range)
            branches += [self._single(option, key, partial) for option in options if option not in TYPES]
        if len(options) < len(members(tp)):
            branches.append({"type": "null"})
        if len(branches) == 1:
            return branches[0]
        return {"oneOf" if kinds else "anyOf": branches}

    def _single(self, option: Any, key: Key, partial: bool) -> Json:
        """Returns the schema of a class, a choice, a list or a table."""
        origin, args = typing.get_origin(option), typing.get_args(option)
        if option is Any:
            return {}
        if option is Schedule:
            ends = {name: dict(key.range.schema) for name in ("from", "to")} if key.range else {}
            return {**self._reference(Schedule, "schedule", partial, "none"), "properties": ends}
        if origin is Literal:
            return {"enum": list(args)}
        if origin is tuple:
            size = _size("Items", key, args[0], partial=False)  # an override replaces a list
            if args[-1] is not ...:
                size = {"minItems": len(args), "maxItems": len(args)}
            return {"type": "array", "items": self._entry(args[0], key, partial=False), **size}
        if origin is Table:
            names = {**(key.names.schema if key.names else {}), "maxLength": MAX_KEY_LENGTH}
            size = _size("Properties", key, args[0], partial=partial)
            entries = self._entry(args[0], key, partial=partial)
            kinds = kinds_of(options_of(args[0]))
            nameless = {"required": ["kind"], "properties": {"kind": {"enum": list(kinds)}}}
            without_name = {"not": nameless} if kinds else {}
            return {"type": "object", "additionalProperties": entries, "propertyNames": names, **size, **without_name}
        return self._reference(option, key.name, partial, "optional" if hasattr(option, "kind") else "none")

    def _entry(self, tp: Any, key: Key, *, partial: bool) -> Json:
        """Returns the schema of an entry of type `tp` in the key's list or table."""
        return self._value(tp, evolve(key, type=tp, range=key.each), partial)

    def _kinds(self, kinds: Mapping[str, type], partial: bool) -> list[Json]:
        """Returns schemas of which a value fits at most one: a bare kind, or a map of one kind."""
        branches: list[Json] = []
        for kind, cls in kinds.items():
            if partial or not any(key.required for key in keys_of(cls).values()):
                branches.append({"const": kind, "description": inspect.cleandoc(cls.__doc__ or "")})
        if partial:
            branches.append(self._without_kind(list(kinds.values())))
        # A map with `file` needs no kind.
        implied = {default_kind(frozenset(kinds.values())), kinds.get("file")}
        for cls in kinds.values():
            branches.append(
                self._reference(cls, cls.kind, partial, "optional" if cls in implied and not partial else "required")
            )
        return branches

    def _without_kind(self, classes: Sequence[type]) -> Json:
        """Returns the schema of a map without `kind`, over a page's map of any of these kinds."""
        properties: dict[str, list[Json]] = {}
        for cls in classes:
            for key in keys_of(cls).values():
                schema = self.key(key, partial=True)
                if schema not in properties.setdefault(key.name, []):
                    properties[key.name].append(schema)
        merged = {
            name: schemas[0] if len(schemas) == 1 else {"anyOf": schemas} for name, schemas in properties.items()
        }
        return {"type": "object", "properties": merged, "additionalProperties": False}

    def _reference(self, cls: Any, title: str, partial: bool, kind: Literal["required", "optional", "none"]) -> Json:
        name = cls.__name__ + ("Override" if partial else "") + ("OptionalKind" if kind == "optional" else "")
        if name not in self.schemas:
            self.schemas[name] = {}  # defined below; a class may contain itself
            schema = self.object(cls, getattr(cls, "kind", title), partial=partial)
            if kind != "none":
                schema["properties"] = {"kind": {"const": cls.kind}, **schema["properties"]}
            if kind == "required":
                schema["required"] = ["kind", *schema.get("required", [])]
            self.schemas[name] = schema
        return {"$ref": f"#/$defs/{name}"}


def _scalars(options: Sequence[type], range: Range | None) -> list[Json]:
    """Returns the schema of these types of scalars, if there are any."""
    names = [TYPES[option] for option in options if not (option is int and float in options)]
    return [{"type": names[0] if len(names) == 1 else names, **(range.schema if range else {})}] if names else []


def _size(noun: str, key: Key, entry: Any, *, partial: bool) -> Json:
    """Returns the limits to the number of entries of type `entry`.  A partial table can be empty, a user's data large."""
    fewest = {f"min{noun}": 1} if key.range is NOT_EMPTY and not partial else {}
    most = {} if entry is Any or entry == Table[Any] else {f"max{noun}": MAX_ENTRIES}
    return fewest | most
