"""What makes a method: who samples, what the teacher is and sees, which losses."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from sdkit.language.specs.blends import Blend, ExtrapolateBlend, GeometricBlend
from sdkit.language.specs.contexts import Sees
from sdkit.language.specs.fields import NOT_EMPTY, Table, spec_field
from sdkit.language.specs.losses import LossTerm, widest_top_k
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
    """What the teacher is (weights), what it sees (context), and what its distribution is blended with."""

    weights: TeacherWeights = spec_field("which weights")
    sees: Sees | None = spec_field(
        "extra context; without it the teacher sees the student's prompt", default=None
    )
    blend: Blend | None = spec_field(
        "what its distribution is blended with, on each route alike", default=None
    )


@frozen(kw_only=True)
class MethodSpec:
    """A method page: the questions that make a method, and nothing of the run."""

    rollout: RolloutSpec = spec_field("who samples, and how", default=RolloutSpec())
    teacher: TeacherSpec | None = spec_field("what the teacher is and sees", default=None)
    losses: Table[LossTerm] = spec_field("named terms of the objective", range=NOT_EMPTY)
    route: RouteSpec | None = spec_field(
        "which terms count a rollout, by its outcome (default: all)", default=None
    )


def teachers_of(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], OneTeacher]]:
    """Each set of weights that teaches, with its key; in the order of the routes."""
    weights = spec.teacher and spec.teacher.weights
    if isinstance(weights, RoutedWeights):
        for name, one in weights.routes.items():
            yield ("teacher", "weights", "routes", name), one
    elif weights:
        yield ("teacher", "weights"), weights


def external_teachers(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], ExternalWeights]]:
    """The other models that teach, each with its key."""
    for path, weights in teachers_of(spec):
        if isinstance(weights, ExternalWeights):
            yield path, weights


def served_teachers(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], ServedWeights]]:
    """The models behind servers that teach, each with its key."""
    for path, weights in teachers_of(spec):
        if isinstance(weights, ServedWeights):
            yield path, weights


def tokens_told(spec: MethodSpec) -> int | None:
    """How many of its likeliest tokens each teacher tells of, where one of them is served; None: all are whole."""
    return widest_top_k(spec.losses) if any(served_teachers(spec)) else None


def blend_base(spec: MethodSpec) -> FrozenWeights | ExternalWeights | None:
    """The weights that do not move and that the teacher is blended with, under the student's prompt."""
    match spec.teacher and spec.teacher.blend:
        case GeometricBlend():
            return FrozenWeights()
        case ExtrapolateBlend(base=base):
            return base
    return None


def other_models(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], ExternalWeights]]:
    """Every model beside the student's that scores its tokens, each with its key."""
    yield from external_teachers(spec)
    base = blend_base(spec)
    if isinstance(base, ExternalWeights):
        yield ("teacher", "blend", "base"), base
