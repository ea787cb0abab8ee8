"""What the scores of an evaluation of trajectories say by turn.  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from sdkit.language.metric_names import GIVEN_FAILURE, TURNS_TO_SUCCESS, WITHIN
from sdkit.runs.intervals import Interval
from sdkit.runs.seed_intervals import clustered_wilson

Part = tuple[str, str]
"""Suite and decoding."""


@frozen(kw_only=True)
class SuccessByTurn:
    """How often and when the trajectories of one suite and decoding succeed."""

    turns: Sequence[int]  # the K for which there is a score within_K, in order
    # Turn after the first → success in it, of the trajectories without one before.
    given_failure: Mapping[int, Interval]
    # Mean turn of the first success, of the trajectories that have one; None if none has.
    turns_to_success: float | None


def success_by_turn(scores: Mapping[tuple[str, str, str], Sequence[float]]) -> dict[Part, SuccessByTurn]:
    """The figures of each suite and decoding that has scores within_K.

    scores: suite, decoding and name → one value per prompt, the mean over its samples.
    """
    within: dict[Part, dict[int, Sequence[float]]] = {}
    for (suite, decoding, name), values in scores.items():
        if name.startswith(WITHIN):
            within.setdefault((suite, decoding), {})[int(name.removeprefix(WITHIN))] = values
    return {part: _figures(dict(sorted(by_turn.items()))) for part, by_turn in within.items()}


def _figures(within: Mapping[int, Sequence[float]]) -> SuccessByTurn:
    given_failure: dict[int, Interval] = {}
    weighted = total = 0.0
    before = [0.0] * len(next(iter(within.values())))
    for turn, values in within.items():
        gained = [now - earlier for now, earlier in zip(values, before, strict=True)]
        failed = [(gain, 1 - earlier) for gain, earlier in zip(gained, before, strict=True) if earlier < 1]
        if failed and turn > 1:
            shares = [round(gain / rest, 9) for gain, rest in failed]  # thirds and the like are equal again
            given_failure[turn] = clustered_wilson(shares, [rest for _, rest in failed])
        weighted, total, before = weighted + turn * sum(gained), total + sum(gained), list(values)
    return SuccessByTurn(
        turns=list(within), given_failure=given_failure, turns_to_success=weighted / total if total else None
    )


def turn_metrics(scores: Mapping[tuple[str, str, str], Sequence[float]]) -> dict[str, float]:
    """Metrics under eval/: success in each turn given failure before, and the mean number of turns to success."""
    metrics: dict[str, float] = {}
    for part, figures in success_by_turn(scores).items():
        start = "/".join(("eval", *part, ""))
        metrics |= {f"{start}{GIVEN_FAILURE}{turn}": share.mean for turn, share in figures.given_failure.items()}
        if figures.turns_to_success is not None:
            metrics[start + TURNS_TO_SUCCESS] = figures.turns_to_success
    return metrics
