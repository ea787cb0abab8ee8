"""Several seeds of one spec: the same run for each seed, as one set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit.language.errors import UnreadableInput, counted, shorten
from sdkit.language.resolved import resolved
from sdkit.language.specs import ExperimentSpec
from sdkit.plan.plan import Plan
from sdkit.runs.run_sets import Member, RunSet

SEED_KEY = "training.seed"


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds in `0,1,2`.  Raises UnreadableInput for anything but different whole numbers from 0 to 2³² − 1."""
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not (word.isascii() and word.isdecimal() and int(word) < 2**32)]
    if wrong:
        raise UnreadableInput(
            f"--seeds {text}: {shorten(wrong[0])} is not a whole number from 0 to {2**32 - 1}",
            hint="example: --seeds 0,1,2",
        )
    seeds = tuple(map(int, words))
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UnreadableInput(f"--seeds {text}: {twice[0]} is named twice")
    return seeds


def seed_overrides(overrides: Sequence[str], seed: int) -> tuple[str, ...]:
    """The overrides of one seed's run."""
    return (*overrides, f"{SEED_KEY}={seed}")


def first_overrides(overrides: Sequence[str], seeds: Sequence[int]) -> tuple[str, ...]:
    """The overrides of the first seed's run; without seeds, of the only run."""
    return seed_overrides(overrides, seeds[0]) if seeds else tuple(overrides)


def seeds_set(
    spec: ExperimentSpec, written: Path, overrides: Sequence[str], seeds: Sequence[int], folder: Path
) -> RunSet:
    """The set of one run for each seed; `written` is the run file, `spec` what it says with the overrides."""
    settings: Mapping[str, Any] = resolved(spec)
    members = [
        Member(
            name=f"seed_{seed}",
            spec=str(written),
            overrides=seed_overrides(overrides, seed),
            settings={**settings, "training": {**settings["training"], "seed": seed}},
        )
        for seed in seeds
    ]
    return RunSet(path=folder, kind="seeds", members=tuple(members), facts={"seeds": list(seeds)})


def plan_seeds(seeds: Sequence[int], plan: Plan) -> str:
    """The section of a plan about the runs of several seeds."""
    lines = [
        f"{counted(len(seeds), 'run')}: training.seed {', '.join(map(str, seeds))}, each in seed_N of the run directory"
    ]
    if hours := run_hours(plan):
        lines.append(f"{len(seeds) * hours:.1f} h in all, without evaluation, if they run one after the other")
    return "\n".join(["seeds:", *(f"  {line}" for line in lines)])


def run_hours(plan: Plan) -> float | None:
    """The estimated hours of a run's steps; None if the plan does not know them."""
    if plan.steps is None or plan.step_time is None or plan.step_time.unknown_reason:
        return None
    return plan.steps * plan.step_time.seconds / 3600
