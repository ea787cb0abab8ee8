"""Accuracy matrix of tasks learned in sequence: transfer, forgetting and retention, with intervals.  Knows numbers only.

R[j][i] is the score on suite i after stage j; j = 0 is the start model, T the last stage, s(i) the stage that learns suite i.

| metric | definition | source |
|---|---|---|
| accuracy | mean of R[T][i] | Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840), ACC |
| learned | mean of R[s][i] − R[s−1][i]: what a task's own stage adds | |
| backward_transfer | mean of R[T][i] − R[s][i] over tasks before the last | GEM, BWT |
| forward_transfer | mean of R[s−1][i] − R[0][i] over tasks after the first | GEM, FWT; the start model for random weights |
| forgetting | mean of max R[l][i] over 1 ≤ l < T, minus R[T][i], over tasks before the last | Chaudhry et al. 2018 (RWalk, arXiv 1801.10112) |

Retention is R[T][i] − R[0][i] of a suite that no stage trains on.  A stage with several suites counts each.

Prompts: each suite's mean or paired change has the interval of `sdkit.runs.intervals`; those of several suites, whose prompts
are independent, are combined as in Zou and Donner 2008 (Statistics in Medicine 27, 1693-1702): the squares of the
distances between mean and end add up.  Several seeds: a prompt's score is its mean over seeds, and the interval is widened by
the error that is due to seeds (`sdkit.runs.seed_intervals`).  Forgetting takes the best of several scores, which noise makes
larger; its interval is for the stage that turned out best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve, frozen

from sdkit.runs.intervals import Interval, combined, difference_of_changes, mean_interval, paired_difference
from sdkit.runs.seed_intervals import error_of_columns, seeds_mean, widened

Scores = Mapping[str, float]
"""Prompt → score, of one suite after one stage."""


@frozen(kw_only=True)
class Trajectory:
    """The scores of one sequence, from the start model to the last stage that has finished."""

    stages: tuple[str, ...]
    suites: Mapping[str, str | None]  # suite → the stage whose task it measures; None: retention
    rows: tuple[Mapping[str, Scores], ...]  # at the start, after the first stage, …: suite → scores

    @property
    def is_complete(self) -> bool:
        """Whether the last stage has finished."""
        return len(self.rows) == len(self.stages) + 1

    def learned_at(self, suite: str) -> int:
        """The number, from 1, of the stage that learns this suite; raises ValueError for a retention suite."""
        stage = self.suites[suite]
        if stage is None:
            raise ValueError(f"no stage learns {suite}")
        return 1 + self.stages.index(stage)


@frozen
class Change:
    """One suite's score after stage `after`, minus that after stage `before` if there is one."""

    suite: str
    after: int
    before: int | None = None


def matrix(runs: Sequence[Trajectory]) -> list[dict[str, Interval]]:
    """The score of every suite at the start and after every stage; `runs` are one sequence under several seeds."""
    rows = min(len(run.rows) for run in runs)
    return [
        {suite: seeds_mean({seed: run.rows[j][suite] for seed, run in enumerate(runs)}) for suite in runs[0].suites}
        for j in range(rows)
    ]


def metrics(runs: Sequence[Trajectory]) -> dict[str, Interval]:
    """The metrics that the module's table defines; without those that no task has."""
    return {name: estimate(runs, changes) for name, changes in metric_changes(runs).items() if changes}


def retention(runs: Sequence[Trajectory]) -> dict[str, Interval]:
    """The change of each retention suite from the start model to the last stage."""
    return {suite: estimate(runs, changes) for suite, changes in retention_changes(runs[0]).items()}


def retention_changes(run: Trajectory) -> dict[str, list[Change]]:
    """Of each retention suite the change from the start to the last stage."""
    return {suite: [Change(suite, len(run.stages), 0)] for suite, stage in run.suites.items() if stage is None}


def metric_changes(runs: Sequence[Trajectory]) -> dict[str, list[Change]]:
    """The changes whose mean over suites each metric is.  The runs are complete, and have the same stages."""
    last, tasks = len(runs[0].stages), {s: runs[0].learned_at(s) for s, stage in runs[0].suites.items() if stage}
    earlier = [suite for suite, stage in tasks.items() if stage < last]
    return {
        "accuracy": [Change(suite, last) for suite in tasks],
        "learned": [Change(suite, stage, stage - 1) for suite, stage in tasks.items()],
        "backward_transfer": [Change(suite, last, tasks[suite]) for suite in earlier],
        "forward_transfer": [Change(suite, stage - 1, 0) for suite, stage in tasks.items() if stage > 1],
        "forgetting": [Change(suite, _best_stage(runs, suite, last), last) for suite in earlier],
    }


