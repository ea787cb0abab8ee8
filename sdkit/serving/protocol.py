"""What is written to a rollout server and read from it: its state, completions, log-probabilities of the canary.

Knows JSON and token ids; knows nothing of connections.  What cannot be read raises Unanswered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit import __version__
from sdkit.batches import Completion, SamplingRequest
from sdkit.language.errors import BadEnvironment, shorten
from sdkit.serving.client import RequestFailed
from sdkit.serving.gateway import SPEC_HEADER
from sdkit.serving.weight_files import WeightFolder

START = "start it with `sdkit serve` and this spec"


@frozen(kw_only=True)
class ExpectedServer:
    """What a server must be, to sample for a run."""

    config: Mapping[str, Any]  # of the student's config.json
    dtype: str
    folder: WeightFolder


@frozen(kw_only=True)
class ServerState:
    """What a server that can sample for this run says of itself."""

    max_tokens: int
    sha256: str | None  # of the weights that it has


def read_state(url: str, told: Any, wanted: ExpectedServer) -> ServerState:
    """What a server says of itself.  Raises BadEnvironment where it cannot sample for this run."""
    try:
        weights = told["weights"] and told["weights"]["sha256"]
        state = ServerState(max_tokens=int(told["max_tokens"]), sha256=weights)
        unfit = next(_mismatch(told, wanted), None)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RequestFailed(f"{url}/sdkit/state does not say what it serves") from None
    if unfit:
        raise BadEnvironment(f"rollout server {url}: {unfit}", hint=START)
    return state


def _mismatch(state: Mapping[str, Any], wanted: ExpectedServer) -> Iterator[str]:
    """Why a server cannot sample for a run."""
    if state["sdkit"] != __version__:
        yield f"it is of sdkit {state['sdkit']}, the trainer of {__version__}"
    for name in SPEC_HEADER:
        theirs, ours = state["model"].get(name), wanted.config.get(name)
        if theirs is None or ours is None:
            continue  # what one side does not say, the canary will
        if theirs != ours:
            yield f"its model has {name} {shorten(theirs)}, the student {shorten(ours)}"
    if state["dtype"] != wanted.dtype:
        yield f"it serves {state['dtype']}, and the run wants {wanted.dtype}"
    if not state["sees_probe"]:
        yield (
            f"it takes weights from {state['folder']}, and does not see there what this run writes to "
            f"{wanted.folder.path} (rollout.backend.folder)"
        )


def completion_body(request: SamplingRequest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Asks for one completion; `settings` are those of `sampling_settings`."""
    return {
        "prompt": list(request.prompt_ids),
        **settings,
        **({"seed": request.seed} if settings["temperature"] else {}),
        "return_token_ids": True,
    }


def read_completion(url: str, answer: Any) -> Completion:
    """The completion that a server sampled."""
    try:
        choice = answer["choices"][0]
        ids = tuple(int(token) for token in choice["token_ids"])
        logprobs = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
        reason = choice["finish_reason"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RequestFailed(
            f"{url} answered without token ids and their log-probabilities ({error})"
        ) from None
    if reason not in ("stop", "length") or len(ids) != len(logprobs):
        raise RequestFailed(f"{url} broke a completion off ({reason})")
    return Completion(ids=ids, logprobs=logprobs, finished=reason == "stop")


def canary_body(ids: Sequence[int]) -> dict[str, Any]:
    """Asks for the log-probabilities of the tokens of a sequence."""
    return {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def read_canary(url: str, answer: Any, ids: Sequence[int]) -> list[float]:
    """The log-probabilities of all tokens but the first."""
    try:
        places = answer["choices"][0]["prompt_logprobs"][1:]
        scored = zip(places, ids[1:], strict=True)
        return [float(place[str(token)]["logprob"]) for place, token in scored]
    except (KeyError, IndexError, TypeError, ValueError):
        raise RequestFailed(f"{url} answered without the log-probabilities of the prompt") from None
