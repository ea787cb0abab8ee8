"""Checks of the host: memory, disks, ports, the sandbox for generated programs."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from sdkit.doctor.findings import Finding
from sdkit.language.errors import BadEnvironment
from sdkit.language.specs import PythonTests
from sdkit.models.loading import cache_folder
from sdkit.rewards.sandbox import Sandbox

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 2**30
"""Docker gives 64 MiB, in which NCCL's and vLLM's buffers between processes do not fit."""
DISK_BYTES = 10 * 2**30


def check_host(folder: Path) -> Iterator[Finding]:
    """Yields the findings about the host; run directories are to be created in `folder`."""
    yield _check_memory()
    yield from _check_shared_memory()
    yield check_disk("disk for runs", folder, DISK_BYTES)
    yield check_disk("disk for models", cache_folder(), DISK_BYTES)
    yield _check_loopback()
    yield _check_sandbox()


def _check_memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, {os.cpu_count()} cores"
    limit = _cgroup_limit()
    if limit is not None and limit < memory.total:
        found += f"; this container may use {limit / 2**30:.1f} GiB"
    return Finding(check="memory", found=found)


def _cgroup_limit() -> int | None:
    try:
        return int(CGROUP_LIMIT.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no cgroup, or `max`
        return None


def _check_shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        return
    total = shutil.disk_usage(SHARED_MEMORY).total
    found = f"{total / 2**30:.2g} GiB in {SHARED_MEMORY}"
    if total < SHARED_MEMORY_BYTES:
        advice = "several ranks on GPUs need more: start the container with --ipc=host or --shm-size=8g"
        yield Finding(check="shared memory", state="note", found=found, advice=advice)
    else:
        yield Finding(check="shared memory", found=found)


def check_disk(check: str, folder: Path, wanted: float) -> Finding:
    """Returns whether `folder`, which need not exist yet, can be written to and has `wanted` bytes left."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(check=check, state="problem", found=f"{existing} cannot be written to")
    free = shutil.disk_usage(existing).free
    found = f"{free / 2**30:.0f} GiB free in {existing}"
    if free < wanted:
        advice = f"about {wanted / 2**30:.0f} GiB may be needed: free some, or choose another folder"
        return Finding(check=check, state="note", found=found, advice=advice)
    return Finding(check=check, found=found)


def _check_loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Finding(check="ports", found=f"ranks can meet on loopback (tried port {server.getsockname()[1]})")
    except OSError as error:
        found = f"no port of 127.0.0.1 can be opened: {error.strerror}"
        return Finding(check="ports", state="problem", found=found, advice="several ranks and servers need one")


def _check_sandbox() -> Finding:
    try:
        Sandbox(PythonTests())
    except BadEnvironment as error:
        return Finding(check="sandbox", state="note", found=str(error), advice=error.hint)
    return Finding(check="sandbox", found="rewards of kind python_tests can run programs in namespaces of their own")
