"""sdkit's Python API for specs, plans and run directories; `train/batch_objective.py` has the objective.

Imports no torch.  docs/api.md shows every function.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from sdkit.data.sources import count_rows
from sdkit.language import load
from sdkit.language.errors import InvalidSpec, Problem
from sdkit.language.resolved import resolved
from sdkit.language.show import annotated
from sdkit.language.specs import ExperimentSpec, MethodSpec
from sdkit.plan.machine import machine_for, memory_gib, other_shapes, shape_of
from sdkit.plan.plan import MethodPlan, Plan, make_plan, plan_method
from sdkit.runs import directory
from sdkit.runs.directory import origin, read_lines

PathLike = str | os.PathLike[str]


def check_spec(path: PathLike, overrides: Sequence[str] = ()) -> list[Problem]:
    """Returns all problems of a run file or method page, errors and warnings, by position.

    `path` is a file or the name of a packaged page; `overrides` are written as on the command line,
    `["training.steps=20"]`.  Raises UnreadableInput if the file cannot be read.
    """
    return list(load.load_spec(path, overrides).problems)


def load_spec(path: PathLike, overrides: Sequence[str] = ()) -> ExperimentSpec | MethodSpec:
    """Returns the frozen spec of a run file (ExperimentSpec) or method page (MethodSpec).

    Arguments are those of `check_spec`.  Raises InvalidSpec if the spec has errors, UnreadableInput if the file cannot be
    read.
    """
    return _checked(path, overrides)[1]


def show_spec(path: PathLike, overrides: Sequence[str] = ()) -> str:
    """Returns the text of `sdkit show`: every value, and the file and line it comes from.  Raises as `load_spec`."""
    return annotated(_checked(path, overrides)[0], show_paths=True)


def resolve_spec(spec: MethodSpec) -> dict[str, Any]:
    """Returns the spec as maps, lists and scalars, with every default written out."""
    return resolved(spec)


def plan_spec(spec: MethodSpec, folder: PathLike = ".") -> Plan | MethodPlan:
    """Returns the plan of a run on this machine, or what a method page fixes of it.

    `folder` is where paths in the spec start.
    """
    if not isinstance(spec, ExperimentSpec):
        return plan_method(spec)
    base = Path(folder)
    machine = machine_for(spec)
    machine = evolve(machine, memory_gib=machine.memory_gib or memory_gib())
    return make_plan(spec, machine, shape_of(spec, base), count_rows(spec.data, base), other_shapes(spec, base))


def read_status(run: PathLike) -> dict[str, Any]:
    """Returns the status of a run: `state`, `step`, and the reason of an early end.

    States are running, done, diverged, stopped, interrupted and failed.  A killed process leaves `running` behind, unless
    another rank or the launcher is left to report it.  Raises UnreadableInput if the folder is not a run directory, as
    the next functions do.
    """
    return dict(directory.read_status(_run(run)))


def read_metrics(run: PathLike) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl: one for each training step, evaluation and teacher lift, with its `step`."""
    return read_lines(_run(run) / "metrics.jsonl")


def read_rollouts(run: PathLike, step: int | None = None) -> list[dict[str, Any]]:
    """Returns the rollouts of one training step, or of all; `step` counts from 1, as in `read_metrics`."""
    return list(_records(run, "rollouts", step, first=1))


def read_evaluations(run: PathLike, step: int | None = None) -> list[dict[str, Any]]:
    """Returns every held-out completion with its scores, after one step, or after all evaluated steps."""
    return list(_records(run, "evaluations", step, first=0))


def _records(run: PathLike, folder: str, step: int | None, first: int) -> Iterator[dict[str, Any]]:
    """Yields the records of a folder of a run, each with its `step`; the file with number 0 is of step `first`."""
    for path in sorted((_run(run) / folder).glob("step_*.jsonl")):
        number = int(path.stem.removeprefix("step_")) + first
        if step in (None, number):
            yield from ({"step": number, **record} for record in read_lines(path))


def _run(path: PathLike) -> Path:
    origin(Path(path))  # raises if this is not a run directory
    return Path(path)


def _checked(path: PathLike, overrides: Sequence[str]) -> tuple[load.CheckedSpec, ExperimentSpec | MethodSpec]:
    checked = load.load_spec(path, overrides)
    if checked.spec is None or not checked.ok:
        raise InvalidSpec(checked.problems, checked.texts)
    return checked, checked.spec
