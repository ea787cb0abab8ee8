"""What the teacher is: live, frozen, averaged or copied weights, another model, one behind a server, or several by route.

Knows nothing of prompts or losses.  Open the teacher before DeepSpeed wraps the student: copies and adapters must exist by then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import Tensor

from sdkit.batches import PaddedSequences, TeacherScores, TopKLogprobs, UnpaddedSequence
from sdkit.language.specs import (
    CopyWeights,
    EmaWeights,
    ExternalWeights,
    FrozenWeights,
    OneTeacher,
    RoutedWeights,
    ServedWeights,
    StudentWeights,
    TeacherWeights,
)
from sdkit.models.weights import STUDENT_ADAPTER, TEACHER_ADAPTER, Weights

Masters = Callable[[], Iterator[tuple[str, Tensor]]]
"""Names and float32 master values of the student's trained parameters; of this rank's pieces where they are sharded."""


Load = Callable[[ExternalWeights], torch.nn.Module]
"""Opens another model, on the student's device."""

Tell = Callable[[Sequence[UnpaddedSequence], int], TopKLogprobs]
"""What a served model thinks of the kept tokens of some texts, over ids below a bound."""

Reach = Callable[[ServedWeights], Tell]
"""Finds a served model."""


class Teacher:
    """Weights that do not move: live (they are the student's own), frozen, or another model's."""

    moves = False
    distance = 0.0  # |teacher - student| / |student| at the last move

    def __init__(self, weights: Weights | None) -> None:
        self.weights = weights  # None: not one set of weights in this process

    @property
    def leaves(self) -> tuple[Teacher, ...]:
        """The teachers that it is made of, one for each route."""
        return (self,)

    def score(self, route: int, asked: PaddedSequences, rows: int) -> TeacherScores:
        """What the teacher of a route says of the counted tokens, over ids below `rows`."""
        assert self.weights is not None
        return self.weights.scores(asked, rows)

    def initialize(self) -> None:
        """Take note of what this rank holds; once, when DeepSpeed has all weights and none has moved."""

    def after_update(self, masters: Masters, updates: int, scalar: Callable[[Any], float]) -> bool:
        """Follow the student after its optimizer step number `updates`; True where the teacher moved."""
        return False

    def after_rollout_batch(self, masters: Masters, scalar: Callable[[Any], float]) -> bool:
        """Follow the student after all updates on a rollout batch; True where the teacher moved."""
        return False

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the student: float32 tensors by name."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take a state back.  Raises KeyError where a tensor is missing."""


class AveragedTeacher(Teacher):
    """Weights that follow the student: shadow += rate × (master − shadow), in float32.

    bfloat16 cannot hold a slow average (at rate 0.01 nine in ten updates round to nothing), so the average lives in
    a float32 shadow and the forward pass sees a cast of it.
    """

    moves = True

    def __init__(
        self, weights: Weights, spec: EmaWeights | CopyWeights, pairs: Mapping[str, Tensor]
    ) -> None:
        super().__init__(weights)
        self._shards = lambda: weights.sharding
        self.spec = spec
        self.live = dict(pairs)  # student's parameter name → the teacher's own
        for parameter in self.live.values():
            parameter.requires_grad_(False)
        self.shadow: dict[str, Tensor] = {}  # of what this rank holds of each

    def initialize(self) -> None:
        held = self._shards().local_shard
        self.shadow = {name: held(p).float().clone() for name, p in self.live.items()}

    def after_update(self, masters: Masters, updates: int, scalar: Callable[[Any], float]) -> bool:
        match self.spec:
            case EmaWeights(every="optimizer_step", update_rate=rate):
                return self._follow(masters, scalar(rate))
            case CopyWeights(every=every) if updates % every == 0:
                return self._follow(masters, 1.0)
        return False

    def after_rollout_batch(self, masters: Masters, scalar: Callable[[Any], float]) -> bool:
        match self.spec:
            case EmaWeights(every="rollout_batch", update_rate=rate):
                return self._follow(masters, scalar(rate))
        return False

    @torch.no_grad()
    def _follow(self, masters: Masters, rate: float) -> bool:
        shards = self._shards()
        squares = torch.zeros(2, dtype=torch.float64)
        followed = 0
        for name, master in masters():
            shadow, own = self.shadow[name], master.to(self.shadow[name].device)
            if own.shape != shadow.shape:
                raise RuntimeError(f"{name} is cut otherwise on the teacher's side")
            shadow.lerp_(own, rate)
            shards.local_shard(self.live[name]).copy_(shadow)
            squares += torch.stack([(shadow - own).square().sum(), own.square().sum()]).cpu()
            followed += 1
        if followed != len(self.shadow):
            raise RuntimeError(
                f"{followed} of {len(self.shadow)} teacher tensors followed the student"
            )
        apart, size = shards.all_reduce_sum(squares).tolist()
        self.distance = (apart / max(size, 1e-30)) ** 0.5
        return True

    def state(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])
            self._shards().local_shard(self.live[name]).copy_(shadow)


