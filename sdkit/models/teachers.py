"""Teachers: live, frozen, averaged or copied weights, another model, a model behind a server, or several by route.

Knows nothing of prompts or losses.  Open the teacher before DeepSpeed wraps the student: copies and adapters must exist
by then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from sdkit.batches import PaddedSequences, TeacherScores, TopKLogprobs, UnpaddedSequence
from sdkit.language import specs
from sdkit.models.weights import STUDENT_ADAPTER, TEACHER_ADAPTER, UNSHARDED, Sharding, Weights

Masters = Callable[[], Iterator[tuple[str, Tensor]]]
"""Yields names and float32 master weights of the student's trained parameters; this rank's shards if they are sharded."""

ShardTensors = Callable[[Mapping[str, Tensor]], Sharding]
"""Shards tensors, given by the student's parameter names, as the masters of these parameters are sharded."""

Event = Literal["optimizer_step", "rollout_batch"]
"""When a teacher may follow the student: after an optimizer step, or after all updates on a rollout batch."""

CopyModel = Callable[[torch.nn.Module], torch.nn.Module]
"""Copies the student's model."""

LoadModel = Callable[[specs.ExternalWeights], torch.nn.Module]
"""Loads another model onto the student's device."""

ScoreTexts = Callable[[Sequence[UnpaddedSequence], int], TopKLogprobs]
"""Returns a served model's log-probabilities of the requested tokens of some texts, over ids below a bound."""

ConnectServed = Callable[[specs.ServedWeights], ScoreTexts]
"""Connects to a served model."""


class Teacher:
    """A teacher that does not follow the student: live (the student's own weights), frozen, or another model."""

    moves = False
    distance = 0.0  # |teacher - student| / |student| at the last change

    def __init__(self, weights: Weights | None) -> None:
        self.weights = weights  # None: served or routed, so no single set of weights here

    @property
    def leaves(self) -> tuple[Teacher, ...]:
        """The teachers that this one consists of, one per route."""
        return (self,)

    def score(self, route: int, sequences: PaddedSequences, rows: int) -> TeacherScores:
        """Returns the scores of the counted tokens by the teacher of a route, over ids below `rows`."""
        assert self.weights is not None
        return self.weights.scores(sequences, rows)

    def initialize(self, shard: ShardTensors | None = None) -> None:
        """Copy this rank's shards.  Call once, after DeepSpeed has wrapped all models and before the first update.

        `shard`: how to shard an average if the weights themselves are not sharded (default: every rank has all of it).
        """

    def follow(self, masters: Masters, spec: specs.TeacherWeights, after: Event, updates: int) -> bool:
        """Follow the student if it is time; returns whether the teacher changed.

        `spec` is the teacher's own, without schedules; `updates` is the number of optimizer steps taken.
        """
        return False

    def state(self) -> dict[str, Tensor]:
        """Returns the float32 tensors, by name, that this rank's checkpoint file needs in addition to the student.

        Every rank must call.
        """
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state.  Raises KeyError if a tensor is missing."""


class AveragedTeacher(Teacher):
    """Weights that follow the student: shadow += rate × (master − shadow), in float32.

    bfloat16 cannot represent a slow average (at rate 0.01, nine in ten updates round to zero), so the average is kept
    in a float32 shadow, and the forward pass uses a cast of it.  The shadow of a float32 parameter is the parameter.
    """

    moves = True

    def __init__(self, weights: Weights, pairs: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self._sharding = UNSHARDED
        self.parameters = dict(pairs)  # student's parameter name → teacher's parameter
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self.shadow: dict[str, Tensor] = {}  # this rank's shards

    def initialize(self, shard: ShardTensors | None = None) -> None:
        assert self.weights is not None
        self._sharding = shard(self.parameters) if shard else self.weights.sharding
        self.shadow = {name: self._sharding.local_shard(p).float() for name, p in self.parameters.items()}

    def follow(self, masters: Masters, spec: specs.TeacherWeights, after: Event, updates: int) -> bool:
        match spec:
            case specs.EmaWeights(every=every, update_rate=rate) if every == after:
                return self._update_shadow(masters, rate)
            case specs.CopyWeights(every=every) if after == "optimizer_step" and updates % every == 0:
                return self._update_shadow(masters, 1.0)
        return False

    @torch.no_grad()
    def _update_shadow(self, masters: Masters, rate: float) -> bool:
        squares: Tensor | None = None
        updated = 0
        for name, master in masters():
            shadow = self.shadow[name]
            student = master.to(shadow.device)
            if student.shape != shadow.shape:
                raise RuntimeError(f"{name} is sharded differently in the teacher")
            before = torch.dist(student, shadow)
            shadow.lerp_(student, rate)
            self._write(name, shadow)
            norms = torch.stack([before * (1 - rate), torch.linalg.vector_norm(student)])
            # Added up on the device: reading each number would make the host wait for every parameter.
            added = norms.double().square()
            squares = added if squares is None else squares + added
            updated += 1
        if updated != len(self.shadow):
            raise RuntimeError(f"{updated} of {len(self.shadow)} teacher tensors were updated")
        if squares is None:
            squares = torch.zeros(2, dtype=torch.float64)
        difference, norm = self._sharding.all_reduce_sum(squares.cpu()).tolist()
        self.distance = (difference / max(norm, 1e-30)) ** 0.5
        return True

    def state(self) -> dict[str, Tensor]:
        return {name: self._sharding.to_file(self.parameters[name], s) for name, s in self.shadow.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, shadow in self.shadow.items():
            shadow.copy_(self._sharding.from_file(self.parameters[name], state[name]))
            self._write(name, shadow)

    def _write(self, name: str, shadow: Tensor) -> None:
        """Write a shadow into its parameter, unless it is the parameter itself."""
        parameter = self.parameters[name]
        shard = self._sharding.local_shard(parameter)
        if shard.data_ptr() != shadow.data_ptr():
            shard.copy_(shadow)
        self._sharding.complete(parameter)


class ServedTeacher(Teacher):
    """A model behind a server: it never changes, has no weights here, and returns top-k log-probabilities only."""

    def __init__(self, score_texts: ScoreTexts) -> None:
        super().__init__(None)
        self.score_texts = score_texts

    def score(self, route: int, sequences: PaddedSequences, rows: int) -> TopKLogprobs:
        scores, device = self.score_texts(sequences.texts, rows), sequences.input_ids.device
        return TopKLogprobs(
            ids=scores.ids.to(device), logprobs=scores.logprobs.to(device), sampled=scores.sampled.to(device)
        )


class RoutedTeacher(Teacher):
    """Several teachers, one per value of a column; routes with equal weights share one."""

    def __init__(self, routes: Sequence[Teacher]) -> None:
        super().__init__(None)
        self.routes = tuple(routes)
        self.parts = tuple(dict.fromkeys(routes))
        self.moves = any(part.moves for part in self.parts)

    @property
    def leaves(self) -> tuple[Teacher, ...]:
        return self.routes

    def initialize(self, shard: ShardTensors | None = None) -> None:
        for part in self.parts:
            part.initialize(shard)

    def score(self, route: int, sequences: PaddedSequences, rows: int) -> TeacherScores:
        return self.routes[route].score(0, sequences, rows)

    def follow(self, masters: Masters, spec: specs.TeacherWeights, after: Event, updates: int) -> bool:
        assert isinstance(spec, specs.RoutedWeights)
        own_specs = dict(zip(self.routes, spec.routes.values(), strict=True))
        changed = [part for part, own in own_specs.items() if part.follow(masters, own, after, updates)]
        self.distance = max((part.distance for part in changed), default=self.distance)
        return bool(changed)

    def state(self) -> dict[str, Tensor]:
        parts = enumerate(self.parts)
        return {f"{i}/{name}": t for i, part in parts for name, t in part.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            prefix = f"{i}/"
            own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            part.load_state(own)


def open_teacher(
    spec: specs.TeacherWeights,
    student: Weights,
    load: LoadModel,
    connect: ConnectServed,
    copy_model: CopyModel = copy.deepcopy,
) -> Teacher:
    """Returns the teacher that `spec` describes, initialized from the student's current weights."""
    if not isinstance(spec, specs.RoutedWeights):
        return _open_one(spec, student, load, connect, copy_model)
    opened: dict[specs.OneTeacher, Teacher] = {}
    for one in spec.routes.values():
        if one not in opened:
            opened[one] = _open_one(one, student, load, connect, copy_model)
    return RoutedTeacher([opened[one] for one in spec.routes.values()])


