"""Rows, prompts and scores of a run: all that can be checked before a weight is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.batches import GroupOutcome, Row
from sdkit.data.prompts import Prompter, TeacherPrompt, check_prompts, check_repeatable
from sdkit.data.rows import drop_duplicates, drop_overlap, fingerprint, load_rows, positions
from sdkit.data.thinking import answer_text
from sdkit.data.turn_ends import end_token
from sdkit.language.errors import BadData, blaming, counted, first_of, outside, shorten
from sdkit.language.specs import (
    ChoiceReward,
    ColumnSlot,
    ExactReward,
    ExperimentSpec,
    MathVerifyReward,
    NumberReward,
    OfRollouts,
    ReasoningGymReward,
    ReasoningGymSource,
    RegexReward,
    Reward,
    RewardModel,
    RoutedWeights,
    Suite,
    TeacherSamples,
    WeightedReward,
    column_of,
    completion_column,
)
from sdkit.models.embedding_ids import HINT, KnownIds
from sdkit.models.loading import load_tokenizer
from sdkit.plan.machine import machine_for
from sdkit.plan.plan import make_plan
from sdkit.rewards.scoring import Scorer, open_rewards, score
from sdkit.user_code.divergences import open_user_divergences
from sdkit.user_code.token_weights import open_user_weights

COMPARED = {ExactReward, NumberReward, ChoiceReward, RegexReward, ReasoningGymReward}
"""Rewards that look at a completion and a row, and at nothing else."""
ReadsText = ExactReward | NumberReward | ChoiceReward | MathVerifyReward
"""Rewards that read a column as text."""
CONTEXT_TEXT = 128
"""Tokens allowed for a template's own words where the context is not known before rollouts are."""
SHOWN = 5
"""Rows that a warning names."""


@frozen(kw_only=True)
class Completions:
    """The data set's own completions of the rows that a run uses, against `rollout.max_new_tokens`."""

    column: str
    rows: int
    cut: tuple[int, ...]  # numbers of the rows whose completion is longer
    longest: int  # tokens, end token included

    def warning(self, limit: int) -> str | None:
        """What to tell of cut completions: how many of how many, and which rows."""
        if not self.cut:
            return None
        more = ", …" if len(self.cut) > SHOWN else ""
        rows = ", ".join(f"row {index}" for index in self.cut[:SHOWN]) + more
        return (
            f"{len(self.cut)} of {counted(self.rows, 'completion')} in the column {self.column} are cut at "
            f"rollout.max_new_tokens ({limit}) and lose their end, the end token with it: {rows}"
        )


