"""The scores of an evaluation, prompt by prompt, also as read from a run directory.  Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from attrs import field, frozen

from sdkit.language.errors import counted
from sdkit.language.metric_names import BOUNDED_MEASURES, PASS_AT, pass_at
from sdkit.runs.intervals import Interval, mean_interval, paired_difference
from sdkit.runs.sample_measures import passed_at
from sdkit.runs.turns import turn_metrics

Key = tuple[str, str, str]
"""Suite, decoding, and a reward, pass_at_K or a measure."""
Prompt = tuple[int, str]
"""A prompt's row and text."""
FEW_PROMPTS = 30
"""Suites with fewer prompts get a warning: the 95 % interval of a score of 0.5 is then wider than ±0.17."""
FEW_PROMPTS_ADVICE = f"hold out at least {FEW_PROMPTS} prompts; with 400, a score of 0.5 is known to ±0.05"


@frozen(eq=False, kw_only=True)
class EvaluationResult:
    """Scores of one evaluation, prompt by prompt, so that two evaluations can be compared in pairs."""

    # For each prompt, in the suite's order: the mean over its samples, and pass@k under the names pass_at_K.
    scores: Mapping[Key, tuple[float, ...]]
    records: Sequence[Mapping[str, Any]]
    tokens: int  # generated
    _intervals: dict[Key, Interval] = field(factory=dict, init=False, repr=False)

    def interval(self, key: Key) -> Interval:
        """A score's mean over prompts with its interval, computed once: fractional scores need many draws."""
        if key not in self._intervals:
            self._intervals[key] = mean_interval(self.scores[key])
        return self._intervals[key]

    def difference(self, before: EvaluationResult, key: Key) -> Interval:
        """The paired change since `before`, with its interval over prompts."""
        return paired_difference(before.scores[key], self.scores[key])

    @cached_property
    def measures(self) -> Mapping[Key, tuple[float, ...]]:
        """For each suite, decoding and measure of `MEASURES`: each prompt's mean over its samples.

        Empty for records of an older sdkit.
        """
        return _tuples(_means_per_prompt(self.records, "measures"))

    def measure_means(self) -> dict[Key, float]:
        """Each measure's mean over prompts."""
        return {key: sum(values) / len(values) for key, values in self.measures.items()}

    def measure_interval(self, key: Key) -> Interval:
        return mean_interval(self.measures[key], bounded=key[2] in BOUNDED_MEASURES)

    def measure_difference(self, before: EvaluationResult, key: Key) -> Interval:
        """The paired change of a measure since `before`, with its interval over prompts."""
        return paired_difference(before.measures[key], self.measures[key], bounded=key[2] in BOUNDED_MEASURES)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of prompts by suite."""
        return {key[0]: len(scores) for key, scores in self.scores.items()}

    @property
    def panel(self) -> dict[str, str]:
        """The suites of the panel, each with the entry of the panel that it belongs to."""
        return {record["suite"]: record["panel"] for record in self.records if "panel" in record}

    def metrics(self, headline: Key) -> dict[str, float]:
        """Metrics under eval/: every score by name, and the headline as eval/score, each with its interval and n.

        Measures of the completions have no intervals here.
        """
        metrics: dict[str, float] = {}
        for key in self.scores:
            interval = self.interval(key)
            names = ["eval/" + "/".join(key)] + (["eval/score"] if key == headline else [])
            for name in names:
                metrics |= interval_metrics(name, interval)
        metrics |= turn_metrics(self.scores)
        return metrics | {"eval/" + "/".join(key): mean for key, mean in self.measure_means().items()}


def interval_metrics(name: str, interval: Interval) -> dict[str, float]:
    """A metric, the ends of its interval and its n, under `INTERVAL_SUFFIXES`."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high, f"{name}_n": interval.n}


def read_back(records: Sequence[Mapping[str, Any]], tokens: int = 0) -> EvaluationResult:
    """The evaluation with these records, which a run directory stores.  tokens: generated in it, 0 if not known."""
    return EvaluationResult(scores=_tuples(per_prompt(records)), records=records, tokens=tokens)


def per_prompt(records: Sequence[Mapping[str, Any]]) -> dict[Key, dict[Prompt, float]]:
    """For each score and prompt, the mean over the prompt's samples; for several samples also pass@k."""
    scores = _means_per_prompt(records, "scores")
    passed: dict[tuple[str, str], dict[Prompt, list[bool]]] = {}
    for record in records:
        if "passed" in record:
            prompts = passed.setdefault((record["suite"], record["decoding"]), {})
            prompts.setdefault((record["row"], record["prompt"]), []).append(record["passed"])
    for part, prompts in passed.items():
        for prompt, samples in prompts.items():
            for k, estimate in passed_at(samples).items():
                scores.setdefault((*part, pass_at(k)), {})[prompt] = estimate
    parts = list(dict.fromkeys(key[:2] for key in scores))  # as if each decoding had been read back alone
    return dict(sorted(scores.items(), key=lambda item: parts.index(item[0][:2])))


def main_keys(keys: Iterable[Key]) -> list[Key]:
    """The keys without those of pass@k for which the same decoding has a larger k."""
    listed = list(keys)
    largest = {key[:2]: key for key in sorted((k for k in listed if is_pass_at(k)), key=_attempts)}
    return [key for key in listed if not is_pass_at(key) or largest[key[:2]] == key]


def is_pass_at(key: Key) -> bool:
    """Whether the key is that of a pass@k."""
    return key[2].startswith(PASS_AT)


def _attempts(key: Key) -> int:
    return int(key[2].removeprefix(PASS_AT))


def _means_per_prompt(
    records: Sequence[Mapping[str, Any]], field: Literal["scores", "measures"]
) -> dict[Key, dict[Prompt, float]]:
    """For each name in this field of the records and each prompt, the mean over the prompt's samples that have it."""
    values: dict[Key, dict[Prompt, list[float]]] = {}
    for record in records:
        prompt = record["row"], record["prompt"]
        for name, value in record.get(field, {}).items():
            prompts = values.setdefault((record["suite"], record["decoding"], name), {})
            prompts.setdefault(prompt, []).append(value)
    return {key: {prompt: sum(v) / len(v) for prompt, v in prompts.items()} for key, prompts in values.items()}


def _tuples(prompts: Mapping[Key, Mapping[Prompt, float]]) -> dict[Key, tuple[float, ...]]:
    return {key: tuple(values.values()) for key, values in prompts.items()}


def interval_note(methods: Iterable[str | None], *, seeds: bool = False) -> str:
    """What the intervals of a table are, from the names of their methods; `seeds`: they count seeds, too."""
    names = ", ".join(dict.fromkeys(filter(None, methods)))
    return f"95 % intervals over prompts{' and seeds' * seeds}" + (f": {names}" if names else "")


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
