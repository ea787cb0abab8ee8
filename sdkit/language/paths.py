"""What the paths in a spec mean.

A path starts at the folder of the file that names it: the run file's, or the method page's.  On the command line it
starts at the working directory.  `~` is the home folder.  A spec stores every path relative to its own folder, or absolute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path as Folder
from typing import Any

from sdkit.language.bundled import PREFIX
from sdkit.language.errors import COMMAND_LINE, Path
from sdkit.language.introspection import is_spec, keys_of
from sdkit.language.overlay import PACKAGED_PAGES, LoadedSpec, folder_of
from sdkit.language.specs import PathTo

Start = tuple[str, str]
"""The folder at which a path starts, and a sentence that says so."""


def start_of(loaded: LoadedSpec, where: Path) -> Start:
    """Returns where the path at the key `where` starts.

    A packaged page has no files beside it: its paths stand for ones that the run file names.
    """
    file = loaded.place(where).file
    if file == COMMAND_LINE:
        return os.getcwd(), "paths on the command line start at the working directory"
    if file == loaded.name or os.path.realpath(folder_of(file)) == os.path.realpath(PACKAGED_PAGES):
        return loaded.folder, "paths start at the spec's folder"
    return folder_of(file), "paths in a method page start at its folder"


def stored_path(text: str, to: PathTo, start: str, folder: str) -> str:
    """Returns a path that starts at `start` as a spec in `folder` stores it.

    Raises LookupError with a path if the text names a model folder from `folder`, but neither a path nor a folder from
    `start`: the path that names that folder from there.
    """
    text = os.path.expanduser(text)
    if to == "output" or os.path.isabs(text) or os.path.realpath(start) == os.path.realpath(folder):
        return text
    if to == "model" and not is_local_model(text, start):
        if not text.startswith(PREFIX) and os.path.isdir(os.path.join(folder, text)):
            raise LookupError(os.path.relpath(os.path.join(folder, text), start))
        return text
    return str(Folder(os.path.relpath(os.path.realpath(start), os.path.realpath(folder)), text))


def is_local_model(text: str, start: str) -> bool:
    """Whether a model's path is that of a folder: it looks like one, or there is one.  If not, it is bundled or a hub id."""
    if text.startswith(PREFIX):
        return False
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or os.path.isdir(os.path.join(start, text))


def meanings(spec: Any, base: Folder) -> Mapping[Path, str]:
    """Returns what each path in a spec in the folder `base` means: an absolute path, or that it is a hub id."""
    found = {where: _meaning(text, to, base) for where, to, text in _paths(spec, ())}
    return {where: meaning for where, meaning in found.items() if meaning}


def _meaning(text: str, to: PathTo, base: Folder) -> str | None:
    """None for a path that is absolute as it stands, and for a bundled model."""
    if os.path.isabs(text) or (to == "model" and text.startswith(PREFIX)):
        return None
    if to == "model" and not is_local_model(text, str(base)):
        return "a model of the hub"
    return str((Folder.cwd() if to == "output" else base).joinpath(text).resolve())


def _paths(value: Any, where: Path) -> Iterator[tuple[Path, PathTo, str]]:
    """The paths in a value of a spec, each with its key."""
    if is_spec(type(value)):
        for key in keys_of(type(value)).values():
            child = getattr(value, key.field)
            if key.path_to and isinstance(child, str):
                yield (*where, key.name), key.path_to, child
            else:
                yield from _paths(child, (*where, key.name))
    elif isinstance(value, Mapping | tuple):
        for name, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _paths(child, (*where, name))
