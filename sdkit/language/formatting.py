"""Formats a spec: keys in the language's order, current names, plain numbers.  Moves text; keeps comments and layout.

A comment line above a key, at most as far to the right as the key, moves with it; blank lines stay where they are.
Tables keep their order, which has a meaning: the first suite is the headline.
"""

from __future__ import annotations

import itertools
import os
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from attrs import frozen

from sdkit.language.errors import Path, UnreadableInput
from sdkit.language.introspection import default_kind, is_spec, keys_of, kinds_of, options_of
from sdkit.language.overlay import is_run_file, is_sequence_data, load
from sdkit.language.renamed import current_name, current_value
from sdkit.language.scalars import scalar
from sdkit.language.source import Source, read, read_text
from sdkit.language.specs import ExperimentSpec, MethodSpec, SequenceSpec, Table

FIRST_KEYS = ("method", "model", "data")
"""The keys with which a run file begins, before those of a method page."""


def format_spec(path: str | os.PathLike[str]) -> tuple[Source, str]:
    """Returns a spec's file as read, and its formatted text.  A file with YAML problems is returned unchanged.

    Raises UnreadableInput if the file cannot be read, or if its text cannot be moved without changing the spec.
    """
    source = read(path)
    if source.problems or source.root is None:
        return source, source.text
    text = source.text if source.text.endswith("\n") else f"{source.text}\n"
    if is_sequence_data(source.data):
        after = _Formatter(text).format(SequenceSpec, source.data)
    else:
        cls = ExperimentSpec if is_run_file(source.data) else MethodSpec
        after = _Formatter(text).format(cls, load(path, resolved=True).data)
    before, now = read_text(source.text, source.name, resolved=True), read_text(after, source.name)
    if now.problems or now.data != before.data:
        raise UnreadableInput(f"{source.name} cannot be formatted without changing it; it is left as it is")
    return source, after


@frozen(eq=False, kw_only=True)
class _Span:
    """A node's place in the text: from its first character to behind its last."""

    start: int
    end: int
    text: str = ""  # of a scalar, without quotes
    plain: bool = False  # a scalar without quotes and anchor
    flow: bool = False
    pairs: Sequence[tuple[_Span, _Span]] = ()  # of a map
    items: Sequence[_Span] = ()  # of a list
    anchors: tuple[tuple[str, bool], ...] = ()  # names below it, in order; whether each is defined there


@frozen(eq=False, kw_only=True)
class _Entry:
    """A key with its value, and the text that moves with them."""

    key: _Span
    value: _Span
    lead: int  # where its comment lines begin; else `line`
    line: int  # where the key's line begins; the key itself in a flow map, or after a dash
    end: int  # behind its last line, or its value in a flow map

    @property
    def name(self) -> str:
        """The key as written, without quotes."""
        return self.key.text


