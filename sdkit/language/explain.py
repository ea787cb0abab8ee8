"""Explanations of keys, kinds and problem codes, for `sdkit explain`.

Everything comes from the spec classes, the rules, and the examples that tools/freeze_surface.py and
tools/freeze_rules.py collect from specs.
"""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, get_origin

from attrs import frozen

from sdkit.language import wording
from sdkit.language.errors import UnreadableInput, did_you_mean, nearest, shorten, spelled
from sdkit.language.files import read_json_object
from sdkit.language.introspection import (
    Key,
    default_kind,
    entry_type,
    is_spec,
    keys_of,
    kinds_of,
    members,
    options_of,
    shared_keys,
)
from sdkit.language.overlay import METHOD_HELP, packaged_methods
from sdkit.language.renamed import rename_hint
from sdkit.language.rules import RULES
from sdkit.language.rules.base import Rule
from sdkit.language.shape_codes import SHAPE_CODES, ShapeCode
from sdkit.language.specs import ExperimentSpec, Schedule, Table
from sdkit.language.suggestions import BY_PEER, SYNONYMS, Occurrence, all_keys

MAX_EXPLAINED = 3
"""More keys of one name are listed, each with its path, instead of explained."""
METHOD = Occurrence(("method",), Key("method", "method", str, None, None, METHOD_HELP), ExperimentSpec)


def explain(name: str, width: int = 100) -> str:
    """Returns what a key (a name or a path such as `optimizer.lr`), a kind or a code means, in lines of `width`.

    Raises UnreadableInput, with the closest name, if there is none.
    """
    words = tuple(name.replace("=", ".").split("."))
    parts = [*_keys(words, width), *_kinds(words, width)]
    if code := codes().get(name):
        parts.append(_code(code, width))
    if not parts:
        raise UnreadableInput(f"there is no key, kind or code {shorten(name)}", hint=_closest(words))
    return "\n\n".join(parts)


def overview(width: int = 100) -> str:
    """Returns the top-level keys of a run file."""
    keys = [METHOD.key, *keys_of(ExperimentSpec).values()]
    lines = ["A run file has these keys; `sdkit explain KEY` shows what is below one.", "", *_key_list(keys, 2, width)]
    return "\n".join(lines)


@cache
def codes() -> dict[str, Rule | ShapeCode]:
    """Returns every code that stands in brackets at the end of a message."""
    return {**SHAPE_CODES, **{rule.code: rule for rule in RULES}}


@cache
def names() -> list[str]:
    """Returns every name that can be explained: keys, kinds and codes."""
    return list(dict.fromkeys(["method", *(at.key.name for at in all_keys()), *_all_kinds(), *codes()]))


@frozen
class _Group:
    """A key with all of its places."""

    key: Key
    at: tuple[Occurrence, ...]

    @property
    def paths(self) -> list[str]:
        return [spelled(path) for path in sorted(dict.fromkeys(at.path for at in self.at), key=len)]

    @property
    def owners(self) -> list[Any]:
        return list(dict.fromkeys(at.owner for at in self.at))

    @property
    def kinds(self) -> list[str]:
        """The kinds that have the key; empty if a class without kind has it, too."""
        return [owner.kind for owner in self.owners] if all(hasattr(cls, "kind") for cls in self.owners) else []


def _keys(words: Sequence[str], width: int) -> list[str]:
    """Explains the keys whose paths end with `words`, or lists them if there are too many."""
    found = [at for at in [METHOD, *all_keys()] if _ends_with(at.path, words)]
    whole = [at for at in found if at.path == tuple(words)]  # elsewhere a NAME may stand for one of the words
    groups = _groups(whole or found)
    if not groups and len(words) > 1:  # an entry of a table, such as losses.distil
        tables = (at for at in all_keys() if get_origin(options_of(at.key.type)[0]) is Table)
        groups = _groups(at for at in tables if _ends_with((*at.path, "NAME"), words))
    if len({path for group in groups for path in group.paths}) <= MAX_EXPLAINED or len(groups) == 1:
        return [_key(group, width) for group in groups]
    lines = [f"{len(groups)} keys are named {spelled(tuple(words))}; `sdkit explain PATH` explains one:", ""]
    for group in groups:
        kinds = f" of {', '.join(group.kinds)}" if group.kinds else ""
        lines += [*_wrapped(_several(group.paths) + kinds, 2, width), *_wrapped(group.key.help, 6, width)]
    return ["\n".join(lines)]


