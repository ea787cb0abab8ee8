"""A method: who samples, the teacher, and the losses."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from sdkit.language.specs.blends import Blend
from sdkit.language.specs.contexts import Sees, Slot, Writer
from sdkit.language.specs.fields import NOT_EMPTY, Table, spec_field
from sdkit.language.specs.losses import Distillation, Loss, ReferenceKl
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

WeightsPath = tuple[str, ...]
"""The path of a model's weights in a spec."""
SlotPath = tuple[str, ...]
"""The path of a slot in a spec."""


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

    @property
    def sees(self) -> Sees | None:
        """The teacher's context, if there is one."""
        return self.teacher.sees if self.teacher else None

    @property
    def slots(self) -> Table[Slot]:
        """The slots of the teacher's context, by name; empty if there is no context."""
        return self.sees.slots if self.sees else Table()

    @property
    def writer(self) -> Writer | None:
        """What writes slots of the teacher's context, if something does."""
        return self.sees.writer if self.sees else None

    def placed_slots(self) -> Iterator[tuple[SlotPath, Slot]]:
        """The slots of the teacher's context, then those of the question to its writer, each with its path."""
        for name, slot in self.slots.items():
            yield ("teacher", "sees", "slots", name), slot
        for name, slot in self.writer.slots.items() if self.writer else ():
            yield ("teacher", "sees", "writer", "slots", name), slot

    @property
    def blend(self) -> Blend | None:
        """The teacher's blend, if there is one."""
        return self.teacher.blend if self.teacher else None

    def teachers(self) -> Iterator[tuple[WeightsPath, OneTeacher]]:
        """Each set of teacher weights, with its path; in the order of the routes."""
        weights = self.teacher and self.teacher.weights
        if isinstance(weights, RoutedWeights):
            for name, one in weights.routes.items():
                yield ("teacher", "weights", "routes", name), one
        elif weights:
            yield ("teacher", "weights"), weights

    def external_teachers(self) -> Iterator[tuple[WeightsPath, ExternalWeights]]:
        """The teachers that are other models, each with its path."""
        return ((path, weights) for path, weights in self.teachers() if isinstance(weights, ExternalWeights))

    def served_teachers(self) -> Iterator[tuple[WeightsPath, ServedWeights]]:
        """The teachers behind servers, each with its path."""
        return ((path, weights) for path, weights in self.teachers() if isinstance(weights, ServedWeights))

    def other_models(self) -> Iterator[tuple[WeightsPath, ExternalWeights]]:
        """Every model other than the student's that scores tokens in this process, each with its path."""
        yield from self.external_teachers()
        if self.blend and isinstance(self.blend.base, ExternalWeights):
            yield ("teacher", "blend", "base"), self.blend.base

    @property
    def served_top_k(self) -> int | None:
        """How many top log-probabilities each teacher returns if one of them is served; None if all are local."""
        if not any(self.served_teachers()):
            return None
        return max((term.support.top_k for term in self.losses.values() if isinstance(term, Distillation)), default=0)

    @property
    def has_reference_term(self) -> bool:
        """Whether a loss term is a KL to the frozen start model."""
        return any(isinstance(term, ReferenceKl) for term in self.losses.values())

    @property
    def needs_reference(self) -> bool:
        """Whether a loss term or a blend needs the start model's scores under the student's prompt."""
        return self.has_reference_term or (self.blend is not None and isinstance(self.blend.base, FrozenWeights))
