"""What git says about a folder: commit, changed files, and the difference to the commit.  Runs git; changes nothing."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

MAX_DIFF_BYTES = 2**20
SECONDS = 10


def state(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the repository that holds `folder`; None if there is none."""
    commit = _run(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit.strip(), "changed": (_run(folder, "status", "--porcelain") or "").splitlines()}


def diff(folder: Path) -> str | None:
    """Returns `git diff HEAD` of the repository that holds `folder`, at most MAX_DIFF_BYTES; None if nothing has changed.

    Of untracked files, only `state` has the names.
    """
    # A repository can configure programs that git runs for a diff.
    return _run(folder, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", limit=MAX_DIFF_BYTES) or None


def _run(folder: Path, *args: str, limit: int = -1) -> str | None:
    """The output of a git command; of one with more than `limit` bytes, the beginning.  None if it fails."""
    command = ["git", "-C", str(folder), *args]
    with tempfile.TemporaryFile() as output:
        try:
            subprocess.run(command, stdout=output, stderr=subprocess.DEVNULL, timeout=SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        size = output.seek(0, os.SEEK_END)
        output.seek(0)
        text = output.read(limit).decode(errors="replace")
        return f"{text}\n… {size - limit:,} more bytes are left out\n" if 0 <= limit < size else text
