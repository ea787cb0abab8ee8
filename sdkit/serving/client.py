"""One vLLM server over HTTP: pooled connections, so many requests at once, further attempts within a deadline.

Knows paths and JSON; knows nothing of teachers, rollouts or what stands in an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from attrs import frozen

from sdkit.language.errors import BadEnvironment, first_line

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that may answer another time."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds before the second attempt, and at most; each pause is twice the one before."""

SLOW = "raise request_seconds and deadline_seconds, or lower requests_at_once"
"""What to do about a server that does not answer in time, if nothing else is said."""

ADVICE: Mapping[int, str] = {
    401: "name the environment variable that holds its key: key_from",
    403: "name the environment variable that holds its key: key_from",
}

Body = Mapping[str, Any]


class RequestFailed(Exception):
    """What a server did instead of answering: one line, perhaps the status and what to do."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        hint: str | None = None,
        passing: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.hint = hint
        self.passing = passing  # it may be otherwise in a moment


@frozen(kw_only=True)
class _Asked:
    """What the requests of one call have in common."""

    path: str
    headers: Mapping[str, str]
    retries: int
    deadline: float  # seconds for one of them, further attempts included


def key_from(name: str | None, environment: Mapping[str, str], where: str) -> str | None:
    """The key in this environment variable.  Raises BadEnvironment, naming `where`.key_from, where it is not set."""
    if name is None:
        return None
    if not (key := environment.get(name)):
        raise BadEnvironment(
            f"the environment has no {name}, which {where}.key_from names", hint=f"export {name}=…"
        )
    return key


class Server:
    """A server's address, and how patiently it is asked.

    Environment variables for proxies count for remote servers alone: what is meant for this machine stays on it.
    Servers that share a runner can be asked at once (`answers`); whoever made the runner closes it.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        remote: bool = False,
        at_once: int,
        request_seconds: float,
        deadline_seconds: float,
        retries: int,
        slow_hint: str = SLOW,
        runner: asyncio.Runner | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.at_once = at_once
        self.request_seconds = request_seconds
        self.deadline_seconds = deadline_seconds
        self.retries = retries
        self.slow_hint = slow_hint
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once),
            timeout=None,  # the whole request has one, below
            trust_env=remote,
        )
        self._shared = runner is not None
        self._loop = runner or asyncio.Runner()  # kept, because connections belong to their loop

    def get(self, path: str, *, retries: int | None = None) -> Any:
        """The answer as JSON.  Raises Unanswered."""
        return self._loop.run(self.answers(path, [None], retries=retries))[0]

    def post(self, path: str, bodies: Sequence[Body], *, retries: int | None = None) -> list[Any]:
        """One answer per body, in order, `at_once` of them in flight.

        Raises Unanswered with the first that failed for good; the others are then given up.
        """
        return self._loop.run(self.answers(path, bodies, retries=retries))

    def close(self) -> None:
        """Close the connections."""
        self._loop.run(self._client.aclose())
        if not self._shared:
            self._loop.close()

    async def answers(
        self,
        path: str,
        bodies: Sequence[Body | None],
        *,
        retries: int | None = None,
        deadline_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """One answer per body (None: a GET), in order, as `post` gives them.  Raises Unanswered."""
        room = asyncio.Semaphore(self.at_once)
        asked = _Asked(
            path=path,
            headers=headers or {},
            retries=self.retries if retries is None else retries,
            deadline=self.deadline_seconds if deadline_seconds is None else deadline_seconds,
        )
        tasks = [asyncio.create_task(self._answer(asked, body, room)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, asked: _Asked, body: Body | None, room: asyncio.Semaphore) -> Any:
        async with room:
            started, attempt = time.monotonic(), 0
            while True:
                left = asked.deadline - (time.monotonic() - started)
                try:
                    return await self._once(asked, body, min(self.request_seconds, left))
                except RequestFailed as fault:
                    pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
                    spent = time.monotonic() - started
                    attempt += 1
                    over = attempt > asked.retries or spent + pause >= asked.deadline
                    if over or not fault.passing:
                        tries = f" ({attempt} attempts in {spent:.0f} s)" if attempt > 1 else ""
                        message = f"{fault}{tries}"
                        raise RequestFailed(message, status=fault.status, hint=fault.hint) from None
                await asyncio.sleep(pause)

    async def _once(self, asked: _Asked, body: Body | None, seconds: float) -> Any:
        path, headers = asked.path, dict(asked.headers)
        where = f"{self.url}{path}"
        try:
            async with asyncio.timeout(seconds):
                method = "GET" if body is None else "POST"
                response = await self._client.request(method, path, json=body, headers=headers)
        except TimeoutError:
            message = f"{where} did not answer within {seconds:.3g} s"
            raise RequestFailed(message, hint=self.slow_hint, passing=True) from None
        except httpx.RequestError as error:
            message = f"{where} cannot be reached: {first_line(error)}"
            raise RequestFailed(
                message, hint="start the server, or correct its url", passing=True
            ) from None
        status = response.status_code
        if status != 200:
            message = f"{where} answered {status}{_reason(response)}"
            raise RequestFailed(
                message,
                status=status,
                hint=ADVICE.get(status),
                passing=status in RETRYABLE_STATUSES,
            )
        try:
            return response.json()
        except ValueError:
            raise RequestFailed(
                f"{where} answered no JSON: is it a vLLM server?", status=status
            ) from None


def _reason(response: httpx.Response) -> str:
    """What an error says of itself, on one line."""
    try:
        said = response.json()
        error = said.get("error", said.get("detail", said))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text
    line = " ".join(text.split())
    return f": {line[:300]}" if line else ""