def _open_one(
    spec: specs.OneTeacher, student: Weights, load: LoadModel, connect: ConnectServed, copy_model: CopyModel
) -> Teacher:
    def copy_weights() -> Weights:
        return Weights(copy_model(student.model).requires_grad_(False).eval())

    match spec:
        case specs.StudentWeights():
            return Teacher(student)
        case specs.FrozenWeights():
            return Teacher(Weights(student.model, None) if student.has_adapters else copy_weights())
        case specs.EmaWeights() | specs.CopyWeights() if student.has_adapters:
            model: Any = student.model
            name = TEACHER_ADAPTER + "_" * (len(model.peft_config) - 1)
            pairs = _add_teacher_adapter(student, name)
            return AveragedTeacher(Weights(student.model, name), pairs)
        case specs.EmaWeights() | specs.CopyWeights():
            weights = copy_weights()
            own = dict(weights.model.named_parameters())
            trained = [n for n, p in student.model.named_parameters() if p.requires_grad]
            return AveragedTeacher(weights, {name: own[name] for name in trained})
        case specs.ExternalWeights():
            return Teacher(Weights(load(spec).requires_grad_(False).eval(), foreign=True))
        case specs.ServedWeights():
            return ServedTeacher(connect(spec))
        case _:
            assert_never(spec)


def _add_teacher_adapter(student: Weights, adapter: str) -> dict[str, Tensor]:
    """Add a teacher adapter as a copy of the student's; returns student's parameter name → teacher's tensor.

    The factors A and B are averaged, which is not the same as averaging their product.
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
            tensor.data = tensor.data.to(parameters[name].dtype)  # PEFT's choice over a quantized layer is float32
            if not parameters[name].is_meta:  # under ZeRO stage 3, only the first rank has values yet
                tensor.copy_(parameters[name])
    model.set_adapter(STUDENT_ADAPTER)
    model.eval()  # new modules start in training mode
    return pairs
