"""Samples trajectories turn by turn, all of a batch together.

A trajectory is one completion of several turns.  What was sampled is never encoded again: a turn is sampled from the prompt
and all tokens so far, the environment's reply is appended as an observation, and the next turn follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from attrs import define, evolve, field, frozen

from sdkit.batches import Completion, RolloutBackend, Row, SamplingParams, SamplingRequest
from sdkit.data.observations import ObservationEncoder
from sdkit.distributed import collectives
from sdkit.environments.interface import Environment, Opened, Reply
from sdkit.environments.routed import route_of
from sdkit.language import specs
from sdkit.language.errors import BadData
from sdkit.seeds import derive
from sdkit.spans import ASSISTANT, FINISHED, Ending, Span, Turn
from sdkit.stdout import Advance, no_progress


@frozen(eq=False, kw_only=True)
class TrajectorySampler:
    """Lets a backend and an environment take turns."""

    environment: Environment
    spec: specs.Environment
    observations: ObservationEncoder
    end_ids: Collection[int]  # that end a turn
    decode: Callable[[Sequence[int]], str]  # without special tokens
    # The prompt of a request and its row, with a text that the environment appends.
    opened_prompt: Callable[[SamplingRequest, Row, str], tuple[int, ...]]

    def sample(
        self,
        backend: RolloutBackend,
        requests: Sequence[SamplingRequest],
        rows: Sequence[Row],
        sampling: SamplingParams,
        advance: Advance = no_progress,
    ) -> list[Completion]:
        """Return one trajectory per request, in order; `rows` are the requests' rows.

        `advance` receives how many have ended, after each turn.  Every rank samples equally often, as sharded weights and
        servers need.  Raises BadData as the environment does.
        """
        opened = self.environment.open([(row, r.environment_seed) for row, r in zip(rows, requests, strict=True)])
        _check_openings(rows, requests, opened)
        starts = zip(requests, rows, opened, strict=True)
        trajectories = [self._begin(*parts, sampling.max_new_tokens) for parts in starts]
        for turn in itertools.count(1):
            active = [t for t in trajectories if t.ending is None]
            if not collectives.all_reduce_max(len(active)):
                break
            sampled = backend.sample([t.next_request(turn) for t in active], sampling)
            for trajectory, completion in zip(active, sampled, strict=True):
                trajectory.add_turn(turn, completion)
            replies = self.environment.reply([(t.handle, self._turn(t)) for t in active])
            for trajectory, reply in zip(active, replies, strict=True):
                trajectory.add_reply(turn, reply, self)
            advance(sum(t.ending is not None for t in active))
        rewards = self.environment.end([t.handle for t in trajectories])
        self._check_errors(trajectories)
        return [trajectory.completion(reward) for trajectory, reward in zip(trajectories, rewards, strict=True)]

    def _begin(self, request: SamplingRequest, row: Row, opened: Opened, max_new_tokens: int) -> _Trajectory:
        """A trajectory before its first turn; one that has an error ends after it."""
        begun = _Trajectory(
            request=request,
            handle=opened.handle,
            prompt_ids=request.prompt_ids,
            row=row.index,
            spec=route_of(self.spec, row),
            max_new_tokens=max_new_tokens,
            error=opened.error,
        )
        if opened.text and not opened.error:
            try:
                begun.prompt_ids, begun.opening = self.opened_prompt(request, row, opened.text), opened.text
            except BadData as error:
                begun.error = error.message
        return begun

    def _turn(self, trajectory: _Trajectory) -> Turn:
        """The last turn as the environment reads it; one that was cut calls no tool."""
        ids, finished = trajectory.last_turn, trajectory.ending is None
        calls, fault = (), None
        if finished and (format := self.observations.prompter.calls):
            before = (*trajectory.prompt_ids, *trajectory.ids[: -len(ids) or None])
            calls, fault = format.read(self.observations.prompter.tokenizer, before, ids)
        return Turn(text=self.decode(ids), calls=calls, fault=fault, finished=finished)

    def _check_errors(self, trajectories: Sequence[_Trajectory]) -> None:
        """Raise BadData if an environment's errors ended more of its trajectories, on all ranks, than it may."""
        for path, spec in specs.environments_of(self.spec, specs.BaseEnvironment):
            own = [t for t in trajectories if t.spec is spec]
            errors = [f"row {t.row}: {t.error}" for t in own if t.error]
            failed, total = collectives.all_reduce_sum(torch.tensor([len(errors), len(own)])).tolist()
            if failed > spec.error_limit * total:
                first = f": {errors[0]}" if errors else ""
                raise BadData(
                    f"{failed} of {total} trajectories ended by an error of the environment{first}",
                    path=path,
                    hint=f"mend the environment, or raise max_error_share, which is {spec.error_limit:g}",
                )


