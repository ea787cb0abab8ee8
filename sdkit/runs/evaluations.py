"""What an evaluation found, prompt by prompt, and the same read back from a run directory.  Loads no torch."""

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

    scores: Mapping[
        Key, tuple[float, ...]
    ]  # a prompt's mean over its samples, in the suite's order
    records: Sequence[Mapping[str, Any]]
    tokens: int  # generated
    lengths: Mapping[tuple[str, str], float]  # mean completion length

    def interval(self, key: Key) -> Interval:
        return mean_interval(self.scores[key])

    def difference(self, before: EvaluationResult, key: Key) -> Interval:
        """The paired change since `before`, with its bootstrap interval over prompts."""
        return paired_difference(before.scores[key], self.scores[key])

    def metrics(self, headline: Key) -> dict[str, float]:
        """Keys under eval/: the headline's score with interval and n, and every score by name."""
        found: dict[str, float] = {}
        for key in self.scores:
            interval = self.interval(key)
            names = ["eval/" + "/".join(key)] + (["eval/score"] if key == headline else [])
            for name in names:
                found |= {
                    name: interval.mean,
                    f"{name}_low": interval.low,
                    f"{name}_high": interval.high,
                }
                found[f"{name}_n"] = interval.n
        for (suite, decoding), length in self.lengths.items():
            found[f"eval/{suite}/{decoding}/completion_tokens"] = length
        return found


def read_back(records: Sequence[Mapping[str, Any]]) -> EvaluationResult:
    """An evaluation from what the run directory keeps of it (a resumed run compares with its own beginning)."""
    scores = {key: tuple(each.values()) for key, each in per_prompt(records).items()}
    return EvaluationResult(scores=scores, records=records, tokens=0, lengths={})


def per_prompt(records: Sequence[Mapping[str, Any]]) -> dict[Key, dict[tuple[int, str], float]]:
    """Per score: of each prompt, by row and text, the mean over its samples."""
    found: dict[Key, dict[tuple[int, str], list[float]]] = {}
    for record in records:
        prompt = record["row"], record["prompt"]
        for reward, value in record["scores"].items():
            prompts = found.setdefault((record["suite"], record["decoding"], reward), {})
            prompts.setdefault(prompt, []).append(value)
    return {
        key: {prompt: sum(values) / len(values) for prompt, values in prompts.items()}
        for key, prompts in found.items()
    }


def with_interval(interval: Interval) -> str:
    """A mean and its interval, for a table."""
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval) -> tuple[str, str]:
    """A difference, and its interval, for a table."""
    return f"{interval.mean:+.3f}", f"[{interval.low:+.3f}, {interval.high:+.3f}]"
