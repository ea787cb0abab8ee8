"""Rollouts from vLLM servers: weights by file, groups dealt out to the servers, each found out when it is gone or new.

A server that does not answer is left out while another does; when it is back it gets the weights again.  Where none
answers they are waited for, up to the spec's deadline.  Knows token ids; knows nothing of prompts, ranks or what trains.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from attrs import define

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.language.errors import BadEnvironment, ProcessDied
from sdkit.language.specs import VllmServerBackend
from sdkit.sampling.canary import Canary
from sdkit.sampling.vllm import sampling_settings
from sdkit.serving.client import RETRYABLE_STATUSES, RequestFailed, Server, key_from
from sdkit.serving.gateway import WEIGHTS_HEADER
from sdkit.serving.protocol import (
    START,
    ExpectedServer,
    ServerState,
    canary_body,
    completion_body,
    read_canary,
    read_completion,
    read_state,
)
from sdkit.serving.weight_files import WeightFile

T = TypeVar("T")
Group = list[int]
"""Places of requests that have one prompt."""

RETRIES = 3
"""Further attempts, within about 4 s, before a server counts as away."""
PROBE_SECONDS = 5.0
"""How long a server may take to say what it has."""
LOOK_AGAIN = 30.0
"""Seconds between looks at a server that is away while others answer."""
PAUSE = 1.0
"""Seconds between looks where none answers."""
ROUNDS = 8
"""How often the rest of a batch is dealt out anew before the run ends."""


@define(eq=False)
class _Member:
    """One server, and what is known of it."""

    url: str
    server: Server
    has: str | None = None  # SHA-256 of the weights that it was seen with
    figures: Mapping[str, float] = {}  # of their canary
    away: str | None = None  # why it was left out
    look_at: float = 0.0  # when to look at it again


class ServerPool:
    """All servers of a run; one thread at a time may ask.

    Raises BadEnvironment where their key is not in the environment.  `say` is told what happens to a server, and `told`
    keeps it.
    """

    def __init__(
        self,
        spec: VllmServerBackend,
        wanted: ExpectedServer,
        environment: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.wanted = wanted
        self.messages: list[str] = []
        self._say = say
        self._canary: Canary | None = None
        self._end_ids: tuple[int, ...] = ()
        self.max_tokens = 0  # of the longest sequence that every server takes; known after `check`
        key = key_from(spec.key_from, environment, "rollout.backend")
        self._runner = asyncio.Runner()
        self._task: asyncio.Task[Any] | None = None
        self._left = False
        self._members = [_Member(url, self._open(url, key)) for url in spec.urls]

    def _open(self, url: str, key: str | None) -> Server:
        return Server(
            url,
            key=key,
            at_once=self.spec.max_rows,
            request_seconds=self.spec.deadline_seconds,
            deadline_seconds=self.spec.deadline_seconds,
            retries=RETRIES,
            slow_hint="raise rollout.backend.deadline_seconds, or lower max_rows",
            runner=self._runner,
        )

    # ── before anything is loaded ─────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Every server is up, and serves the student's model in the run's precision.  Nothing is tried twice.

        Raises BadEnvironment.
        """
        states = self._run(self._states())
        self.max_tokens = min(state.max_tokens for state in states)

    def check_length(self, longest: int) -> None:
        """Raise BadEnvironment where a sequence of so many tokens is too long for a server."""
        if longest > self.max_tokens:
            raise BadEnvironment(
                f"the longest prompt and completion have {longest} tokens, a rollout server takes {self.max_tokens}",
                hint=f"start it with `sdkit serve` and this spec, or with --max-tokens {longest}",
            )

    def begin(self, canary: Canary, end_ids: tuple[int, ...]) -> None:
        """What is known of the model once it is loaded."""
        self._canary, self._end_ids = canary, end_ids

    async def _states(self) -> list[ServerState]:
        asked = (self._state(member, retries=0) for member in self._members)
        found = await asyncio.gather(*asked, return_exceptions=True)
        for state in found:
            if isinstance(state, RequestFailed):
                hint = f"{START}, or correct rollout.backend.urls"
                raise BadEnvironment(f"no rollout server: {state}", hint=hint)
            if isinstance(state, BaseException):
                raise state
        return [state for state in found if isinstance(state, ServerState)]

    async def _state(self, member: _Member, retries: int) -> ServerState:
        """What a server says of itself.  Raises Unanswered, or BadEnvironment where it cannot sample for this run."""
        path = f"/sdkit/state?probe={self.wanted.folder.probe}"
        try:
            told = await member.server.answers(
                path, [None], retries=retries, deadline_seconds=PROBE_SECONDS
            )
        except RequestFailed as fault:
            raise _final(fault) from None
        return read_state(member.url, told[0], self.wanted)

    # ── during the run ────────────────────────────────────────────────────────────────────────

    def load(self, file: WeightFile) -> dict[str, float]:
        """Give every server these weights, and compare; returns the largest canary figures, and how many servers there are.

        Raises NumericsGuard where a server's canary is another, ProcessDied where none answers.
        """
        ready = self._run(self._ready(file))
        names = dict.fromkeys(name for member in ready for name in member.figures)
        figures = {name: max(member.figures[name] for member in ready) for name in names}
        return figures | {"servers": float(len(ready))}

    def sample(
        self, file: WeightFile, requests: Sequence[SamplingRequest], sampling: SamplingParams
    ) -> list[Completion]:
        """One completion per request, in order, each sampled by these weights; requests of a prompt go together.

        Raises as `load` does.
        """
        return self._run(self._sample(file, requests, sampling))

    def abort(self) -> None:
        """Leave what is asked of the servers at the moment; from any thread.  Nothing can be asked afterwards."""
        self._left = True
        if (task := self._task) is not None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                task.get_loop().call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """Close the connections, and remove the weight files."""
        for member in self._members:
            member.server.close()
        self._runner.close()
        self.wanted.folder.close()

    def say(self, text: str) -> None:
        """Tell of a server, and keep it."""
        self.messages.append(text)
        self._say(text)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(self._watched(work))

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        try:
            if self._left:
                work.close()
                raise asyncio.CancelledError
            return await work
        finally:
            self._task = None

    async def _sample(
        self, file: WeightFile, requests: Sequence[SamplingRequest], sampling: SamplingParams
    ) -> list[Completion]:
        done: dict[int, Completion] = {}
        waiting = _groups(requests)
        for _ in range(ROUNDS):
            if not waiting:
                break
            ready = await self._ready(file)
            parts = [waiting[i :: len(ready)] for i in range(len(ready))]
            asked = (
                self._ask(member, file, [requests[place] for place in _places(part)], sampling)
                for member, part in zip(ready, parts, strict=True)
            )
            found = await asyncio.gather(*asked, return_exceptions=True)
            waiting = []
            for member, part, completions in zip(ready, parts, found, strict=True):
                if isinstance(completions, RequestFailed):
                    self._lost(member, completions)
                    waiting += part
                elif isinstance(completions, BaseException):
                    raise completions
                else:
                    done.update(zip(_places(part), completions, strict=True))
        if waiting:
            raise ProcessDied(
                f"the rollout servers lost a batch {ROUNDS} times",
                hint="what ends them stands in their own output; continue with --resume",
            )
        return [done[place] for place in range(len(requests))]

    async def _ask(
        self,
        member: _Member,
        file: WeightFile,
        requests: Sequence[SamplingRequest],
        sampling: SamplingParams,
    ) -> list[Completion]:
        settings = sampling_settings(sampling, self._end_ids)
        bodies = [completion_body(request, settings) for request in requests]
        headers = {WEIGHTS_HEADER: file.sha256}
        answers = await member.server.answers("/v1/completions", bodies, headers=headers)
        return [read_completion(member.url, answer) for answer in answers]

    # ── who has the weights ───────────────────────────────────────────────────────────────────

    async def _ready(self, file: WeightFile) -> list[_Member]:
        """The servers that have these weights, after those that had not got them; waits where there is none."""
        now = time.monotonic()
        asked = [m for m in self._members if not m.away or m.look_at <= now]
        await self._give(asked, file)
        ends = now + self.spec.deadline_seconds
        said = False
        while not (ready := [m for m in self._members if m.has == file.sha256]):
            if time.monotonic() > ends:
                raise self._nobody()
            if not said:
                self.say(
                    f"no rollout server answers; waiting up to {self.spec.deadline_seconds:g} s for one"
                )
                said = True
            await asyncio.sleep(PAUSE)
            await self._give(self._members, file)
        return ready

    def _nobody(self) -> ProcessDied:
        reasons = "; ".join(m.away or f"{m.url} loses the weights" for m in self._members)
        return ProcessDied(
            f"no rollout server for {self.spec.deadline_seconds:g} s: {reasons}",
            hint=f"{START}, then continue with --resume",
        )

    async def _give(self, members: Sequence[_Member], file: WeightFile) -> None:
        """Give the weights to those of these servers that have others, all at once."""
        lacking = [member for member in members if member.has != file.sha256]
        work = (self._give_one(member, file) for member in lacking)
        outcomes = await asyncio.gather(*work, return_exceptions=True)
        for member, outcome in zip(lacking, outcomes, strict=True):
            if isinstance(outcome, RequestFailed):
                self._lost(member, outcome)
            elif outcome is not None:
                raise outcome

    async def _give_one(self, member: _Member, file: WeightFile) -> None:
        state = await self._state(member, retries=0 if member.away else RETRIES)
        if state.sha256 != file.sha256:
            update = {"version": file.version, "file": file.path.name, "sha256": file.sha256}
            try:
                await member.server.answers("/sdkit/weights", [update])
            except RequestFailed as fault:
                raise _final(fault) from None
        member.figures = await self._compare(member, file)
        if member.away:
            self.say(f"rollout server {member.url} is back, with weights {file.version}")
        member.away, member.has = None, file.sha256

    async def _compare(self, member: _Member, file: WeightFile) -> dict[str, float]:
        canary = self._canary
        assert canary is not None, "a transfer before begin"
        bodies, headers = [canary_body(canary.ids)], {WEIGHTS_HEADER: file.sha256}
        answer = (await member.server.answers("/v1/completions", bodies, headers=headers))[0]
        there = read_canary(member.url, answer, canary.ids)
        return canary.compare(file.canary, there, file.version, f"the server {member.url}")

    def _lost(self, member: _Member, fault: RequestFailed) -> None:
        """Note that a server has not the weights that it was asked for, or does not answer; raise where it never will."""
        had, member.has = member.has, None
        if fault.status == 409:
            if had:
                self.say(f"rollout server {member.url} was started anew; it gets the weights again")
            return
        if isinstance(error := _final(fault), BadEnvironment):
            raise error
        if not member.away:
            self.say(f"a rollout server is away: {fault}")
        member.away, member.look_at = str(fault), time.monotonic() + LOOK_AGAIN


def _final(fault: RequestFailed) -> Exception:
    """The fault itself where it may pass, or is about weights; else what ends the run."""
    if fault.status is None or fault.status == 409 or fault.status in RETRYABLE_STATUSES:
        return fault
    known = {404: f"it is a server, but none that takes weights; {START}"}
    return BadEnvironment(f"rollout server {fault}", hint=known.get(fault.status, fault.hint))


def _groups(requests: Sequence[SamplingRequest]) -> list[Group]:
    """Requests of one prompt, which stand together, in one group."""
    groups: list[Group] = []
    for place, request in enumerate(requests):
        if groups and requests[groups[-1][0]].prompt_ids == request.prompt_ids:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _places(part: Sequence[Group]) -> list[int]:
    return [place for group in part for place in group]
