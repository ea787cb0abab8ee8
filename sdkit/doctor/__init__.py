"""`sdkit doctor`: what runs need of this machine and its packages, and what to do where something is missing."""

from __future__ import annotations

from pathlib import Path

from sdkit.doctor.findings import Finding
from sdkit.language.specs import ExperimentSpec


def examine(spec: ExperimentSpec | None = None, base: Path = Path()) -> list[Finding]:
    """Returns all findings about this machine; with a spec, whose paths start at `base`, also about a run of it."""
    import torch

    from sdkit.doctor.devices import check_devices
    from sdkit.doctor.host import check_host
    from sdkit.doctor.packages import check_packages
    from sdkit.doctor.run_file import check_run_file

    folder = Path(spec.output.folder) if spec else Path()
    findings = [*check_packages(gpu=torch.cuda.is_available()), *check_devices(), *check_host(folder)]
    return findings + (list(check_run_file(spec, base)) if spec else [])
