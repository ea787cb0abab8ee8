"""Token weights within a loss term, and routes of rollouts to terms.

Weights are computed once per rollout batch, before its first update, and carry no gradient.  Averages divide by the
number of tokens, not by the sum of weights.  Entropies and log-probabilities are at the sampling temperature.
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
    Scheduled,
    between,
    spec_field,
)


@frozen(kw_only=True)
class PositionWeight:
    """smallest + (1 − smallest) · sigmoid((t / |y| − middle) / width) for token t = 1 … |y|: later tokens count more."""

    kind: ClassVar[str] = "position"
    smallest: Scheduled = spec_field("lower limit of the weight, approached at the start", range=SHARE)
    middle: Scheduled = spec_field("position of the midpoint, as a share of the completion", range=SHARE)
    width: Scheduled = spec_field("width of the rise, as a share of the completion", range=POSITIVE)


@frozen(kw_only=True)
class TeacherEntropyWeight:
    """exp(−rate · teacher entropy), divided by its mean over the tokens that the term counts in the rollout batch."""

    kind: ClassVar[str] = "teacher_entropy"
    rate: Scheduled = spec_field("decay of the weight per nat of teacher entropy", range=NOT_NEGATIVE)


@frozen(kw_only=True)
class DriftWeight:
    """1 + strength · (1 − share of the completion's total |log teacher − log student| that precedes the token).

    Early tokens count most, the more so if student and teacher diverge late.
    """

    kind: ClassVar[str] = "drift"
    strength: Scheduled = spec_field("excess over 1 of the first token's weight", range=NOT_NEGATIVE)


@frozen(kw_only=True)
class PassRateWeight:
    """(p · (1 − p))^power, p the share of successes in the group before filtering: prompts with p near ½ count most."""

    kind: ClassVar[str] = "pass_rate"
    power: Scheduled = spec_field("exponent", default=0.5, range=between(0.001, 10.0))
    threshold: float = spec_field("smallest reward that counts as a success", default=1.0, range=SIGNED)


@frozen(kw_only=True)
class PerplexityWeight:
    """perplexity^power of the rollout's counted tokens, divided by its mean over the rollouts of the group that the term counts."""

    kind: ClassVar[str] = "perplexity"
    of: Literal["student", "teacher"] = spec_field("whose perplexity")
    power: Scheduled = spec_field(
        "exponent; below 0, likely rollouts count most", default=1.0, range=between(-100.0, 100.0)
    )


Given = Literal[
    "position", "length", "reward", "student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy"
]


@frozen(kw_only=True)
class FileWeight:
    """A user-defined function `function(counts, **given) -> weights`; weights are [N, T], at least 0.

    `counts` [N, T] bool marks the tokens that the term counts, T being the longest completion; other inputs are 0 at
    unmarked tokens.  `position` [N, T] counts from 0, `length` [N] is the completion's length, `reward` [N] the training
    reward.
    """

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", range=PATH)
    function: str = spec_field("name of the function", range=NAME)
    given: tuple[Given, ...] = spec_field("keyword arguments to pass", default=())
    rows: Literal["rollout", "group"] = spec_field(
        "whether a rollout's weights depend on that rollout alone or on its group; with `group` the N rows are one group",
        default="rollout",
    )


Weight = PositionWeight | TeacherEntropyWeight | DriftWeight | PassRateWeight | PerplexityWeight | FileWeight


@frozen(kw_only=True)
class RouteSpec:
    """Routes rollouts to terms by outcome.  Terms in neither list count all rollouts."""

    when: Literal["failed", "failed_with_context"] = spec_field(
        "`failed`: reward below the threshold; `failed_with_context`: that, and a teacher prompt"
    )
    threshold: float = spec_field("smallest reward that counts as a success", default=1.0, range=SIGNED)
    then: tuple[str, ...] = spec_field("terms that count only these rollouts", range=NOT_EMPTY, each=NAME)
    otherwise: tuple[str, ...] = spec_field("terms that count only all other rollouts", default=(), each=NAME)
