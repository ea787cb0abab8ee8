"""Checks of what one run file needs of this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import torch

from sdkit.api import plan_spec
from sdkit.doctor.findings import Finding
from sdkit.doctor.host import check_disk
from sdkit.language.specs import ExperimentSpec, VllmBackend, VllmServerBackend
from sdkit.plan.disk import DiskEstimate
from sdkit.plan.machine import vllm_version
from sdkit.plan.memory import GIB, MemoryEstimate
from sdkit.plan.plan import Plan

ANSWER_SECONDS = 2.0


def check_run_file(spec: ExperimentSpec, base: Path) -> Iterator[Finding]:
    """Yields the findings about a run of this spec, whose paths start at `base`."""
    plan = plan_spec(spec, base)
    assert isinstance(plan, Plan)
    yield _check_backend(plan)
    for line in plan.derived:
        if not line.startswith("rollout.backend "):
            yield Finding(check="plan", found=line)
    if plan.memory:
        yield _check_memory(plan, plan.memory)
    if plan.disk:
        yield check_disk("disk of the run", Path(spec.output.folder), _disk_bytes(spec, plan.disk))
    if isinstance(plan.backend, VllmServerBackend):
        yield from map(_check_server, plan.backend.urls)


def _check_backend(plan: Plan) -> Finding:
    found = f"{plan.backend.kind}: {plan.backend_reason}"
    if isinstance(plan.backend, VllmBackend) and vllm_version() is None:
        advice = "install vLLM (above), or set rollout.backend: transformers"
        return Finding(
            check="rollout.backend", state="problem", found=f"{found}, but it is not installed", advice=advice
        )
    return Finding(check="rollout.backend", found=found)


def _check_memory(plan: Plan, memory: MemoryEstimate) -> Finding:
    available, place = plan.memory_gib, "this machine has"
    if torch.cuda.is_available():
        sizes = [torch.cuda.mem_get_info(index)[1] for index in range(torch.cuda.device_count())]
        available, place = min(sizes) / 2**30, "the smallest GPU has"
    found = f"about {memory.peak_gib:.1f} GiB a rank"
    if available is None:
        return Finding(check="memory of the run", found=found)
    found += f", {place} {available:.1f}"
    if memory.peak_gib <= available:
        return Finding(check="memory of the run", found=found)
    advice = "`sdkit plan` shows the parts and the settings that lower them"
    return Finding(check="memory of the run", state="problem", found=found, advice=advice)


def _disk_bytes(spec: ExperimentSpec, disk: DiskEstimate) -> float:
    """The trained model, the best one, and the checkpoints that are there at the same time."""
    kept = spec.output.keep_checkpoints + 1 if spec.output.checkpoint_every else 1
    return (disk.model * (1 + (spec.output.keep_best is not None)) + kept * disk.checkpoint) * GIB


def _check_server(url: str) -> Finding:
    address = urlsplit(url)
    check = f"server {address.netloc}"
    try:
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=ANSWER_SECONDS):
            return Finding(check=check, found="something listens; `sdkit train` asks it for its model")
    except OSError as error:
        found = f"nothing answers: {error.strerror or error}"
        return Finding(check=check, state="note", found=found, advice="start it with `sdkit serve`")
