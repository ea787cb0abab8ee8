"""The tables of held-out scores: each run before and after training, and runs against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from attrs import frozen

from sdkit.language.errors import counted
from sdkit.report.facts import Row
from sdkit.report.records import RunRecord, Subject
from sdkit.runs.compare import CommonBudget, common_budget, differences, same_kind
from sdkit.runs.evaluations import Key, few_prompts_warning, interval_note, signed, with_interval
from sdkit.runs.history import AXES, Axis
from sdkit.runs.intervals import Interval
from sdkit.runs.score_tables import TURN_COLUMNS, TURNS_NOTE, turn_rows


@frozen(kw_only=True)
class ScoreRow:
    """One score of one run at its first and its last evaluation."""

    run: str
    key: Key
    is_headline: bool  # whether it is the main score of its suite
    start: Interval
    end: Interval
    change: Interval | None  # None if the run has one evaluation only
    lift: float | None  # of the teacher, before training; None if it was not measured

    @property
    def cells(self) -> list[str]:
        """Start, end, change, its interval, number of prompts, and the lift, if it was measured."""
        change = signed(self.change) if self.change else ("–", "–")
        end = with_interval(self.end) if self.change else "–"
        lift = [] if self.lift is None else [f"{self.lift:+.3f}"]
        return [with_interval(self.start), end, *change, str(self.start.n), *lift]

    @property
    def verdict(self) -> str:
        """`up` or `down` if the interval of the change excludes 0, else `even`."""
        if self.change is None or self.change.low <= 0 <= self.change.high:
            return "even"
        return "up" if self.change.mean > 0 else "down"


@frozen(kw_only=True)
class ScoreTable:
    """The headline table and what is to be said below it."""

    rows: Sequence[ScoreRow]
    over_seeds: bool  # whether a row is the mean of several seeds
    note: str
    few_prompts: str | None

    @property
    def main_rows(self) -> list[ScoreRow]:
        """The main score of each suite."""
        return [row for row in self.rows if row.is_headline]

    @property
    def other_rows(self) -> list[ScoreRow]:
        """All other scores."""
        return [row for row in self.rows if not row.is_headline]

    @property
    def has_lift(self) -> bool:
        """Whether a teacher's lift is in the table."""
        return any(row.lift is not None for row in self.rows)


def score_table(subjects: Sequence[Subject]) -> ScoreTable:
    """Every score of every subject, those of one suite, decoding and reward side by side."""
    rows = [row for subject in subjects if subject.run.points for row in _rows(subject)]
    keys = list(dict.fromkeys(row.key for row in rows))
    ordered = sorted(rows, key=lambda row: keys.index(row.key))
    methods = [interval.method for row in ordered for interval in (row.start, row.end, row.change) if interval]
    sizes = {row.key[0]: row.start.n for row in ordered}
    over_seeds = any(len(subject.run.members) > 1 for subject in subjects)
    return ScoreTable(
        rows=ordered,
        over_seeds=over_seeds,
        note=interval_note(methods, seeds=over_seeds),
        few_prompts=few_prompts_warning(sizes),
    )


def _rows(subject: Subject) -> list[ScoreRow]:
    run = subject.run
    first, last = run.points[0], run.points[-1]
    lifts = [
        {name: value for line in record.lines for name, value in line.items() if name.startswith("lift/")}
        for record in subject.records
    ]
    main = {run.main_score(suite) for suite in run.suites}
    return [
        ScoreRow(
            run=subject.name,
            key=key,
            is_headline=(key[0], key[2]) in main,
            start=start,
            end=end,
            change=change if last is not first else None,
            lift=_mean([lift["lift/" + "/".join(key)] for lift in lifts if "lift/" + "/".join(key) in lift]),
        )
        for key, (start, end, change) in run.changes(list(first.scores)).items()
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@frozen(kw_only=True)
class TurnTable:
    """Success by turn of every run whose turns are rewarded."""

    rows: Sequence[Row]  # the run; cells: those of `columns`
    columns: Sequence[str] = TURN_COLUMNS
    note: str = f"95 % intervals over prompts. {TURNS_NOTE.capitalize()}"


def turn_table(records: Sequence[RunRecord]) -> TurnTable:
    """The table, before and after training; without rows if no run has scores by turn."""
    runs = [record.run for record in records if record.run.points]
    ends = {run.name: (run.ends[0], run.ends[1] if len(run.points) > 1 else None) for run in runs}
    return TurnTable(rows=[Row(name=name, cells=cells) for name, pair in ends.items() for cells in turn_rows(*pair)])


@frozen(kw_only=True)
class Verdict:
    """One score of two runs at their largest common budget."""

    pair: str
    key: Key
    budget: str
    means: tuple[str, str]
    difference: tuple[str, str]  # mean and simultaneous interval
    prompts: str
    text: str
    significant: bool


def verdicts(subjects: Sequence[Subject], axis: Axis) -> tuple[list[Verdict], list[str]]:
    """The differences of all pairs of runs in the main scores of their suites, and the pairs that cannot be compared.

    Stages of sequences are not in it.
    """
    runs = [subject.run for subject in subjects if not subject.stage and subject.run.points]
    main = {run.main_score(suite) for run in runs for suite in run.suites}
    keys = [k for k in dict.fromkeys(k for run in runs for p in run.points for k in p.scores) if (k[0], k[2]) in main]
    pairs = [(a, b, common_budget(a, b, axis) if same_kind(a, b) else None) for a, b in combinations(runs, 2)]
    without = [
        f"{a.name} and {b.name}: no two evaluations at a common budget of {AXES[axis]}"
        if same_kind(a, b)
        else f"{a.name} and {b.name}: one run is not compared with several seeds"
        for a, b, budget in pairs
        if budget is None
    ]
    rows = [
        Verdict(
            pair=f"{d.budget.first.name} − {d.budget.second.name}",
            key=d.key,
            budget=_budget(d.budget, axis),
            means=_means(d.budget, d.key),
            difference=signed(d.interval),
            prompts=f"{d.sizes[0]} paired" if d.paired else f"{d.sizes[0]} and {d.sizes[1]}, not the same",
            text=d.verdict(),
            significant=d.significant,
        )
        for d in differences([budget for _, _, budget in pairs if budget], keys)
    ]
    return rows, without


def _means(budget: CommonBudget, key: Key) -> tuple[str, str]:
    scores: list[Mapping[Key, Interval]] = [point.scores for point in budget.points]
    first, second = (f"{score[key].mean:.3f}" if key in score else "–" for score in scores)
    return first, second


def _budget(budget: CommonBudget, axis: Axis) -> str:
    spent = " and ".join(dict.fromkeys(f"{point.at(axis):,.0f}" for point in budget.points))
    steps = dict.fromkeys(point.step for point in budget.points)
    return f"{spent} {AXES[axis]}, {counted(len(steps), 'step').split()[1]} {' and '.join(map(str, steps))}"
