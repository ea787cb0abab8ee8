"""The surface of the language: every key of every spec class, with type, default, range and help.

`python tools/freeze_surface.py` writes tests/spec_surface.txt, docs/language.md and the examples of `sdkit explain`;
`--check` only compares.  A change of the first is a change of what users rely on, to be seen as such in review.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import attrs
import language_examples
import language_page

from sdkit.language.introspection import Key, is_spec, keys_of, members
from sdkit.language.resolved import resolved
from sdkit.language.specs import ExperimentSpec, Table

ROOT = Path(__file__).resolve().parent.parent


def surface() -> str:
    """The whole surface as text, class by class in the order in which the language reaches them."""
    blocks = []
    for cls in _reached(ExperimentSpec):
        kind = f" (kind: {cls.kind})" if hasattr(cls, "kind") else ""
        lines = [f"{cls.__name__}{kind}"]
        lines += [f"  {_line(key)}" for key in keys_of(cls).values()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _reached(root: type) -> list[Any]:
    found: dict[type, None] = {}

    def visit(tp: Any) -> None:
        if is_spec(tp):
            if tp not in found:
                found[tp] = None
                for key in keys_of(tp).values():
                    visit(key.type)
        else:
            for part in typing.get_args(tp):
                visit(part)

    visit(root)
    return list(found)


def _line(key: Key) -> str:
    default = "required" if key.default is attrs.NOTHING else f"= {_shown(key.default)}"
    bounds = f"; {key.bounds}" if key.bounds else ""
    return f"{key.name}: {_type(key.type)} {default}{bounds}"


def _shown(value: Any) -> str:
    if is_spec(type(value)) and value == type(value)():
        return getattr(value, "kind", "its own defaults")
    return repr(resolved(value))


def _type(tp: Any) -> str:
    words = {int: "int", float: "float", str: "text", bool: "bool", types.NoneType: "null"}
    if len(members(tp)) > 1:
        return " | ".join(_type(part) for part in members(tp))
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is Literal:
        return " | ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type(args[0])}" if args[-1] is ... else f"[{', '.join(map(_type, args))}]"
    if origin is Table:
        return f"table of {_type(args[0])}"
    return words.get(tp) or getattr(tp, "__name__", str(tp))


def examples() -> str:
    """An example of each kind and of each key that some spec sets, as JSON."""
    kinds = {
        cls.__name__: language_examples.kind_example(cls, place.key)
        for cls, place in language_page.places().items()
        if hasattr(cls, "kind") and place.key
    }
    found = kinds | language_examples.key_examples()
    for example in found.values():
        if example["file"].startswith("tests/"):  # a user has no such file
            del example["file"]
    return json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> int:
    """Write the files, or check them; the exit code."""
    files = {
        ROOT / "tests" / "spec_surface.txt": surface(),
        ROOT / "docs" / "language.md": language_page.page(),
        ROOT / "sdkit" / "language" / "key_examples.json": examples(),
    }
    if "--check" not in sys.argv[1:]:
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return 0
    if all(path.is_file() and path.read_text(encoding="utf-8") == text for path, text in files.items()):
        return 0
    print("the surface of the language has changed: run tools/freeze_surface.py and read the diff")
    return 1


if __name__ == "__main__":
    sys.exit(main())
