"""Loads and checks the rows, prompts and rewards of a run, before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sdkit.batches import GroupOutcome, Row, SamplingRequest, TurnOutcome
from sdkit.data.logged_chats import CompletionEncoder, control_text, encode_all
from sdkit.data.prompts import FIRST_TURN, Prompter, TeacherPrompt, check_prompts, check_repeatable
from sdkit.data.rows import drop_duplicates, drop_overlap, fingerprint, load_rows, positions
from sdkit.data.thinking import answer_text
from sdkit.data.turn_ends import end_token
from sdkit.environments import open_environments
from sdkit.environments.interface import Environment
from sdkit.environments.rows import check_routes, check_rows
from sdkit.environments.tool_prompts import ObservationEncoders, open_encoders
from sdkit.language import columns, specs
from sdkit.language.errors import BadData, blaming, first_of, outside, shorten
from sdkit.language.panel import panel_suites
from sdkit.language.tasksets import data_in_full
from sdkit.language.user_tools import opens_prompts
from sdkit.models.embedding_ids import HINT, KnownIds
from sdkit.models.loading import load_tokenizer
from sdkit.plan.machine import machine_for
from sdkit.plan.plan import make_plan
from sdkit.plan.teacher_rows import sampled_context_tokens
from sdkit.rewards.scoring import Scorer, open_rewards
from sdkit.train.dataset_completions import DatasetCompletions, measure_completions
from sdkit.train.demonstrations import check_demonstrations
from sdkit.train.reward_checks import check_rewards
from sdkit.user_code.divergences import open_user_divergences
from sdkit.user_code.token_weights import open_user_weights

TEMPLATE_TOKENS = 128
"""Tokens reserved for a template's own text if the context is known only after sampling."""


