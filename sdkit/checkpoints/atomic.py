"""Atomic folders: written under a temporary name and renamed when complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from sdkit.language.errors import BadEnvironment

WRITE_ERRORS = ("inline_container", "no space left", "os error", "file write failed")
"""Parts of the messages with which torch and safetensors report a failed write; they raise no OSError."""


@contextlib.contextmanager
def delete_partial_on_error(partial: Path, final: Path, then: str = "continue with --resume") -> Iterator[None]:
    """Delete `partial` if the body raises, whether the error is this rank's or another's.

    A disk error becomes BadEnvironment; its hint names `then`, the thing to do once there is room.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (reason := disk_error(error)) is None:
            raise
        raise BadEnvironment(
            f"cannot write {final}: {reason}", hint=f"what was complete before is untouched; make room and {then}"
        ) from None


def disk_error(error: Exception) -> str | None:
    """Why the file could not be written; None if `error` is not a disk error."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, RuntimeError | SafetensorError):
        text = str(error).lower()
        if any(words in text for words in WRITE_ERRORS):
            full = "no space left on device"
            return full if full in text else "a file was not written whole; the disk may be full"
    return None


def empty_folder(partial: Path) -> None:
    """Create an empty folder; deletes an existing one first.  Raises OSError."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def follow_umask(path: Path) -> None:
    """Give the file the mode of any new file; safetensors writes files that only their owner can read.  Raises OSError."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def fsync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk.  Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(partial: Path, final: Path) -> None:
    """Rename a complete folder to `final`, then delete the folder that had this name.  Raises OSError."""
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo each `replace_folder` that was interrupted between its two renames: restore the old folder's name."""
    for old in folder.glob(".old-*"):
        # It fails if the new folder has the name already, or another rank was faster.
        with contextlib.suppress(OSError):
            old.rename(old.with_name(old.name.removeprefix(".old-")))