def _best_stage(runs: Sequence[Trajectory], suite: str, last: int) -> int:
    """The stage before the last after which a suite's mean over seeds is highest; the latest of equal ones."""
    means = {j: np.mean([_values(run, suite, j).mean() for run in runs]) for j in range(1, last)}
    return max(means, key=lambda j: (means[j], j))


def estimate(runs: Sequence[Trajectory], changes: Sequence[Change]) -> Interval:
    """The mean of these changes over suites, prompts and seeds, with its 95 % interval.  Raises ValueError without changes."""
    parts = [_over_prompts(runs, change) for change in changes]
    return _combine(parts, [_table(runs, change) for change in changes])


def difference(
    first: Sequence[Trajectory], second: Sequence[Trajectory], changes: tuple[Sequence[Change], Sequence[Change]]
) -> Interval | None:
    """The mean change of `first` minus that of `second`, paired by suite, prompt and seed, with its 95 % interval.

    `changes` are those of the first and of the second.  None if suites, prompts or the number of seeds differ.
    """
    if len(first) != len(second) or [c.suite for c in changes[0]] != [c.suite for c in changes[1]]:
        return None
    parts = [_paired(first, second, a, b) for a, b in zip(*changes, strict=True)]
    if not parts or any(part is None for part in parts):
        return None
    tables = [_table(first, a) - _table(second, b) for a, b in zip(*changes, strict=True)]
    return _combine([part for part in parts if part], tables)


def _combine(parts: Sequence[Interval], tables: Sequence[np.ndarray]) -> Interval:
    """The mean of independent estimates, widened by the error that is due to the seeds.  `tables`: of each suite [P, S]"""
    method = ", ".join(dict.fromkeys(part.method for part in parts if part.method))
    interval = evolve(combined([(part, 1 / len(parts)) for part in parts]), method=method)
    return widened(
        interval, [error_of_columns([(table, 1 / len(tables)) for table in tables])] if tables[0].shape[1] > 1 else []
    )


def _over_prompts(runs: Sequence[Trajectory], change: Change) -> Interval:
    after = _over_seeds(runs, change.suite, change.after)
    if change.before is None:
        return mean_interval(after)
    return paired_difference(_over_seeds(runs, change.suite, change.before), after)


def _paired(first: Sequence[Trajectory], second: Sequence[Trajectory], a: Change, b: Change) -> Interval | None:
    """The change of the first minus that of the second, over their common prompts; None if their prompts differ."""
    sides = [(runs[0].rows[c.after][c.suite], runs, c) for runs, c in ((first, a), (second, b))]
    if sides[0][0].keys() != sides[1][0].keys():
        return None
    if a.before is None or b.before is None:
        return paired_difference(_over_seeds(second, b.suite, b.after), _over_seeds(first, a.suite, a.after))
    values = [_over_seeds(r, c.suite, stage) for _, r, c in sides for stage in (c.before, c.after)]
    return difference_of_changes(*values[2:], *values[:2])


def _over_seeds(runs: Sequence[Trajectory], suite: str, stage: int | None) -> list[float]:
    """Each prompt's score, averaged over the seeds, in the order of the first seed's prompts."""
    assert stage is not None
    return np.mean([_values(run, suite, stage, runs[0]) for run in runs], axis=0).tolist()


def _values(run: Trajectory, suite: str, stage: int, order: Trajectory | None = None) -> np.ndarray:
    scores = run.rows[stage][suite]
    return np.array([scores[prompt] for prompt in (order or run).rows[0][suite]])


def _table(runs: Sequence[Trajectory], change: Change) -> np.ndarray:
    """The change of every prompt under every seed.  [P, S]"""

    def column(run: Trajectory) -> np.ndarray:
        before = 0.0 if change.before is None else _values(run, change.suite, change.before, runs[0])
        return _values(run, change.suite, change.after, runs[0]) - before

    return np.stack([column(run) for run in runs], axis=1)
