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
from sdkit.data.observations import ObservationEncoder, ObservationPart
from sdkit.distributed import collectives
from sdkit.environments.interface import Environment, Opened, Reply
from sdkit.environments.routed import route_of
from sdkit.language import specs
from sdkit.language.errors import BadData
from sdkit.seeds import derive
from sdkit.spans import ASSISTANT, DEMONSTRATION, FINISHED, Ending, Span, Turn
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
    spec: specs.Environment
    observations: Callable[[Row], ObservationEncoder]  # of a row
    end_ids: Collection[int]  # that end a turn
    decode: Callable[[Sequence[int]], str]  # without special tokens
    # The prompt of a request and its row, with a text that the environment appends.
    opened_prompt: Callable[[SamplingRequest, Row, str], tuple[int, ...]]
    # The turns that a row's trajectory starts with.
    demonstrated: Callable[[Row], Sequence[tuple[int, ...]]] = lambda _: ()
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
        trajectories = self.open(requests, rows, sampling, advance)
        for _ in range(self.environment.max_turns):
            active = [t for t in trajectories if t.ending is None]
            if not (len(active) if self.all_ranks else collectives.all_reduce_max(len(active))):
                break
            asked = [self.request(t, sampling) for t in active]
            for trajectory, request, completion in zip(active, asked, backend.sample(asked, sampling), strict=True):
                trajectory.add_turn(request, completion)
            self._answer(active, advance)
        return self.end(trajectories)

    def open(
        self,
        requests: Sequence[SamplingRequest],
        rows: Sequence[Row],
        sampling: SamplingParams,
        advance: Advance = no_progress,
    ) -> list[Trajectory]:
        """Return a new trajectory for each request, after the turns of its demonstration; some may have ended in them."""
        opened = self.environment.open([(row, r.environment_seed) for row, r in zip(rows, requests, strict=True)])
        _check_openings(rows, requests, opened)
        trajectories = [
            self._begin(request, row, each, sampling)
            for request, row, each in zip(requests, rows, opened, strict=True)
        ]
        while demonstrating := [t for t in trajectories if t.demonstration and t.ending is None]:
            for trajectory in demonstrating:
                trajectory.add_demonstrated_turn()
            self._answer(demonstrating, advance)
        return trajectories

    def _answer(self, trajectories: Sequence[Trajectory], advance: Advance) -> None:
        """Let the environment answer the last turn of each."""
        replies = self.environment.reply([(t.handle, self.turn(t)) for t in trajectories])
        for trajectory, reply in zip(trajectories, replies, strict=True):
            trajectory.add_reply(reply, self)
        advance(sum(t.ending is not None for t in trajectories))

    def end(self, trajectories: Sequence[Trajectory]) -> list[Completion]:
        """End the trajectories in the environment, and return them.  Raises BadData if too many ended by an error."""
        rewards = self.environment.end([t.handle for t in trajectories])
        self._check_errors(trajectories)
        return [trajectory.completion(reward) for trajectory, reward in zip(trajectories, rewards, strict=True)]

    def request(self, trajectory: Trajectory, sampling: SamplingParams) -> SamplingRequest:
        """Return the request of the next turn, for at most as many tokens as the trajectory has left."""
        left = trajectory.tokens_left
        return evolve(trajectory.next_request(), max_new_tokens=left if left < sampling.max_new_tokens else None)

    def _begin(self, request: SamplingRequest, row: Row, opened: Opened, sampling: SamplingParams) -> Trajectory:
        """Return a trajectory before its first turn; one that has an error ends after it."""
        begun = Trajectory(
            request=request,
            handle=opened.handle,
            row=row.index,
            spec=route_of(self.spec, row),
            observations=self.observations(row),
            max_new_tokens=sampling.max_new_tokens,
            prompt_ids=request.prompt_ids,
            demonstration=self.demonstrated(row),
            error=opened.error,
        )
        if opened.text and not opened.error:
            try:
                begun.prompt_ids, begun.opening = self.opened_prompt(request, row, opened.text), opened.text
            except BadData as error:
                begun.error = error.message
        return begun

    def turn(self, trajectory: Trajectory) -> Turn:
        """Return the last turn as the environment reads it; one that was cut calls no tool."""
        ids, finished = trajectory.last_turn, trajectory.ending is None
        calls, fault = (), None
        prompter = trajectory.observations.prompter
        if finished and (format := prompter.calls):
            before = (*trajectory.prompt_ids, *trajectory.ids[: -len(ids) or None])
            calls, fault = format.read(prompter.tokenizer, before, ids)
        return Turn(text=self.decode(ids), calls=calls, fault=fault, finished=finished)

    def _check_errors(self, trajectories: Sequence[Trajectory]) -> None:
        """Raise BadData if an environment's errors ended more of its trajectories, on all ranks, than it may."""
        for path, spec in specs.environments_of(self.spec, specs.BaseEnvironment):
            own = [t for t in trajectories if t.spec is spec]
            errors = [f"row {t.row}: {t.error}" for t in own if t.error]
            counts = torch.tensor([len(errors), len(own)])
            failed, total = (counts if self.all_ranks else collectives.all_reduce_sum(counts)).tolist()
            if failed > spec.error_limit * total:
                first = f": {errors[0]}" if errors else ""
                raise BadData(
                    f"{failed} of {total} trajectories ended by an error of the environment{first}",
                    path=path,
                    hint=f"mend the environment, or raise max_error_share, which is {spec.error_limit:g}",
                )


