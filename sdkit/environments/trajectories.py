"""Samples trajectories turn by turn, all of a batch together; `continuous` samples each at its own pace.

A trajectory is one completion of several turns.  What was sampled is never encoded again: a turn is sampled from the prompt
and all tokens so far, the environment's reply is appended as an observation, and the next turn follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from attrs import define, evolve, field, frozen

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.data.observations import ObservationEncoder
from sdkit.distributed import collectives
from sdkit.environments.interface import Environment, Reply
from sdkit.language.errors import BadData
from sdkit.seeds import derive
from sdkit.spans import ASSISTANT, FINISHED, Ending, Span, Turn
from sdkit.stdout import Advance, no_progress


class TurnSampler(Protocol):
    """What samples turns: a rollout backend, or the rollout servers with the weights of one batch."""

    def sample(self, requests: Sequence[SamplingRequest], sampling: SamplingParams, /) -> list[Completion]:
        """Returns one completion per request, in order."""
        ...


@frozen(eq=False, kw_only=True)
class TrajectorySampler:
    """Lets a backend and an environment take turns."""

    environment: Environment
    observations: ObservationEncoder
    max_tokens: int  # of a trajectory
    max_seconds: float | None = None  # of the environment's calls, after which no turn follows
    error_limit: float  # share of trajectories that may end by an error
    end_ids: Collection[int]  # that end a turn
    decode: Callable[[Sequence[int]], str]  # without special tokens
    all_ranks: bool = False  # whether this rank samples the trajectories of all ranks

    def sample(
        self,
        backend: TurnSampler,
        requests: Sequence[SamplingRequest],
        rows: Sequence[Row],
        sampling: SamplingParams,
        advance: Advance = no_progress,
    ) -> list[Completion]:
        """Return one trajectory per request, in order; `rows` are the requests' rows.

        `advance` receives how many have ended, after each turn.  Every rank samples equally often, as sharded weights and
        servers need.  Raises BadData as the environment does.
        """
        trajectories = self.open(requests, rows)
        for _ in range(self.environment.max_turns):
            active = [t for t in trajectories if t.ending is None]
            if not (len(active) if self.all_ranks else collectives.all_reduce_max(len(active))):
                break
            asked = [self.request(t, sampling) for t in active]
            for trajectory, request, completion in zip(active, asked, backend.sample(asked, sampling), strict=True):
                trajectory.add_turn(request, completion)
            replies = self.environment.reply([(t.handle, self.turn(t)) for t in active])
            for trajectory, reply in zip(active, replies, strict=True):
                trajectory.add_reply(reply, self)
            advance(sum(t.ending is not None for t in active))
        return self.end(trajectories)

    def open(self, requests: Sequence[SamplingRequest], rows: Sequence[Row]) -> list[Trajectory]:
        """Return a new trajectory for each request."""
        seeds = [derive(request.seed, "environment") for request in requests]
        opened = self.environment.open(list(zip(rows, seeds, strict=True)))
        return [Trajectory(request, each.handle) for request, each in zip(requests, opened, strict=True)]

    def end(self, trajectories: Sequence[Trajectory]) -> list[Completion]:
        """End the trajectories in the environment, and return them.  Raises BadData if too many ended by an error."""
        rewards = self.environment.end([t.handle for t in trajectories])
        self._check_errors(trajectories)
        return [trajectory.completion(reward) for trajectory, reward in zip(trajectories, rewards, strict=True)]

    def request(self, trajectory: Trajectory, sampling: SamplingParams) -> SamplingRequest:
        """Return the request of the next turn, for at most as many tokens as the trajectory has left."""
        left = self.max_tokens - len(trajectory.ids)
        return evolve(trajectory.next_request(), max_new_tokens=left if left < sampling.max_new_tokens else None)

    def turn(self, trajectory: Trajectory) -> Turn:
        """Return the last turn as the environment reads it."""
        return Turn(text=self.decode(trajectory.last_turn), finished=trajectory.ending is None)

    def _check_errors(self, trajectories: Sequence[Trajectory]) -> None:
        """Raise BadData if more than `error_limit` of the trajectories of all ranks ended by an error."""
        errors = [t.error for t in trajectories if t.error]
        own = torch.tensor([len(errors), len(trajectories)])
        failed, total = (own if self.all_ranks else collectives.all_reduce_sum(own)).tolist()
        if failed > self.error_limit * total:
            first = f": {errors[0]}" if errors else ""
            raise BadData(
                f"{failed} of {total} trajectories ended by an error of the environment{first}",
                path=("environment",),
                hint=f"mend the environment, or raise max_error_share, which is {self.error_limit:g}",
            )


@define(eq=False)
class Trajectory:
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

    @property
    def turns(self) -> int:
        """The number of turns so far."""
        return self.spans[-1].turn if self.spans else 0

    def next_request(self) -> SamplingRequest:
        """Return the request of the next turn; the first one is that of a completion of one turn."""
        if not self.spans:
            return self.request
        return SamplingRequest(
            prompt_ids=(*self.request.prompt_ids, *self.ids),
            seed=derive(self.request.seed, "turn", self.turns + 1),
            trajectory=self.request.seed,
        )

    def add_turn(self, request: SamplingRequest, sampled: Completion) -> None:
        """Append a turn; one that was cut by a limit is the last."""
        self._append(ASSISTANT, self.turns + 1, sampled.ids, sampled.logprobs, None)
        if not sampled.finished:
            self.ending = "length" if request.max_new_tokens is None else "max_tokens"

    def add_reply(self, reply: Reply, sampler: TrajectorySampler) -> None:
        """Note the turn's reward, and append the observation if another turn follows."""
        if reply.reward is not None:
            self.turn_rewards.append(reply.reward)
        if reply.error:
            self.ending, self.error = "environment_error", reply.error
        if self.ending:
            return
        if not reply.messages:
            self.ending = reply.ending or "done"
        elif self.turns == sampler.environment.max_turns:
            self.ending = "max_turns"
        elif sampler.max_seconds is not None and reply.seconds > sampler.max_seconds:
            self.ending = "timeout"
        else:
            closed = bool(self.ids) and self.ids[-1] in sampler.end_ids
            parts = sampler.observations.encode(reply.messages, closed=closed)
            if len(self.ids) + sum(len(part.ids) for part in parts) < sampler.max_tokens:
                for part in parts:
                    self._append(part.role, self.turns, part.ids, (0.0,) * len(part.ids), part.body)
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
