"""A client for a teacher behind a vLLM server, which returns log-probabilities of completion tokens.

A request is the teacher's prompt followed by a completion.  The response's `prompt_logprobs` hold, at each position, the
k most likely tokens and the actual token, always at temperature 1.  Knows nothing of losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sdkit.batches import TopKLogprobs, UnpaddedSequence
from sdkit.language.errors import BadData, BadEnvironment, ProcessDied, SdkitError, shorten
from sdkit.language.specs import ServedWeights
from sdkit.serving.client import RequestFailed, Server, key_from

SPELLING_BLOCK = 1024
"""Token ids to detokenize in one request."""

VLLM_NEGATIVE_INFINITY = -9999.0
"""vLLM's value for a log-probability of -inf, which JSON cannot express."""

PROBABILITY_SLACK = 1e-2
"""How far the sum of the k probabilities may exceed 1: a bfloat16 model rounds them."""


class ServedModel:
    """One model on one server.  Raises BadEnvironment if its key is not in the environment."""

    def __init__(self, spec: ServedWeights, k: int, environment: Mapping[str, str]) -> None:
        key = key_from(spec.key_from, environment, "teacher.weights")
        self.spec = spec
        self.k = k
        self.context: int | None = None  # longest request in tokens, if the server reports it
        self.root: str | None = None  # the source of the model, if the server reports it
        self.server = Server(
            spec.url,
            key=key,
            remote=spec.allow_remote,
            max_concurrent=spec.requests_at_once,
            request_seconds=spec.request_seconds,
            deadline_seconds=spec.deadline_seconds,
            retries=spec.retries,
        )

    def check(self, tokenizer: Any) -> None:
        """Check that the server is up, serves the model, has the student's vocabulary and returns log-probabilities.

        No retries.  Raises BadEnvironment, or BadData if the vocabularies differ.
        """
        with _request_failures_as(BadEnvironment):
            entry = self.server.find_model(
                self.spec.model,
                question="is it a vLLM server?",
                hint="correct teacher.weights.model, or start the server with --served-model-name",
            )
            self.context, self.root = entry.get("max_model_len"), entry.get("root")
            self._compare_spelling(tokenizer)
        known = sorted(tokenizer.get_vocab().values())
        probe = UnpaddedSequence(prompt=tuple(known[:1]), completion=tuple(known[1:2]), positions=(0,))
        try:
            self._request_logprobs([probe], known[-1] + 1, retries=0)
        except RequestFailed as failure:
            hint = f"start it with --max-logprobs {self.k}" if failure.status == 400 else failure.hint
            raise BadEnvironment(str(failure), hint=hint) from None

    def check_length(self, longest: int) -> None:
        """Raise BadData if a sequence of `longest` tokens is too long for the server."""
        # vLLM generates at least one token, so a request needs one more than the sequence.
        if self.context and longest >= self.context:
            raise BadData(
                f"the longest prompt and completion have {longest} tokens, the served teacher {self.spec.model} accepts "
                f"{self.context - 1}",
                hint=f"start it with --max-model-len {longest + 1}, or lower rollout.max_new_tokens",
            )

    def _compare_spelling(self, tokenizer: Any) -> None:
        """Compare the text of every id of the student's vocabulary, a block of ids at a time.

        A block that differs is halved until a single id differs.  If none does, only the joints between ids differ,
        which is no error.
        """
        ids = sorted(tokenizer.get_vocab().values())
        blocks = [ids[i : i + SPELLING_BLOCK] for i in range(0, len(ids), SPELLING_BLOCK)]
        while blocks:
            differing = [
                (block, text)
                for block, text in zip(blocks, self._detokenize(blocks), strict=True)
                if text != tokenizer.decode(block)
            ]
            for block, text in differing:
                if len(block) == 1:
                    raise BadData(
                        f"the teacher {self.spec.model} at {self.server.url} has another vocabulary than the student: "
                        f"the id {block[0]} is {shorten(tokenizer.decode(block))} for the student, {shorten(text)} "
                        "for the teacher",
                        hint="distributions are compared id by id: serve a teacher with the student's tokenizer",
                    )
            halves = [(block[: len(block) // 2], block[len(block) // 2 :]) for block, _ in differing]
            blocks = [half for pair in halves for half in pair]

    def _detokenize(self, blocks: Sequence[Sequence[int]]) -> list[str]:
        bodies = [{"model": self.spec.model, "tokens": list(block)} for block in blocks]
        try:
            return [str(a["prompt"]) for a in self.server.post("/detokenize", bodies, retries=0)]
        except RequestFailed as failure:
            if failure.status == 400:
                message = f"the served teacher does not know every token id of the student: {failure}"
                raise BadData(message, hint="serve one with the student's tokenizer") from None
            raise
        except (KeyError, TypeError):
            raise RequestFailed(f"{self.server.url}/detokenize answered without a text") from None

    def score(self, texts: Sequence[UnpaddedSequence], rows: int) -> TopKLogprobs:
        """Returns the top-k log-probabilities at the requested positions of the texts, over ids below `rows`.  [M, k]

        Raises ProcessDied if the server does not answer in time, or not with log-probabilities.
        """
        with _request_failures_as(ProcessDied):
            return self._request_logprobs([text for text in texts if text.positions], rows)

    def close(self) -> None:
        """Close the connections."""
        self.server.close()

    def _request_logprobs(
        self, texts: Sequence[UnpaddedSequence], rows: int, retries: int | None = None
    ) -> TopKLogprobs:
        bodies = [self._request_body(text) for text in texts]
        answers = self.server.post("/v1/completions", bodies, retries=retries)
        per_text = [self._parse_answer(*pair, rows) for pair in zip(texts, answers, strict=True)]
        flat = [entry for entries in per_text for entry in entries]
        k = self.k
        return TopKLogprobs(
            ids=torch.tensor([e[0] for e in flat], dtype=torch.long).reshape(len(flat), k),
            logprobs=torch.tensor([e[1] for e in flat], dtype=torch.float32).reshape(len(flat), k),
            sampled=torch.tensor([e[2] for e in flat], dtype=torch.float32),
        )

    def _request_body(self, text: UnpaddedSequence) -> dict[str, Any]:
        """Returns the request for one text, cut after the last requested position."""
        return {
            "model": self.spec.model,
            "prompt": [*text.prompt, *text.completion[: text.positions[-1] + 1]],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.k,
        }

    def _parse_answer(
        self, text: UnpaddedSequence, answer: Any, rows: int
    ) -> list[tuple[list[int], list[float], float]]:
        """Returns, for each requested token: the k most likely ids, their log-probabilities, and the token's own."""
        try:
            logprobs = answer["choices"][0]["prompt_logprobs"]
            if len(logprobs) != len(text.prompt) + text.positions[-1] + 1:
                raise RequestFailed(
                    f"{self.server.url} returned {len(logprobs)} tokens for {len(text.prompt) + text.positions[-1] + 1}"
                )
            return [
                _parse_position(logprobs[len(text.prompt) + p], text.completion[p], self.k, rows)
                for p in text.positions
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestFailed(
                f"{self.server.url} answered without the log-probabilities of the prompt ({error})"
            ) from None


def _parse_position(
    position: Mapping[str, Mapping[str, Any]], token: int, k: int, rows: int
) -> tuple[list[int], list[float], float]:
    """Returns ids, log-probabilities and the token's own log-probability at one position.

    vLLM adds the actual token if it is not among the k most likely.  Ids outside the student's vocabulary are dropped:
    their probability becomes part of the remainder.
    """
    logprobs = {int(key): _logprob(entry["logprob"]) for key, entry in position.items()}
    token_logprob = logprobs[token]
    if len(logprobs) == k + 1:
        del logprobs[token]
    if len(logprobs) != k:
        raise ValueError(f"{len(logprobs)} tokens instead of {k}")
    if math.fsum(map(math.exp, logprobs.values())) > 1 + PROBABILITY_SLACK:
        raise ValueError("their probabilities sum to more than 1: does the server's --logprobs-mode return logits?")
    order = sorted((i for i in logprobs if i < rows), key=lambda i: -logprobs[i])
    missing = k - len(order)
    values = [logprobs[i] for i in order]
    return order + [0] * missing, values + [-math.inf] * missing, token_logprob


def _logprob(value: float) -> float:
    value = float(value)
    if not value <= PROBABILITY_SLACK:
        raise ValueError(f"{value} is not a log-probability")
    return -math.inf if value <= VLLM_NEGATIVE_INFINITY else value


@contextlib.contextmanager
def _request_failures_as(error: type[SdkitError]) -> Iterator[None]:
    """Raise an error of this class for each RequestFailed."""
    try:
        yield
    except RequestFailed as failure:
        raise error(str(failure), hint=failure.hint) from None