class _Formatter:
    """Formats the one document of a text that ends with a line break."""

    def __init__(self, text: str) -> None:
        self._text = text

    def format(self, cls: type, merged: Any) -> str:
        """Returns the formatted text; `merged` is the spec's data over its method page."""
        kinds = (yaml.NodeEvent, yaml.CollectionEndEvent)
        events = (e for e in yaml.parse(self._text, Loader=yaml.SafeLoader) if isinstance(e, kinds))
        root = _span(next(events), events)
        return self._render(root, cls, merged, (), 0, len(self._text))

    def _render(self, node: _Span, tp: Any, merged: Any, path: Path, start: int, end: int) -> str:
        """The text from `start` to `end`, in which the node is formatted as a value of type `tp`."""
        if node.pairs:
            return self._map(node, _type_below(tp, merged), merged, path, start, end)
        out, position = "", start
        entry = _entry_type(tp)
        for i, item in enumerate(node.items):
            below = merged[i] if isinstance(merged, list) and i < len(merged) else None
            stop = self._line_end(item.end) if item.pairs and not item.flow else item.end
            out += self._render(item, entry, below, (*path, i), position, stop)
            position = stop
        if node.plain:
            out += self._text[position : node.start] + _plain(self._text[node.start : node.end], path)
            position = node.end
        return out + self._text[position:end]

    def _map(self, node: _Span, tp: Any, merged: Any, path: Path, start: int, end: int) -> str:
        entries = list(self._flow_entries(node) if node.flow else self._block_entries(node, end))
        order = entries
        if not (node.flow and "#" in self._between(entries)):
            order = _ordered(entries, tp, path)
        if not node.flow and entries[0].line == entries[0].key.start and order[0].lead < order[0].line:
            order = entries  # a comment cannot stand between a dash and its key
        out = self._text[start : entries[0].lead]
        for place, (slot, entry) in enumerate(zip(entries, order, strict=True)):
            out += self._text[entry.lead : entry.line] + self._text[slot.line : slot.key.start]
            out += self._pair(entry, tp, merged, path)
            out += self._text[slot.end : entries[place + 1].lead] if slot is not entries[-1] else ""
        return out + self._text[entries[-1].end : end]

    def _pair(self, entry: _Entry, tp: Any, merged: Any, path: Path) -> str:
        """A key under its current name, and its value."""
        here = (*path, entry.name)
        written = self._text[entry.key.start : entry.key.end]
        name = current_name(here) or entry.name
        below = merged.get(name) if isinstance(merged, dict) else None
        value = self._render(entry.value, _key_type(tp, name), below, (*path, name), entry.key.end, entry.end)
        return (written if name == entry.name else name) + value

    def _flow_entries(self, node: _Span) -> Iterator[_Entry]:
        for key, value in node.pairs:
            end = max(key.end, value.end)
            yield _Entry(key=key, value=value, lead=key.start, line=key.start, end=end)

    def _block_entries(self, node: _Span, limit: int) -> Iterator[_Entry]:
        """The entries of a block map; comments and blank lines behind the last line of a value are of the next one."""
        first = node.pairs[0][0].start
        column = first - self._line_start(first)
        leads = [self._lead(key.start, column) for key, _ in node.pairs]
        if not self._text[: leads[0]].strip():  # the comment that the file begins with stays there
            leads[0] = self._line_start(first)
        for place, (key, value) in enumerate(node.pairs):
            line = self._line_start(key.start)
            if self._text[line : key.start].strip():  # a dash before the first key
                line = key.start
            end = self._line_end(max(key.end, value.end))
            stop = leads[place + 1] if place + 1 < len(leads) else limit
            while end < stop and (text := self._line(end)).strip().startswith("#") and _indent(text) > column:
                end += len(text)
            yield _Entry(key=key, value=value, lead=min(leads[place], line), line=line, end=min(end, limit))

    def _lead(self, key: int, column: int) -> int:
        """Where the comment lines above a key begin."""
        start = self._line_start(key)
        if self._text[start:key].strip():
            return key
        while start > 0:
            before = self._line_start(start - 1)
            text = self._text[before:start]
            if not text.lstrip().startswith("#") or _indent(text) > column:
                break
            start = before
        return start

    def _between(self, entries: Sequence[_Entry]) -> str:
        """The text between entries."""
        return "".join(self._text[a.end : b.lead] for a, b in itertools.pairwise(entries))

    def _line_start(self, index: int) -> int:
        return self._text.rfind("\n", 0, index) + 1

    def _line(self, start: int) -> str:
        """The line that begins at `start`, with its line break."""
        return self._text[start : self._text.find("\n", start) + 1]

    def _line_end(self, index: int) -> int:
        """Behind the line break of the line in which the text up to `index` ends."""
        at_start = index > 0 and self._text[index - 1] == "\n"
        return index if at_start else self._text.find("\n", index) + 1


