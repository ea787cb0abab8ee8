"""What a run *is* at a step: the one mutable object.  Everything that flows through a step is frozen.

Weights, teacher, optimizer, data position and versions stand here and nowhere else, so a checkpoint is this object
written down.  Random numbers need no state: every draw has a seed derived from (run, step, row).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from sdkit.batches import RolloutBackend
from sdkit.distributed import collectives, zero, zero_shards
from sdkit.language.errors import BadData, blaming
from sdkit.language.schedules import at_step, scalar_at
from sdkit.language.specs import (
    Blend,
    Distillation,
    ExperimentSpec,
    ExternalWeights,
    ExtrapolateBlend,
    FrozenWeights,
    GeometricBlend,
    Loss,
    ModelSpec,
    ProductBlend,
    ReplayBackend,
    ServedWeights,
    Table,
    TeacherWeights,
    TopKSupport,
    TransformersBackend,
    TrustRegionBlend,
    VllmBackend,
    VllmEngine,
    VllmServerBackend,
    other_models,
    teachers_of,
)
from sdkit.models import activation_checkpointing, lora
from sdkit.models.embedding_ids import KnownIds
from sdkit.models.loading import end_ids, load_model, resolve_model, special_ids, vocabulary
from sdkit.models.probes import check_deterministic
from sdkit.models.teachers import Teacher, open_teacher
from sdkit.models.weights import Weights
from sdkit.plan.memory import needs_reference
from sdkit.plan.plan import ChosenBackend, Plan
from sdkit.sampling.canary import draw_canary
from sdkit.sampling.replay import ReplayRollouts
from sdkit.sampling.transformers import TransformersRollouts
from sdkit.sampling.vllm import VllmRollouts
from sdkit.serving.pool import ServerPool
from sdkit.serving.rollouts import ServerRollouts
from sdkit.serving.teacher_client import ServedModel
from sdkit.stdout import quiet
from sdkit.train.inputs import RunData
from sdkit.train.prefetch import RolloutPrefetcher
from sdkit.train.row_probe import measure_longest_pack, padding_shows_in_samples
from sdkit.train.step import Student


class TrainState:
    """A run's state.  Opening it loads the model, the teacher and DeepSpeed; backends open when first used."""

    def __init__(
        self,
        spec: ExperimentSpec,
        plan: Plan,
        base: Path,
        data: RunData,
        located: str,
        longest: int,
        served: Mapping[ServedWeights, ServedModel] | None = None,
        servers: ServerPool | None = None,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.base = base
        self.data = data
        self.model_folder = located
        self.longest_sequence = longest  # tokens of the longest sequence, completion included
        self.served = served or {}
        self.pool = servers  # of rollouts; the first rank's alone
        self.prefetcher: RolloutPrefetcher | None = None
        if spec.rollout.max_staleness and isinstance(plan.backend, VllmServerBackend):
            self.prefetcher = RolloutPrefetcher(spec.rollout.max_staleness)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        assert plan.steps is not None, "steps are known once the data are loaded"
        self.step = 0  # rollout batches done
        self.end = plan.steps  # rollout batches after which the run ends: a replay may have fewer
        self.optimizer_steps = 0  # optimizer steps applied; the policy version
        self.skipped = 0  # optimizer steps in a row that were skipped
        with blaming("model", "path"):
            model: Any = load_model(spec.model, located, spec.training.seed)
            self.student = Weights(model.to(self.device))
            _ = self.student.transform  # measured while the parameters are complete, as below
        self.end_ids = end_ids(self.student.causal, data.tokenizer, data.turn_end)
        self.special_ids = special_ids(data.tokenizer, self.end_ids)
        self.teacher: Teacher | None = None
        if spec.teacher:
            self.teacher = self._open_teacher(spec.teacher.weights)
        start = FrozenWeights()
        self.reference = self._open_frozen(start) if needs_reference(spec) else None
        self.blend_partner = self._open_blend_partner()
        for weights in self._others.values():
            _ = weights.transform
        self.compared_ids, self.ids_below = self._vocabulary()
        self._check_model()
        self._probe_models()
        self.longest_pack = measure_longest_pack(self)
        backends = plan.backend, plan.evaluation_backend
        self.pads_samples = not (
            any(isinstance(each, TransformersBackend) for each in backends)
            and any(
                padding_shows_in_samples(weights, data.tokenizer, self.end_ids)
                for _, weights in self.models
            )
        )  # whether sampling here may pad prompts to equal lengths
        chunk = spec.training.chunk_tokens
        functions = data.user_divergences
        self.student_module = Student(
            self.student, spec.rollout.temperature, chunk, self.compared_ids, functions
        )
        bf16 = spec.model.dtype == "bfloat16"
        root = zero_shards.Root(model)
        head = self.student.head_parameters
        self.zero = zero.Zero(root, spec.optimizer, plan.zero_stage, bf16, spec.training.offload)
        self._also_sharded: list[Any] = []
        if plan.zero_stage == 3:
            self.student.sharding = zero_shards.Zero3Sharding(root, head)
            self._shard_others()
        if self.teacher:
            self.teacher.initialize()
        self._backends: dict[str, RolloutBackend] = {}
        self._loaded: dict[str, tuple[int, int]] = {}

    @property
    def _others(self) -> dict[nn.Module, Weights]:
        """Every model beside the student's: teachers, the reference, the base of a blend."""
        teachers = (
            *(self.teacher.leaves if self.teacher else ()),
            self.reference,
            self.blend_partner,
        )
        others = {each.weights.model: each.weights for each in teachers if each and each.weights}
        others.pop(self.student.model, None)
        return others

    def _shard_others(self) -> None:
        """Take apart every model beside the student's."""
        for model, weights in self._others.items():
            root, head = zero_shards.Root(model), weights.head_parameters
            engine = zero.open_forward_only(root, self.spec.training.offload)
            self._also_sharded.append(engine)
            weights.sharding = zero_shards.Zero3Sharding(root, head)

    def _open_teacher(self, weights: TeacherWeights) -> Teacher:
        return open_teacher(
            weights, self.student, self._load_external, lambda which: self.served[which].score
        )

    def _load_external(self, weights: ExternalWeights) -> Any:
        spec = ModelSpec(
            path=weights.path,
            revision=weights.revision,
            dtype=weights.dtype,
            attention=self.spec.model.attention,
        )
        where = next(path for path, each in other_models(self.spec) if each == weights)
        with blaming(*where, "path"):
            model: Any = load_model(
                spec, resolve_model(weights.path, self.base), self.spec.training.seed
            )
            _ = Weights(model.to(self.device)).transform
        return model

    @property
    def models(self) -> list[tuple[str, Weights]]:
        """The student, and the weights of other models than it: by what they are here."""
        told = [("teacher", leaf) for leaf in (self.teacher.leaves if self.teacher else ())]
        if self.blend_partner:
            told.append(("base of the blend", self.blend_partner))
        others = [
            (who, each.weights) for who, each in told if each.weights and each.weights.foreign
        ]
        return [("student", self.student), *others]

    def _vocabulary(self) -> tuple[int, int | None]:
        """How many ids are compared, and the bound of the ids that may be sampled, where there must be one.

        Output projections may have more rows than the tokenizer has ids, and not every model equally many: then what
        is beyond the tokenizer's ids is no token to either side.  How many a served model has is not known.
        """
        own = self.student.head.shape[0]
        known = max(vocabulary(self.data.tokenizer).values()) + 1
        same = all(weights.head.shape[0] == own for _, weights in self.models)
        if same and (not self.served or own == known):
            return own, None
        for who, weights in self.models:
            if weights.head.shape[0] < known:
                raise BadData(
                    f"the {who} has {weights.head.shape[0]} output rows for {known} token ids",
                    path=("teacher", "weights") if weights.foreign else ("model", "path"),
                )
        return known, known

    def _check_model(self) -> None:
        """What only the loaded models can say.  Raises BadData naming the key to change."""
        for name, term in self.spec.losses.items():
            if isinstance(term, Distillation) and isinstance(term.support, TopKSupport):
                if term.support.k > self.compared_ids:
                    raise BadData(
                        f"k is {term.support.k}, but the vocabulary has {self.compared_ids} tokens",
                        hint="use support: vocabulary",
                        path=("losses", name, "support", "k"),
                    )
        for who, weights in self.models:
            self._check_ids(who, weights)
            context = getattr(weights.causal.config, "max_position_embeddings", None)
            if context and self.longest_sequence > context:
                raise BadData(
                    f"the longest prompt and completion have {self.longest_sequence} tokens, the {who} takes {context}",
                    hint="lower rollout.max_new_tokens or teacher.sees.max_prompt_tokens, or drop long rows",
                    path=("rollout", "max_new_tokens"),
                )

    def _check_ids(self, who: str, weights: Weights) -> None:
        """Raise BadData where the loaded model has no embedding for an id of the data, or for an end token."""
        known = KnownIds(f"the {who}", weights.causal.get_input_embeddings().weight.shape[0])
        with blaming(*(("teacher", "weights") if weights.foreign else ("model", "path"))):
            known.check(self.data.tokenizer, "the text", (self.data.largest_id,))
            known.check(self.data.tokenizer, "the list of end tokens", self.end_ids)

    def _probe_models(self) -> None:
        """What only a forward pass can say.  Raises BadData naming the key to change."""
        if self.spec.model.lora:
            lora.check(self.student, self.device, self.plan.zero_stage)
        for who, weights in self.models:
            check_deterministic(weights, who, self.device)
        if self.spec.model.activation_checkpointing:
            activation_checkpointing.check(self.student, self.spec.model.path, self.device)

    def _open_blend_partner(self) -> Teacher | None:
        """What the teacher is blended with."""
        match self.spec.teacher and self.spec.teacher.blend:
            case None:
                return None
            case TrustRegionBlend() | ProductBlend():
                return Teacher(self.student)
            case GeometricBlend():
                return self.reference
            case ExtrapolateBlend(base=base):
                return (
                    self.reference if isinstance(base, FrozenWeights) else self._open_frozen(base)
                )
            case other:
                assert_never(other)

    def _open_frozen(self, wanted: FrozenWeights | ExternalWeights) -> Teacher:
        """These weights; where they are a teacher already, that one."""
        leaves = self.teacher.leaves if self.teacher else ()
        for leaf, (_, weights) in zip(leaves, teachers_of(self.spec), strict=True):
            if weights == wanted:
                return leaf
        return self._open_teacher(wanted)

    @property
    def total_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        assert self.plan.total_updates is not None, "steps are known once the data are loaded"
        return self.plan.total_updates

    @property
    def teacher_weights(self) -> Weights:
        """The teacher's weights; the student's where there is no teacher.  It must be one model in this process."""
        weights = self.teacher.weights if self.teacher else self.student
        assert weights is not None, "a routed or served teacher does not sample"
        return weights

    @property
    def blend(self) -> Blend | None:
        """What the teacher is blended with, every number as it is at the current optimizer step."""
        return self.spec.teacher and at_step(self.spec.teacher.blend, self.optimizer_steps)

    @property
    def losses(self) -> Table[Loss]:
        """The terms of the objective, every number as it is at the current optimizer step."""
        return at_step(self.spec.losses, self.optimizer_steps)

    def scalar(self, value: Any) -> float:
        """A scalar that may move, at the current optimizer step."""
        return scalar_at(value, self.optimizer_steps)

    def masters(self) -> Any:
        """Names (as the model has them) and float32 masters of the trained parameters."""
        for name, value in self.zero.masters():
            yield name.removeprefix("model."), value

    def backend(
        self, weights: Weights, *, evaluation: bool = False
    ) -> tuple[RolloutBackend, dict[str, float]]:
        """The backend with these weights loaded, and the figures of the transfer (none where nothing moved)."""
        chosen = self.plan.evaluation_backend if evaluation else self.plan.backend
        if weights.foreign and isinstance(chosen, VllmEngine):
            chosen = TransformersBackend()  # vLLM's engine has the student's architecture
        backend = self._opened(chosen)
        wanted = (id(weights), self.optimizer_steps)
        if self._loaded.get(chosen.kind) == wanted:
            return backend, {}
        measured = dict(backend.load(weights, self.optimizer_steps))
        self._loaded[chosen.kind] = wanted
        return backend, measured

    def servers(self) -> ServerRollouts:
        """The rollout servers, whatever weights they have; whoever asks may give them others."""
        self._loaded.pop(VllmServerBackend.kind, None)
        backend = self._opened(self.plan.backend)
        assert isinstance(backend, ServerRollouts), "the plan's backend is another"
        return backend

    def server_messages(self) -> list[str]:
        """What has happened to rollout servers since this was last asked."""
        found = self.pool.messages if self.pool else []
        told = found[:]
        del found[: len(told)]
        return told

    def _opened(self, spec: ChosenBackend | ReplayBackend) -> RolloutBackend:
        if spec.kind not in self._backends:
            with blaming("rollout", "backend"):
                self._backends[spec.kind] = self._open(spec)
        return self._backends[spec.kind]

    def _open(self, spec: ChosenBackend | ReplayBackend) -> RolloutBackend:
        match spec:
            case TransformersBackend():
                rows = spec.batch_rows if self.pads_samples else 1
                return TransformersRollouts(self.data.tokenizer, rows, self.end_ids)
            case VllmBackend():
                with quiet():
                    return VllmRollouts(
                        spec,
                        self.model_folder,
                        self.spec.model.dtype,
                        self.longest_sequence,
                        self.end_ids,
                    )
            case VllmServerBackend():
                vocabulary = self.student.causal.config.get_text_config().vocab_size
                canary = draw_canary(spec, self.spec.model.dtype, vocabulary, self.longest_sequence)
                return ServerRollouts(self.pool, canary, self.end_ids)
            case ReplayBackend():
                return ReplayRollouts((self.base / spec.run).resolve())
            case _:
                assert_never(spec)

    def close(self, *, together: bool = True) -> None:
        """Free DeepSpeed's engine and then the backends: vLLM takes the process group with it."""
        for model in self.served.values():
            model.close()
        self.zero.close()
        for engine in self._also_sharded:
            engine.destroy()
        if together:
            collectives.barrier()
        for backend in self._backends.values():
            backend.close()
        if self.pool and VllmServerBackend.kind not in self._backends:
            self.pool.close()
