"""An HTTP client for one vLLM server: pooled connections, bounded concurrency, retries within a deadline.

Knows paths and JSON; knows nothing of teachers, rollouts or the content of responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from sdkit.language.errors import BadEnvironment, first_line, listed, shorten
from sdkit.stdout import Advance, no_progress

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that are worth a retry."""

FIRST_RETRY_DELAY, MAX_RETRY_DELAY = 0.5, 8.0
"""Seconds before the second attempt, and the upper bound; each delay is twice the previous one."""

SLOW_HINT = "raise request_seconds and deadline_seconds, or lower requests_at_once"
"""The default hint for a server that does not answer in time."""

STATUS_HINTS: Mapping[int, str] = {
    401: "name the environment variable that holds its key: key_from",
    403: "name the environment variable that holds its key: key_from",
}

T = TypeVar("T")
Body = Mapping[str, Any]


class RequestFailed(Exception):
    """A request that got no usable response: one line of text, with the HTTP status and a hint where known."""

    def __init__(
        self, message: str, *, status: int | None = None, hint: str | None = None, is_retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.hint = hint
        self.is_retryable = is_retryable


def key_from(name: str | None, environment: Mapping[str, str], where: str) -> str | None:
    """Returns the API key in the environment variable `name`; None for no name.

    Raises BadEnvironment, naming `where`.key_from, if the variable is not set.
    """
    if name is None:
        return None
    if not (key := environment.get(name)):
        raise BadEnvironment(f"the environment has no {name}, which {where}.key_from names", hint=f"export {name}=…")
    return key


class Server:
    """A server's address, with limits on concurrency, time and retries.

    Proxy environment variables apply only to remote servers, so that traffic for this machine stays on it.
    Servers that share a runner can be called concurrently (`request_all`); the owner of the runner closes it.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        remote: bool = False,
        max_concurrent: int,
        request_seconds: float,
        deadline_seconds: float,
        retries: int,
        slow_hint: str = SLOW_HINT,
        runner: asyncio.Runner | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.max_concurrent = max_concurrent
        self.request_seconds = request_seconds
        self.deadline_seconds = deadline_seconds
        self.retries = retries
        self.slow_hint = slow_hint
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=max_concurrent, max_keepalive_connections=max_concurrent),
            timeout=None,  # `_request_once` sets one for the whole request
            trust_env=remote,
        )
        self._slots = asyncio.Semaphore(max_concurrent)
        self._shares_runner = runner is not None
        # One for all calls: connections belong to their event loop.
        self._runner = runner or asyncio.Runner()

    def get(self, path: str, *, retries: int | None = None) -> Any:
        """Returns the response as JSON.  Raises RequestFailed."""
        return self._runner.run(self.request_all(path, [None], retries=retries))[0]

    def post(self, path: str, bodies: Sequence[Body], *, retries: int | None = None) -> list[Any]:
        """Returns one JSON response per body, in order, with up to `max_concurrent` requests in flight.

        Raises RequestFailed for the first request that fails for good, and cancels the others.
        """
        return self._runner.run(self.request_all(path, bodies, retries=retries))

    def find_model(self, name: str, *, question: str, hint: str) -> Mapping[str, Any]:
        """Returns what the server says of a model that it serves.  No retries.

        Raises RequestFailed, with `question` if it lists no models and with `hint` if it serves others.
        """
        answer = self.get("/v1/models", retries=0)
        try:
            models = {str(entry["id"]): entry for entry in answer["data"]}
        except (TypeError, KeyError):
            raise RequestFailed(f"{self.url}/v1/models lists no models: {question}") from None
        if name not in models:
            served = listed(models) or "nothing"
            raise RequestFailed(f"the server {self.url} serves {served}, not {shorten(name)}", hint=hint)
        return models[name]

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.aclose())
        if not self._shares_runner:
            self._runner.close()

    async def request_all(
        self,
        path: str,
        bodies: Sequence[Body | None],
        *,
        retries: int | None = None,
        deadline_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
        advance: Advance = no_progress,
    ) -> list[Any]:
        """Returns one JSON response per body (None: a GET), in order, as `post` does.  Raises RequestFailed.

        `advance` receives 1 for each response.
        """
        retries = self.retries if retries is None else retries
        deadline = self.deadline_seconds if deadline_seconds is None else deadline_seconds

        async def request(body: Body | None) -> Any:
            async with self._slots:
                answer = await self._request_with_retries(path, body, headers or {}, retries, deadline)
                advance(1)
                return answer

        return await all_or_none(request(body) for body in bodies)

    async def _request_with_retries(
        self, path: str, body: Body | None, headers: Mapping[str, str], retries: int, deadline: float
    ) -> Any:
        started, attempt = time.monotonic(), 0
        while True:
            remaining = deadline - (time.monotonic() - started)
            try:
                return await self._request_once(path, body, headers, min(self.request_seconds, remaining))
            except RequestFailed as failure:
                delay = min(FIRST_RETRY_DELAY * 2**attempt, MAX_RETRY_DELAY)
                elapsed = time.monotonic() - started
                attempt += 1
                give_up = attempt > retries or elapsed + delay >= deadline
                if give_up or not failure.is_retryable:
                    tries = f" ({attempt} attempts in {elapsed:.0f} s)" if attempt > 1 else ""
                    raise RequestFailed(f"{failure}{tries}", status=failure.status, hint=failure.hint) from None
            await asyncio.sleep(delay)

    async def _request_once(self, path: str, body: Body | None, headers: Mapping[str, str], seconds: float) -> Any:
        where = f"{self.url}{path}"
        try:
            async with asyncio.timeout(seconds):
                method = "GET" if body is None else "POST"
                response = await self._client.request(method, path, json=body, headers=dict(headers))
        except TimeoutError:
            message = f"{where} did not answer within {seconds:.3g} s"
            raise RequestFailed(message, hint=self.slow_hint, is_retryable=True) from None
        except httpx.RequestError as error:
            message = f"{where} cannot be reached: {first_line(error)}"
            raise RequestFailed(message, hint="start the server, or correct its url", is_retryable=True) from None
        status = response.status_code
        if status != 200:
            message = f"{where} answered {status}{_error_text(response)}"
            raise RequestFailed(
                message, status=status, hint=STATUS_HINTS.get(status), is_retryable=status in RETRYABLE_STATUSES
            )
        try:
            return response.json()
        except ValueError:
            raise RequestFailed(f"{where} answered no JSON: is it a vLLM server?", status=status) from None


async def all_or_none(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns the results of concurrent calls, in order; raises the first error, and cancels the others."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _error_text(response: httpx.Response) -> str:
    """Returns `: ` and the message of an error response on one line; empty if it has none."""
    try:
        body = response.json()
        error = body.get("error", body.get("detail", body))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text
    line = " ".join(text.split())
    return f": {line[:300]}" if line else ""
