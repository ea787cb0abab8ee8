"""`sdkit diff`: what differs between two specs or runs: settings, derived numbers, code, data and environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from rich.console import Console
from rich.markup import escape

from sdkit.language.errors import BadEnvironment, shorten, spelled
from sdkit.language.errors import Path as SpecPath
from sdkit.language.files import sha256_of
from sdkit.language.introspection import keys_of
from sdkit.language.resolved import leaves, resolved
from sdkit.language.specs import ExperimentSpec, LocalFile, MethodSpec
from sdkit.plan.numbers import Number
from sdkit.runs import directory, fingerprints
from sdkit.runs.compare import differing
from sdkit.runs.compare_text import MISSING, differences_table
from sdkit.runs.history import read_origins
from sdkit.runs.provenance import provenance

ENVIRONMENT = ("versions", "python", "platform", "commit")
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "code": ("code", "accepted_changes"),
    "models": ("models",),
    "data": ("data", "data files"),
    "environment": ENVIRONMENT,
}
"""Title → the parts of an origin that it shows."""
EXCERPT = 60
"""Characters of a text that are shown, from shortly before the first difference."""


@frozen(kw_only=True)
class Side:
    """One of two specs or runs that are compared."""

    name: str
    spec: MethodSpec
    numbers: Mapping[str, Number]  # derived
    origins: Mapping[str, Any]  # part → a value or a map; a part that is missing is not known


def origins_of_run(run: Path) -> dict[str, Any]:
    """Returns what a run was made from, by the parts of `SECTIONS`.  Raises UnreadableInput."""
    return read_origins(run) | _environment(directory.provenance(run))


def origins_of_spec(spec: MethodSpec, base: Path) -> dict[str, Any]:
    """Returns what a run of this spec would be made from now; rows and local models are not read, data files are.

    It is empty for a method page.  Raises BadEnvironment if a file cannot be read.
    """
    if not isinstance(spec, ExperimentSpec):
        return {}
    files = {"code": fingerprints.of_code(spec, base), "data files": dict(_data_files(spec, base))}
    return _environment(provenance(base)) | files


def print_differences(first: Side, second: Side, console: Console) -> None:
    """Print what differs, a table for each section.

    Beside a method page only the keys of a page are compared, and of all else only what is known of both.
    """
    sides, same = (first, second), True
    for title, maps in _sections(sides).items():
        if paths := differing(maps):
            same = False
            rows = [(spelled(path), _cells(maps, path)) for path in paths]
            console.print(differences_table(title, [side.name for side in sides], rows))
    if same:
        console.print(f"{first.name} and {second.name} are the same", markup=False, highlight=False)
    of_one = first.origins.keys() ^ second.origins.keys() if first.origins and second.origins else ()
    if unknown := [name for name in ("data", "models") if name in of_one]:
        text = f"not compared: {' and '.join(unknown)}, whose hashes only a run has recorded"
        console.print(text, markup=False, highlight=False)


def _sections(sides: Sequence[Side]) -> dict[str, list[Mapping[SpecPath, Any]]]:
    """Title → what each side has under it."""
    are_runs = all(isinstance(side.spec, ExperimentSpec) for side in sides)
    keys = keys_of(ExperimentSpec if are_runs else MethodSpec)
    settings = [{path: v for path, v in leaves(resolved(side.spec)) if path[0] in keys} for side in sides]
    numbers = set.intersection(*(set(side.numbers) for side in sides))
    sections = {
        "settings": settings,
        "derived numbers": [{(name,): v for name, v in side.numbers.items() if name in numbers} for side in sides],
    }
    known = set.intersection(*(set(side.origins) for side in sides)) | {"accepted_changes"}
    for title, parts in SECTIONS.items():
        compared = [{p: v for p in parts if p in known and (v := side.origins.get(p))} for side in sides]
        sections[title] = [dict(leaves(origins)) for origins in compared]
    return sections


def _environment(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of `ENVIRONMENT` in the contents of a provenance.json."""
    flat = {**facts, "commit": (facts.get("git") or {}).get("commit")}
    return {part: flat[part] for part in ENVIRONMENT if flat.get(part)}


def _data_files(spec: ExperimentSpec, base: Path) -> Iterator[tuple[str, str]]:
    """The path, as the spec has it, and the SHA-256 of each local data file that exists."""
    for data in (spec.data, *(suite.data for _, _, suite in spec.placed_suites())):
        if isinstance(data.source, LocalFile) and os.path.isfile(base / data.source.path):
            try:
                yield data.source.path, sha256_of(base / data.source.path)
            except OSError as error:
                raise BadEnvironment(f"cannot read {data.source.path}: {error.strerror}") from None


def _cells(maps: Sequence[Mapping[SpecPath, Any]], path: SpecPath) -> list[str]:
    """A setting's values as markup: of hashes the beginning, of texts that differ late the part where they do."""
    texts = [value for values in maps if isinstance(value := values.get(path), str)]
    start = 0
    if len(texts) > 1 and max(map(len, texts)) > EXCERPT:
        start = max(0, _common_length(*texts) - EXCERPT // 4)
    cells = []
    for values in maps:
        value = values.get(path)
        if isinstance(value, str) and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", value):
            value = value[:12]
        shown = f"…{value[start:]}" if start and isinstance(value, str) else value
        cells.append(escape(shorten(shown, EXCERPT)) if path in values else MISSING)
    return cells


def _common_length(first: str, second: str) -> int:
    """The number of characters before two texts differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
