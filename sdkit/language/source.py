"""Parses YAML into a tree of values with their positions.  Knows no spec class.

The tree is built from PyYAML's events rather than by its loaders, which execute tags, discard positions and recurse
without limit.  Plain scalars follow YAML 1.2's core schema: `1e-6` is a number, `off` is text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from attrs import evolve, frozen

from sdkit.language.errors import Path, Place, Problem, UnreadableInput, printable, shorten
from sdkit.language.files import MAX_RESOLVED_BYTES, MAX_SPEC_BYTES, UnreadableFile, read_file
from sdkit.language.renamed import current_name, current_value
from sdkit.language.scalars import scalar

MAX_DEPTH = 40
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
MAX_VALUES = 100_000
MULTILINE = 10_000
"""The length of a place whose value goes on in the next line: more characters than a line shows."""
MAX_KEY_LENGTH = 100  # characters; quoted and escaped, it stays below the 1024 characters that YAML allows for a key

EXPANDED_BY_HAND = "write the value, or give it on the command line"
"""The hint for a variable in a spec."""

_FORBIDDEN = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|\ufeff")
_INDENTATION = re.compile(r"\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@frozen(eq=False)
class Node:
    """A value of a document (scalar, map or list), with its place and the place of its key."""

    value: Any  # scalar | dict[str, Node] | list[Node]
    place: Place
    key: Place | None = None
    replaced: Node | None = None  # the value that it takes the place of, where the two are of different kinds

    @property
    def data(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {name: child.data for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.data for child in self.value]
        return self.value

    def walk(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Yields this value and all values below it, each with its path."""
        yield path, self
        if isinstance(self.value, dict | list):
            children = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
            for name, child in children:
                yield from child.walk((*path, name))


@frozen(eq=False)
class Source:
    """A parsed YAML text: its values, their places, and its YAML problems."""

    name: str
    text: str
    root: Node | None
    problems: tuple[Problem, ...] = ()

    @property
    def data(self) -> Any:
        """The text's data; None if it is empty or unreadable."""
        return self.root.data if self.root else None


def read(path: str | os.PathLike[str], *, resolved: bool = False) -> Source:
    """Reads a YAML file.  Raises UnreadableInput if it cannot be read.

    A resolved spec has a larger size limit, and an earlier sdkit may have written it: keys get their current names.
    """
    name = os.fspath(path)
    try:
        raw = read_file(name, MAX_RESOLVED_BYTES if resolved else MAX_SPEC_BYTES)
    except UnreadableFile as error:
        raise UnreadableInput(f"{printable(name)}: {error}") from None
    try:
        return read_text(raw.decode("utf-8-sig"), name, resolved=resolved)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UnreadableInput(
            f"{name}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8", hint="save it as UTF-8"
        ) from None


def read_text(text: str, name: str, *, resolved: bool = False) -> Source:
    """Parses YAML from a string; messages call it `name`."""
    if match := _FORBIDDEN.search(text):
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - (text.rfind("\n", 0, match.start()) + 1) + 1
        message = f"character U+{ord(match[0]):04X} is not allowed in YAML"
        return Source(name, text, None, (Problem((), message, "yaml", None, Place(name, line, column)),))
    reader = _Reader(name, text, resolved)
    try:
        root = reader.document()
    except yaml.MarkedYAMLError as error:
        root = None
        reader.problems.append(_syntax_problem(error, name, text))
    except _FatalProblem as error:
        root = None
        reader.problems.append(error.problem)
    return Source(name, text, root, tuple(reader.problems))


def key_fault(keys: Iterable[str]) -> str | None:
    """Returns why one of these keys is not allowed in a resolved spec; None if all are."""
    for key in keys:
        if len(key) > MAX_KEY_LENGTH:
            return f"a key of {len(key)} characters, more than {MAX_KEY_LENGTH}"
        if match := _SURROGATE.search(key):
            return f"U+{ord(match[0]):04X} is half of a character"
    return None


