"""What a token weighs within its term, and which terms count a rollout.

Weights are worked out once per rollout batch, before its first update, and carry no gradient; averages divide by the
number of tokens, not by their weight.  Entropies and log-probabilities are those at the sampling temperature.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SHARE,
    SIGNED,
    Schedule,
    between,
    spec_field,
)


@frozen(kw_only=True)
class PositionWeight:
    """smallest + (1 − smallest) · sigmoid((t / |y| − middle) / width) of token t = 1 … |y|: the end of the completion counts most."""

    kind: ClassVar[str] = "position"
    smallest: float | Schedule = spec_field("what the weight falls to at the start", range=SHARE)
    middle: float | Schedule = spec_field(
        "share of the completion at which it is half-way", range=SHARE
    )
    width: float | Schedule = spec_field(
        "how slowly it rises, share of the completion", range=POSITIVE
    )


@frozen(kw_only=True)
class TeacherEntropyWeight:
    """exp(−rate · the teacher's entropy), divided by its mean over the tokens that the term counts in the rollout batch."""

    kind: ClassVar[str] = "teacher_entropy"
    rate: float | Schedule = spec_field(
        "how much less an unsure teacher counts, per nat", range=NOT_NEGATIVE
    )


@frozen(kw_only=True)
class DriftWeight:
    """1 + strength · (1 − share of the completion's |log teacher − log student| that stands before the token).

    Tokens early in the completion count most, the more so where student and teacher part late.
    """

    kind: ClassVar[str] = "drift"
    strength: float | Schedule = spec_field("weight above 1 of the first token", range=NOT_NEGATIVE)


@frozen(kw_only=True)
class PassRateWeight:
    """(p · (1 − p)) to the power, p the share of successes in the rollout's group as sampled: prompts half solved count most."""

    kind: ClassVar[str] = "pass_rate"
    power: float | Schedule = spec_field("exponent", default=0.5, range=between(0.001, 10.0))
    threshold: float = spec_field("smallest reward that is a success", default=1.0, range=SIGNED)


@frozen(kw_only=True)
class PerplexityWeight:
    """Perplexity of the rollout's counted tokens, to the power, over its mean in the group's rollouts that the term counts."""

    kind: ClassVar[str] = "perplexity"
    of: Literal["student", "teacher"] = spec_field("whose perplexity")
    power: float | Schedule = spec_field(
        "exponent; below 0 the likely rollouts count most",
        default=1.0,
        range=between(-100.0, 100.0),
    )


Given = Literal[
    "position",
    "length",
    "reward",
    "student_logprobs",
    "student_entropy",
    "teacher_logprobs",
    "teacher_entropy",
]


@frozen(kw_only=True)
class FileWeight:
    """A function of the user's: `function(counts, **given) -> weights`, [N, T] of at least 0.

    `counts` [N, T] bool says which tokens the term counts, T being the longest completion; whatever else it is given
    holds 0 elsewhere.  `position` [N, T] counts from 0, `length` [N] is that of the completion, `reward` [N] that of
    training.
    """

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", range=PATH)
    function: str = spec_field("name of the function", range=NAME)
    given: tuple[Given, ...] = spec_field("what it is called with, by name", default=())
    rows: Literal["rollout", "group"] = spec_field(
        "whether a rollout's weights depend on it alone, or on its group: then the N rows are one group",
        default="rollout",
    )


Weight = (
    PositionWeight
    | TeacherEntropyWeight
    | DriftWeight
    | PassRateWeight
    | PerplexityWeight
    | FileWeight
)


@frozen(kw_only=True)
class RouteSpec:
    """Rollouts are counted by other terms according to their outcome; terms in neither list count all."""

    when: Literal["failed", "failed_with_context"] = spec_field(
        "a reward below the threshold, and for the second a teacher prompt"
    )
    threshold: float = spec_field("smallest reward that is a success", default=1.0, range=SIGNED)
    then: tuple[str, ...] = spec_field(
        "terms that count such rollouts alone", range=NOT_EMPTY, each=NAME
    )
    otherwise: tuple[str, ...] = spec_field(
        "terms that count the others alone", default=(), each=NAME
    )
