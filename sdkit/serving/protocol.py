"""Request bodies for rollout servers, and parsers of their responses: state, completions, canary log-probabilities.

Knows JSON and token ids; knows nothing of connections.  A response that cannot be parsed raises RequestFailed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit import __version__
from sdkit.batches import Completion, SamplingRequest
from sdkit.language.errors import BadEnvironment, shorten
from sdkit.serving.client import RequestFailed
from sdkit.serving.gateway import COMPARED_CONFIG_KEYS
from sdkit.serving.weight_files import WeightFolder

START_HINT = "start it with `sdkit serve` and this spec"


@frozen(kw_only=True)
class ExpectedServer:
    """What a run requires of its rollout servers."""

    config: Mapping[str, Any]  # the student's config.json
    dtype: str
    folder: WeightFolder


@frozen(kw_only=True)
class ServerState:
    """The state that a suitable server reports."""

    max_tokens: int
    sha256: str | None  # of the loaded weights


def read_state(url: str, response: Any, expected: ExpectedServer) -> ServerState:
    """Returns the state in a server's response.  Raises BadEnvironment if the server cannot sample for this run."""
    try:
        weights = response["weights"] and response["weights"]["sha256"]
        state = ServerState(max_tokens=int(response["max_tokens"]), sha256=weights)
        mismatch = next(_mismatch(response, expected), None)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RequestFailed(f"{url}/sdkit/state does not say what it serves") from None
    if mismatch:
        raise BadEnvironment(f"rollout server {url}: {mismatch}", hint=START_HINT)
    return state


def _mismatch(state: Mapping[str, Any], expected: ExpectedServer) -> Iterator[str]:
    """Yields the reasons why a server cannot sample for a run."""
    if state["sdkit"] != __version__:
        yield f"it runs sdkit {state['sdkit']}, the trainer {__version__}"
    for name in COMPARED_CONFIG_KEYS:
        theirs, ours = state["model"].get(name), expected.config.get(name)
        if theirs is None or ours is None:
            continue  # unknown on one side: the canary finds a difference
        if theirs != ours:
            yield f"its model has {name} {shorten(theirs)}, the student {shorten(ours)}"
    if state["dtype"] != expected.dtype:
        yield f"it serves {state['dtype']}, the run needs {expected.dtype}"
    if not state["sees_probe"]:
        yield (
            f"it reads weights from {state['folder']}, which does not contain what this run writes to "
            f"{expected.folder.path} (rollout.backend.folder)"
        )


def completion_body(request: SamplingRequest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the request for one completion; `settings` come from `sampling_settings`."""
    limit = request.max_new_tokens
    return {
        "prompt": list(request.prompt_ids),
        **settings,
        **({} if limit is None else {"max_tokens": limit}),
        **({"seed": request.seed} if settings["temperature"] else {}),
        "return_token_ids": True,
    }


def read_completion(url: str, answer: Any) -> Completion:
    """Returns the completion in a server's response."""
    try:
        choice = answer["choices"][0]
        ids = tuple(int(token) for token in choice["token_ids"])
        logprobs = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
        reason = choice["finish_reason"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RequestFailed(f"{url} answered without token ids and their log-probabilities ({error})") from None
    if reason not in ("stop", "length") or len(ids) != len(logprobs):
        raise RequestFailed(f"{url} returned an incomplete completion ({reason})")
    return Completion(ids=ids, logprobs=logprobs, finished=reason == "stop")


def canary_body(ids: Sequence[int]) -> dict[str, Any]:
    """Returns the request for the log-probabilities of a sequence's tokens."""
    return {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def read_canary(url: str, answer: Any, ids: Sequence[int]) -> list[float]:
    """Returns the log-probabilities of all tokens but the first."""
    try:
        places = answer["choices"][0]["prompt_logprobs"][1:]
        scored = zip(places, ids[1:], strict=True)
        return [float(place[str(token)]["logprob"]) for place, token in scored]
    except (KeyError, IndexError, TypeError, ValueError):
        raise RequestFailed(f"{url} answered without the log-probabilities of the prompt") from None
