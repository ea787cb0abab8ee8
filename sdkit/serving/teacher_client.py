"""A teacher behind a vLLM server: checked before anything is loaded, then asked for what it thinks of token ids.

A request is a teacher's prompt with the completion behind it; the answer's `prompt_logprobs` are the k likeliest tokens
at each place and the token that stands there, at temperature 1 whatever is asked.  Knows nothing of losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sdkit.batches import TopKLogprobs, UnpaddedSequence
from sdkit.language.errors import BadData, BadEnvironment, ProcessDied, SdkitError, listed, shorten
from sdkit.language.specs import ServedWeights
from sdkit.serving.client import RequestFailed, Server, key_from

BLOCK = 1024
"""Token ids that the server spells in one request."""

NOTHING = -9999.0
"""What vLLM writes for a log-probability of -inf, which JSON does not have."""

MASS_SLACK = 1e-2
"""How far above 1 the k probabilities may sum: those of a bfloat16 model are rounded."""


class ServedModel:
    """One model of one server.  Raises BadEnvironment where its key is not in the environment."""

    def __init__(self, spec: ServedWeights, k: int, environment: Mapping[str, str]) -> None:
        key = key_from(spec.key_from, environment, "teacher.weights")
        self.spec = spec
        self.k = k
        self.context: int | None = None  # tokens of the longest request, where the server says so
        self.root: str | None = None  # where the server says it has the model from
        self.server = Server(
            spec.url,
            key=key,
            remote=spec.allow_remote,
            at_once=spec.requests_at_once,
            request_seconds=spec.request_seconds,
            deadline_seconds=spec.deadline_seconds,
            retries=spec.retries,
        )

    # ── before anything is loaded ─────────────────────────────────────────────────────────────

    def check(self, tokenizer: Any) -> None:
        """The server is up, has the model, spells every id as the student does, and answers as it will be asked.

        Nothing is tried twice.  Raises BadEnvironment, and BadData where the vocabularies differ.
        """
        with _ends_as(BadEnvironment):
            self._find_model(self.server.get("/v1/models", retries=0))
            self._compare_spelling(tokenizer)
        known = sorted(tokenizer.get_vocab().values())
        probe = UnpaddedSequence(
            prompt=tuple(known[:1]), completion=tuple(known[1:2]), positions=(0,)
        )
        try:
            self._ask([probe], known[-1] + 1, retries=0)
        except RequestFailed as fault:
            hint = f"start it with --max-logprobs {self.k}" if fault.status == 400 else fault.hint
            raise BadEnvironment(str(fault), hint=hint) from None

    def check_length(self, longest: int) -> None:
        """Raise BadData where a sequence of so many tokens is too long for the server."""
        # A request asks for one token beyond the sequence, the least that vLLM generates.
        if self.context and longest >= self.context:
            raise BadData(
                f"the longest prompt and completion have {longest} tokens, the served teacher {self.spec.model} takes "
                f"{self.context - 1}",
                hint=f"start it with --max-model-len {longest + 1}, or lower rollout.max_new_tokens",
            )

    def _find_model(self, answer: Any) -> None:
        try:
            models = {str(entry["id"]): entry for entry in answer["data"]}
        except (TypeError, KeyError):
            raise RequestFailed(
                f"{self.server.url}/v1/models lists no models: is it a vLLM server?"
            ) from None
        if self.spec.model not in models:
            raise RequestFailed(
                f"the server {self.server.url} serves {listed(models) or 'nothing'}, not {shorten(self.spec.model)}",
                hint="correct teacher.weights.model, or start the server with --served-model-name",
            )
        found = models[self.spec.model]
        self.context, self.root = found.get("max_model_len"), found.get("root")

    def _compare_spelling(self, tokenizer: Any) -> None:
        """Compare the text of every id that the student has, a block of ids at a time.

        A block that differs is halved until one id is found; where none differs alone, only the joints did.
        """
        ids = sorted(tokenizer.get_vocab().values())
        blocks = [ids[i : i + BLOCK] for i in range(0, len(ids), BLOCK)]
        while blocks:
            odd = [
                (block, text)
                for block, text in zip(blocks, self._spelled(blocks), strict=True)
                if text != tokenizer.decode(block)
            ]
            for block, text in odd:
                if len(block) == 1:
                    raise BadData(
                        f"the teacher {self.spec.model} at {self.server.url} has another vocabulary than the student: "
                        f"the id {block[0]} is {shorten(tokenizer.decode(block))} for the student, {shorten(text)} "
                        "for the teacher",
                        hint="distributions are compared id by id: serve a teacher with the student's tokenizer",
                    )
            halves = [(block[: len(block) // 2], block[len(block) // 2 :]) for block, _ in odd]
            blocks = [half for pair in halves for half in pair]

    def _spelled(self, blocks: Sequence[Sequence[int]]) -> list[str]:
        bodies = [{"model": self.spec.model, "tokens": list(block)} for block in blocks]
        try:
            return [str(a["prompt"]) for a in self.server.post("/detokenize", bodies, retries=0)]
        except RequestFailed as fault:
            if fault.status == 400:
                message = f"the served teacher does not know every token id of the student: {fault}"
                raise BadData(message, hint="serve one with the student's tokenizer") from None
            raise
        except (KeyError, TypeError):
            raise RequestFailed(f"{self.server.url}/detokenize answered without a text") from None

    # ── during the run ────────────────────────────────────────────────────────────────────────

    def score(self, texts: Sequence[UnpaddedSequence], rows: int) -> TopKLogprobs:
        """What the model thinks of the kept tokens of each text, one text after the other, over ids below `rows`.

        Raises ProcessDied where the server does not answer in time, or not as it should.
        """
        with _ends_as(ProcessDied):
            return self._ask([text for text in texts if text.positions], rows)

    def close(self) -> None:
        """Close the connections."""
        self.server.close()

    def _ask(
        self, texts: Sequence[UnpaddedSequence], rows: int, retries: int | None = None
    ) -> TopKLogprobs:
        bodies = [self._question(text) for text in texts]
        answers = self.server.post("/v1/completions", bodies, retries=retries)
        told = [self._read(*pair, rows) for pair in zip(texts, answers, strict=True)]
        flat = [entry for each in told for entry in each]
        k = self.k
        return TopKLogprobs(
            ids=torch.tensor([e[0] for e in flat], dtype=torch.long).reshape(len(flat), k),
            logprobs=torch.tensor([e[1] for e in flat], dtype=torch.float32).reshape(len(flat), k),
            sampled=torch.tensor([e[2] for e in flat], dtype=torch.float32),
        )

    def _question(self, text: UnpaddedSequence) -> dict[str, Any]:
        """Up to the last token that is asked about."""
        return {
            "model": self.spec.model,
            "prompt": [*text.prompt, *text.completion[: text.positions[-1] + 1]],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.k,
        }

    def _read(
        self, text: UnpaddedSequence, answer: Any, rows: int
    ) -> list[tuple[list[int], list[float], float]]:
        """For each kept token: ids and log-probabilities of the k likeliest, log-probability of the token."""
        try:
            places = answer["choices"][0]["prompt_logprobs"]
            if len(places) != len(text.prompt) + text.positions[-1] + 1:
                raise RequestFailed(
                    f"{self.server.url} told of {len(places)} tokens for {len(text.prompt) + text.positions[-1] + 1}"
                )
            return [
                _entry(places[len(text.prompt) + p], text.completion[p], self.k, rows)
                for p in text.positions
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestFailed(
                f"{self.server.url} answered without the log-probabilities of the prompt ({error})"
            ) from None


def _entry(
    place: Mapping[str, Mapping[str, Any]], token: int, k: int, rows: int
) -> tuple[list[int], list[float], float]:
    """One place of the answer.  The token that stands there is told of even where it is not among the k likeliest.

    Ids that the student has not are left out: their probability is part of the remainder.
    """
    logprobs = {int(key): _logprob(entry["logprob"]) for key, entry in place.items()}
    own = logprobs[token]
    if len(logprobs) == k + 1:
        del logprobs[token]
    if len(logprobs) != k:
        raise ValueError(f"{len(logprobs)} tokens where {k} were asked for")
    if math.fsum(map(math.exp, logprobs.values())) > 1 + MASS_SLACK:
        raise ValueError("they sum to more than 1: is the server's --logprobs-mode one of logits?")
    order = sorted((i for i in logprobs if i < rows), key=lambda i: -logprobs[i])
    missing = k - len(order)
    kept = [logprobs[i] for i in order]
    return order + [0] * missing, kept + [-math.inf] * missing, own


def _logprob(value: float) -> float:
    value = float(value)
    if not value <= MASS_SLACK:
        raise ValueError(f"{value} is none")
    return -math.inf if value <= NOTHING else value


@contextlib.contextmanager
def _ends_as(failure: type[SdkitError]) -> Iterator[None]:
    try:
        yield
    except RequestFailed as fault:
        raise failure(str(fault), hint=fault.hint) from None