def _groups(occurrences: Iterable[Occurrence]) -> list[_Group]:
    groups: list[tuple[Key, list[Occurrence]]] = []
    for at in occurrences:
        for key, places in groups:
            if key == at.key:
                places.append(at)
                break
        else:
            groups.append((at.key, [at]))
    return [_Group(key, tuple(places)) for key, places in groups]


def _ends_with(path: tuple[str | int, ...], words: Sequence[str]) -> bool:
    """Whether a path ends with `words`; any word stands for NAME, any number for an index."""
    tail = path[-len(words) :]
    return len(tail) == len(words) and all(
        part in ("NAME", word) or (part == 0 and word.isdecimal()) for part, word in zip(tail, words, strict=True)
    )


def _key(group: _Group, width: int) -> str:
    key = group.key
    lines = [group.paths[0], *_wrapped(key.help, 2, width), ""]
    facts = {
        "takes": _takes(key),
        "range": key.bounds,
        "default": "none: the key is required" if key.required else wording.default(key),
        "of kind": ", ".join(group.kinds),
        "also at": ", ".join(group.paths[1:]),
        "elsewhere": ", ".join(name for name, ours in SYNONYMS.items() if key.name in ours),
    }
    if key is METHOD.key:
        facts |= {"default": "none: a run file without it has the method's keys itself"}
        facts |= {"packaged": ", ".join(packaged_methods())}
    for fact, text in facts.items():
        if text:
            lines += textwrap.wrap(f"{fact:<10}{text}", width, initial_indent="  ", subsequent_indent=" " * 12)
    lines += _choices(key, width)
    lines += _example(*(f"{owner.__name__}.{key.name}" for owner in group.owners), fallback=key)
    return "\n".join(lines)


def _choices(key: Key, width: int) -> list[str]:
    """The kinds that a key takes, each with its own keys, or the keys of its only class."""
    classes = _classes(key)
    if not classes:
        return []
    if not kinds_of(classes):
        heading = "  a schedule has the keys:" if classes == [Schedule] else "  its keys:"
        return ["", heading, *_keys_of_class(classes[0], width)]
    default = default_kind(frozenset(classes))
    lines = ["", "  kinds:" + (f" (without `kind` it is {default.kind})" if default else "")]
    shared = shared_keys(classes)
    for cls in classes:
        lines += [f"    {cls.kind}", *_wrapped(_summary(cls), 8, width)]
        lines += _key_list([key for key in keys_of(cls).values() if key not in shared], 8, width)
    if shared:
        lines += ["  keys of every kind:", *_key_list(shared, 8, width)]
    return lines


def _keys_of_class(cls: Any, width: int) -> list[str]:
    return _key_list(keys_of(cls).values(), 4, width)


def _key_list(keys: Iterable[Key], indent: int, width: int) -> list[str]:
    """Each key with what it takes, its default, and its help."""
    lines = []
    for key in keys:
        default = "required" if key.required else f"default {wording.default(key)}"
        start = " " * indent
        text = f"{key.name}: {_takes(key)}; {default}"
        lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=start + "    ")
        lines += _wrapped(key.help, indent + 4, width)
    return lines


def _takes(key: Key) -> str:
    return wording.takes(key, lambda label, _: label)


def _classes(key: Key) -> list[Any]:
    """The spec classes that a key, or an entry of its list or table, takes."""
    options = options_of(key.type)
    if get_origin(options[0]) in (Table, tuple):
        options = list(members(entry_type(key.type)))
    return [option for option in options if is_spec(option)]


