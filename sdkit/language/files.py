"""Reads the files that a spec names: regular files only, up to a size limit.

A path may lead to a device, a pipe or a huge file.  Checking a spec must finish all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdkit.language.errors import BadData, BadEnvironment, SdkitError, one_line

MAX_SPEC_BYTES = 4 * 2**20
"""A run file or a method page."""
MAX_RESOLVED_BYTES = 16 * MAX_SPEC_BYTES
"""A resolved spec, which writes out every default and the origin of every value."""
MAX_SOURCE_CODE_BYTES = 2**19
"""A user's Python file."""
MAX_CONFIG_BYTES = 4 * 2**20
"""A model's config.json and similar files."""
MAX_TOKENIZER_BYTES = 2**26
"""A tokenizer.json."""
HASHING_THREADS = min(16, os.cpu_count() or 1)
"""Hashing releases Python's lock.  A disk seldom delivers more than 16 cores can hash."""


class UnreadableFile(Exception):
    """A file cannot be read.  The message is the reason, worded to follow the file's name."""


def read_file(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes.  Raises UnreadableFile."""
    content = read_start(path, None if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise UnreadableFile(f"larger than {_format_size(limit)}")
    return content


def read_start(path: str | os.PathLike[str], size: int | None) -> bytes:
    """Returns the first `size` bytes of a regular file, or all of them.  Raises UnreadableFile."""
    try:
        if kind := irregular_kind(path):  # opening a pipe or a device can have side effects
            raise UnreadableFile(kind)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UnreadableFile("this is not a regular file")
            return file.read() if size is None else file.read(size)
    except FileNotFoundError:
        raise UnreadableFile("there is no such file") from None
    except OSError as error:
        raise UnreadableFile((error.strerror or str(error)).lower()) from None
    except ValueError:  # a NUL byte, or characters that are invalid in file names
        raise UnreadableFile("this is not a file name") from None


def irregular_kind(path: str | os.PathLike[str]) -> str | None:
    """Returns what a path leads to if it is a folder, a pipe or a device; None for a regular file or none at all."""
    if os.path.isdir(path):
        return "this is a folder, not a file"
    if os.path.exists(path) and not os.path.isfile(path):
        return "this is a pipe or a device, not a regular file"
    return None


def _format_size(limit: int) -> str:
    return f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"


def read_json_object(path: str | os.PathLike[str], limit: int | None = None) -> Mapping[str, Any] | None:
    """Returns the object in a JSON file, or None if the file is unreadable or holds something else."""
    try:
        content = json.loads(read_file(path, limit))
    except (UnreadableFile, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def file_names(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the sorted names in a folder, or an empty list if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file, which is read in pieces.  Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Returns the SHA-256 of each file, several at a time.  Raises OSError."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return list(threads.map(sha256_of, paths))


@contextlib.contextmanager
def library_reads(failure: str) -> Iterator[None]:
    """Raises BadData, which starts with `failure`, for whatever a library raises at damaged files: it may be anything."""
    try:
        yield
    except (SdkitError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which this floor does not import
            raise
        raise BadData(f"{failure}: {one_line(error, 300)}") from None


@contextlib.contextmanager
def needs_package(what: str, package: str) -> Iterator[None]:
    """Raises BadEnvironment, naming `what` needs the package, if an import inside the block fails."""
    try:
        yield
    except ImportError as error:
        message = f"{what} need a package that is missing: {error.name or package}"
        raise BadEnvironment(message, hint=f"pip install {package}") from error