class RunData:
    """Training rows, held-out rows, their prompts as token ids, and the rewards of each suite."""

    def __init__(
        self,
        spec: ExperimentSpec,
        base: Path,
        tokenizer: Any,
        *,
        now: datetime | None = None,
        known: KnownIds | None = None,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.known = known  # None: any id may stand in a prompt
        self.largest_id = 0  # of all prompts and completions that `check` has seen
        with blaming("model", "chat_template_options"):
            self.prompter = Prompter(
                tokenizer,
                dict(spec.model.chat_template_options),
                now=now,
                keep_text=spec.model.control_tokens == "text",
            )
        only = next(iter(spec.rewards)) if len(spec.rewards) == 1 else None
        self.reward = spec.reward or only  # the name of the reward that training uses
        self.turn_end = end_token(tokenizer, self.prompter.options)
        self.completions: Completions | None = None
        suites = spec.evaluation.suites if spec.evaluation else {}
        column = completion_column(spec.rollout.sampled_by)
        needed = (column,) if column else ()
        self.suites: dict[str, list[Row]] = {}
        self.repeats: dict[
            str, int
        ] = {}  # held-out rows dropped, their prompt stands in the suite already
        for name, suite in suites.items():
            with blaming("evaluation", "suites", name, "data"):
                found = load_rows(suite.data, base, spec.data.columns, texts=self._texts(suite))
            self.suites[name], self.repeats[name] = drop_duplicates(found)
        with blaming("data"):
            rows = load_rows(spec.data, base, needed=needed, texts=self._texts(None))
        held_out = [
            row
            for name, suite in suites.items()
            for row in self.suites[name]
            if suite.same_prompts == "drop"
        ]
        self.train, self.dropped = drop_overlap(rows, held_out)
        if not self.train:
            raise BadData(
                "every training row is held out too, so nothing is left to train on", path=("data",)
            )
        sees = spec.teacher.sees if spec.teacher else None
        self.needs_rollouts_for_context = any(
            isinstance(slot, OfRollouts) for slot in (sees.slots.values() if sees else ())
        )
        self.strips_thinking = any(
            getattr(slot, "strip_thinking", False) for slot in (sees.slots.values() if sees else ())
        )
        self.rewards: dict[str, dict[str, Scorer]] = {
            name: self._rewards(suite, base) for name, suite in suites.items()
        }
        self.train_rewards = self._open_training_rewards(base)
        weights = spec.teacher and spec.teacher.weights
        self.routed = weights if isinstance(weights, RoutedWeights) else None
        self.routes = list(self.routed.routes) if self.routed else []
        self.user_weights = open_user_weights(spec.losses, base)  # by term
        self.user_divergences = open_user_divergences(spec.losses, base)  # by term
        self.visited = 0  # training rows that the run will use
        self.spelled: list[tuple[Row, str]] = []  # of those, which spell a control token
        self._student: dict[int, tuple[int, ...]] = {}
        self._teacher: dict[int, tuple[int, ...] | None] = {}
        self._opening: dict[int, str] = {}  # the tag of thinking that a row's prompt leaves open

    def _texts(self, suite: Suite | None) -> set[str]:
        """The columns whose values must have a text: of a suite's rows, or of the training rows."""
        spec = self.spec
        names = self._shown_columns if suite is None else self._slot_columns
        weights = spec.teacher and spec.teacher.weights
        if isinstance(weights, RoutedWeights):
            names = [*names, weights.by]
        rewards = self._judges(suite) if suite else filter(self._applies_to_training, spec.rewards)
        judges = [part for name in rewards for part in self._leaves(name)]
        return {*names, *(judge.answer for judge in judges if isinstance(judge, ReadsText))}

    @property
    def _slot_columns(self) -> list[str]:
        sees = self.spec.teacher.sees if self.spec.teacher else None
        slots = sees.slots.values() if sees else ()
        return [slot.name for slot in slots if isinstance(slot, ColumnSlot)]

    @property
    def _shown_columns(self) -> list[str]:
        """The columns of training rows that a model reads or is trained on, the prompt aside."""
        column = completion_column(self.spec.rollout.sampled_by)
        return [*self._slot_columns, *filter(None, [column])]

    def _judges(self, suite: Suite) -> Iterable[str]:
        """The rewards that a suite's completions are judged by."""
        return dict.fromkeys((suite.score, *suite.also, *filter(None, [self.reward])))

    def _rewards(self, suite: Suite, base: Path) -> dict[str, Scorer]:
        source = suite.data.source
        task = source if isinstance(source, ReasoningGymSource) else None
        return open_rewards(self.spec.rewards, self._judges(suite), base, task)

    def _open_training_rewards(self, base: Path) -> dict[str, Scorer]:
        """The rewards that training rows can be scored with too: for the curves, not for the gradient."""
        source = self.spec.data.source
        task = source if isinstance(source, ReasoningGymSource) else None
        names = [name for name in self.spec.rewards if self._applies_to_training(name)]
        return open_rewards(self.spec.rewards, names, base, task)

    def _applies_to_training(self, name: str) -> bool:
        reward, data = self.spec.rewards[name], self.spec.data
        if isinstance(reward, WeightedReward):
            return all(map(self._applies_to_training, reward.parts))
        if isinstance(reward, ReasoningGymReward):
            return isinstance(data.source, ReasoningGymSource)
        return column_of(reward) in (None, *(data.columns or {}))

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the training rows and of each suite."""
        suites = {f"suite {name}": fingerprint(rows) for name, rows in self.suites.items()}
        return {"train": fingerprint(self.train), **suites}

    def prompt_fingerprints(self, count: int) -> dict[str, str]:
        """SHA-256 of the prompts of the first `count` training rows in the run's order, and of each suite's.

        Those of teachers that wait for rollouts are none of a row alone, and left out.
        """
        training = self.spec.training
        order = positions(0, count, len(self.train), training.seed, self.spec.data.shuffle)
        parts = {"train": [self.train[i] for i in order]}
        parts |= {f"suite {name}": rows for name, rows in self.suites.items()}
        found = {name: _digest(map(self.student_ids, rows)) for name, rows in parts.items()}
        for name, rows in parts.items():
            found[f"{name} (teacher)"] = _digest(map(self.teacher_ids, rows))
        return found

    def batch_rows(self, step: int) -> list[Row]:
        """The prompts of rollout batch number `step`: a pure function of step and seed."""
        training = self.spec.training
        size = training.prompts_per_step
        chosen = positions(
            step * size, size, len(self.train), training.seed, self.spec.data.shuffle
        )
        return [self.train[i] for i in chosen]

    def student_ids(self, row: Row) -> tuple[int, ...]:
        """The student's prompt, generation prompt included."""
        if id(row) not in self._student:
            self._student[id(row)] = self.prompter.student_ids(row)
        return self._student[id(row)]

    def teacher_ids(self, row: Row) -> tuple[int, ...] | None:
        """The teacher's prompt; None where the row has not what the context requires, or there is no teacher."""
        if self.spec.teacher is None:
            return None
        if id(row) not in self._teacher:
            prompt = self.prompter.teacher_ids(row, self.spec.teacher.sees)
            self._teacher[id(row)] = None if prompt is None else prompt.ids
        return self._teacher[id(row)]

    def teacher_prompt(self, row: Row, evidence: GroupOutcome | None) -> TeacherPrompt | None:
        """The teacher's prompt of one rollout, with what is known of it."""
        teacher = self.spec.teacher
        prompt = teacher and self.prompter.teacher_ids(row, teacher.sees, evidence)
        if prompt and self.known:
            self.known.check(self.tokenizer, f"row {row.index}: the teacher's prompt", prompt.ids)
        return prompt

    def answer(self, row: Row, completion: Sequence[int]) -> str | None:
        """A completion's text without its thinking; None where no slot shows it so."""
        if not self.strips_thinking:
            return None
        if id(row) not in self._opening:
            self._opening[id(row)] = self.prompter.opening(row)
        return answer_text(self.tokenizer, completion, self._opening[id(row)])

    def teacher_route(self, row: Row) -> int:
        """Which of a routed teacher's routes is the row's; 0 where the teacher is not routed."""
        return self.routes.index(row.text(self.routed.by) or "") if self.routed else 0

    def _check_routes(self, rows: Iterable[Row]) -> None:
        """Raise BadData naming the rows whose column holds no route."""
        if self.routed is None:
            return
        by = self.routed.by
        bad = [
            f"row {row.index}: {by} is {shorten(value)}, which {outside(self.routes)}"
            for row in rows
            if (value := row.text(by)) not in self.routes
        ]
        if bad:
            raise BadData(
                first_of(bad),
                hint="teacher.weights.routes must have every value",
                path=("teacher", "weights", "by"),
            )

    def check(self, steps: int) -> int:
        """Render every prompt that the run will use; returns the longest sequence, completion included, in tokens.

        Raises BadData naming the rows that cannot be used.
        """
        training = self.spec.training
        visited = self.train
        self.visited = min(steps * training.prompts_per_step, len(visited))
        if steps * training.prompts_per_step < len(visited):
            visited = [row for step in range(steps) for row in self.batch_rows(step)]
        with blaming("model", "path"):
            check_repeatable(self.prompter, visited[:4])
        self.spelled = list(self._spelled(visited))
        with blaming("data"):
            longest = self._render_prompts(visited)
            self.completions = self._own_completions(visited)
        self._check_routes(visited)
        _check_rewards(self.train_rewards, visited)
        self._try_rewards(self.train_rewards, visited)
        room = [self.spec.rollout.max_new_tokens]
        if self.spec.evaluation:
            for name, suite in self.spec.evaluation.suites.items():
                with blaming("evaluation", "suites", name, "data"):
                    longest = max(longest, self._render_prompts(self.suites[name]))
                _check_rewards(self.rewards[name], self.suites[name])
                self._try_rewards(self.rewards[name], self.suites[name])
                self._check_routes(self.suites[name][: suite.loss_prompts])
                room.append(suite.max_new_tokens or 0)
        return longest + max(room)

    def _spelled(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
        """The rows whose text spells a control token that the run takes for one, each with the first."""
        if self.prompter.keep_text:
            return
        for row in rows:
            columns = (row.text(name) or "" for name in self._shown_columns)
            texts = (*(m["content"] for m in row.messages), *columns)
            if name := next(filter(None, map(self.prompter.control.find, texts)), None):
                yield row, name

    def _own_completions(self, rows: Iterable[Row]) -> Completions | None:
        """How many of the data set's completions fit; None where it is not asked for any."""
        column = completion_column(self.spec.rollout.sampled_by)
        if column is None:
            return None
        end = -1 if self.turn_end is None else self.turn_end
        different = {id(row): row for row in rows}.values()
        ids = [self.prompter.completion_ids(row.text(column) or "", end) for row in different]
        self._check_ids(
            (row, f"the {column}", own) for row, own in zip(different, ids, strict=True)
        )
        lengths = {row.index: len(own) for row, own in zip(different, ids, strict=True)}
        limit = self.spec.rollout.max_new_tokens
        cut = tuple(index for index, length in lengths.items() if length > limit)
        return Completions(
            column=column, rows=len(lengths), cut=cut, longest=max(lengths.values(), default=0)
        )

    def _try_rewards(self, rewards: Mapping[str, Scorer], rows: Sequence[Row]) -> None:
        """Judge an empty completion: of every row where right answers are only compared, of the first where a user's
        function or a process judges; a reward model was tried when it was opened.  Raises BadData as `score` does.
        """
        for name, scorer in rewards.items():
            kinds = {type(part) for part in self._leaves(name)}
            tried = rows if kinds <= COMPARED else rows[:1]
            if RewardModel not in kinds:
                score({name: scorer}, [""] * len(tried), tried)

    def _leaves(self, name: str) -> Iterator[Reward]:
        """A reward, or what it sums over."""
        reward = self.spec.rewards[name]
        if not isinstance(reward, WeightedReward):
            yield reward
            return
        for part in reward.parts:
            yield from self._leaves(part)

    def _check_ids(self, texts: Iterable[tuple[Row, str, Sequence[int]]]) -> None:
        """Raise BadData naming the rows with an id that a model has no embedding for.  texts: row, what it is, ids."""
        faults: list[str] = []
        for row, what, ids in texts:
            self.largest_id = max(self.largest_id, *ids, 0)
            fault = self.known and self.known.fault(self.tokenizer, f"row {row.index}: {what}", ids)
            faults += [fault] if fault else []
        if faults:
            raise BadData(first_of(list(dict.fromkeys(faults))), hint=HINT)

    def _render_prompts(self, rows: list[Row]) -> int:
        """Render the rows' prompts and keep them; the longest in tokens."""
        spec = self.spec
        sees = spec.teacher.sees if spec.teacher else None
        prompts = check_prompts(self.prompter, rows, sees, spec.rollout.max_prompt_tokens)
        for row, (student, teacher) in zip(rows, prompts, strict=True):
            self._student[id(row)] = student
            self._teacher[id(row)] = teacher.ids if teacher and spec.teacher else None
        self._check_ids(
            (row, f"the {who}'s prompt", ids)
            for row, (student, teacher) in zip(rows, prompts, strict=True)
            for who, ids in (
                ("student", student),
                ("teacher", teacher.ids if teacher and spec.teacher else ()),
            )
        )
        sampled_by = spec.rollout.sampled_by
        if isinstance(sampled_by, TeacherSamples) and sampled_by.prompt == "teacher":
            bad = [
                f"row {row.index}: a slot is empty" for row in rows if self.teacher_ids(row) is None
            ]
            if bad:
                raise BadData(
                    first_of(bad), hint="the teacher samples, so every row needs its context"
                )
        longest = max(max(len(s), len(t.ids) if t else 0) for s, t in prompts)
        if sees is None or not self.needs_rollouts_for_context:
            return longest
        slots = sum(isinstance(slot, OfRollouts) for slot in sees.slots.values())
        most = longest + CONTEXT_TEXT + slots * spec.rollout.max_new_tokens
        return max(longest, min(most, sees.max_prompt_tokens or most))


def _digest(prompts: Iterable[Sequence[int] | None]) -> str:
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(json.dumps(ids).encode() + b"\n")
    return digest.hexdigest()


def _check_rewards(rewards: Mapping[str, Scorer], rows: Iterable[Row]) -> None:
    """Raise BadData naming the rows without a right answer, or tests, that these rewards can read."""
    bad: dict[str, str] = {}  # what is wrong → the first reward that says so
    for row in rows:
        for name, scorer in rewards.items():
            try:
                scorer.check_row(row)
            except BadData as error:
                bad.setdefault(error.message, name)
    if bad:
        raise BadData(first_of(list(bad)), path=("rewards", next(iter(bad.values()))))


def longest_sequence(spec: ExperimentSpec, base: Path, located: str) -> int:
    """The longest prompt and completion of a run of the spec, in tokens."""
    data = RunData(spec, base, load_tokenizer(spec.model, located))
    plan = make_plan(spec, machine_for(spec), None, rows=len(data.train))
    assert plan.steps is not None
    return data.check(plan.steps)
