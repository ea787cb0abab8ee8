"""Runs the stages of a sequence file, each from the weights of the one before, and sums up what they show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from sdkit.language.errors import UnreadableInput
from sdkit.language.resolved import resolved
from sdkit.language.sequences import CheckedSequence, load_sequence
from sdkit.runs.run_sets import Member, RunSet, open_set
from sdkit.runs.sequence_text import print_sequence
from sdkit.runs.sequences import read_sequence, write_summary
from sdkit.sets.runner import Options, run_members, train_command
from sdkit.sets.seeds import SEED_KEY, seed_overrides


def sequence_set(sequence: CheckedSequence, overrides: Sequence[str], folder: Path) -> RunSet:
    """Returns the set of runs of a checked sequence, whose run directories are in `folder`."""
    assert sequence.spec is not None
    members = [
        Member(name=stage.name, spec=sequence.name, overrides=tuple(overrides), settings=resolved(stage.spec))
        for stage in sequence.stages
    ]
    tasks = {suite: stage.name for stage in sequence.stages for suite in stage.suites}
    retention = [suite for suite in sequence.stages[0].spec.suites if suite not in tasks]
    facts = {"suites": {**tasks, **dict.fromkeys(retention)}, "carry_over": list(sequence.spec.carry_over)}
    return RunSet(path=folder, kind="sequence", members=tuple(members), facts=facts)


def seeds_of_sequence(
    sequence: CheckedSequence, overrides: Sequence[str], seeds: Sequence[int], folder: Path
) -> RunSet:
    """Returns the set of one sequence for each seed.  Raises UnreadableInput if an override gives a seed."""
    if any(text.partition("=")[0] == SEED_KEY for text in overrides):
        raise UnreadableInput(f"{SEED_KEY} is given here and by --seeds", hint="leave one of them out")
    members = []
    for seed in seeds:
        words = seed_overrides(overrides, seed)
        stages = load_sequence(sequence.name, words).stages
        settings = {stage.name: resolved(stage.spec) for stage in stages}
        members.append(Member(name=f"seed_{seed}", spec=sequence.name, overrides=words, settings=settings))
    return RunSet(path=folder, kind="seeds", members=tuple(members), facts={"seeds": list(seeds)})


def train_seeds(
    run_set: RunSet, console: Console, options: Options, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Run the sequence of every seed that has not finished; print and write what they show together.

    Raises as `open_set` and `run_members`.
    """
    open_set(run_set, resume=resume, overwrite=overwrite)
    with _summing_up(run_set, console):
        run_members(run_set, lambda member: train_command(run_set, member, options), console, options)


def train_sequence(
    run_set: RunSet, console: Console, options: Options, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Run the stages that have not finished; print and write the accuracy matrix, also of a sequence that ends early.

    Raises as `open_set` and `run_members`.
    """
    open_set(run_set, resume=resume, overwrite=overwrite)

    def command(member: Member) -> list[str]:
        return [*train_command(run_set, member, options), "--stage", member.name]

    with _summing_up(run_set, console):
        run_members(run_set, command, console, options)


@contextlib.contextmanager
def _summing_up(run_set: RunSet, console: Console) -> Iterator[None]:
    """Print and write the accuracy matrix afterwards, also if the runs end early."""
    try:
        yield
    finally:
        with contextlib.suppress(UnreadableInput):  # nothing has been evaluated yet
            result = read_sequence(run_set.path)
            print_sequence(result, console)
            console.print(f"written to {write_summary(result)}", markup=False, highlight=False)
