"""A method: who samples, the teacher, and the losses."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from sdkit.language.specs.blends import Blend
from sdkit.language.specs.contexts import Sees
from sdkit.language.specs.fields import NOT_EMPTY, Table, spec_field
from sdkit.language.specs.losses import Distillation, Loss
from sdkit.language.specs.rollouts import RolloutSpec
from sdkit.language.specs.teachers import (
    ExternalWeights,
    FrozenWeights,
    OneTeacher,
    RoutedWeights,
    ServedWeights,
    TeacherWeights,
)
from sdkit.language.specs.token_weights import RouteSpec


@frozen(kw_only=True)
class TeacherSpec:
    """The teacher: its weights, the context it sees, and what its distribution is blended with."""

    weights: TeacherWeights = spec_field("the teacher's weights")
    sees: Sees | None = spec_field(
        "extra context (default: none; the teacher sees the student's prompt)", default=None
    )
    blend: Blend | None = spec_field(
        "what the teacher's distribution is blended with, the same on every route", default=None
    )

    def describe(self) -> str:
        """Returns the weights in words, and what the teacher's prompt adds."""
        context = self.sees.describe() if self.sees else "the student's prompt"
        return f"{self.weights.describe()}, sees {context}"


@frozen(kw_only=True)
class MethodSpec:
    """A method page: everything that defines the method, nothing that defines the run."""

    rollout: RolloutSpec = spec_field("who samples, and how", default=RolloutSpec())
    teacher: TeacherSpec | None = spec_field("the teacher and its context", default=None)
    losses: Table[Loss] = spec_field("loss terms of the objective, by name", range=NOT_EMPTY)
    route: RouteSpec | None = spec_field(
        "which terms count a rollout, depending on its outcome (default: all)", default=None
    )


def teachers_of(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], OneTeacher]]:
    """Each set of teacher weights, with its path; in the order of the routes."""
    weights = spec.teacher and spec.teacher.weights
    if isinstance(weights, RoutedWeights):
        for name, one in weights.routes.items():
            yield ("teacher", "weights", "routes", name), one
    elif weights:
        yield ("teacher", "weights"), weights


def external_teachers(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], ExternalWeights]]:
    """The teachers that are other models, each with its path."""
    for path, weights in teachers_of(spec):
        if isinstance(weights, ExternalWeights):
            yield path, weights


def served_teachers(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], ServedWeights]]:
    """The teachers behind servers, each with its path."""
    for path, weights in teachers_of(spec):
        if isinstance(weights, ServedWeights):
            yield path, weights


def tokens_told(spec: MethodSpec) -> int | None:
    """How many top log-probabilities each teacher returns if one of them is served; None if all are local."""
    if not any(served_teachers(spec)):
        return None
    return max((term.support.top_k for term in spec.losses.values() if isinstance(term, Distillation)), default=0)


def blend_base(spec: MethodSpec) -> FrozenWeights | ExternalWeights | None:
    """The fixed weights that the teacher is blended with under the student's prompt; None if there are none."""
    return spec.teacher.blend.base if spec.teacher and spec.teacher.blend else None


def other_models(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], ExternalWeights]]:
    """Every model other than the student's that scores tokens in this process, each with its path."""
    yield from external_teachers(spec)
    base = blend_base(spec)
    if isinstance(base, ExternalWeights):
        yield ("teacher", "blend", "base"), base
