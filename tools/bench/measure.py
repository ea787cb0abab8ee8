"""Measures one side on one shape in a process of its own, and the machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from attrs import asdict, evolve, frozen

from tools.bench import inputs, sdkit_side
from tools.bench.shapes import Shape, Side

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POLL_SECONDS = 0.25


@frozen(kw_only=True)
class Measurement:
    """What one side took for a shape's steps, or why it failed."""

    shape: str
    side: Side
    round: int
    steps: Sequence[dict[str, float]] = ()  # seconds, sampling (seconds) and tokens, see sdkit_side.read_steps
    peak_gib: float = 0.0
    error: str | None = None

    @property
    def later(self) -> Sequence[dict[str, float]]:
        """The steps after the first, which compiles and allocates."""
        return self.steps[1:]

    def seconds(self, phase: str = "seconds") -> float:
        """Return the mean seconds of a later step, or of one phase of it."""
        return sum(step[phase] for step in self.later) / len(self.later)

    def rate(self) -> float:
        """Return the completion tokens per second of the later steps."""
        return self.tokens() / self.seconds()

    def tokens(self) -> float:
        """Return the mean completion tokens of a later step."""
        return sum(step["tokens"] for step in self.later) / len(self.later)


@frozen(kw_only=True)
class Session:
    """What is measured and where: `folder` has a folder for each measurement, `cache` the models and TRL's environment."""

    folder: Path
    cache: Path
    shapes: Mapping[str, Shape]
    machines: Sequence[Mapping[str, float | str]]  # see measure_machine
    rollouts: Mapping[str, float | str] | None = None  # see rollouts.py
    done: Sequence[Measurement] = ()

    def of(self, shape: Shape, side: Side) -> list[Measurement]:
        """Return a side's measurements of a shape that did not fail, by round."""
        return [m for m in self.done if (m.shape, m.side, m.error) == (shape.name, side, None)]


def folder_of(session: Path, shape: Shape, side: Side, number: int) -> Path:
    """Return the folder of a measurement: spec or settings, rows, log and steps."""
    return session / f"{shape.name} {shape.dtype} {side} {number}".replace(", ", "-").replace(" ", "-")


def measure(session: Session, shape: Shape, side: Side, number: int) -> Measurement:
    """Run a side on a shape in a process of its own; a measurement that the session has is read instead."""
    folder = folder_of(session.folder, shape, side, number)
    result = folder / "measurement.json"
    if result.exists():
        return Measurement(**json.loads(result.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured = Measurement(shape=shape.name, side=side, round=number)
    try:
        command = _command(session.cache, shape, side, folder)
        peak = run_process(command, folder / "log.txt", threads=max(1, (os.cpu_count() or 1) // shape.ranks))
        steps = json.loads((folder / "steps.json").read_text()) if side == "TRL" else _read_run(folder / "run")
        measured = evolve(measured, steps=steps, peak_gib=peak)
    except ChildFailed as failure:
        measured = evolve(measured, error=str(failure))
    result.write_text(json.dumps(asdict(measured)))
    return measured


def _command(cache: Path, shape: Shape, side: Side, folder: Path) -> list[str | Path]:
    """Return the command of a side, with its input written to `folder`."""
    rows, model = folder / "rows.jsonl", inputs.model_folder(shape, cache)
    inputs.write_rows(shape, rows)
    if side == "TRL":
        given = folder / "shape.json"
        given.write_text(json.dumps({"shape": asdict(shape), "templates": inputs.TEMPLATES}))
        return [trl_python(cache), HERE / "trl_side.py", given, model, rows, folder]
    spec = folder / "spec.yaml"
    sdkit_side.write_spec(shape, side, model, rows, spec)
    ranks = ["--processes", str(shape.ranks)] if shape.ranks > 1 else []
    return [sys.executable, "-m", "sdkit", "train", spec, "--to", folder / "run", *ranks]


def _read_run(run: Path) -> list[dict[str, float]]:
    """Return the steps of a run, and delete its model."""
    steps = sdkit_side.read_steps(run)
    shutil.rmtree(run / "model", ignore_errors=True)
    return steps


def measure_machine(folder: Path, number: int) -> dict[str, float | str]:
    """Return operations per second by dtype, `bytes` per second of a copy, and the `device`."""
    return _printed_json("tools.bench.matrix_rate", folder / f"machine-{number}.json")


def measure_rollouts(folder: Path, dtype: str) -> dict[str, float | str]:
    """Return what `rollouts.py` prints."""
    return _printed_json("tools.bench.rollouts", folder / f"rollouts-{dtype}.json", dtype)


def _printed_json(module: str, result: Path, *arguments: str) -> dict[str, float | str]:
    """Return the JSON that a module prints last; a result that the session has is read instead.  Raises ChildFailed."""
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        log = result.with_suffix(".log")
        run_process([sys.executable, "-m", module, *arguments], log, threads=os.cpu_count() or 1)
        log.rename(result)
    return json.loads(result.read_text().splitlines()[-1])


def trl_python(cache: Path) -> Path:
    """Return the interpreter of an environment with the newest TRL beside sdkit's own torch and transformers."""
    python = cache / "trl/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", cache / "trl"], check=True)
        packages = next(cache.glob("trl/lib/python*/site-packages"))
        shared = next(path for path in sys.path if path.endswith("site-packages"))
        (packages / "sdkit_environment.pth").write_text(shared + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "trl"], check=True)
    return python


class ChildFailed(Exception):
    """A measured process failed; the text is the last line of its log."""


def run_process(command: Sequence[str | Path], log: Path, *, threads: int) -> float:
    """Run a command in the repository with its output in `log`; returns its peak memory in GiB.

    That is the largest sum over its process tree of each process' peak resident memory, or the largest memory in use on
    the GPU if there is one.  Raises ChildFailed.
    """
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment = os.environ | settings | {"OMP_NUM_THREADS": str(threads)}
    peak = 0.0
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            peak = max(peak, _gpu_mib() or _resident_mib(process.pid))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ChildFailed(lines[-1] if lines else f"exit code {process.returncode}")
    return peak / 1024


def _resident_mib(pid: int) -> float:
    """Return the sum of the peak resident memory of a process and its descendants, in MiB."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with contextlib.suppress(OSError):
                peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                total += int(peak[1]) if peak else 0
    return total / 1024


def _gpu_mib() -> float | None:
    """Return the memory in use on the first GPU in MiB, or None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return float(answer.stdout) if answer.returncode == 0 else None
