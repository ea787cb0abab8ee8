"""Finds the user's modules that a Python file imports.  Parses files; runs none.

Imports whose names are computed at run time, and files that the code reads as data, are not found.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sdkit.language.files import MAX_SOURCE_CODE_BYTES, UnreadableFile, read_file

_SDKIT = Path(__file__).resolve().parents[1]
_STANDARD_LIBRARY = Path(os.__file__).resolve().parent


def with_imports(files: Iterable[Path], search: Sequence[Path]) -> list[Path]:
    """Returns these files and the modules that they import, at any depth, sorted.

    `search` are the folders where Python looks for modules, in order.  The standard library, installed packages and sdkit
    are left out, since their versions identify them.
    """
    pending = [file.resolve() for file in files]
    reached = set(pending)
    while pending:
        file = pending.pop()
        modules = (m for names, start in _imports(file) for m in _files_of(names, [start] if start else search))
        for module in modules:
            if module not in reached and not _is_library(module):
                reached.add(module)
                pending.append(module)
    return sorted(reached)


def modules_beside(file: Path) -> set[str]:
    """Returns the names of the modules in the file's own folder that it imports, unless the standard library has them."""
    names = {names[0] for names, start in _imports(file) if start is None} - sys.stdlib_module_names
    return {name for name in names if any(_files_of([name], [file.parent]))}


def _imports(file: Path) -> Iterator[tuple[Sequence[str], Path | None]]:
    """The dotted names that a file imports; for relative imports with the folder where they start."""
    try:
        tree = ast.parse(read_file(file, MAX_SOURCE_CODE_BYTES))
    except (UnreadableFile, SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return  # Python reports it when the file is imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), None
        elif isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if 0 < node.level <= len(file.parents) else None
            package = node.module.split(".") if node.module else []
            for alias in node.names:  # a name in a module, or a module of its own
                yield [*package, alias.name], start


def _files_of(names: Sequence[str], search: Sequence[Path]) -> Iterator[Path]:
    """The files that Python runs to import `names`, joined by dots, from the folders `search`."""
    for name in names:
        paths = (path for folder in search for path in (folder / name / "__init__.py", folder / f"{name}.py"))
        file = next(filter(os.path.isfile, paths), None)  # False where a folder cannot be searched
        if file:
            yield file.resolve()
        if file and file.name != "__init__.py":
            return
        search = [file.parent] if file else [folder / name for folder in search if (folder / name).is_dir()]


def _is_library(file: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return bool(installed) or file.is_relative_to(_STANDARD_LIBRARY) or file.is_relative_to(_SDKIT)
