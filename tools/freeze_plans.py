"""The plan of every shipped run file, on a fixed machine, and of every method page: what a change does to each is a diff.

`python tools/freeze_plans.py` writes tests/plans/; `--check` only compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sdkit.data.sources import count_rows
from sdkit.language.load import load_spec
from sdkit.plan.accelerators import ACCELERATORS, Machine
from sdkit.plan.machine import other_shapes, shape_of
from sdkit.plan.plan import make_plan, plan_method
from sdkit.plan.text import render_method, render_plan

ROOT = Path(__file__).resolve().parent.parent
SPECS = ROOT / "specs"
FROZEN = ROOT / "tests" / "plans"
NO_DATA = FROZEN / "no-data"  # so that the plans do not depend on which data files are here


def plans() -> dict[str, str]:
    """Path of the golden file below tests/plans → the plan of a run file or of a method page."""
    paths = sorted([*SPECS.glob("*.yaml"), *(SPECS / "papers").glob("*.yaml")])
    pages = sorted((ROOT / "sdkit" / "methods").glob("*.yaml"))
    return {f"{path.stem}.txt": plan_of(path) for path in paths} | {
        f"methods/{path.stem}.txt": plan_of_page(path) for path in pages
    }


def plan_of_page(path: Path) -> str:
    """What `sdkit plan` prints for a method page."""
    page: Any = load_spec(path).spec
    return render_method(plan_method(page)) + "\n"


def plan_of(path: Path) -> str:
    """The plan's text on the fixed machine, or with the ranks and the memory that the file states."""
    run: Any = load_spec(path).spec
    stated = run.machine
    machine = Machine(
        ranks=stated.ranks if stated else 1,
        memory_gib=stated.memory_gib if stated and stated.memory_gib else 24.0,
        vllm="0.32.0",
        accelerator=ACCELERATORS[stated.accelerator] if stated and stated.accelerator else None,
        on_cpu=not (stated and stated.accelerator),
    )
    shape, teachers = shape_of(run, path.parent), other_shapes(run, path.parent)
    return render_plan(run, make_plan(run, machine, shape, count_rows(run.data, NO_DATA), teachers)) + "\n"


def main() -> int:
    """Write the plans, or check them; the exit code."""
    now = plans()
    then = {path.relative_to(FROZEN).as_posix(): path.read_text(encoding="utf-8") for path in FROZEN.rglob("*.txt")}
    if "--check" in sys.argv[1:]:
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        for name in changed:
            print(f"tests/plans/{name} has changed: run tools/freeze_plans.py and read the diff")
        return 1 if changed else 0
    (FROZEN / "methods").mkdir(parents=True, exist_ok=True)
    for name in then.keys() - now.keys():
        (FROZEN / name).unlink()
    for name, text in now.items():
        (FROZEN / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