@define(eq=False)
class _Trajectory:
    """A trajectory while it grows."""

    request: SamplingRequest
    handle: Any  # what stands for it in the environment
    prompt_ids: tuple[int, ...]  # with what the environment appended
    row: int
    spec: specs.OneEnvironment
    max_new_tokens: int  # of a turn
    opening: str | None = None
    ids: list[int] = field(factory=list)
    logprobs: list[float] | None = field(factory=list)  # 0 for observations; None: the backend gives none
    spans: list[Span] = field(factory=list)
    turn_rewards: list[float] = field(factory=list)
    ending: Ending | None = None
    error: str | None = None

    @property
    def last_turn(self) -> list[int]:
        """The ids of the last turn, which no observation follows yet."""
        return self.ids[self.spans[-1].start :]

    def next_request(self, turn: int) -> SamplingRequest:
        """Return the request of a turn; the first one is that of a completion of one turn."""
        if turn == 1:
            return evolve(self.request, prompt_ids=self.prompt_ids)
        prompt_ids = (*self.prompt_ids, *self.ids)
        return SamplingRequest(prompt_ids=prompt_ids, seed=derive(self.request.seed, "turn", turn))

    @property
    def max_tokens(self) -> int:
        return self.spec.longest(self.max_new_tokens)

    def add_turn(self, turn: int, sampled: Completion) -> None:
        ids = sampled.ids[: self.max_tokens - len(self.ids)]
        self._append(ASSISTANT, turn, ids, sampled.logprobs, None)
        if len(ids) < len(sampled.ids):
            self.ending = "max_tokens"
        elif not sampled.finished:
            self.ending = "length"

    def add_reply(self, turn: int, reply: Reply, sampler: TrajectorySampler) -> None:
        """Note the turn's reward, and append the observation if another turn follows."""
        if reply.reward is not None:
            self.turn_rewards.append(reply.reward)
        self.error = self.error or reply.error
        if self.error:
            self.ending = "environment_error"
        if self.ending:
            return
        if not reply.messages:
            self.ending = reply.ending or "done"
        elif turn == self.spec.max_turns:
            self.ending = "max_turns"
        else:
            closed = bool(self.ids) and self.ids[-1] in sampler.end_ids
            limit = self.spec.max_observation_tokens
            parts = sampler.observations.encode(reply.messages, closed=closed, limit=limit)
            if len(self.ids) + sum(len(part.ids) for part in parts) < self.max_tokens:
                for part in parts:
                    self._append(part.role, turn, part.ids, (0.0,) * len(part.ids), part.body)
            else:
                self.ending = "max_tokens"

    def _append(
        self, role: str, turn: int, ids: Sequence[int], logprobs: Sequence[float] | None, body: tuple[int, int] | None
    ) -> None:
        start = len(self.ids)
        self.ids += ids
        self.logprobs = None if self.logprobs is None or logprobs is None else [*self.logprobs, *logprobs[: len(ids)]]
        within = body and (start + body[0], start + body[1])
        self.spans.append(Span(role=role, turn=turn, start=start, end=len(self.ids), body=within))

    def completion(self, reward: float | None) -> Completion:
        return Completion(
            ids=tuple(self.ids),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            finished=self.ending in FINISHED,
            spans=tuple(self.spans),
            ending=self.ending,
            turn_rewards=tuple(self.turn_rewards),
            reward=reward,
            opening=self.opening,
        )


def _check_openings(rows: Sequence[Row], requests: Sequence[SamplingRequest], opened: Sequence[Opened]) -> None:
    """Raise BadData unless all trajectories of a prompt begin with the same text."""
    texts: dict[tuple[int, int], str | None] = {}
    for row, request, each in zip(rows, requests, opened, strict=True):
        if not each.error and texts.setdefault((row.index, request.environment_seed), each.text) != each.text:
            raise BadData(
                f"row {row.index}: reset returned different texts for completions of the same prompt",
                hint="draw from Python's random alone, or from a generator with the seed that reset gets",
                path=("environment",),
            )