@cache
def _all_kinds() -> dict[str, list[tuple[type, Occurrence]]]:
    """Every kind by its name, with each place of its key."""
    places: dict[str, list[tuple[type, Occurrence]]] = {}
    for at in all_keys():
        for kind, cls in kinds_of(_classes(at.key)).items():
            places.setdefault(kind, []).append((cls, at))
    return places


def _kinds(words: Sequence[str], width: int) -> Iterator[str]:
    """Explains the kinds named by the last word; the words before it, if any, end the path of their key."""
    *before, kind = words
    places: dict[Any, list[str]] = {}
    for cls, at in _all_kinds().get(kind, ()):
        if not before or _ends_with(at.path, before) or _ends_with((*at.path, "NAME"), before):
            places.setdefault(cls, []).append(spelled(at.path))
    for cls, paths in places.items():
        lines = [f"{cls.kind}, a kind of {_several(list(dict.fromkeys(paths)))}", *_documentation(cls, width), ""]
        lines += ["  its keys:", *_keys_of_class(cls, width)] if keys_of(cls) else ["  it has no keys of its own"]
        yield "\n".join([*lines, *_example(cls.__name__)])


def _summary(cls: Any) -> str:
    return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]


def _documentation(cls: Any, width: int) -> list[str]:
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    return [line for paragraph in paragraphs for line in _wrapped(paragraph, 2, width)]


def _code(code: Rule | ShapeCode, width: int) -> str:
    scope = f"{code.severity}, run files only" if code.runs_only else code.severity
    summary = f"{code.summary[0].upper()}{code.summary[1:]}."
    lines = [f"{code.code} ({scope})", *_wrapped(summary, 2, width), *_wrapped(code.reason, 2, width)]
    if example := _read("code_examples.json").get(code.code):
        lines += ["", "Breaks the rule:", "", textwrap.indent(example["breaks"], "    ")]
        lines += ["", textwrap.indent(example["message"], "  ")]
        lines += ["", "Keeps it:", "", textwrap.indent(example["keeps"], "    ")]
    return "\n".join(lines)


def _example(*names: str, fallback: Key | None = None) -> list[str]:
    """The example of the first of these names that has one, or else the default of the key `fallback`."""
    examples = _read("key_examples.json")
    shown = next((examples[name] for name in names if name in examples), None)
    if shown:
        text = shown["text"] + (f"  # {shown['comment']}" if "comment" in shown else "")
        source = f", from {shown['file']}" if "file" in shown else ""
        return ["", f"  example{source}:", "", textwrap.indent(text, "    ")]
    if fallback and fallback.default is not None and not fallback.required:
        return ["", f"  example: {fallback.name}: {wording.default(fallback).strip('`')}"]
    return []


@cache
def _read(name: str) -> dict[str, dict[str, str]]:
    return dict(read_json_object(os.path.join(os.path.dirname(__file__), name)) or {})


def _closest(words: Sequence[str]) -> str | None:
    """A hint for a name that does not exist: its new name, sdkit's name for it, or the closest spelling."""
    name = words[-1]
    if hint := rename_hint(tuple(words)):
        return hint
    if paths := [spelled(at.path) for at in all_keys() if at.key.name == name]:
        return did_you_mean(spelled(tuple(words)), paths) or f'sdkit has "{paths[0]}"'
    if name in BY_PEER:
        return BY_PEER[name]
    if ours := SYNONYMS.get(name):
        return f'sdkit calls it "{ours[0]}"'
    known = names()
    # A spelling suggestion looks at a limited number of words: ask for some at a time.
    close = (nearest(name, known[start : start + 100]) for start in range(0, len(known), 100))
    return did_you_mean(name, [word for word in close if word]) or "`sdkit explain` lists the keys of a run file"


def _several(paths: Sequence[str]) -> str:
    return ", ".join(paths[:MAX_EXPLAINED]) + (" …" if paths[MAX_EXPLAINED:] else "")


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    start = " " * indent
    return textwrap.wrap(" ".join(text.split()), width, initial_indent=start, subsequent_indent=start)
