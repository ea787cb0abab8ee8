"""A client for the writer of a teacher's context: a model behind an OpenAI-compatible chat API.

One chat for each question.  An answer that cannot be used is asked for again, in the same chat.  Knows nothing of
rollouts or slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit.language.errors import BadEnvironment
from sdkit.language.specs import Writer
from sdkit.serving.client import RequestFailed, Server, key_from

AGAIN = "This answer cannot be used: {fault}. Answer again, with nothing else."
"""The next message of a chat after an answer that cannot be used."""
SLOW_HINT = "raise deadline_seconds and request_seconds, or requests_at_once"

Fault = Callable[[str], str | None]
"""Returns what is wrong with an answer, or None."""


@frozen(kw_only=True)
class Answer:
    """A writer's answer; empty if it failed, and then why."""

    text: str
    fault: str = ""


class WriterClient:
    """One model on one server.  Raises BadEnvironment if its key is not in the environment."""

    def __init__(self, spec: Writer, environment: Mapping[str, str]) -> None:
        self.spec = spec
        self._runner = asyncio.Runner()
        self.server = Server(
            spec.url,
            key=key_from(spec.key_from, environment, "teacher.sees.writer"),
            remote=spec.allow_remote,
            max_concurrent=spec.requests_at_once,
            request_seconds=spec.request_seconds,
            deadline_seconds=spec.deadline_seconds,
            retries=spec.retries,
            slow_hint=SLOW_HINT,
            runner=self._runner,
        )

    def check(self) -> None:
        """Raise BadEnvironment unless the server is up and serves the model.  No retries."""
        try:
            self.server.find_model(
                self.spec.model, question="has it a chat API?", hint="correct teacher.sees.writer.model"
            )
        except RequestFailed as failure:
            raise BadEnvironment(str(failure), hint=failure.hint) from None

    def ask(self, questions: Sequence[tuple[str, int]], fault: Fault) -> list[Answer]:
        """Returns an answer to each question, a text with a seed, in order.

        All answers are due within `deadline_seconds` of the call.
        """
        return self._runner.run(self._ask_all(questions, fault))

    def close(self) -> None:
        """Close the connections."""
        self.server.close()
        self._runner.close()

    async def _ask_all(self, questions: Sequence[tuple[str, int]], fault: Fault) -> list[Answer]:
        due = time.monotonic() + self.spec.deadline_seconds
        semaphore = asyncio.Semaphore(self.spec.requests_at_once)

        async def ask(text: str, seed: int) -> Answer:
            async with semaphore:
                return await self._ask(text, seed, fault, due)

        return await asyncio.gather(*(ask(*question) for question in questions))

    async def _ask(self, question: str, seed: int, fault: Fault, due: float) -> Answer:
        """The answer to one question, asked `attempts` times at most, until `due`."""
        messages, wrong = [{"role": "user", "content": question}], ""
        for attempt in range(self.spec.attempts):
            left = due - time.monotonic()
            if left <= 0:
                return Answer(text="", fault=wrong or f"late: {self.spec.deadline_seconds:g} s were over")
            try:
                body = self._body(messages, seed + attempt)
                (response,) = await self.server.request_all("/v1/chat/completions", [body], deadline_seconds=left)
                text = _content(response)
            except RequestFailed as failure:
                return Answer(text="", fault=str(failure))
            if (wrong := fault(text)) is None:
                return Answer(text=text)
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": AGAIN.format(fault=wrong)},
            ]
        return Answer(text="", fault=wrong)

    def _body(self, messages: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
        return {
            "model": self.spec.model,
            "messages": list(messages),
            "temperature": self.spec.temperature,
            "max_completion_tokens": self.spec.max_new_tokens,
            "seed": seed,
        }


def _content(response: Any) -> str:
    """The text of a response's message; empty if it has none, as after a refusal.  Raises RequestFailed."""
    try:
        text = response["choices"][0]["message"].get("content") or ""
        return text.encode("utf-8", "replace").decode()  # JSON may spell half of a character
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailed("the server answered without a message") from None
