"""Samples trajectories each at its own pace: while the environment answers one, the others are sampled.

The tokens are those of sampling in lockstep, because the seed of a turn depends on the trajectory and the turn alone.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from attrs import define, field

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.environments.interface import Reply
from sdkit.environments.trajectories import Trajectory, TrajectorySampler
from sdkit.processes import DaemonThreads
from sdkit.serving.pool import SampleTurn
from sdkit.serving.rollouts import LoadedServers
from sdkit.stdout import Advance, no_progress


class SteppedBackend(Protocol):
    """A backend that takes further requests while it samples."""

    def start(self, request: SamplingRequest, sampling: SamplingParams) -> str:
        """Adds a request to those that `step` runs; returns its id."""
        ...

    def step(self) -> list[tuple[str, Completion]]:
        """Samples a token for each request that was started; returns the completions that are complete, by id."""
        ...


def sample_continuously(
    sampler: TrajectorySampler,
    backend: SteppedBackend,
    requests: Sequence[SamplingRequest],
    rows: Sequence[Row],
    sampling: SamplingParams,
    *,
    threads: int,
    advance: Advance = no_progress,
) -> list[Completion]:
    """Return one trajectory per request, in order, as `TrajectorySampler.sample` does, and raise as it does.

    Up to `threads` threads ask the environment at the same time.  `advance` receives 1 for each trajectory that has ended.
    """
    trajectories = sampler.open(requests, rows, sampling, advance)
    pool = DaemonThreads(min(threads, len(trajectories)), "sdkit environment")
    turns = _Turns(sampler, backend, sampling, pool)
    try:
        for trajectory in trajectories:
            if trajectory.ending is None:
                turns.sample(trajectory)
        while turns.are_left:
            advance(turns.advance())
    finally:
        pool.end(0.0)
    return sampler.end(trajectories)


def sample_on_servers(
    sampler: TrajectorySampler,
    servers: LoadedServers,
    requests: Sequence[SamplingRequest],
    rows: Sequence[Row],
    sampling: SamplingParams,
    *,
    threads: int,
) -> list[Completion]:
    """Return one trajectory per request, in order, as `sample_continuously` does, from rollout servers."""
    trajectories = sampler.open(requests, rows, sampling, servers.advance)
    begun = [trajectory for trajectory in trajectories if trajectory.ending is None]
    pool = DaemonThreads(min(threads, len(trajectories)), "sdkit environment")

    async def play(trajectory: Trajectory, sample: SampleTurn) -> None:
        while trajectory.ending is None:
            request = sampler.request(trajectory, sampling)
            trajectory.add_turn(request, await sample(request))
            reply = _asked(sampler, trajectory, pool)
            trajectory.add_reply((await asyncio.wrap_future(reply))[0], sampler)
        servers.advance(1)

    first = [sampler.request(trajectory, sampling) for trajectory in begun]
    try:
        servers.play(first, sampling, [functools.partial(play, trajectory) for trajectory in begun])
    finally:
        pool.end(0.0)
    return sampler.end(trajectories)


def _asked(sampler: TrajectorySampler, trajectory: Trajectory, pool: DaemonThreads) -> Future[list[Reply]]:
    """Ask the environment, in a thread, for its reply to the last turn."""
    turn = trajectory.handle, sampler.turn(trajectory)
    return pool.submit(functools.partial(sampler.environment.reply, [turn]))


@define(eq=False)
class _Turns:
    """The turns that the engine samples or the environment answers."""

    sampler: TrajectorySampler
    backend: SteppedBackend
    sampling: SamplingParams
    pool: DaemonThreads
    sampled: dict[str, tuple[Trajectory, SamplingRequest]] = field(factory=dict)
    answered: dict[Future[list[Reply]], Trajectory] = field(factory=dict)

    @property
    def are_left(self) -> bool:
        return bool(self.sampled or self.answered)

    def sample(self, trajectory: Trajectory) -> None:
        """Hand the next turn of a trajectory to the engine."""
        request = self.sampler.request(trajectory, self.sampling)
        self.sampled[self.backend.start(request, self.sampling)] = trajectory, request

    def advance(self) -> int:
        """Sample one token of each turn, and take the replies that are there; returns how many trajectories ended."""
        for number, completion in self.backend.step() if self.sampled else ():
            trajectory, request = self.sampled.pop(number)
            trajectory.add_turn(request, completion)
            self.answered[_asked(self.sampler, trajectory, self.pool)] = trajectory
        # With nothing to sample, wait for a reply.
        done, _ = wait(self.answered, timeout=0 if self.sampled else None, return_when=FIRST_COMPLETED)
        ended = 0
        for future in [each for each in self.answered if each in done]:
            trajectory = self.answered.pop(future)
            trajectory.add_reply(future.result()[0], self.sampler)
            if trajectory.ending is None:
                self.sample(trajectory)
            ended += trajectory.ending is not None
        return ended
