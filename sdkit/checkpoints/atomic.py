"""Folders that are on disk whole or not at all: written under another name, and renamed when complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from sdkit.language.errors import BadEnvironment

WRITE_ERRORS = ("inline_container", "no space left", "os error", "file write failed")
"""What torch and safetensors say where a file cannot be written: they raise no OSError."""


@contextlib.contextmanager
def delete_partial_on_error(
    partial: Path, final: Path, then: str = "continue with --resume"
) -> Iterator[None]:
    """What is half written goes where it cannot be finished, here or by another rank; `then`: what to do once there is room.

    Raises BadEnvironment for what the disk has against it.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (found := disk_error(error)) is None:
            raise
        raise BadEnvironment(
            f"cannot write {final}: {found}",
            hint=f"what was complete before is untouched; make room and {then}",
        ) from None


def disk_error(error: Exception) -> str | None:
    """What the disk has against a file; None where the error is another."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, RuntimeError | SafetensorError):
        text = str(error).lower()
        if any(words in text for words in WRITE_ERRORS):
            full = "no space left on device"
            return full if full in text else "a file was not written whole; the disk may be full"
    return None


def empty_folder(partial: Path) -> None:
    """An empty folder.  Raises OSError."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def fsync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk.  Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(partial: Path, final: Path) -> None:
    """Give a complete folder its name; what had it before goes afterwards.  Raises OSError."""
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo every `put` in a folder that ended between its two renames: what was set aside has its name again."""
    for old in folder.glob(".old-*"):
        with contextlib.suppress(OSError):  # its successor has the name, or another rank was faster
            old.rename(old.with_name(old.name.removeprefix(".old-")))
