"""Rows, prompts and scores of a run: all that can be checked before a weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdkit.batches import Row
from sdkit.components.data import drop_overlap, fingerprint, load_rows, positions
from sdkit.components.prompts import Prompter
from sdkit.components.rewards import open_reward
from sdkit.problems import BadData
from sdkit.specs import (
    DatasetSamples,
    ExperimentSpec,
    ReasoningGymReward,
    ReasoningGymSource,
    Suite,
    TeacherSamples,
)

Scorer = Callable[[str, Row], float]


class Data:
    """Training rows, held-out rows, their prompts as token ids, and the rewards of each suite."""

    def __init__(self, spec: ExperimentSpec, base: Path, tokenizer: Any) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.prompter = Prompter(tokenizer, dict(spec.model.chat_template_options))
        suites = spec.evaluation.suites if spec.evaluation else {}
        sampled_by = spec.rollout.sampled_by
        needed = (sampled_by.column,) if isinstance(sampled_by, DatasetSamples) else ()
        self.suites: dict[str, list[Row]] = {
            name: load_rows(suite.data, base, spec.data.columns) for name, suite in suites.items()
        }
        rows = load_rows(spec.data, base, needed=needed)
        held_out = [row for rows_of in self.suites.values() for row in rows_of]
        self.train, self.dropped = drop_overlap(rows, held_out)
        if not self.train:
            raise BadData("every training row is held out too, so nothing is left to train on")
        self.rewards: dict[str, dict[str, Scorer]] = {
            name: self._rewards(suite, base) for name, suite in suites.items()
        }
        self.train_rewards = self._applicable(base)
        self._student: dict[int, tuple[int, ...]] = {}
        self._teacher: dict[int, tuple[int, ...] | None] = {}

    def _rewards(self, suite: Suite, base: Path) -> dict[str, Scorer]:
        source = suite.data.source
        task = source if isinstance(source, ReasoningGymSource) else None
        return {
            name: open_reward(self.spec.rewards[name], base, task)
            for name in (suite.score, *suite.also)
        }

    def _applicable(self, base: Path) -> dict[str, Scorer]:
        """The rewards that training rows can be scored with too: for the curves, not for the gradient."""
        source = self.spec.data.source
        task = source if isinstance(source, ReasoningGymSource) else None
        columns = self.spec.data.columns or {}
        return {
            name: open_reward(reward, base, task)
            for name, reward in self.spec.rewards.items()
            if getattr(reward, "answer", None) in (None, *columns)
            and (task is not None or not isinstance(reward, ReasoningGymReward))
        }

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the training rows and of each suite."""
        suites = {f"suite {name}": fingerprint(rows) for name, rows in self.suites.items()}
        return {"train": fingerprint(self.train), **suites}

    def take(self, step: int) -> list[Row]:
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

    def check(self, steps: int) -> int:
        """Render every prompt that the run will use; returns the longest sequence, completion included, in tokens.

        Raises BadData naming the rows that cannot be used.
        """
        training = self.spec.training
        visited = self.train
        if steps * training.prompts_per_step < len(visited):
            visited = [row for step in range(steps) for row in self.take(step)]
        longest = max(self._longest(visited, "training"), 1)
        room = [self.spec.rollout.max_new_tokens]
        if self.spec.evaluation:
            for name, suite in self.spec.evaluation.suites.items():
                longest = max(longest, self._longest(self.suites[name], f"suite {name}"))
                room.append(suite.max_new_tokens or 0)
        return longest + max(room)

    def _longest(self, rows: list[Row], what: str) -> int:
        limit = self.spec.rollout.max_prompt_tokens
        sampled_by = self.spec.rollout.sampled_by
        teacher_samples = isinstance(sampled_by, TeacherSamples) and sampled_by.prompt == "teacher"
        longest, bad = 0, []
        for row in rows:
            own, others = self.student_ids(row), self.teacher_ids(row)
            longest = max(longest, len(own), len(others or ()))
            if limit is not None and len(own) > limit:
                bad.append(
                    f"{what} row {row.index}: prompt of {len(own)} tokens, more than {limit}"
                )
            if teacher_samples and others is None:
                bad.append(
                    f"{what} row {row.index}: no teacher prompt to sample from (a slot is empty)"
                )
        if bad:
            shown = bad[:20] + ([f"… and {len(bad) - 20} more"] if len(bad) > 20 else [])
            raise BadData(
                "\n".join(shown),
                hint="shorten or drop these rows, or raise rollout.max_prompt_tokens",
            )
        return longest