class RunData:
    """Training rows, held-out rows, their prompts as token ids, and the rewards of each suite."""

    def __init__(
        self,
        spec: specs.ExperimentSpec,
        base: Path,
        tokenizer: Any,
        *,
        now: datetime | None = None,
        known: KnownIds | None = None,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.known_ids = known  # None: prompts may contain any id
        self.longest_prompt = 0  # tokens for which `check` leaves room
        self.largest_id = 0  # in the prompts and completions that `check` rendered
        with blaming("model", "chat_template_kwargs"):
            self.prompter = Prompter(
                tokenizer,
                dict(spec.model.chat_template_kwargs),
                now=now,
                keep_text=spec.model.control_tokens == "text",
            )
        weights = spec.teacher and spec.teacher.weights
        self.needs_rollouts_for_context = any(isinstance(slot, specs.OfRollouts) for slot in spec.slots.values())
        self.context_by_turn = spec.sees is not None and spec.sees.by_turn
        self.strips_thinking = any(getattr(slot, "strip_thinking", False) for _, slot in spec.placed_slots())
        self.routed = weights if isinstance(weights, specs.RoutedWeights) else None
        self.routes = list(self.routed.routes) if self.routed else []
        self.reward = columns.training_reward(spec)
        self.opens_prompts = opens_prompts(spec.environment, base)  # whether an environment may append to a prompt
        self.turn_end = end_token(tokenizer, self.prompter.options)
        self.completions: DatasetCompletions | None = None
        # Columns that tell rows with the same prompt apart, in alphabetical order.
        self.task_columns = sorted(spec.environment.task_columns(spec.data.columns or ())) if spec.environment else []
        self.suites: dict[str, list[Row]] = {}
        # By suite: held-out rows dropped because an earlier row of the suite has the same prompt.
        self.dropped_repeats: dict[str, int] = {}
        self.panel = {part.name: part for part in panel_suites(spec)}
        for name, suite in spec.suites.items():
            with blaming("evaluation", "suites", name, "data"):
                texts = columns.text_columns(spec, suite)
                self.suites[name], self.dropped_repeats[name] = self._load_suite(suite, texts, base)
        for name, part in self.panel.items():
            with blaming(*part.path):
                texts = set() if part.is_packaged else columns.text_columns(spec, part.suite)
                self.suites[name], self.dropped_repeats[name] = self._load_suite(part.suite, texts, base)
        self.train, self.dropped = self._load_training_rows(base)
        self.rewards = {
            name: self._open_rewards(spec.rewards, columns.suite_rewards(spec, suite), suite.data, base)
            for name, suite in spec.suites.items()
        }
        for name, part in self.panel.items():
            self.rewards[name] = self._open_rewards(part.rewards, part.scores, part.suite.data, base)
        # Every reward that can score training rows: for metrics, whether or not the loss uses it.
        self.train_rewards = self._open_rewards(spec.rewards, columns.training_rewards(spec), spec.data, base)
        self.environments = self.open_environments(base)
        self.plain_prompter = self.prompter  # of the panel, which has no environment and no tools
        self.observations: ObservationEncoders | None = None
        if spec.environment:
            self._show_tools(spec.environment)
        self.user_weights = open_user_weights(spec.losses, base)  # by term
        self.user_divergences = open_user_divergences(spec.losses, base)  # by term
        self.rows_used = 0  # number of training rows that the run uses
        # Rows used that spell a control token, with the token.
        self.control_token_rows: list[tuple[Row, str]] = []
        self.cut_contexts: list[tuple[Row, int]] = []  # rows whose teacher's prompt is cut, with the tokens lost
        self._panel_rows = {id(row) for name in self.panel for row in self.suites[name]}
        self._student: dict[int, tuple[int, ...]] = {}
        self._teacher: dict[int, tuple[int, ...] | None] = {}
        self._opening: dict[int, str] = {}  # the thinking tag that a row's prompt leaves open

    def _show_tools(self, environment: specs.Environment) -> None:
        """Show the environment's tools in the prompts of the task, and prepare its observations."""
        opened = next(iter(self.environments.values()))
        try:
            self.observations = open_encoders(self.prompter, self.turn_end, environment, opened)
            self.prompter = self.observations.show_tools(self.prompter)
        except BaseException:
            self.close()
            raise

    @property
    def completion_encoder(self) -> CompletionEncoder:
        """The encoder of completions, and of demonstrated turns, that the data set has."""
        return CompletionEncoder(self.prompter, self.turn_end)

    def set_date(self, now: datetime) -> None:
        """Set the date that chat templates print."""
        with_tools = self.observations.prompters if self.observations else ()
        for prompter in (self.prompter, self.plain_prompter, *with_tools):
            prompter.now = now

    def open_environments(self, base: Path) -> Mapping[str | None, Environment]:
        """The environment of the training rows (None) and of each suite of the task, which asks its rewards as they are.

        Empty if the spec has none.
        """
        spec = self.spec.environment
        if spec is None:
            return {}
        with blaming("environment"):
            rewards = {None: self.train_rewards, **{name: self.rewards[name] for name in self.spec.suites}}
            data = {None: self.spec.data, **{name: suite.data for name, suite in self.spec.suites.items()}}
            data = {name: data_in_full(self.spec, each) for name, each in data.items()}
            return open_environments(spec, rewards, self.reward, base, data)

    def close(self) -> None:
        """End the processes of the environments."""
        for environment in set(self.environments.values()):
            environment.close()

    def _load_suite(self, suite: specs.HeldOutPrompts, texts: set[str], base: Path) -> tuple[list[Row], int]:
        """A suite's rows without repeated prompts, and the number of rows dropped."""
        rows = load_rows(data_in_full(self.spec, suite.data), base, texts=texts)
        return drop_duplicates(rows, self.task_columns)

    def _load_training_rows(self, base: Path) -> tuple[list[Row], int]:
        """The training rows without those held out in a suite or in the panel, and the number of rows dropped."""
        needed, texts = columns.required_columns(self.spec), columns.text_columns(self.spec, None)
        with blaming("data"):
            rows = load_rows(data_in_full(self.spec, self.spec.data), base, needed=needed, texts=texts)
        suites = {**self.spec.suites, **{name: part.suite for name, part in self.panel.items()}}
        held_out = [row for name, suite in suites.items() for row in self.suites[name] if suite.same_prompts == "drop"]
        kept, dropped = drop_overlap(rows, held_out, self.task_columns)
        if not kept:
            raise BadData("every training row is held out too, so nothing is left to train on", path=("data",))
        return kept, dropped

    def _open_rewards(
        self, rewards: Mapping[str, specs.Reward], names: Iterable[str], data: specs.DataSpec, base: Path
    ) -> dict[str, Scorer]:
        """Scorers of the named rewards, for rows of this data set."""
        task = data.source if isinstance(data.source, specs.ReasoningGymSource) else None
        return open_rewards(rewards, names, base, task, self._now)

    def _now(self) -> datetime:
        """The date that chat templates print; rank 0 sets it for all ranks after the rewards are opened."""
        return self.prompter.now

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the training rows and of each suite."""
        suites = {f"suite {name}": fingerprint(rows) for name, rows in self.suites.items()}
        return {"train": fingerprint(self.train), **suites}

    def prompt_fingerprints(self, count: int) -> dict[str, str]:
        """SHA-256 of the prompts of the first `count` training rows in the run's order, and of each suite's.

        Teacher prompts that depend on rollouts are not determined by a row and are left out.
        """
        training = self.spec.training
        order = positions(0, count, len(self.train), training.seed, self.spec.data.shuffle)
        parts = {"train": [self.train[i] for i in order]}
        parts |= {f"suite {name}": rows for name, rows in self.suites.items()}
        digests = {name: digest_of_prompts(map(self.student_ids, rows)) for name, rows in parts.items()}
        for name, rows in parts.items():
            if name.removeprefix("suite ") in self.panel:
                continue
            digests[f"{name} (teacher)"] = digest_of_prompts(map(self.teacher_ids, rows))
        return digests

    def batch_rows(self, step: int) -> list[Row]:
        """The rows of rollout batch number `step`: a pure function of step and seed."""
        training = self.spec.training
        size, shuffle = training.prompts_per_step, self.spec.data.shuffle
        chosen = positions(step * size, size, len(self.train), training.seed, shuffle)
        return [self.train[i] for i in chosen]

    def student_ids(self, row: Row, *, is_opened: bool = False) -> tuple[int, ...]:
        """The student's prompt, including the generation prompt; `is_opened`: of a row as its environment opened it."""
        if is_opened:
            return self.prompter.student_ids(row)
        if id(row) not in self._student:
            prompter = self.plain_prompter if id(row) in self._panel_rows else self.prompter
            self._student[id(row)] = prompter.student_ids(row)
        return self._student[id(row)]

    def teacher_ids(self, row: Row, *, is_opened: bool = False) -> tuple[int, ...] | None:
        """The teacher's prompt; None if there is no teacher or the row lacks something that the context requires."""
        if self.spec.teacher is None:
            return None
        if is_opened:
            prompt = self.prompter.teacher_ids(row, self.spec.teacher.sees)
            return prompt and prompt.ids
        if id(row) not in self._teacher:
            prompt = self.prompter.teacher_ids(row, self.spec.teacher.sees)
            self._teacher[id(row)] = None if prompt is None else prompt.ids
        return self._teacher[id(row)]

    def opened_prompt(
        self, request: SamplingRequest, row: Row, text: str, *, by_teacher: bool = False
    ) -> tuple[int, ...]:
        """The prompt of a request with a text that its environment appends.  Raises BadData if it is too long."""
        if by_teacher and self.needs_rollouts_for_context:
            return request.prompt_ids  # made for a rollout in the same environment, whose text it has
        opened = row.with_opening(text)
        student = self.student_ids(opened, is_opened=True)
        teacher = self.teacher_ids(opened, is_opened=True) or ()
        if self.known_ids:
            self.known_ids.check(
                self.tokenizer, f"row {row.index}: the prompt with reset's text", (*student, *teacher)
            )
        limit = self.spec.rollout.max_prompt_tokens
        if limit is None or len(student) > limit:
            allowed = "and rollout.max_prompt_tokens is not set" if limit is None else f"more than {limit}"
            raise BadData(f"row {row.index}: with reset's text the prompt has {len(student)} tokens, {allowed}")
        if len(teacher) > self.longest_prompt:
            message = f"row {row.index}: with reset's text the teacher's prompt has {len(teacher)} tokens"
            raise BadData(f"{message}, more than {self.longest_prompt}")
        return teacher if by_teacher and teacher else student

    def teacher_prompt(
        self, row: Row, evidence: GroupOutcome | None, turn: TurnOutcome = FIRST_TURN
    ) -> TeacherPrompt | None:
        """The teacher's prompt for one rollout, or one turn of it, given its group's outcome."""
        teacher = self.spec.teacher
        prompt = teacher and self.prompter.teacher_ids(row, teacher.sees, evidence, turn)
        if prompt and self.known_ids:
            self.known_ids.check(self.tokenizer, f"row {row.index}: the teacher's prompt", prompt.ids)
        return prompt

    def answer(self, row: Row, completion: Sequence[int]) -> str | None:
        """A completion's text without its thinking; None if no slot strips thinking."""
        if not self.strips_thinking:
            return None
        if id(row) not in self._opening:
            self._opening[id(row)] = self.prompter.opening(row)
        return answer_text(self.tokenizer, completion, self._opening[id(row)])

    def teacher_route(self, row: Row) -> int:
        """Index of the row's route in a routed teacher; 0 if the teacher is not routed."""
        return self.routes.index(row.text(self.routed.by) or "") if self.routed else 0

    def _check_routes(self, rows: Iterable[Row]) -> None:
        """Raise BadData naming the rows whose column names no route."""
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
                first_of(bad), hint="teacher.weights.routes must have every value", path=("teacher", "weights", "by")
            )

    def check(self, steps: int) -> int:
        """Render every prompt that the run will use; returns the longest sequence with its completion, in tokens.

        Raises BadData naming the rows that cannot be used.
        """
        training = self.spec.training
        rows = self.train
        self.rows_used = min(steps * training.prompts_per_step, len(rows))
        if steps * training.prompts_per_step < len(rows):
            rows = [row for step in range(steps) for row in self.batch_rows(step)]
        with blaming("model", "path"):
            check_repeatable(self.prompter, rows[:4])
        self.control_token_rows = list(self._find_control_tokens(rows))
        with blaming("data"):
            longest = self._render_prompts(rows)
            self.completions = self._dataset_completions(rows)
        with blaming("rollout", "sampled_by", "starts_with"):
            self._check_demonstrations(rows)
        self._check_routes(rows)
        check_rows(self.spec.environment, rows, data_in_full(self.spec, self.spec.data))
        check_routes(
            self.spec.environment, [*self.train, *(row for name in self.spec.suites for row in self.suites[name])]
        )
        check_rewards(self.spec.rewards, self.train_rewards, rows)
        longest_completion = self.spec.longest_completion()
        for name, suite in self.spec.suites.items():
            with blaming("evaluation", "suites", name, "data"):
                longest = max(longest, self._render_prompts(self.suites[name]))
            check_rewards(self.spec.rewards, self.rewards[name], self.suites[name])
            self._check_routes(self.suites[name][: suite.loss_prompts])
            with blaming("evaluation", "suites", name, "data"):
                check_rows(self.spec.environment, self.suites[name], data_in_full(self.spec, suite.data))
            longest_completion = max(longest_completion, self.spec.longest_completion(suite.max_new_tokens))
        self.longest_prompt = longest
        limits = (part.suite.max_new_tokens or 0 for part in self.panel.values())
        return max(longest, self._check_panel()) + max(longest_completion, *limits, 0)

    def _check_panel(self) -> int:
        """Render the prompts of the panel, which only the student sees; returns the length of the longest in tokens."""
        longest = 0
        for name, part in self.panel.items():
            rows = self.suites[name]
            with blaming(*part.path):
                self._check_ids((row, "the student's prompt", self.student_ids(row)) for row in rows)
            check_rewards(part.rewards, self.rewards[name], rows)
            longest = max(longest, *(len(self.student_ids(row)) for row in rows))
        return longest

    def _find_control_tokens(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
        """Yields the rows whose text spells a control token that the tokenizer would encode as one, each with its first."""
        if self.prompter.keep_text:
            return
        for row in rows:
            shown = (control_text(row, name) for name in columns.shown_columns(self.spec))
            texts = (*(m["content"] for m in row.messages), *shown)
            if name := next(filter(None, map(self.prompter.control.find, texts)), None):
                yield row, name

    def _dataset_completions(self, rows: Iterable[Row]) -> DatasetCompletions | None:
        """Lengths of the data set's completions; None if the run samples its own."""
        column = self.spec.rollout.sampled_by.completion_column
        if column is None:
            return None
        completions = encode_all(self.completion_encoder, {id(row): row for row in rows}.values(), column)
        self._check_ids((row, f"the {column}", ids) for row, ids in completions)
        lengths = {row.index: len(ids) for row, ids in completions}
        return measure_completions(column, lengths, self.spec.rollout.max_new_tokens)

    def _check_demonstrations(self, rows: Iterable[Row]) -> None:
        """Raise BadData naming the rows whose demonstration no trajectory can start with."""
        rollout = self.spec.rollout
        if rollout.starts_with:
            column, unique = rollout.starts_with.column, {id(row): row for row in rows}.values()
            turns = check_demonstrations(self.completion_encoder, column, unique, rollout.max_new_tokens)
            self._check_ids((row, f"the {column}", ids) for row, ids in turns)

    def _check_ids(self, texts: Iterable[tuple[Row, str, Sequence[int]]]) -> None:
        """Raise BadData naming the rows with an id that a model has no embedding for.  texts: row, description, ids."""
        faults: list[str] = []
        for row, what, ids in texts:
            self.largest_id = max(self.largest_id, *ids, 0)
            fault = self.known_ids and self.known_ids.fault(self.tokenizer, f"row {row.index}: {what}", ids)
            faults += [fault] if fault else []
        if faults:
            raise BadData(first_of(list(dict.fromkeys(faults))), hint=HINT)

    def _render_prompts(self, rows: list[Row]) -> int:
        """Render and store the rows' prompts; returns the length of the longest in tokens."""
        spec = self.spec
        sees = spec.sees
        prompts = check_prompts(self.prompter, rows, sees, spec.rollout.max_prompt_tokens)
        for row, (student, teacher) in zip(rows, prompts, strict=True):
            self._student[id(row)] = student
            self._teacher[id(row)] = teacher.ids if teacher and spec.teacher else None
            if teacher and teacher.cut_tokens:
                self.cut_contexts.append((row, teacher.cut_tokens))
        self._check_ids(
            (row, f"the {who}'s prompt", ids)
            for row, (student, teacher) in zip(rows, prompts, strict=True)
            for who, ids in (("student", student), ("teacher", teacher.ids if teacher and spec.teacher else ()))
        )
        sampled_by = spec.rollout.sampled_by
        if isinstance(sampled_by, specs.TeacherSamples) and sampled_by.prompt == "teacher":
            bad = [f"row {row.index}: a slot is empty" for row in rows if self.teacher_ids(row) is None]
            if bad:
                hint = "the teacher samples, so every row needs its context"
                raise BadData(first_of(bad), hint=hint)
        longest = max(max(len(s), len(t.ids) if t else 0) for s, t in prompts)
        limit = spec.rollout.max_prompt_tokens
        if limit is not None and spec.environment and self.opens_prompts:
            longest += limit - min(len(s) for s, _ in prompts)  # what the environment may append, to both prompts
        if sees is None or not self.needs_rollouts_for_context:
            return longest
        upper_bound = longest + TEMPLATE_TOKENS + sampled_context_tokens(spec)
        return max(longest, min(upper_bound, sees.max_prompt_tokens or upper_bound))


def digest_of_prompts(prompts: Iterable[Sequence[int] | None]) -> str:
    """SHA-256 of prompts as token ids, in order."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(json.dumps(ids).encode() + b"\n")
    return digest.hexdigest()


def longest_sequence(spec: specs.ExperimentSpec, base: Path, located: str) -> int:
    """Length of the longest prompt with its completion in a run of the spec, in tokens."""
    return checked_data(spec, base, located)[1]


def checked_data(
    spec: specs.ExperimentSpec, base: Path, located: str, known: KnownIds | None = None
) -> tuple[RunData, int]:
    """The data of a run of the spec, checked as the run would, and its longest prompt with completion in tokens."""
    with blaming("model", "path"):
        tokenizer = load_tokenizer(spec.model, located)
    data = RunData(spec, base, tokenizer, known=known)
    plan = make_plan(spec, machine_for(spec), None, rows=len(data.train))
    assert plan.steps is not None
    return data, data.check(plan.steps)
