"""The one way in which files that a spec names are read: regular files alone, never more than a limit.

A device has no end, a pipe may never begin, and a file of any size can stand at any path; a check of a spec ends all the same.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from typing import Any

MAX_SPEC_BYTES = 4 * 2**20
"""Bytes of a run file or a method page."""
MAX_RESOLVED_BYTES = 16 * MAX_SPEC_BYTES
"""Bytes of a resolved spec: every default is written out, with the place of every value."""
MAX_SOURCE_CODE_BYTES = 2**19
"""Bytes of a user's Python file."""
MAX_CONFIG_BYTES = 4 * 2**20
"""Bytes of a model's config.json and the like."""
MAX_TOKENIZER_BYTES = 2**26
"""Bytes of a tokenizer.json."""


class UnreadableFile(Exception):
    """A file that is not read; its text says why, to stand after the file's name."""


def read_file(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes.  Raises UnreadableFile."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe or a device can have effects
            raise UnreadableFile(_describe_kind(path))
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UnreadableFile("this is not a regular file")
            content = file.read() if limit is None else file.read(limit + 1)
    except FileNotFoundError:
        raise UnreadableFile("there is no such file") from None
    except OSError as error:
        raise UnreadableFile((error.strerror or str(error)).lower()) from None
    except ValueError:  # a NUL byte, or characters that no file name can have
        raise UnreadableFile("this is not a file name") from None
    if limit is not None and len(content) > limit:
        raise UnreadableFile(f"larger than {_format_size(limit)}")
    return content


def _describe_kind(path: str | os.PathLike[str]) -> str:
    if os.path.isdir(path):
        return "this is a folder, not a file"
    return "this is a pipe or a device, not a regular file"


def _format_size(limit: int) -> str:
    return f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"


def read_json_object(path: str | os.PathLike[str], limit: int) -> Mapping[str, Any] | None:
    """The object in a JSON file; None where there is none that can be read."""
    try:
        found = json.loads(read_file(path, limit))
    except (UnreadableFile, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def file_names(folder: str | os.PathLike[str]) -> list[str]:
    """The sorted names of what is in a folder; none where it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []
