"""The state of a training run, and its only mutable object; everything that flows through a step is frozen.

Weights, teacher, optimizer, data position and versions are here and nowhere else, so a checkpoint is this object on disk.
Random numbers need no state: every draw has a seed derived from (run, step, row).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from sdkit.batches import RolloutBackend
from sdkit.distributed import collectives, zero, zero_shards
from sdkit.language.errors import blaming
from sdkit.language.schedules import at_step, scalar_at
from sdkit.language.specs import (
    Blend,
    ExperimentSpec,
    ExternalWeights,
    ExtrapolateBlend,
    FrozenWeights,
    GeometricBlend,
    Loss,
    ModelSpec,
    ProductBlend,
    ServedWeights,
    Table,
    TeacherWeights,
    TransformersBackend,
    TrustRegionBlend,
    VllmServerBackend,
    other_models,
    teachers_of,
)
from sdkit.models.loading import end_ids, load_model, resolve_model, special_ids
from sdkit.models.teachers import Teacher, open_teacher
from sdkit.models.weights import Weights
from sdkit.plan.memory import needs_reference
from sdkit.plan.plan import Plan
from sdkit.serving.pool import ServerPool
from sdkit.serving.rollouts import ServerRollouts
from sdkit.serving.teacher_client import ServedModel
from sdkit.train.inputs import RunData
from sdkit.train.model_checks import check_models, compared_vocabulary, probe_models
from sdkit.train.prefetch import RolloutPrefetcher
from sdkit.train.rollout_backends import RolloutBackends
from sdkit.train.row_probe import measure_longest_pack, padding_shows_in_samples
from sdkit.train.student import Student


class TrainState:
    """The state of a run.  Creating it loads the model, the teacher and DeepSpeed; backends open on first use."""

    def __init__(
        self,
        spec: ExperimentSpec,
        plan: Plan,
        base: Path,
        data: RunData,
        model_folder: str,
        longest_sequence: int,
        served: Mapping[ServedWeights, ServedModel] | None = None,
        pool: ServerPool | None = None,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.base = base
        self.data = data
        self.model_folder = model_folder
        self.longest_sequence = longest_sequence  # tokens of the longest sequence, completion included
        self.served = served or {}
        self.pool = pool  # of rollout servers; on the first rank only
        self.prefetcher: RolloutPrefetcher | None = None
        if spec.rollout.max_staleness and isinstance(plan.backend, VllmServerBackend):
            self.prefetcher = RolloutPrefetcher(spec.rollout.max_staleness)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        assert plan.steps is not None, "steps are known once the data are loaded"
        self.step = 0  # rollout batches trained on
        self.end = plan.steps  # rollout batches after which the run ends: a replay may have fewer
        self.optimizer_steps = 0  # optimizer steps applied; the policy version
        self.skipped = 0  # optimizer steps in a row that were skipped
        with blaming("model", "path"):
            model: Any = load_model(spec.model, model_folder, spec.training.seed)
            self.student = Weights(model.to(self.device))
            _ = self.student.transform  # measured and cached before ZeRO-3 shards the parameters
        self.end_ids = end_ids(self.student.causal, data.tokenizer, data.turn_end)
        self.special_ids = special_ids(data.tokenizer, self.end_ids)
        self.teacher: Teacher | None = None
        if spec.teacher:
            self.teacher = self._open_teacher(spec.teacher.weights)
        self.reference = self._open_frozen(FrozenWeights()) if needs_reference(spec) else None
        self.blend_partner = self._open_blend_partner()
        for weights in self._other_weights.values():
            _ = weights.transform
        self._check_models()
        self.longest_pack = measure_longest_pack(self)
        self.pads_samples = self._may_pad_samples()
        self.student_module = Student(
            self.student,
            spec.rollout.temperature,
            spec.training.chunk_tokens,
            self.compared_ids,
            data.user_divergences,
        )
        self._initialize_zero(model)
        if self.teacher:
            self.teacher.initialize()
        self.backends = RolloutBackends(
            spec,
            plan,
            base,
            data,
            self.student,
            model_folder=model_folder,
            longest_sequence=longest_sequence,
            end_ids=self.end_ids,
            pads_samples=self.pads_samples,
            pool=pool,
        )

    def _check_models(self) -> None:
        """Check the loaded models; sets `compared_ids` and `ids_below`.  Raises BadData naming the key to change."""
        spec, models = self.spec, self.models
        vocabulary = compared_vocabulary(models, self.data, bool(self.served))
        self.compared_ids, self.ids_below = vocabulary
        longest = self.longest_sequence
        check_models(spec, models, self.data, self.end_ids, self.compared_ids, longest)
        probe_models(spec, models, self.device, self.plan.zero_stage)

    def _may_pad_samples(self) -> bool:
        """Return whether the transformers backend may pad prompts to equal lengths, if the run uses that backend."""
        backends = self.plan.backend, self.plan.evaluation_backend
        return not (
            any(isinstance(backend, TransformersBackend) for backend in backends)
            and any(padding_shows_in_samples(weights, self.data.tokenizer, self.end_ids) for _, weights in self.models)
        )

    def _initialize_zero(self, model: nn.Module) -> None:
        """Wrap the student in DeepSpeed; under ZeRO-3, shard every other model too."""
        stage, offload = self.plan.zero_stage, self.spec.training.offload
        root = zero_shards.Root(model)
        head = self.student.head_parameters
        bf16 = self.spec.model.dtype == "bfloat16"
        self.zero = zero.Zero(root, self.spec.optimizer, stage, bf16, offload)
        self._forward_engines: list[Any] = []
        if stage == 3:
            self.student.sharding = zero_shards.Zero3Sharding(root, head)
            self._shard_other_models()

    @property
    def _other_weights(self) -> dict[nn.Module, Weights]:
        """The weights of every module other than the student's: teachers, the reference, the base of a blend."""
        teachers = (*(self.teacher.leaves if self.teacher else ()), self.reference, self.blend_partner)
        weights = {t.weights.model: t.weights for t in teachers if t and t.weights}
        weights.pop(self.student.model, None)
        return weights

    def _shard_other_models(self) -> None:
        """Shard every module other than the student's."""
        for model, weights in self._other_weights.items():
            root, head = zero_shards.Root(model), weights.head_parameters
            engine = zero.open_forward_only(root, self.spec.training.offload)
            self._forward_engines.append(engine)
            weights.sharding = zero_shards.Zero3Sharding(root, head)

    def _open_teacher(self, weights: TeacherWeights) -> Teacher:
        return open_teacher(weights, self.student, self._load_external, lambda served: self.served[served].score)

    def _load_external(self, weights: ExternalWeights) -> Any:
        spec = ModelSpec(
            path=weights.path,
            revision=weights.revision,
            dtype=weights.dtype,
            attn_implementation=self.spec.model.attn_implementation,
        )
        path = next(path for path, other in other_models(self.spec) if other == weights)
        with blaming(*path, "path"):
            model: Any = load_model(spec, resolve_model(weights.path, self.base), self.spec.training.seed)
            _ = Weights(model.to(self.device)).transform
        return model

    @property
    def models(self) -> list[tuple[str, Weights]]:
        """The student and the models with other weights, each with the name that errors use."""
        teachers = [("teacher", leaf) for leaf in (self.teacher.leaves if self.teacher else ())]
        if self.blend_partner:
            teachers.append(("base of the blend", self.blend_partner))
        foreign = [
            (name, teacher.weights) for name, teacher in teachers if teacher.weights and teacher.weights.foreign
        ]
        return [("student", self.student), *foreign]

    def _open_blend_partner(self) -> Teacher | None:
        """Return the model that the teacher is blended with, if any."""
        match self.spec.teacher and self.spec.teacher.blend:
            case None:
                return None
            case TrustRegionBlend() | ProductBlend():
                return Teacher(self.student)
            case GeometricBlend():
                return self.reference
            case ExtrapolateBlend(base=base):
                return self.reference if isinstance(base, FrozenWeights) else self._open_frozen(base)
            case other:
                assert_never(other)

    def _open_frozen(self, spec: FrozenWeights | ExternalWeights) -> Teacher:
        """Open frozen weights, or return the teacher that has them already."""
        leaves = self.teacher.leaves if self.teacher else ()
        for leaf, (_, weights) in zip(leaves, teachers_of(self.spec), strict=True):
            if weights == spec:
                return leaf
        return self._open_teacher(spec)

    @property
    def total_optimizer_steps(self) -> int:
        """Number of optimizer steps of the full run."""
        assert self.plan.total_updates is not None, "steps are known once the data are loaded"
        return self.plan.total_updates

    @property
    def teacher_weights(self) -> Weights:
        """The teacher's weights, or the student's if there is no teacher.

        The teacher must be one model in this process, neither routed nor served.
        """
        weights = self.teacher.weights if self.teacher else self.student
        assert weights is not None, "a routed or served teacher does not sample"
        return weights

    @property
    def blend(self) -> Blend | None:
        """The teacher's blend, with schedules resolved at the current optimizer step."""
        return self.spec.teacher and at_step(self.spec.teacher.blend, self.optimizer_steps)

    @property
    def losses(self) -> Table[Loss]:
        """The loss terms, with schedules resolved at the current optimizer step."""
        return at_step(self.spec.losses, self.optimizer_steps)

    def scalar(self, value: Any) -> float:
        """Return the value of a number or schedule at the current optimizer step."""
        return scalar_at(value, self.optimizer_steps)

    def masters(self) -> Any:
        """Yield the name (as in the model) and the float32 master weights of each trained parameter."""
        for name, value in self.zero.masters():
            yield name.removeprefix("model."), value

    def backend(self, weights: Weights, *, evaluation: bool = False) -> tuple[RolloutBackend, dict[str, float]]:
        """Return the backend with these weights loaded, and the metrics of the transfer (none if nothing moved)."""
        return self.backends.load(weights, self.optimizer_steps, evaluation=evaluation)

    def servers(self) -> ServerRollouts:
        """Return the backend of the rollout servers, whose weights the caller may replace."""
        return self.backends.servers()

    def server_messages(self) -> list[str]:
        """Return the messages about rollout servers since the last call."""
        queue = self.pool.messages if self.pool else []
        messages = queue[:]
        del queue[: len(messages)]  # the pool's threads may have added more meanwhile
        return messages

    def close(self, *, together: bool = True) -> None:
        """Free DeepSpeed's engines, then the backends: closing vLLM destroys the process group.

        `together` is False if other ranks may not get here, so that this rank does not wait for them.
        """
        for model in self.served.values():
            model.close()
        self.zero.close()
        for engine in self._forward_engines:
            engine.destroy()
        if together:
            collectives.barrier()
        self.backends.close()
