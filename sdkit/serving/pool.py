"""A pool of vLLM rollout servers: sends weights by file, distributes groups of requests, handles lost and restarted servers.

A server that does not answer is skipped while another does; once it is back it gets the weights again.  If none
answers, the pool waits for one, up to the spec's deadline.  Knows token ids; knows nothing of prompts, ranks or training.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from attrs import define

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.language.errors import BadEnvironment, ProcessDied
from sdkit.language.specs import VllmServerBackend
from sdkit.sampling.canary import Canary
from sdkit.sampling.vllm_settings import sampling_settings
from sdkit.serving import protocol
from sdkit.serving.client import RETRYABLE_STATUSES, RequestFailed, Server, all_or_none, key_from
from sdkit.serving.gateway import WEIGHTS_HEADER
from sdkit.serving.weight_files import WeightFile
from sdkit.stdout import Advance, no_progress

T = TypeVar("T")
Group = list[int]
"""Indices of the requests that share one prompt."""
SampleTurn = Callable[[SamplingRequest], Awaitable[Completion]]
"""Samples one turn, from any number of coroutines at the same time."""
Player = Callable[[SampleTurn], Coroutine[Any, Any, None]]
"""Plays one trajectory, whose turns it samples one after the other."""

RETRIES = 3
"""Retries, within about 4 s, before a server counts as unavailable."""
PROBE_SECONDS = 5.0
"""How long a server may take to report its state."""
RECHECK_SECONDS = 30.0
"""Seconds between checks of an unavailable server while others answer."""
POLL_SECONDS = 1.0
"""Seconds between checks if none answers."""
MAX_ROUNDS = 8
"""How often the unfinished part of a batch is redistributed before the run ends."""


@define(eq=False)
class _Member:
    """One server and its last known state."""

    url: str
    server: Server
    loaded_sha256: str | None = None  # SHA-256 of the weights that it last reported
    canary_metrics: Mapping[str, float] = {}  # for these weights
    unavailable_reason: str | None = None  # why it is skipped
    retry_at: float = 0.0  # when to check it again


class ServerPool:
    """All rollout servers of a run; used by one thread at a time.

    Raises BadEnvironment if their key is not in the environment.  Changes of a server's state are passed to `log` and
    kept in `messages`.
    """

    def __init__(
        self,
        spec: VllmServerBackend,
        expected: protocol.ExpectedServer,
        environment: Mapping[str, str],
        log: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.expected = expected
        self.messages: list[str] = []
        self._log = log
        self._canary: Canary | None = None
        self._end_ids: tuple[int, ...] = ()
        self._vocabulary = 0
        self.max_tokens = 0  # longest sequence that every server accepts; known after `check`
        key = key_from(spec.key_from, environment, "rollout.backend")
        self._runner = asyncio.Runner()
        self._task: asyncio.Task[Any] | None = None
        self._aborted = False
        self._members = [_Member(url, self._connect(url, key)) for url in spec.urls]
        self._getting_ready = asyncio.Lock()  # one call at a time sends weights
        self._sampled_by: dict[int, _Member] = {}  # of the current batch, by the seed of the (first) request
        self._dealt = 0  # groups of the current batch that were dealt in turn

    def _connect(self, url: str, key: str | None) -> Server:
        return Server(
            url,
            key=key,
            max_concurrent=self.spec.max_num_seqs,
            request_seconds=self.spec.deadline_seconds,
            deadline_seconds=self.spec.deadline_seconds,
            retries=RETRIES,
            slow_hint="raise rollout.backend.deadline_seconds, or lower max_num_seqs",
            runner=self._runner,
        )

    def check(self) -> None:
        """Raise BadEnvironment unless every server is up and serves the student's model in the run's dtype.  No retries."""
        states = self._run(self._read_states())
        self.max_tokens = min(state.max_tokens for state in states)

    def check_length(self, longest: int) -> None:
        """Raise BadEnvironment if a sequence of `longest` tokens is too long for a server."""
        if longest > self.max_tokens:
            raise BadEnvironment(
                f"the longest prompt and completion have {longest} tokens, a rollout server accepts {self.max_tokens}",
                hint=f"start it with `sdkit serve` and this spec, or with --max-tokens {longest}",
            )

    def set_model(self, canary: Canary, end_ids: tuple[int, ...], vocabulary: int) -> None:
        """Set the canary, the end tokens and the number of ids, which are known once the model is loaded."""
        self._canary, self._end_ids, self._vocabulary = canary, end_ids, vocabulary

    async def _read_states(self) -> list[protocol.ServerState]:
        states = await _outcomes(self._read_state(member, retries=0) for member in self._members)
        for state in states:
            if isinstance(state, RequestFailed):
                _raise_if_final(state)
                hint = f"{protocol.START_HINT}, or correct rollout.backend.urls"
                raise BadEnvironment(f"no rollout server: {state}", hint=hint)
        return [state for state in states if isinstance(state, protocol.ServerState)]

    async def _read_state(self, member: _Member, retries: int) -> protocol.ServerState:
        """Returns a server's state.  Raises RequestFailed, or BadEnvironment if it cannot sample for this run."""
        path = f"/sdkit/state?probe={self.expected.folder.probe}"
        responses = await member.server.request_all(path, [None], retries=retries, deadline_seconds=PROBE_SECONDS)
        return protocol.read_state(member.url, responses[0], self.expected)

    def load(self, file: WeightFile) -> dict[str, float]:
        """Load these weights on every server and check the canary; returns the largest canary metrics and the server count.

        Raises NumericsGuard if a server fails the canary, ProcessDied if none answers.
        """
        ready = self._run(self._ready_members(file))
        names = dict.fromkeys(name for member in ready for name in member.canary_metrics)
        metrics = {name: max(member.canary_metrics[name] for member in ready) for name in names}
        return metrics | {"servers": float(len(ready))}

    def sample(
        self,
        file: WeightFile,
        requests: Sequence[SamplingRequest],
        sampling: SamplingParams,
        advance: Advance = no_progress,
    ) -> list[Completion]:
        """Returns one completion per request, in order, sampled by these weights; requests of one prompt go to one server.

        A later turn goes to the server of the turn before, which has cached its prefix, unless that server is lost.
        `advance` receives 1 for each completion.  Raises as `load` does.
        """
        if not any(request.trajectory in self._sampled_by for request in requests):
            self._begin_batch()
        return self._run(self._sample(file, requests, sampling, advance))

    def play(
        self,
        file: WeightFile,
        requests: Sequence[SamplingRequest],
        sampling: SamplingParams,
        players: Sequence[Player],
    ) -> None:
        """Run the players of trajectories at the same time; each samples its turns, by these weights, at its own pace.

        `requests` are their first turns.  Servers are chosen as by `sample`.  Raises as `load` does, and as a player does.
        """
        self._begin_batch()
        self._run(self._play(file, requests, sampling, players))

    def abort(self) -> None:
        """Cancel the current call, from any thread; later calls are cancelled too."""
        self._aborted = True
        if (task := self._task) is not None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                task.get_loop().call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """Close the connections and remove the weight files."""
        for member in self._members:
            member.server.close()
        self._runner.close()
        self.expected.folder.close()

    def _report(self, text: str) -> None:
        """Log a change of a server's state, and keep it in `messages`."""
        self.messages.append(text)
        self._log(text)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(self._run_cancellable(work))

    async def _run_cancellable(self, work: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        try:
            if self._aborted:
                work.close()
                raise asyncio.CancelledError
            return await work
        finally:
            self._task = None

    def _begin_batch(self) -> None:
        self._sampled_by, self._dealt = {}, 0

    async def _play(
        self,
        file: WeightFile,
        requests: Sequence[SamplingRequest],
        sampling: SamplingParams,
        players: Sequence[Player],
    ) -> None:
        self._deal(_groups(requests), requests, await self._ready_members(file))

        async def sample(request: SamplingRequest) -> Completion:
            return (await self._sample(file, [request], sampling, no_progress))[0]

        await all_or_none(player(sample) for player in players)

    async def _sample(
        self, file: WeightFile, requests: Sequence[SamplingRequest], sampling: SamplingParams, advance: Advance
    ) -> list[Completion]:
        done: dict[int, Completion] = {}
        pending = _groups(requests)
        for _ in range(MAX_ROUNDS):
            if not pending:
                break
            members = await self._ready_members(file)
            parts = self._deal(pending, requests, members)
            outcomes = await _outcomes(
                self._sample_on(member, file, [requests[i] for i in _indices(part)], sampling, advance)
                for member, part in zip(members, parts, strict=True)
            )
            pending = []
            for member, part, completions in zip(members, parts, outcomes, strict=True):
                if isinstance(completions, RequestFailed):
                    self._mark_unavailable(member, completions)
                    pending += part
                else:
                    done.update(zip(_indices(part), completions, strict=True))
        if pending:
            raise ProcessDied(
                f"the rollout servers lost a batch {MAX_ROUNDS} times",
                hint="see the servers' own output for the reason, then continue with --resume",
            )
        return [done[i] for i in range(len(requests))]

    def _deal(
        self, groups: Sequence[Group], requests: Sequence[SamplingRequest], members: Sequence[_Member]
    ) -> list[list[Group]]:
        """Returns the groups for each of these servers, and notes which server gets which trajectory."""
        parts: list[list[Group]] = [[] for _ in members]
        for group in groups:
            trajectories = [_first_seed(requests[i]) for i in group]
            earlier = self._sampled_by.get(trajectories[0])
            if earlier in members:
                number = members.index(earlier)
            else:
                number, self._dealt = self._dealt % len(members), self._dealt + 1
            parts[number].append(group)
            self._sampled_by.update(dict.fromkeys(trajectories, members[number]))
        return parts

    async def _sample_on(
        self,
        member: _Member,
        file: WeightFile,
        requests: Sequence[SamplingRequest],
        sampling: SamplingParams,
        advance: Advance,
    ) -> list[Completion]:
        settings = sampling_settings(sampling, self._end_ids, self._vocabulary)
        bodies = [protocol.completion_body(request, settings) for request in requests]
        headers = {WEIGHTS_HEADER: file.sha256}
        answers = await member.server.request_all("/v1/completions", bodies, headers=headers, advance=advance)
        return [protocol.read_completion(member.url, answer) for answer in answers]

    async def _ready_members(self, file: WeightFile) -> list[_Member]:
        """Returns the servers that have these weights, after sending them to the others; waits if there are none."""
        async with self._getting_ready:
            return await self._get_ready(file)

    async def _get_ready(self, file: WeightFile) -> list[_Member]:
        now = time.monotonic()
        available = [m for m in self._members if not m.unavailable_reason or m.retry_at <= now]
        await self._send_weights(available, file)
        deadline = now + self.spec.deadline_seconds
        logged = False
        while not (ready := [m for m in self._members if m.loaded_sha256 == file.sha256]):
            if time.monotonic() > deadline:
                reasons = (m.unavailable_reason or f"{m.url} keeps losing the weights" for m in self._members)
                raise ProcessDied(
                    f"no rollout server for {self.spec.deadline_seconds:g} s: {'; '.join(reasons)}",
                    hint=f"{protocol.START_HINT}, then continue with --resume",
                )
            if not logged:
                self._report(f"no rollout server answers; waiting up to {self.spec.deadline_seconds:g} s for one")
                logged = True
            await asyncio.sleep(POLL_SECONDS)
            await self._send_weights(self._members, file)
        return ready

    async def _send_weights(self, members: Sequence[_Member], file: WeightFile) -> None:
        """Send the weights to those of these servers that do not have them, concurrently."""
        outdated = [member for member in members if member.loaded_sha256 != file.sha256]
        outcomes = await _outcomes(self._send_weights_to(member, file) for member in outdated)
        for member, outcome in zip(outdated, outcomes, strict=True):
            if outcome is not None:
                self._mark_unavailable(member, outcome)

    async def _send_weights_to(self, member: _Member, file: WeightFile) -> None:
        state = await self._read_state(member, retries=0 if member.unavailable_reason else RETRIES)
        if state.sha256 != file.sha256:
            update = {"version": file.version, "file": file.path.name, "sha256": file.sha256}
            await member.server.request_all("/sdkit/weights", [update])
        member.canary_metrics = await self._check_canary(member, file)
        if member.unavailable_reason:
            self._report(f"rollout server {member.url} is back, with weights {file.version}")
        member.unavailable_reason, member.loaded_sha256 = None, file.sha256

    async def _check_canary(self, member: _Member, file: WeightFile) -> dict[str, float]:
        canary = self._canary
        assert canary is not None, "call set_model before a transfer"
        bodies, headers = [protocol.canary_body(canary.ids)], {WEIGHTS_HEADER: file.sha256}
        answer = (await member.server.request_all("/v1/completions", bodies, headers=headers))[0]
        engine_logprobs = protocol.read_canary(member.url, answer, canary.ids)
        return canary.compare(file.canary, engine_logprobs, file.version, f"the server {member.url}")

    def _mark_unavailable(self, member: _Member, failure: RequestFailed) -> None:
        """Record that a server lacks the requested weights or does not answer; raise if a retry cannot help."""
        previous, member.loaded_sha256 = member.loaded_sha256, None
        if failure.status == 409:
            if previous:
                self._report(f"rollout server {member.url} has restarted; sending the weights again")
            return
        _raise_if_final(failure)
        if not member.unavailable_reason:
            self._report(f"a rollout server is unavailable: {failure}")
        member.unavailable_reason = str(failure)
        member.retry_at = time.monotonic() + RECHECK_SECONDS


async def _outcomes(calls: Iterable[Awaitable[T]]) -> list[T | RequestFailed]:
    """Returns the results of concurrent calls, or their RequestFailed; raises the first other error once all have ended."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, RequestFailed):
            raise outcome
    return cast(list[T | RequestFailed], outcomes)


def _raise_if_final(failure: RequestFailed) -> None:
    """Raise BadEnvironment unless a retry may help or the weights are outdated."""
    if failure.status in (None, 409, *RETRYABLE_STATUSES):
        return
    hint = f"this server does not accept weights; {protocol.START_HINT}" if failure.status == 404 else failure.hint
    raise BadEnvironment(f"rollout server {failure}", hint=hint)


def _groups(requests: Sequence[SamplingRequest]) -> list[Group]:
    """Returns the requests grouped by prompt; requests of one prompt are consecutive."""
    by_prompt = itertools.groupby(range(len(requests)), key=lambda i: requests[i].prompt_ids)
    return [list(group) for _, group in by_prompt]


def _first_seed(request: SamplingRequest) -> int:
    """The seed of the first turn of a request's trajectory."""
    return request.seed if request.trajectory is None else request.trajectory


def _indices(part: Sequence[Group]) -> list[int]:
    return [i for group in part for i in group]
