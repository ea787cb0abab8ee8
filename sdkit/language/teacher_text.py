"""Describes the teacher in words, for `sdkit plan`: its weights, its prompt and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from sdkit.language.objective_text import format_number
from sdkit.language.specs import (
    AnswerStart,
    CopyWeights,
    EarlierTurns,
    EmaWeights,
    ExternalWeights,
    ExtrapolateBlend,
    FrozenWeights,
    GeometricBlend,
    MethodSpec,
    ProductBlend,
    RoutedWeights,
    ServedWeights,
    StudentWeights,
    SystemMessage,
    TeacherWeights,
    TrustRegionBlend,
    UserTurn,
)


def describe_teacher(spec: MethodSpec) -> str:
    """Describes the teacher's weights and what its prompt adds."""
    if spec.teacher is None:
        return "none"
    weights = describe_weights(spec.teacher.weights)
    match spec.teacher.sees:
        case None:
            return f"{weights}, sees the student's prompt"
        case UserTurn(slots=slots):
            place = "in the user turn"
        case SystemMessage(slots=slots):
            place = "in the system message"
        case EarlierTurns(slots=slots, turns=turns):
            place = f"as {len(turns)} earlier turn{'s' * (len(turns) != 1)}"
        case AnswerStart(slots=slots):
            place = "at the start of the answer"
        case other:
            assert_never(other)
    return f"{weights}, sees {', '.join(slots) or 'fixed text'} {place}"


def describe_weights(weights: TeacherWeights) -> str:
    """Describes the teacher's weights."""
    match weights:
        case StudentWeights():
            return "the live student"
        case FrozenWeights():
            return "the frozen start model"
        case EmaWeights(update_rate=rate, every=every):
            often = every.replace("_", " ")
            return f"average of the student (update_rate {format_number(rate)} per {often})"
        case CopyWeights(every=every):
            return f"copy of the student, renewed every {every} optimizer steps"
        case ExternalWeights(path=path):
            return f"the model {path}"
        case ServedWeights(url=url, model=model):
            return f"the model {model} served at {url}"
        case RoutedWeights(by=by, routes=routes):
            teachers = "; ".join(f"{name}: {describe_weights(w)}" for name, w in routes.items())
            return f"by column {by} ({teachers})"
        case _:
            assert_never(weights)


def describe_blend(spec: MethodSpec) -> Iterator[str]:
    """Yields a line on the blended teacher distribution Q, which the loss terms use as the teacher, if there is a blend."""
    own = "under the student's prompt"
    match spec.teacher and spec.teacher.blend:
        case None:
            return
        case TrustRegionBlend(student_share=share):
            power, of = "c", "T^(1 − c) × S^c, S the live student under the teacher's prompt"
        case ProductBlend(student_power=share):
            power, of = "b", f"T × S^b, S the live student {own}"
        case GeometricBlend(teacher_share=share):
            power, of = "w", f"B^(1 − w) × T^w, B the frozen start model {own}"
        case ExtrapolateBlend(factor=share, base=base):
            power, of = "f", f"T^f × B^(1 − f), B {describe_weights(base)} {own}"
        case other:
            assert_never(other)
    yield f"blend: teacher Q ∝ {of}, {power} = {format_number(share)}"


def describe_place(weights: TeacherWeights, adapters: bool) -> str:
    """Describes where the teacher's weights are stored, besides the student's."""
    match weights:
        case StudentWeights():
            return ""
        case FrozenWeights():
            return " (the student with its adapter off)" if adapters else " (a second copy of the model)"
        case EmaWeights() | CopyWeights():
            return " (a second adapter, float32 shadow)" if adapters else " (a second copy, float32 shadow)"
        case ExternalWeights(dtype=dtype):
            return f" (a second model, {dtype})"
        case ServedWeights(requests_at_once=count):
            return f" (no weights here, {count} request{'s' * (count != 1)} at once)"
        case RoutedWeights(routes=routes):
            free = StudentWeights | ServedWeights  # no weights of their own here
            count = len({weights for weights in routes.values() if not isinstance(weights, free)})
            return f" ({count} set{'s' * (count != 1)} of weights beside the student's)"
        case _:
            assert_never(weights)