def _span(event: Any, events: Iterator[Any]) -> _Span:
    """The node that begins with this event."""
    start, end = event.start_mark.index, event.end_mark.index
    own = ((event.anchor, not isinstance(event, yaml.AliasEvent)),) if event.anchor else ()
    if isinstance(event, yaml.ScalarEvent):
        plain = event.style is None and not event.anchor and start < end
        return _Span(start=start, end=end, text=event.value, plain=plain, anchors=own)
    if isinstance(event, yaml.AliasEvent):
        return _Span(start=start, end=end, anchors=own)
    children: list[_Span] = []
    while not isinstance(below := next(events), yaml.CollectionEndEvent):
        children.append(_span(below, events))
    flow = bool(event.flow_style)
    end = below.end_mark.index if flow or not children else children[-1].end
    anchors = own + tuple(anchor for child in children for anchor in child.anchors)
    if isinstance(event, yaml.SequenceStartEvent):
        return _Span(start=start, end=end, flow=flow, items=children, anchors=anchors)
    pairs = list(zip(children[::2], children[1::2], strict=True))
    return _Span(start=start, end=end, flow=flow, pairs=pairs, anchors=anchors)


def _ordered(entries: Sequence[_Entry], tp: Any, path: Path) -> Sequence[_Entry]:
    """The entries in the order of a class's keys, unknown ones last; as they are if an alias would precede its anchor."""
    if not is_spec(tp):
        return entries
    known = _key_order(tp)
    places = {name: place for place, name in enumerate(known)}

    def place(entry: _Entry) -> int:
        return places.get(current_name((*path, entry.name)) or entry.name, len(known))

    order = sorted(entries, key=place)
    defined = {name for entry in entries for name, here in entry.value.anchors if here}
    seen: set[str] = set()
    for name, here in (anchor for entry in order for anchor in entry.value.anchors):
        if here:
            seen.add(name)
        elif name in defined - seen:
            return entries
    return order


def _key_order(cls: type) -> list[str]:
    names = list(keys_of(cls))
    if cls is ExperimentSpec:
        return [*FIRST_KEYS, *(name for name in names if name not in FIRST_KEYS)]
    return ["kind", *names]


def _type_below(tp: Any, merged: Any) -> Any:
    """The class or the table that a map is read as; None if that is not clear."""
    options = options_of(tp)
    tables = [option for option in options if typing.get_origin(option) is Table]
    classes = [option for option in options if is_spec(option)]
    if tables or not kinds_of(options):
        return next(iter([*tables, *classes]), None)
    data = merged if isinstance(merged, dict) else {"kind": merged}
    kinds = kinds_of(options)
    named = kinds.get("file" if "kind" not in data and "file" in data else str(data.get("kind")))
    fitting = (cls for cls in classes if data.keys() <= {"kind", *keys_of(cls)})
    return named or default_kind(frozenset(classes)) or next(fitting, None)


def _key_type(tp: Any, name: str) -> Any:
    """The type of a key's value in a class or table."""
    if typing.get_origin(tp) is Table:
        return typing.get_args(tp)[0]
    return keys_of(tp)[name].type if is_spec(tp) and name in keys_of(tp) else Any


def _entry_type(tp: Any) -> Any:
    """The type of a list's entries."""
    lists = (option for option in options_of(tp) if typing.get_origin(option) is tuple)
    return next((typing.get_args(option)[0] for option in lists), Any)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _plain(written: str, path: Path) -> str:
    """A scalar without quotes as every YAML parser reads it: null, true, and numbers such as 1.0e-6 and 0.5."""
    value = scalar(written)
    if isinstance(value, str):
        return current_name(path, value) or written
    if isinstance(today := current_value(path, value), list):
        return f"[{', '.join(today)}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int):
        return written
    number, _, power = written.lower().partition("e")
    sign, number = ("-" if number.startswith("-") else ""), number.lstrip("+-")
    whole, _, fraction = number.partition(".")
    exponent = f"e{power if power.startswith(('+', '-')) else f'+{power}'}" if power else ""
    return f"{sign}{whole or '0'}.{fraction or '0'}{exponent}"
