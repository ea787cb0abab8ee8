"""Shell completion of arguments.  Nothing here may fail or print: the shell shows what it gets."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import typer

MAX_LISTED = 1000
"""The most entries of a folder that are looked at."""


def spec_files(incomplete: str) -> list[tuple[str, str]]:
    """Completes the path of a run file or method page, or the name of a packaged page."""
    from sdkit.language.overlay import packaged_methods

    words = _paths(incomplete)
    if "/" not in incomplete:
        words += [(name, "packaged method page") for name in packaged_methods()]
    matching = [word for word in words if word[0].startswith(incomplete)]
    # A shell adds a space after the only completion, so show what is in the folder as well.
    if len(matching) == 1 and matching[0][0].endswith("/"):
        matching += _paths(matching[0][0])
    return matching


def specs_and_overrides(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Completes a spec or, after the first one, also `key.path=value` for it."""
    words: list[str] = list(context.params.get("words") or ())
    specs = [] if "=" in incomplete else spec_files(incomplete)
    return specs + (_override_words(words[0], words[1:], incomplete) if words else [])


def overrides(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Completes `key.path=value` for the spec before it on the command line."""
    return _override_words(context.params.get("spec"), list(context.params.get("overrides") or ()), incomplete)


def _override_words(spec: Any, before: list[str], incomplete: str) -> list[tuple[str, str]]:
    from sdkit.language.completions import override_words, value_words

    data = _data(spec)
    # bash splits a word at `=`: what is before the cursor is then `key.path`, `=` and the start of the value.
    if before[-1:] == ["="]:
        return value_words(before[-2], data) if len(before) > 1 else []
    if before and "=" not in before[-1] and before[-2:-1] != ["="]:
        return value_words(before[-1], data)
    return override_words(incomplete, data)


def explained_names(incomplete: str) -> list[str]:
    """Completes a key, its path, a kind or a code."""
    from sdkit.language.errors import spelled
    from sdkit.language.explain import names
    from sdkit.language.suggestions import all_keys

    known = [spelled(at.path) for at in all_keys()] if "." in incomplete else names()
    return list(dict.fromkeys(name for name in known if name.startswith(incomplete)))


def method_names(incomplete: str) -> list[str]:
    """Completes the name of a packaged method page."""
    from sdkit.language.overlay import packaged_methods

    return [name for name in packaged_methods() if name.startswith(incomplete)]


def peer_names(incomplete: str) -> list[tuple[str, str]]:
    """Completes the name of a trainer whose configuration can be imported."""
    from sdkit.language.peers import peers

    return [(name, summary) for name, summary in peers().items() if name.startswith(incomplete)]


def _data(spec: Any) -> Any:
    """The data of a spec merged onto its method page, or None if there is no such file."""
    from sdkit.language.errors import SdkitError
    from sdkit.language.overlay import load

    try:
        return load(spec).data if spec else None
    except (SdkitError, OSError):
        return None


def _paths(incomplete: str) -> list[tuple[str, str]]:
    """The folders and YAML files beside an incomplete path."""
    folder, start = os.path.split(incomplete)
    words = []
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            for entry in islice(entries, MAX_LISTED):
                if entry.name.startswith(".") and not start.startswith("."):
                    continue
                path = os.path.join(folder, entry.name)
                if entry.is_dir():
                    words.append((f"{path}/", "folder"))
                elif entry.name.endswith((".yaml", ".yml")):
                    words.append((path, "spec"))
    except OSError:
        return []
    return sorted(words)
