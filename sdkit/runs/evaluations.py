"""The scores of an evaluation, prompt by prompt, also as read from a run directory.  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit.runs.intervals import Interval, mean_interval, paired_difference

Key = tuple[str, str, str]
"""Suite, decoding, reward."""


@frozen(eq=False, kw_only=True)
class EvaluationResult:
    """Scores of one evaluation, prompt by prompt, so that two evaluations can be compared in pairs."""

    # For each prompt, in the suite's order, the mean over its samples.
    scores: Mapping[Key, tuple[float, ...]]
    records: Sequence[Mapping[str, Any]]
    tokens: int  # generated
    lengths: Mapping[tuple[str, str], float]  # mean completion length

    def interval(self, key: Key) -> Interval:
        return mean_interval(self.scores[key])

    def difference(self, before: EvaluationResult, key: Key) -> Interval:
        """The paired change since `before`, with its bootstrap interval over prompts."""
        return paired_difference(before.scores[key], self.scores[key])

    def metrics(self, headline: Key) -> dict[str, float]:
        """Metrics under eval/: every score by name, and the headline as eval/score, each with its interval and n."""
        metrics: dict[str, float] = {}
        for key in self.scores:
            interval = self.interval(key)
            names = ["eval/" + "/".join(key)] + (["eval/score"] if key == headline else [])
            for name in names:
                metrics |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
                metrics[f"{name}_n"] = interval.n
        for (suite, decoding), length in self.lengths.items():
            metrics[f"eval/{suite}/{decoding}/completion_tokens"] = length
        return metrics


def read_back(records: Sequence[Mapping[str, Any]]) -> EvaluationResult:
    """The evaluation stored in these records of a run directory (a resumed run compares with its first one)."""
    scores = {key: tuple(prompts.values()) for key, prompts in per_prompt(records).items()}
    return EvaluationResult(scores=scores, records=records, tokens=0, lengths={})


def per_prompt(records: Sequence[Mapping[str, Any]]) -> dict[Key, dict[tuple[int, str], float]]:
    """For each score and prompt (row and text), the mean over the prompt's samples."""
    scores: dict[Key, dict[tuple[int, str], list[float]]] = {}
    for record in records:
        prompt = record["row"], record["prompt"]
        for reward, value in record["scores"].items():
            prompts = scores.setdefault((record["suite"], record["decoding"], reward), {})
            prompts.setdefault(prompt, []).append(value)
    return {
        key: {prompt: sum(values) / len(values) for prompt, values in prompts.items()}
        for key, prompts in scores.items()
    }


def with_interval(interval: Interval) -> str:
    """A mean and its interval, for a table."""
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval) -> tuple[str, str]:
    """A difference, and its interval, for a table."""
    return f"{interval.mean:+.3f}", f"[{interval.low:+.3f}, {interval.high:+.3f}]"