class _FatalProblem(Exception):
    """A problem after which the rest of the text cannot be parsed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _Reader:
    """Builds nodes from the events of one document.  Collects recoverable problems, raises the others."""

    def __init__(self, name: str, text: str, resolved: bool) -> None:
        self.name = name
        self._resolved = resolved
        self._scale = MAX_RESOLVED_BYTES // MAX_SPEC_BYTES if resolved else 1  # multiplies the limits
        self.problems: list[Problem] = []
        self._events = yaml.parse(text, Loader=_LOADER)
        self._anchors: dict[str, Node | None] = {}
        self._values = 0
        self._characters = 0

    def document(self) -> Node | None:
        """Returns the only document of the text; None if it is empty."""
        root = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root:
                    raise self._fatal("a second document starts here", event)
                root = self._node(next(self._events), (), None)
        return root

    def _node(self, event: Any, path: Path, key: Place | None) -> Node:
        place = self._place(event)
        if len(path) > MAX_DEPTH:
            raise self._fatal(TOO_DEEP, event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path, place, key)
        self._count_value(getattr(event, "value", None), event)
        if event.tag:
            hint = 'put the text in quotes: "!…"' if isinstance(event, yaml.ScalarEvent) else None
            self.problems.append(self._problem(path, "tags are not supported", event, "tag", hint))
        if event.anchor:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
            if self._resolved and isinstance(value, str):
                value = current_name(path, value) or value
            elif self._resolved and isinstance(today := current_value(path, value), list):
                value = [Node(item, place) for item in today]
            node = Node(value, place, key)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._list(path, place, key)
        else:
            node = self._map(path, place, key)
        if event.anchor:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, event: Any, path: Path, place: Place, key: Place | None) -> Node:
        if event.anchor not in self._anchors:
            raise self._fatal(f"*{event.anchor} is not defined above", event, path)
        target = self._anchors[event.anchor]
        if target is None:
            raise self._fatal(f"*{event.anchor} stands inside what it refers to", event, path)
        for below, node in target.walk():
            self._count_value(node.value, event)
            self._count_characters(below[-1] if below else "", event)
            if len(path) + len(below) > MAX_DEPTH:
                raise self._fatal(TOO_DEEP, event)
        return evolve(target, key=key, place=place)

    def _scalar(self, event: Any, path: Path) -> Any:
        if match := _SURROGATE.search(event.value):
            message = f"U+{ord(match[0]):04X} is half of a character"
            self.problems.append(self._problem(path, message, event))
        if not event.implicit[0] or event.tag:
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self.problems.append(self._problem(path, str(error), event, "number"))
            return event.value

    def _list(self, path: Path, place: Place, key: Place | None) -> Node:
        items: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items)), None))
        return Node(items, key or evolve(place, length=1), key)

    def _map(self, path: Path, place: Place, key: Place | None) -> Node:
        items: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = self._key(event, path)
            if self._resolved and name:
                name = current_name((*path, name)) or name
            child_key = self._place(event)
            child = self._node(next(self._events), (*path, name or "?"), child_key)
            if name in items:
                first = items[name].key
                message = f"{shorten(name)} was already given in line {first.line if first else 0}"
                self.problems.append(self._problem((*path, name), message, event, "duplicate_key"))
            elif name is not None:
                items[name] = child
        return Node(items, key or evolve(place, length=1), key)

    def _key(self, event: Any, path: Path) -> str | None:
        """The key's text; None if it cannot be a key, which is reported."""
        if not isinstance(event, yaml.ScalarEvent):
            if not isinstance(event, yaml.AliasEvent):
                self._node(event, (*path, "?"), None)
            self.problems.append(self._problem(path, "a key must be text", event, "key_type"))
            return None
        value = self._scalar(event, path)
        if value == "<<" and event.implicit[0]:
            hint = "write the keys out, or use an alias for a whole value"
            message = "merge keys (<<) are not supported"
            self.problems.append(self._problem(path, message, event, "merge_key", hint))
            return None
        if not isinstance(value, str):
            message = f"key {shorten(value)} is not text"
            hint = f'put it in quotes: "{event.value}"'
            self.problems.append(self._problem(path, message, event, "key_type", hint))
            return None
        if message := key_fault((value,)):
            self.problems.append(self._problem(path, message, event, "key_type"))
            return None
        self._count_characters(value, event)
        return value

    def _count_value(self, value: Any, event: Any) -> None:
        """Counts one value; an alias counts as everything it expands to."""
        self._values += 1
        if self._values > MAX_VALUES * self._scale:
            raise self._fatal(f"more than {MAX_VALUES} values, aliases written out", event)
        self._count_characters(value, event)

    def _count_characters(self, text: Any, event: Any) -> None:
        self._characters += len(text) if isinstance(text, str) else 0
        if self._characters > MAX_SPEC_BYTES * self._scale:
            raise self._fatal(f"more than {MAX_SPEC_BYTES // 2**20} MiB of text, aliases written out", event)

    def _place(self, event: Any) -> Place:
        start, end = event.start_mark, event.end_mark
        length = max(1, end.column - start.column) if end.line == start.line else MULTILINE
        return Place(self.name, start.line + 1, start.column + 1, length)

    def _problem(self, path: Path, message: str, event: Any, code: str = "yaml", hint: str | None = None) -> Problem:
        return Problem(path, message, code, hint, self._place(event))

    def _fatal(self, message: str, event: Any, path: Path = ()) -> _FatalProblem:
        return _FatalProblem(self._problem(path, message, event))


