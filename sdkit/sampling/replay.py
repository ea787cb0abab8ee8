"""Replays the recorded completions of an earlier run; samples nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit.batches import Completion, Rollout, SamplingParams, SamplingRequest
from sdkit.language.errors import BadData
from sdkit.models.weights import Weights
from sdkit.runs.directory import read_lines
from sdkit.spans import span_records, spans_of
from sdkit.stdout import Advance, no_progress


def completion_record(completion: Completion) -> dict[str, Any]:
    """Return a completion as JSON values; `completion_from` reads them."""
    return {
        "completion_ids": completion.ids,
        "sampler_logprobs": completion.logprobs,
        "finished": completion.finished,
        **trajectory_record(completion, completion.reward),
        **written_record(completion),
    }


def written_record(source: Completion | Rollout) -> dict[str, Any]:
    """Return the answer of a writer; nothing if none was asked."""
    return {} if source.written is None else {"written": source.written}


def trajectory_record(trajectory: Completion | Rollout, reward: float | None) -> dict[str, Any]:
    """Return what a trajectory has beyond its tokens, with the environment's reward; nothing for a completion of one turn."""
    if not trajectory.spans:
        return {}
    return {
        "spans": span_records(trajectory.spans),
        "ending": trajectory.ending,
        "turn_rewards": trajectory.turn_rewards,
        "turn_feedback": trajectory.turn_feedback,
        "unanswered": trajectory.unanswered,
        "environment_reward": reward,
        **({} if trajectory.opening is None else {"opening": trajectory.opening}),
    }


def completion_from(record: Mapping[str, Any]) -> Completion:
    """Return the completion of a record in `rollouts/`, or of one that `completion_record` wrote."""
    logprobs = record["sampler_logprobs"]
    return Completion(
        ids=tuple(record["completion_ids"]),
        logprobs=None if logprobs is None else tuple(logprobs),
        finished=record["finished"],
        spans=spans_of(record.get("spans", ())),
        ending=record.get("ending"),
        turn_rewards=tuple(record.get("turn_rewards", ())),
        turn_feedback=tuple(record.get("turn_feedback", ())),
        unanswered=tuple((role, text) for role, text in record.get("unanswered", ())),
        reward=record.get("environment_reward"),
        opening=record.get("opening"),
        written=record.get("written"),
    )


class ReplayRollouts:
    """A rollout backend that looks up completions of an earlier run by prompt and seed."""

    name = "replay"

    def __init__(self, run: Path) -> None:
        self.run = run
        self.recorded: dict[tuple[tuple[int, ...], int], Completion] = {}
        for path in sorted((run / "rollouts").glob("step_*.jsonl")):
            for record in read_lines(path):
                self.recorded[tuple(record["sampled_from_ids"]), record["seed"]] = completion_from(record)
        if not self.recorded:
            raise BadData(f"{run} holds no recorded rollouts", hint="name the directory of an earlier run")

    def load(self, weights: Weights, version: int) -> Mapping[str, float]:
        return {}

    def sample(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams, advance: Advance = no_progress
    ) -> list[Completion]:
        try:
            return [self.recorded[r.prompt_ids, r.seed] for r in requests]
        except KeyError:
            raise BadData(
                f"{self.run} did not record a completion for one of this step's prompts",
                hint="replay needs the same data, chat template, seed and batch sizes, and no more steps than were recorded",
            ) from None

    def close(self) -> None:
        self.recorded.clear()
