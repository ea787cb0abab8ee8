"""Samples trajectories turn by turn, all of a batch together.

A trajectory is one completion of several turns.  What was sampled is never encoded again: a turn is sampled from the prompt
and all tokens so far, the environment's reply is appended as an observation, and the next turn follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from attrs import define, field, frozen

from sdkit.batches import Completion, RolloutBackend, Row, SamplingParams, SamplingRequest
from sdkit.data.observations import ObservationEncoder
from sdkit.distributed import collectives
from sdkit.environments.interface import Environment, Reply
from sdkit.language.errors import BadData
from sdkit.seeds import derive
from sdkit.spans import ASSISTANT, FINISHED, Ending, Span, Turn
from sdkit.stdout import Advance, no_progress


@frozen(eq=False, kw_only=True)
class TrajectorySampler:
    """Lets a backend and an environment take turns."""

    environment: Environment
    observations: ObservationEncoder
    max_tokens: int  # of a trajectory
    error_limit: float  # share of trajectories that may end by an error
    end_ids: Collection[int]  # that end a turn
    decode: Callable[[Sequence[int]], str]  # without special tokens

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
        seeds = [derive(request.seed, "environment") for request in requests]
        opened = self.environment.open(list(zip(rows, seeds, strict=True)))
        trajectories = [_Trajectory(request, each.handle) for request, each in zip(requests, opened, strict=True)]
        for turn in range(1, self.environment.max_turns + 1):
            active = [t for t in trajectories if t.ending is None]
            if not collectives.all_reduce_max(len(active)):
                break
            sampled = backend.sample([t.next_request(turn) for t in active], sampling)
            for trajectory, completion in zip(active, sampled, strict=True):
                trajectory.add_turn(turn, completion, self.max_tokens)
            replies = self.environment.reply([(t.handle, self._turn(t)) for t in active])
            for trajectory, reply in zip(active, replies, strict=True):
                trajectory.add_reply(turn, reply, self)
            advance(sum(t.ending is not None for t in active))
        rewards = self.environment.end([t.handle for t in trajectories])
        self._check_errors(trajectories)
        return [trajectory.completion(reward) for trajectory, reward in zip(trajectories, rewards, strict=True)]

    def _turn(self, trajectory: _Trajectory) -> Turn:
        return Turn(text=self.decode(trajectory.last_turn), finished=trajectory.ending is None)

    def _check_errors(self, trajectories: Sequence[_Trajectory]) -> None:
        """Raise BadData if more than `error_limit` of the trajectories of all ranks ended by an error."""
        errors = [t.error for t in trajectories if t.error]
        failed, total = collectives.all_reduce_sum(torch.tensor([len(errors), len(trajectories)])).tolist()
        if failed > self.error_limit * total:
            first = f": {errors[0]}" if errors else ""
            raise BadData(
                f"{failed} of {total} trajectories ended by an error of the environment{first}",
                path=("environment",),
                hint=f"mend the environment, or raise max_error_share, which is {self.error_limit:g}",
            )


@define(eq=False)
class _Trajectory:
    """A trajectory while it grows."""

    request: SamplingRequest
    handle: Any  # what stands for it in the environment
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
            return self.request
        prompt_ids = (*self.request.prompt_ids, *self.ids)
        return SamplingRequest(prompt_ids=prompt_ids, seed=derive(self.request.seed, "turn", turn))

    def add_turn(self, turn: int, sampled: Completion, max_tokens: int) -> None:
        ids = sampled.ids[: max_tokens - len(self.ids)]
        self._append(ASSISTANT, turn, ids, sampled.logprobs, None)
        if len(ids) < len(sampled.ids):
            self.ending = "max_tokens"
        elif not sampled.finished:
            self.ending = "length"

    def add_reply(self, turn: int, reply: Reply, sampler: TrajectorySampler) -> None:
        """Note the turn's reward, and append the observation if another turn follows."""
        if reply.reward is not None:
            self.turn_rewards.append(reply.reward)
        if reply.error:
            self.ending, self.error = "environment_error", reply.error
        if self.ending:
            return
        if not reply.messages:
            self.ending = reply.ending or "done"
        elif turn == sampler.environment.max_turns:
            self.ending = "max_turns"
        else:
            closed = bool(self.ids) and self.ids[-1] in sampler.end_ids
            parts = sampler.observations.encode(reply.messages, closed=closed)
            if len(self.ids) + sum(len(part.ids) for part in parts) < sampler.max_tokens:
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
        )
