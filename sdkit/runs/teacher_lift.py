"""The teacher's lift: what its prompt changes in a score, for each held-out prompt and on average.  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen
from rich.table import Table

from sdkit.runs.evaluations import EvaluationResult, Key, interval_note, is_pass_at, signed
from sdkit.runs.intervals import Interval, paired_difference

ADVICE = (
    "lift.jsonl has each prompt with its completion: look at what teacher.sees says there (`sdkit plan SPEC --data 2`)"
)


@frozen(eq=False, kw_only=True)
class TeacherLift:
    """Scores from the teacher's prompt and from the student's, prompt by prompt, before training."""

    pairs: Mapping[
        Key, tuple[Sequence[float], Sequence[float]]
    ]  # student, teacher: each prompt's mean over its samples
    records: Sequence[Mapping[str, Any]]  # completions from the teacher's prompt, each with the lift of its prompt

    def interval(self, key: Key) -> Interval:
        return paired_difference(*self.pairs[key])

    def changed(self, key: Key) -> tuple[int, int]:
        """The numbers of prompts whose score the teacher's prompt raises, and lowers."""
        pairs = list(zip(*self.pairs[key], strict=True))
        return sum(after > before for before, after in pairs), sum(after < before for before, after in pairs)

    def metrics(self) -> dict[str, float]:
        """The mean lift of each score, and the shares of prompts that are helped and hurt, under lift/."""
        metrics: dict[str, float] = {}
        for key in self.pairs:
            name, interval = "lift/" + "/".join(key), self.interval(key)
            helped, hurt = self.changed(key)
            metrics |= {name: interval.mean, f"{name}/helped": helped / interval.n, f"{name}/hurt": hurt / interval.n}
        return metrics

    def table(self) -> Table:
        """A table of every score's lift, and of the prompts that it helps and hurts."""
        intervals = {key: self.interval(key) for key in self.pairs}
        title = "teacher lift: score from its prompt minus the student's, before training"
        note = interval_note(interval.method for interval in intervals.values())
        table = Table("suite", "decoding", "score", title=title, caption=note)
        for name in ("lift", "95 % interval", "n", "helped", "hurt"):
            table.add_column(name, justify="right")
        for key, interval in intervals.items():
            table.add_row(*key, *signed(interval), str(interval.n), *map(str, self.changed(key)))
        return table

    def warning(self) -> str | None:
        """A warning if the teacher's prompt lowers a score, or raises none, by more than chance; None otherwise."""
        intervals = {key: self.interval(key) for key in self.pairs}
        if lowered := [key for key, interval in intervals.items() if interval.high < 0]:
            key = min(lowered, key=lambda key: intervals[key].mean)
            mean, (_, hurt) = intervals[key].mean, self.changed(key)
            share = f"{hurt} of {intervals[key].n} prompts"
            return f"the teacher's view lowers {' '.join(key)} by {-mean:.3f} (it hurts {share}): students learn to do worse"
        if intervals and all(interval.low <= 0 for interval in intervals.values()):
            return "the teacher's view lifts no score clearly above the student's; there may be nothing to distil"
        return None


def merged(lifts: Sequence[TeacherLift]) -> TeacherLift:
    """The lifts of several suites as one."""
    return TeacherLift(
        pairs={key: pair for lift in lifts for key, pair in lift.pairs.items()},
        records=[record for lift in lifts for record in lift.records],
    )


def lift_of(before: EvaluationResult, prompts: Sequence[int], after: EvaluationResult) -> TeacherLift:
    """The lift of one suite: its prompts at these places in `before`, in the order of those of `after`."""
    pairs = {
        key: ([before.scores[key][i] for i in prompts], scores)
        for key, scores in after.scores.items()
        if not is_pass_at(key)
    }
    places: dict[tuple[int, str], int] = {}
    records: list[dict[str, Any]] = []
    for record in after.records:
        place = places.setdefault((record["row"], record["prompt"]), len(places))
        lifts = {}
        for reward in record["scores"]:
            student, teacher = pairs[record["suite"], record["decoding"], reward]
            lifts[reward] = teacher[place] - student[place]
        records.append({**record, "lift": lifts})
    return TeacherLift(pairs=pairs, records=records)
