"""Token weights within a loss term, and routes of rollouts to terms.

Weights are computed once per rollout batch, before its first update, and carry no gradient.  Averages divide by the
number of tokens, not by the sum of weights.  Entropies and log-probabilities are at the sampling temperature.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from attrs import frozen

from sdkit.language.specs.fields import (
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SIGNED,
    Component,
    Scheduled,
    between,
    spec_field,
)

Statistic = Literal["student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
"""Token statistics, from one forward pass of the student or of the teacher before the first update on a rollout batch.

`train/token_statistics.py` computes those that `required_statistics` lists.
"""


class BaseWeight(Component):
    """What the loss terms and rules ask of a token weight."""

    __slots__ = ()
    needs_group: ClassVar[bool] = False
    """Whether it compares the rollouts of a group."""
    needs_turns: ClassVar[bool] = False
    """Whether it compares the turns of a trajectory."""
    value_alone: ClassVar[int] = 1
    """The weight in a group of one, if it compares the rollouts of a group."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The token statistics that it needs."""
        return ()

    @property
    def reward_setting(self) -> tuple[str, ...] | None:
        """The path of the setting that needs the training reward, if there is one."""
        return None


@frozen(kw_only=True)
class PositionWeight(BaseWeight):
    """smallest + (1 − smallest) · sigmoid((t / |y| − middle) / width) for token t = 1 … |y|: later tokens count more."""

    kind: ClassVar[str] = "position"
    smallest: Scheduled = spec_field("lower limit of the weight, approached at the start", range=SHARE)
    middle: Scheduled = spec_field("position of the midpoint, as a share of the completion", range=SHARE)
    width: Scheduled = spec_field("width of the rise, as a share of the completion", range=POSITIVE)

    def describe(self) -> str:
        place = f"around {self.middle:g} of the completion (width {self.width:g})"
        return f"rising from {self.smallest:g} to 1 {place}"


@frozen(kw_only=True)
class TeacherEntropyWeight(BaseWeight):
    """exp(−rate · teacher entropy), divided by its mean over the tokens that the term counts in the rollout batch."""

    kind: ClassVar[str] = "teacher_entropy"
    description: ClassVar[str] = "exp(−{0.rate:g} × teacher's entropy) / its mean"
    rate: Scheduled = spec_field("decay of the weight per nat of teacher entropy", range=NOT_NEGATIVE)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ("teacher_entropy",)


@frozen(kw_only=True)
class DriftWeight(BaseWeight):
    """1 + strength · (1 − share of the completion's total |log teacher − log student| that precedes the token).

    Early tokens count most, the more so if student and teacher diverge late.
    """

    kind: ClassVar[str] = "drift"
    description: ClassVar[str] = "1 + {0.strength:g} × (1 − share of |log teacher − log student| before the token)"
    strength: Scheduled = spec_field("excess over 1 of the first token's weight", range=NOT_NEGATIVE)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ("student_logprobs", "teacher_logprobs")


@frozen(kw_only=True)
class StepAgreementWeight(BaseWeight):
    """How well student and teacher agree in a turn, compared with the first: min((d₁ + 1e-6) / (d_k + 1e-6), largest).

    d_k is the mean |log teacher − log student| of the tokens that the term counts in turn k; the first turn, and so a
    completion of one turn, weighs 1.
    """

    kind: ClassVar[str] = "step_agreement"
    description: ClassVar[str] = (
        "|log teacher − log student| in the first turn / in the token's turn, at most {0.largest:g}"
    )
    needs_turns: ClassVar[bool] = True
    largest: Scheduled = spec_field("upper bound of the weight", range=between(1.0, 1e6))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ("student_logprobs", "teacher_logprobs")


@frozen(kw_only=True)
class PassRateWeight(BaseWeight):
    """(p · (1 − p))^power, p the share of successes in the group before filtering: prompts with p near ½ count most."""

    kind: ClassVar[str] = "pass_rate"
    description: ClassVar[str] = "(p (1 − p))^{0.power:g}, p the group's share of rewards of at least {0.threshold:g}"
    needs_group: ClassVar[bool] = True
    value_alone: ClassVar[int] = 0
    power: Scheduled = spec_field("exponent", default=0.5, range=between(0.001, 10.0))
    threshold: float = spec_field("smallest reward that counts as a success", default=1.0, range=SIGNED)

    @property
    def reward_setting(self) -> tuple[str, ...]:
        return ("weight",)


@frozen(kw_only=True)
class PerplexityWeight(BaseWeight):
    """perplexity^power of the rollout's counted tokens, divided by its mean over the rollouts of the group that the term counts."""

    kind: ClassVar[str] = "perplexity"
    description: ClassVar[str] = "the {0.of}'s perplexity^{0.power:g} / its mean in the group"
    needs_group: ClassVar[bool] = True
    of: Literal["student", "teacher"] = spec_field("whose perplexity")
    power: Scheduled = spec_field(
        "exponent; below 0, likely rollouts count most", default=1.0, range=between(-100.0, 100.0)
    )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ("student_logprobs",) if self.of == "student" else ("teacher_logprobs",)


Given = Literal["position", "length", "turn", "reward", Statistic]


@frozen(kw_only=True)
class FileWeight(BaseWeight):
    """A user-defined function `function(counts, **given) -> weights`; weights are [N, T], at least 0.

    `counts` [N, T] bool marks the tokens that the term counts, T being the longest completion; other inputs are 0 at
    unmarked tokens.  `position` [N, T] counts from 0, `turn` [N, T] from 1, `length` [N] is the completion's length,
    `reward` [N] the training reward.
    """

    kind: ClassVar[str] = "file"
    description: ClassVar[str] = "{0.function} in {0.file}"
    file: str = spec_field("Python file, relative to the spec", path_to="file")
    function: str = spec_field("name of the function", range=NAME)
    given: tuple[Given, ...] = spec_field("keyword arguments to pass", default=())
    rows: Literal["rollout", "group"] = spec_field(
        "whether a rollout's weights depend on that rollout alone or on its group; with `group` the N rows are one group",
        default="rollout",
    )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return tuple(s for s in STATISTICS if s in self.given)

    @property
    def reward_setting(self) -> tuple[str, ...] | None:
        return ("weight", "given") if "reward" in self.given else None


Weight = (
    PositionWeight
    | TeacherEntropyWeight
    | DriftWeight
    | StepAgreementWeight
    | PassRateWeight
    | PerplexityWeight
    | FileWeight
)


@frozen(kw_only=True)
class RouteSpec:
    """Routes rollouts to terms by outcome.  Terms in neither list count all rollouts."""

    when: Literal["failed", "failed_with_context"] = spec_field(
        "`failed`: reward below the threshold; `failed_with_context`: that, and a teacher prompt"
    )
    threshold: float = spec_field("smallest reward that counts as a success", default=1.0, range=SIGNED)
    then: tuple[str, ...] = spec_field("terms that count only these rollouts", range=NOT_EMPTY, each=NAME)
    otherwise: tuple[str, ...] = spec_field("terms that count only all other rollouts", default=(), each=NAME)

    def describe(self) -> str:
        """Returns which terms train on a rollout."""
        context = " and a teacher prompt" * (self.when == "failed_with_context")
        then, otherwise = (", ".join(names) or "no term" for names in (self.then, self.otherwise))
        return f"rollouts with a reward below {self.threshold:g}{context} go to {then}, others to {otherwise}"
