"""Builds spec objects from plain data.  Walks the fields of the spec classes and collects all problems with their paths.

Values are not coerced, except that an int is accepted for a float.  This file checks each field on its own: type,
choice and range.  The rules check how fields fit together.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, TypeVar

from sdkit.language.errors import (
    MAX_SHOWN_PROBLEMS,
    Path,
    Problem,
    counted,
    did_you_mean,
    listed,
    outside,
    shorten,
    spelled,
)
from sdkit.language.introspection import Key, default_kind, is_spec, keys_of, kinds_of, members, options_of
from sdkit.language.overlay import QUESTION, LoadedSpec
from sdkit.language.paths import start_of, stored_path
from sdkit.language.renamed import current_name, rename_hint
from sdkit.language.specs import ExperimentSpec, MethodSpec, PathTo, Range, Schedule, Table

S = TypeVar("S")

MAX_ENTRIES = 200
"""The most entries of a list or table; some rules compare all pairs of entries."""
INVALID: Any = object()
"""Placeholder for a value that has a problem."""

_NULLS = ("None", "none", "nil")
"""What other languages write for null."""
_SCALAR_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def structure(loaded: LoadedSpec) -> tuple[MethodSpec | ExperimentSpec | None, list[Problem]]:
    """Returns the run file or method page as a spec, or None if it has problems, and the problems."""
    structurer = _Structurer(loaded)
    if loaded.root is None:
        structurer.report((), "the file is empty", "type")
        return None, structurer.problems
    spec = structurer.instance(ExperimentSpec if loaded.kind == "run" else MethodSpec, loaded.data, ())
    return (None if structurer.problems else spec), _without_those_of_a_missing_page(structurer.problems, loaded)


def _without_those_of_a_missing_page(problems: list[Problem], loaded: LoadedSpec) -> list[Problem]:
    """The problems but those of keys that a method page would complete, where a run file names none that can be read."""
    data = loaded.data if isinstance(loaded.data, dict) else {}
    if loaded.kind != "run" or (loaded.is_complete and (loaded.method is not None or "losses" in data)):
        return problems
    return [p for p in problems if len(p.path) < 2 or p.path[0] not in keys_of(MethodSpec)]


def structure_as(cls: type[S], loaded: LoadedSpec) -> tuple[S | None, list[Problem]]:
    """Returns the document as an instance of a spec class, or None if it has problems, and the problems."""
    structurer = _Structurer(loaded)
    value = structurer.instance(cls, loaded.data, ())
    return (None if structurer.problems else value), structurer.problems


class _Structurer:
    """Builds values and collects problems; `path` is always the path of the value."""

    def __init__(self, loaded: LoadedSpec) -> None:
        self.loaded = loaded
        self.problems: list[Problem] = []

    def report(self, path: Path, message: str, code: str, hint: str | None = None, *, at_key: bool = False) -> Any:
        """Records a problem and returns INVALID."""
        self.problems.append(Problem(path, message, code, hint, self.loaded.place(path, at_key=at_key)))
        return INVALID

    def value(self, tp: Any, data: Any, path: Path) -> Any:
        """Returns `data` as a value of type `tp`, or INVALID."""
        if data is None and types.NoneType in members(tp):
            return None
        options = options_of(tp)
        if data in _NULLS and types.NoneType in members(tp) and not any(_accepts(option, data) for option in options):
            return self.report(path, f"{shorten(data)} is text, not null", "type", "write null")
        if kinds := kinds_of(options):
            return self._of_kind(kinds, data, path)
        if len(options) > 1:
            return self._one_of(options, data, path)
        return self._single(options[0], data, path)

    def _single(self, option: Any, data: Any, path: Path) -> Any:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if option is Any:
            return data
        if is_spec(option):
            # `kind` is optional if there is only one.
            has_kind = isinstance(data, dict) and "kind" in data
            tagged = has_kind and data["kind"] == getattr(option, "kind", None)
            return self.instance(option, data, path, tagged=tagged)
        if origin is Literal:
            return self._choice(args, data, path)
        if origin is tuple:
            return self._tuple(args, data, path)
        if origin is Table:
            return self._table(args[0], data, path)
        return self._scalar((option,), data, path)

    def instance(self, cls: type[S], data: Any, path: Path, *, tagged: bool = False) -> S | Any:
        """Returns `data` as an instance of a spec class, or INVALID.  Unknown keys are problems."""
        if not isinstance(data, dict):
            from sdkit.language.repairs import map_hint

            return self._report_wrong_type(data, "a map", path, hint=map_hint(cls, data, path))
        keys = keys_of(cls)
        values = {}
        for name, item in data.items():
            if name in keys:
                values[keys[name].field] = self._field(keys[name], item, (*path, name))
            elif not (tagged and name == "kind"):
                self._report_unknown_key(cls, name, path)
        given = {*data, *(self._meant_key(cls, name, path) for name in data if name not in keys)}
        missing = [k.name for k in keys.values() if k.required and k.name not in given]
        if not path and not self.loaded.is_complete:
            missing = [name for name in missing if name not in keys_of(MethodSpec)]
        if missing:
            self._report_missing_keys(cls, missing, path)
        invalid = missing or any(value is INVALID for value in values.values())
        required = {k.field for k in keys.values() if k.required}
        return INVALID if invalid or required - set(values) else cls(**values)

    def _meant_key(self, cls: type, name: str, path: Path) -> str | None:
        """The key that an unknown one stands for, which is then not missing besides."""
        from sdkit.language.suggestions import meant_key

        return current_name((*path, name)) or meant_key(name, cls)

    def _field(self, key: Key, data: Any, path: Path) -> Any:
        value = self.value(key.type, data, path)
        if value is INVALID or value is None:
            return value
        if isinstance(value, Schedule):
            written: dict[Path, Any] = {(*path, "from"): value.start, (*path, "to"): value.to}
        else:
            # Show an int given for a float as it was written.
            written = {path: data if isinstance(data, int | float) else value}
        known_problems = len(self.problems)
        for at, number in written.items():
            self._check_range(key.range, number, at)
        self._check_entries(key, value, path)
        if len(self.problems) > known_problems:
            return INVALID
        return self._path(key.path_to, value, path) if key.path_to and isinstance(value, str) else value

    def _path(self, to: PathTo, text: str, path: Path) -> str | Any:
        """Returns a path as the spec stores it, or INVALID."""
        start, rule = start_of(self.loaded, path)
        try:
            return stored_path(text, to, start, self.loaded.folder)
        except LookupError as error:
            message = f"{shorten(text)} is a folder beside the run file, but {rule}"
            return self.report(path, message, "path", f"write {error.args[0]}")

    def _check_entries(self, key: Key, value: Any, path: Path) -> None:
        """Reports the names and scalar entries of a list or table that are not in their ranges."""
        entries = value.items() if isinstance(value, Table) else enumerate(value) if isinstance(value, tuple) else ()
        for name, entry in entries:
            if key.names and not key.names.accepts(name):
                self.report((*path, name), f"{shorten(name)} is not {key.names.text}", "range", at_key=True)
            if isinstance(entry, str | int | float):
                self._check_range(key.each, entry, (*path, name))

    def _check_range(self, range: Range | None, value: Any, path: Path) -> None:
        if range and not range.accepts(value):
            name = path[-1] if isinstance(path[-1], str) else spelled(path[-2:])
            fault = f"is {shorten(value)}, not {range.text}"
            if isinstance(value, Table | tuple | str) and not value:
                fault = "is empty"
            elif isinstance(value, Table | tuple):
                fault = f"has {counted(len(value), 'entry', 'entries')}, not {range.text}"
            self.report(path, f"'{name}' {fault}", "range")

    def _of_kind(self, kinds: dict[str, type], data: Any, path: Path) -> Any:
        if isinstance(data, str):
            if data not in kinds:
                return self._report_not_a_choice(kinds, data, path, "choice")
            return self.instance(kinds[data], {}, path, tagged=True)
        if not isinstance(data, dict):
            return self._report_wrong_type(data, f"one of {listed(kinds)}", path)
        # `file` implies a user's function.
        user_function = kinds.get("file") if "file" in data else None
        default = user_function or default_kind(frozenset(kinds.values()))
        if "kind" not in data:
            if default:
                return self.instance(default, data, path, tagged=True)
            matching = [n for n, cls in kinds.items() if data and set(data) <= set(keys_of(cls))]
            hint = self._similar_entry(path) or (f"add kind: {matching[0]}" if len(matching) == 1 else None)
            message = f"'kind' is missing; it is one of {listed(kinds)}"
            return self.report(path, message, "missing_key", hint, at_key=True)
        kind = data["kind"]
        if not isinstance(kind, str) or kind not in kinds:
            return self._report_not_a_choice(kinds, kind, (*path, "kind"), "kind")
        return self.instance(kinds[kind], data, path, tagged=True)

    def _one_of(self, options: list[Any], data: Any, path: Path) -> Any:
        """A union without kinds, whose members differ in shape: a map, a list or a scalar."""
        shapes: dict[Any, Any] = {}
        for option in options:
            if is_spec(option):  # of several classes, the first with one of the keys, else the first
                fits = isinstance(data, dict) and not data.keys().isdisjoint(keys_of(option))
                shapes[dict] = option if fits else shapes.get(dict, option)
            else:
                shapes[list if typing.get_origin(option) is tuple else None] = option
        for shape in (dict, list):
            if isinstance(data, shape) and shape in shapes:
                return self.value(shapes[shape], data, path)
        if typing.get_origin(shapes[None]) is Literal:
            choices = typing.get_args(shapes[None])
            if data in choices:
                return data
            hint = rename_hint(path, data) or f"write [{data}]" if isinstance(data, str) else None
            return self._report_wrong_type(data, f"{listed(choices)} or a list", path, hint=hint)
        return self._scalar(tuple(o for o in options if o in _SCALAR_NAMES), data, path)

    def _scalar(self, wanted: tuple[type, ...], data: Any, path: Path) -> Any:
        if type(data) in wanted:
            return data
        if type(data) is int and float in wanted:
            return float(data)
        words = " or ".join(_SCALAR_NAMES[w] for w in _SCALAR_NAMES if w in wanted)
        return self._report_wrong_type(data, words, path, wanted)

    def _choice(self, choices: tuple[Any, ...], data: Any, path: Path) -> Any:
        if any(data == c and type(data) is type(c) for c in choices):
            return data
        if isinstance(data, dict | list):
            return self._report_wrong_type(data, f"one of {listed(choices)}", path)
        return self._report_not_a_choice(choices, data, path, "choice")

    def _has_too_many_entries(self, tp: Any, data: Any, path: Path) -> bool:
        """Whether a list or table has more than `MAX_ENTRIES` entries.  Free-form user data has no such limit."""
        if tp is Any or tp == Table[Any] or len(data) <= MAX_ENTRIES:
            return False
        self.report(path, f"{len(data)} entries, more than {MAX_ENTRIES}", "range")
        return True

    def _tuple(self, args: tuple[Any, ...], data: Any, path: Path) -> Any:
        if not isinstance(data, list):
            from sdkit.language.repairs import list_hint

            return self._report_wrong_type(
                data, "a list", path, hint=list_hint(data, None if args[-1] is Ellipsis else len(args))
            )
        if args[-1] is not Ellipsis and len(data) != len(args):
            message = f"this is a list of {len(data)}, not of {len(args)}"
            return self.report(path, message, "type")
        if self._has_too_many_entries(args[0], data, path):
            return INVALID
        item_types = args[:1] * len(data) if args[-1] is Ellipsis else args
        items = [self.value(tp, x, (*path, i)) for i, (tp, x) in enumerate(zip(item_types, data, strict=True))]
        return INVALID if any(x is INVALID for x in items) else tuple(items)

    def _table(self, tp: Any, data: Any, path: Path) -> Any:
        if not isinstance(data, dict):
            from sdkit.language.repairs import table_hint

            return self._report_wrong_type(data, "a map", path, hint=table_hint(tp, data, path))
        if self._has_too_many_entries(tp, data, path):
            return INVALID
        if self._report_nameless_entry(tp, data, path):
            return INVALID
        items = {name: self.value(tp, x, (*path, name)) for name, x in data.items()}
        return INVALID if any(x is INVALID for x in items.values()) else Table(items)

    def _report_nameless_entry(self, tp: Any, data: dict[str, Any], path: Path) -> bool:
        """Reports one entry of a table that stands in the table's place; returns whether this is one."""
        from sdkit.language.repairs import is_nameless_entry, nameless_hint

        if not path or not is_nameless_entry(tp, data):
            return False
        name = str(path[-1])
        self.report(path, f"this is an entry of '{name}' without its name", "type", nameless_hint(data, name))
        return True

    def _report_wrong_type(
        self, data: Any, wanted: str, path: Path, scalars: tuple[type, ...] = (), hint: str | None = None
    ) -> Any:
        message = f"the value is missing; {wanted} is expected"
        if data == QUESTION:
            message, hint = f"{shorten(path[-1])} is {wanted}", f"`sdkit explain {spelled(path)}` says more"
        elif data is not None:
            message = f"{_describe_type(data)}, not {wanted}"
        if scalars and not hint:
            from sdkit.language.repairs import scalar_hint

            hint = scalar_hint(data, scalars)
        return self.report(path, message, "type", hint)

    def _report_not_a_choice(self, choices: Any, data: Any, path: Path, code: str) -> Any:
        from sdkit.language.repairs import parse_unquoted
        from sdkit.language.suggestions import REFUSED, file_source

        hint = None
        if data == QUESTION:
            return self.report(path, f"{shorten(path[-1])} is one of {listed(choices)}", code)
        if isinstance(data, str):
            hint = REFUSED.get((path[-1], data)) or (file_source(data) if path[-1] == "source" else None)
            if parse_unquoted(data) in choices:
                hint = "remove the quotes"
            elif not hint and len(self.problems) < MAX_SHOWN_PROBLEMS:  # slow, so only for problems that are shown
                hint = did_you_mean(data, [c for c in choices if isinstance(c, str)])
        shown = "this" if isinstance(data, dict | list) else shorten(data)
        return self.report(path, f"{shown} {outside(choices)}", code, hint)

    def _similar_entry(self, path: Path) -> str | None:
        """A hint if an entry of a table may be a misspelled one, which the method page or run file has."""
        siblings = self.loaded.nodes[path[:-1]].value if path[:-1] in self.loaded.nodes else None
        if not path or not isinstance(siblings, dict):
            return None
        file = self.loaded.place(path).file
        others = [name for name, node in siblings.items() if node.place.file != file and isinstance(node.value, dict)]
        return did_you_mean(str(path[-1]), others)

    def _report_missing_keys(self, cls: type, missing: list[str], path: Path) -> None:
        kind = getattr(cls, "kind", None)
        where = f" in {shorten(kind)}" if kind else f" in '{path[-1]}'" if path else ""
        is_or_are = "is" if len(missing) == 1 else "are"
        message = f"{listed(missing, ' and ')} {is_or_are} missing{where}"
        hint = None
        if kind and self.loaded.is_bare(path):
            hint = f"write {{kind: {kind}, {', '.join(f'{m}: …' for m in missing)}}}"
        elif not kind and path:
            hint = self._similar_entry(path)
        elif "losses" in missing and cls is ExperimentSpec:
            hint = "name a method, such as method: sdft (`sdkit methods` lists them), or write losses"
        self.report((*path, missing[0]), message, "missing_key", hint)

    def _report_unknown_key(self, cls: type, name: str, path: Path) -> None:
        from sdkit.language.suggestions import advice

        hint = None
        if len(self.problems) < MAX_SHOWN_PROBLEMS:
            hint = rename_hint((*path, name)) or advice(name, cls, path)
        message = f"unknown key {shorten(name)}"
        self.report((*path, name), message, "unknown_key", hint, at_key=True)


def _accepts(option: Any, text: str) -> bool:
    """Whether the text is a value of this option: any text, a choice, or a kind."""
    return option in (str, Any) or text in typing.get_args(option) or getattr(option, "kind", None) == text


def _describe_type(data: Any) -> str:
    if isinstance(data, dict):
        return "this is a map"
    if isinstance(data, list):
        return "this is a list"
    return f"{shorten(data)} is {_SCALAR_NAMES[type(data)]}"
