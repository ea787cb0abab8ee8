"""The examples in docs/language.md and of `sdkit explain`: parts of specs that the tests load, so none is out of date."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from sdkit.language.introspection import Key, entry_type, is_spec, keys_of
from sdkit.language.load import CheckedSpec, load_spec
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
    path: tuple[str | int, ...]

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
def loaded_specs() -> dict[Path, CheckedSpec]:
    """The specs of `FOLDERS` that have no problems of shape, by file."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.yaml"))]
    return {file: checked for file in files if (checked := load_spec(file)).spec}


@cache
def uses() -> dict[type, list[Use]]:
    """The uses of each spec class, in the order of `FOLDERS`."""
    found: dict[type, list[Use]] = {}

    def visit(spec: Any, file: Path, path: tuple[str | int, ...]) -> None:
        for key in keys_of(type(spec)).values():
            value = getattr(spec, key.field)
            entries = [(None, value)]
            if isinstance(value, Table | tuple):
                entries = list(value.items() if isinstance(value, Table) else enumerate(value))
            for name, entry in entries:
                if is_spec(type(entry)):
                    below = (*path, key.name) if name is None else (*path, key.name, name)
                    found.setdefault(type(entry), []).append(Use(entry, key, name, file, below))
                    visit(entry, file, below)

    for file, checked in loaded_specs().items():
        visit(checked.spec, file, ())
    return found


def key_examples() -> dict[str, dict[str, str]]:
    """`CLASS.KEY` → a value other than the default, the file that has it, and the comment of its line, if there is one."""
    objects: dict[type, list[tuple[Any, Path, tuple[str | int, ...]]]] = {}
    for file, checked in loaded_specs().items():
        objects.setdefault(type(checked.spec), []).append((checked.spec, file, ()))
    for cls, found in uses().items():
        objects[cls] = [(use.value, use.file, use.path) for use in found]
    examples: dict[str, dict[str, str]] = {}
    for cls, instances in objects.items():
        for key in keys_of(cls).values():
            candidates = [
                _key_example(key, getattr(spec, key.field), file, path)
                for spec, file, path in instances
                if getattr(spec, key.field) != key.default
            ]
            if candidates:
                examples[f"{cls.__name__}.{key.name}"] = min(candidates, key=_key_rank)
    return dict(sorted(examples.items()))


def _key_example(key: Key, value: Any, file: Path, path: tuple[str | int, ...]) -> dict[str, str]:
    data = without_defaults(value, key.type)
    text = compact({key.name: data}) if isinstance(data, dict | list) else f"{key.name}: {compact(data)}"
    loaded = loaded_specs()[file].loaded
    where = (*path, key.name)
    if not loaded.written(where):
        return {"text": text, "file": str(file.relative_to(ROOT))}
    place = loaded.place(where)
    line = loaded.texts[place.file].splitlines()[place.line - 1]
    comment = re.search(r" # (.*)$", line) if "\n" not in text else None
    note = {"comment": comment[1]} if comment else {}
    return {"text": text, "file": str(Path(place.file).resolve().relative_to(ROOT)), **note}


def _key_rank(example: dict[str, str]) -> tuple[bool, bool, bool, int, str]:
    """Shipped files first, then values that are short enough, then those with a comment, then the shortest."""
    text, file = example["text"], example["file"]
    return file.startswith(FOLDERS[-1]), len(text) > LONGEST, "comment" not in example, len(text), file


def run_file() -> str:
    """A whole run file."""
    return f"A whole run file, [`{RUN_FILE}`](../{RUN_FILE}):\n\n" + _fenced((ROOT / RUN_FILE).read_text("utf-8"))


def kind_example(cls: type, key: Key) -> dict[str, str]:
    """The use of a kind under `key`, and its file."""
    best = _best_use(cls, key)
    return {"text": best.text, "file": str(best.file.relative_to(ROOT))}


def example(cls: type, key: Key) -> str:
    """The use of a class under `key`, with a link to its file if that is shipped."""
    best = _best_use(cls, key)
    # A bare kind says nothing about its file: it may be there by default.
    linked = best.file.parent != ROOT / FOLDERS[-1] and not isinstance(best.data, str)
    source = f"From [`{best.file.stem}`](../{best.file.relative_to(ROOT)}):\n\n" if linked else ""
    return source + _fenced(best.text)


def _best_use(cls: type, key: Key) -> Use:
    """The use with the most keys that is short enough, or else the shortest.  Raises ValueError if no spec has one."""
    candidates = [use for use in uses().get(cls, []) if use.key.name == key.name and use.data]
    shipped = [use for use in candidates if use.file.parent != ROOT / FOLDERS[-1]]
    if not candidates:
        raise ValueError(f"no spec has {key.name}: {cls.__name__}; add one to tests/ok/examples.yaml")
    return min(shipped or candidates, key=_rank)


def _rank(use: Use) -> tuple[bool, int, int]:
    too_long = len(use.text) > LONGEST
    keys = 0 if too_long or isinstance(use.data, str) else len(use.data)
    return too_long, -keys, len(use.text)


def _fenced(text: str) -> str:
    return f"```yaml\n{text.rstrip()}\n```"