def _syntax_problem(error: yaml.MarkedYAMLError, name: str, text: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    lines = text.splitlines()
    if foreign := _foreign_line(lines[: line + 1]):
        at, column, message, hint = foreign
        return Problem((), message, "yaml", hint, Place(name, at + 1, column + 1))
    after = lines[line][column:] if line < len(lines) else ""
    message, hint = (error.problem or "this is not YAML").split("\n")[0], None
    if after.startswith("\t"):
        message, hint = "a tab cannot indent YAML", "use spaces"
    elif "mapping values are not allowed" in message:
        message = "a ':' where no key can stand"
        hint = 'check the indentation, and put text that holds ": " in quotes'
    elif "unknown escape character" in message:
        message, hint = f"in double quotes, {after[:2]} is no escape", "use single quotes, or write \\\\ for each \\"
    elif after.startswith("{") and lines[line][:column].endswith("$"):
        message, hint = "'${…}' is not expanded, and '{' opens a map here", EXPANDED_BY_HAND
    elif "<document start>" in message:
        message, hint = "a second value begins here", "a spec is one YAML map"
    elif after[:1] in ("@", "`", "%"):
        message, hint = f"text cannot start with {after[0]}", "put it in quotes"
    elif error.context and error.context_mark:
        message, hint = _explain_unclosed(error.context, error.context_mark.line + 1, message)
    # Show an error at the end of the text on the last line.
    if line >= len(lines) and lines:
        line, column = len(lines) - 1, max(0, len(lines[-1]) - 1)
    return Problem((), message, "yaml", hint, Place(name, line + 1, column + 1))


def _foreign_line(lines: list[str]) -> tuple[int, int, str, str] | None:
    """The first line that is no YAML for a reason that the parser does not see: its index, a column, message and hint."""
    for index, line in enumerate(lines):
        if line.startswith(("<<<<<<< ", ">>>>>>> ")) or line == "=======":
            return (
                index,
                0,
                "a conflict of a merge is not resolved",
                "keep one side, and remove the lines of <, = and >",
            )
        if line.startswith("```"):
            return index, 0, "a fence of Markdown is not YAML", "remove it"
        if (match := _INDENTATION.match(line)) and not match[0].isascii():
            column = next(at for at, character in enumerate(match[0]) if not character.isascii())
            message = f"character U+{ord(line[column]):04X} looks like a space, but cannot indent YAML"
            return index, column, message, "use spaces"
    return None


def _explain_unclosed(context: str, line: int, message: str) -> tuple[str, str | None]:
    """The message and hint for a collection or a quoted text that began in `line` and is not closed."""
    for words, pair in (("flow mapping", "{}"), ("flow sequence", "[]")):
        if words in context:
            return (f"',' or '{pair[1]}' is missing: the '{pair[0]}' of line {line} is still open", None)
    if "quoted scalar" in context:
        return f"the quoted text of line {line} is still open", None
    if "block" in context:
        kind = "map" if "mapping" in context else "list"
        return f"this does not fit the {kind} that began in line {line}", "check the indentation"
    return message, None