@define(eq=False)
class Trajectory:
    """A trajectory while it grows."""

    request: SamplingRequest
    handle: Any  # what stands for it in the environment
    row: int
    spec: specs.BaseEnvironment
    observations: ObservationEncoder
    max_new_tokens: int  # of a turn
    prompt_ids: tuple[int, ...]  # with what the environment appended
    demonstration: Sequence[tuple[int, ...]] = ()  # turns before the first that is sampled, which are not played yet
    opening: str | None = None
    ids: list[int] = field(factory=list)
    logprobs: list[float] | None = field(factory=list)  # 0 where not sampled; None: the backend gives none
    spans: list[Span] = field(factory=list)
    turn_rewards: list[float] = field(factory=list)
    turn_feedback: list[str | None] = field(factory=list)
    unanswered: tuple[tuple[str, str], ...] = ()  # role and text of messages that are no part of the trajectory
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
            return evolve(self.request, prompt_ids=self.prompt_ids)
        return SamplingRequest(
            prompt_ids=(*self.prompt_ids, *self.ids),
            seed=derive(self.request.seed, "turn", self.turns + 1),
            trajectory=self.request.seed,
        )

    @property
    def tokens_left(self) -> int:
        """How many tokens the trajectory may still get."""
        return self.spec.longest(self.max_new_tokens) - len(self.ids)

    def add_turn(self, request: SamplingRequest, sampled: Completion) -> None:
        """Append a turn; one that was cut by a limit is the last."""
        self._append(ASSISTANT, self.turns + 1, sampled.ids, sampled.logprobs, None)
        if not sampled.finished:
            self.ending = "length" if request.max_new_tokens is None else "max_tokens"

    def add_demonstrated_turn(self) -> None:
        """Append the next turn of the demonstration; one that the trajectory's limit cuts is the last."""
        turn, *rest = self.demonstration
        self.demonstration = rest
        ids = turn[: self.tokens_left]
        self._append(DEMONSTRATION, self.turns + 1, ids, (0.0,) * len(ids), None)
        if len(ids) < len(turn):
            self.ending = "max_tokens"

    def add_reply(self, reply: Reply, sampler: TrajectorySampler) -> None:
        """Note the turn's reward and feedback, and append the observation if another turn follows."""
        if reply.reward is not None:
            self.turn_rewards.append(reply.reward)
        self.turn_feedback.append(reply.feedback)
        self.error = self.error or reply.error
        if self.error:
            self.ending = "environment_error"
        elif not reply.messages:
            self.ending = self.ending or reply.ending or "done"
        else:
            demonstrated = self.spans[-1].role == DEMONSTRATION  # which may end otherwise than answers, as calls do
            closed = demonstrated or (bool(self.ids) and self.ids[-1] in sampler.end_ids)
            limit = self.spec.max_observation_tokens
            parts = self.observations.encode(reply.messages, closed=closed, limit=limit)
            self._add_observation(parts, reply.seconds, sampler)

    def _add_observation(self, parts: Sequence[ObservationPart], seconds: float, sampler: TrajectorySampler) -> None:
        """Append the messages after a turn if another turn follows.  seconds: of the environment's calls so far."""
        if self.ending:
            pass
        elif self.turns == self.spec.max_turns:
            self.ending = "max_turns"
        elif self.spec.max_seconds is not None and seconds > self.spec.max_seconds:
            self.ending = "timeout"
        elif sum(len(part.ids) for part in parts) >= self.tokens_left:
            self.ending = "max_tokens"
        if self.ending:
            self.unanswered = tuple((part.role, sampler.decode(part.ids[slice(*part.body)])) for part in parts)
        else:
            for part in parts:
                self._append(part.role, self.turns, part.ids, (0.0,) * len(part.ids), part.body)

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
            turn_feedback=tuple(self.turn_feedback) if any(self.turn_feedback) else (),
            unanswered=self.unanswered,
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
