"""What a mean score hides: pass@k, and the length, entropy, diversity and repetition of completions.  Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sdkit.language.metric_names import attempts

Ids = Sequence[int]
"""The token ids of one completion, the end token included."""


def pass_at(k: int, passed: int, samples: int) -> float:
    """The probability that at least one of k samples passes, estimated without bias: 1 − C(n − c, k) / C(n, k).

    Of n = `samples`, c = `passed` did.  Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.  Raises ValueError
    unless 0 <= passed <= samples and 1 <= k <= samples.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {passed} in {samples} samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def distinct(n: int, texts: Sequence[Ids]) -> float:
    """Different n-grams / n-grams of all texts together; 1 if there are none.

    Source: Li et al. 2016 (arXiv 1510.03055), here with token ids, over the completions of one prompt.
    """
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def completion_measures(ids: Ids, logprobs: Sequence[float] | None, *, finished: bool) -> dict[str, float]:
    """The measures of one completion.

    logprobs: of the sampled tokens, from the distribution that they were drawn from; None: not drawn, or not known.
    Then there is no entropy.  Minus their mean estimates the entropy of that distribution at these tokens, without bias
    at each of them.  Self-repetition is the share of 4-grams that occurred before: seq-rep-4 of Welleck et al. 2020 (arXiv
    1908.04319).
    """
    measures = {
        "completion_tokens": float(len(ids)),
        "cut_at_limit": float(not finished),
        "self_repetition": 1 - distinct(4, [ids]),
    }
    if logprobs:
        measures["entropy"] = -sum(logprobs) / len(logprobs)
    return measures


def prompt_measures(texts: Sequence[Ids]) -> dict[str, float]:
    """The measures of all completions of one prompt."""
    return {f"distinct_{n}": distinct(n, texts) for n in (1, 2)}


def passed_at(passed: Sequence[bool]) -> Mapping[int, float]:
    """pass@k by k, from whether each sample of a prompt passed; empty for fewer than two samples."""
    n = len(passed)
    return {k: pass_at(k, sum(passed), n) for k in attempts(n)} if n > 1 else {}