class ServedTeacher(Teacher):
    """A model behind a server: it never moves, holds no weights here, and tells of a few ids alone."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(None)
        self.tell = tell

    def score(self, route: int, asked: PaddedSequences, rows: int) -> TopKLogprobs:
        told, device = self.tell(asked.texts, rows), asked.input_ids.device
        return TopKLogprobs(
            ids=told.ids.to(device),
            logprobs=told.logprobs.to(device),
            sampled=told.sampled.to(device),
        )


class RoutedTeacher(Teacher):
    """Several teachers, one for each value of a column; routes of equal weights share one."""

    def __init__(self, routes: Sequence[Teacher]) -> None:
        super().__init__(None)
        self.routes = tuple(routes)
        self.parts = tuple(dict.fromkeys(routes))
        self.moves = any(part.moves for part in self.parts)

    @property
    def leaves(self) -> tuple[Teacher, ...]:
        return self.routes

    def initialize(self) -> None:
        for part in self.parts:
            part.initialize()

    def score(self, route: int, asked: PaddedSequences, rows: int) -> TeacherScores:
        return self.routes[route].score(0, asked, rows)

    def after_update(self, masters: Masters, updates: int, scalar: Callable[[Any], float]) -> bool:
        return self._moved([p.after_update(masters, updates, scalar) for p in self.parts])

    def after_rollout_batch(self, masters: Masters, scalar: Callable[[Any], float]) -> bool:
        return self._moved([p.after_rollout_batch(masters, scalar) for p in self.parts])

    def _moved(self, each: Sequence[bool]) -> bool:
        moved = [part.distance for part, did in zip(self.parts, each, strict=True) if did]
        self.distance = max(moved, default=self.distance)
        return any(each)

    def state(self) -> dict[str, Tensor]:
        parts = enumerate(self.parts)
        return {f"{i}/{name}": t for i, part in parts for name, t in part.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            mark = f"{i}/"
            own = {name.removeprefix(mark): t for name, t in state.items() if name.startswith(mark)}
            part.load_state(own)


def open_teacher(spec: TeacherWeights, student: Weights, load: Load, reach: Reach) -> Teacher:
    """The teacher that `spec` asks for, starting from the student's weights as they are now."""
    if not isinstance(spec, RoutedWeights):
        return _open(spec, student, load, reach)
    opened: dict[OneTeacher, Teacher] = {}
    for one in spec.routes.values():
        if one not in opened:
            opened[one] = _open(one, student, load, reach)
    return RoutedTeacher([opened[one] for one in spec.routes.values()])


def _open(spec: OneTeacher, student: Weights, load: Load, reach: Reach) -> Teacher:
    adapters = hasattr(student.model, "peft_config")
    match spec:
        case StudentWeights():
            return Teacher(student)
        case FrozenWeights():
            return Teacher(Weights(student.model, None) if adapters else _copy(student))
        case EmaWeights() | CopyWeights() if adapters:
            taken: Any = student.model
            name = TEACHER_ADAPTER + "_" * (len(taken.peft_config) - 1)
            pairs = _add_teacher_adapter(student, name)
            return AveragedTeacher(Weights(student.model, name), spec, pairs)
        case EmaWeights() | CopyWeights():
            weights = _copy(student)
            own = dict(weights.model.named_parameters())
            trained = [n for n, p in student.model.named_parameters() if p.requires_grad]
            return AveragedTeacher(weights, spec, {name: own[name] for name in trained})
        case ExternalWeights():
            return Teacher(Weights(load(spec).requires_grad_(False).eval(), foreign=True))
        case ServedWeights():
            return ServedTeacher(reach(spec))
        case _:
            assert_never(spec)


def _copy(student: Weights) -> Weights:
    trained = [p for p in student.model.parameters() if p.requires_grad]
    weights = Weights(copy.deepcopy(student.model).requires_grad_(False))
    for parameter in trained:
        parameter.requires_grad_(True)
    weights.model.eval()
    return weights


def _add_teacher_adapter(student: Weights, adapter: str) -> dict[str, Tensor]:
    """Add a teacher's adapter as a copy of the student's; student's name → the teacher's tensor.

    The average is of the factors A and B, which is not the average of their product.
    """
    model: Any = student.model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_adapter(adapter, model.peft_config[STUDENT_ADAPTER], autocast_adapter_dtype=False)
    parameters = dict(model.named_parameters())
    pairs = {n: parameters[n.replace(f".{STUDENT_ADAPTER}.", f".{adapter}.")] for n in trained}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in pairs)
    with torch.no_grad():
        for name, tensor in pairs.items():
            tensor.copy_(parameters[name])
    model.set_adapter(STUDENT_ADAPTER)
    model.eval()  # new modules start in training mode
    return pairs
