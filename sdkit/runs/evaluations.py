"""The scores of an evaluation, prompt by prompt, also as read from a run directory.  Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit.language.errors import counted
from sdkit.runs.intervals import Interval, mean_interval, paired_difference

Key = tuple[str, str, str]
"""Suite, decoding, reward."""
FEW_PROMPTS = 30
"""Suites with fewer prompts get a warning: the 95 % interval of a score of 0.5 is then wider than ±0.17."""
FEW_PROMPTS_ADVICE = f"hold out at least {FEW_PROMPTS} prompts; with 400, a score of 0.5 is known to ±0.05"


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
        """The paired change since `before`, with its interval over prompts."""
        return paired_difference(before.scores[key], self.scores[key])

    @property
    def sizes(self) -> dict[str, int]:
        """The number of prompts by suite."""
        return {key[0]: len(scores) for key, scores in self.scores.items()}

    @property
    def panel(self) -> dict[str, str]:
        """The suites of the panel, each with the entry of the panel that it belongs to."""
        return {record["suite"]: record["panel"] for record in self.records if "panel" in record}

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


def interval_note(methods: Iterable[str | None]) -> str:
    """What the intervals of a table are, from the names of their methods."""
    names = ", ".join(dict.fromkeys(filter(None, methods)))
    return "95 % intervals over prompts" + (f": {names}" if names else "")


def few_prompts_warning(sizes: Mapping[str, int]) -> str | None:
    """A warning that names the suites with fewer than `FEW_PROMPTS` prompts; None if there are none."""
    few = [f"suite {name} has {counted(n, 'prompt')}" for name, n in sizes.items() if n < FEW_PROMPTS]
    return f"{', '.join(few)}: too few to tell small differences from chance" if few else None


def with_interval(interval: Interval) -> str:
    """A mean and its interval, for a table."""
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval) -> tuple[str, str]:
    """A difference, and its interval, for a table."""
    return f"{interval.mean:+.3f}", f"[{interval.low:+.3f}, {interval.high:+.3f}]"
