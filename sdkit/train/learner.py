"""The training side of a run: the student under DeepSpeed, and the models that score its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from attrs import frozen
from torch import Tensor

from sdkit.data.text_spans import Decode
from sdkit.distributed import zero, zero_shards
from sdkit.distributed.master_shards import MasterSharding
from sdkit.models.teachers import ShardTensors
from sdkit.train.loss_masks import UserFunction
from sdkit.train.models import Models
from sdkit.train.setup import RunSetup
from sdkit.train.student import Student
from sdkit.train.teacher_scores import TeacherScorer


@frozen(eq=False, kw_only=True)
class Learner:
    """Turns rollouts into loss masks, losses and optimizer steps (token_statistics.py, step.py)."""

    models: Models
    student: Student
    scorer: TeacherScorer
    zero: zero.Zero  # DeepSpeed's engine around the student
    frozen_engines: tuple[Any, ...]  # DeepSpeed's engines around the other models, under ZeRO stage 3
    micro_batch_tokens: int
    user_weights: Mapping[str, UserFunction]  # by loss term
    decode: Decode  # the text of a turn, for patterns in masks

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name (as in the model) and the float32 master weights of each trained parameter, as `Zero.masters`."""
        for name, value in self.zero.masters():
            yield name.removeprefix("model."), value

    def close(self) -> None:
        """Free DeepSpeed's engines."""
        self.zero.close()
        for engine in self.frozen_engines:
            engine.destroy()


def open_learner(setup: RunSetup, models: Models) -> Learner:
    """Wrap the student in DeepSpeed; under ZeRO stage 3, shard every other model too."""
    spec, data, student = setup.spec, setup.data, models.student
    chunk_tokens = spec.training.chunk_tokens
    module = Student(student, spec.rollout.temperature, chunk_tokens, models.compared_ids, data.user_divergences)
    scorer = TeacherScorer(
        models=models,
        has_reference_term=spec.has_reference_term,
        top_k=spec.served_top_k,
        chunk_tokens=chunk_tokens,
        pass_tokens=spec.training.micro_batch_tokens,
        all_routes=setup.plan.zero_stage == 3,
    )
    stage, offload, bf16 = setup.plan.zero_stage, spec.training.offload, spec.model.dtype == "bfloat16"
    root, head = zero_shards.Root(student.model), student.head_parameters
    engine = zero.Zero(root, spec.optimizer, stage, bf16, zero.ZeroOptions.of(spec.training))
    frozen_engines: list[Any] = []
    if stage == 3:
        student.sharding = zero_shards.Zero3Sharding(root, head)
        for model, weights in models.others.items():
            root, head = zero_shards.Root(model), weights.head_parameters
            frozen_engines.append(zero.open_forward_only(root, offload))
            weights.sharding = zero_shards.Zero3Sharding(root, head)
    if models.teacher:
        models.teacher.initialize(_master_sharding(engine) if stage in (1, 2) and engine.shards_masters else None)
    return Learner(
        models=models,
        student=module,
        scorer=scorer,
        zero=engine,
        frozen_engines=tuple(frozen_engines),
        micro_batch_tokens=spec.training.micro_batch_tokens,
        user_weights=data.user_weights,
        decode=partial(data.tokenizer.decode, skip_special_tokens=True),
    )


def _master_sharding(engine: zero.Zero) -> ShardTensors:
    own_parts = {name.removeprefix("model."): part for name, part in engine.own_parts().items()}
    return lambda tensors: MasterSharding(tensors, own_parts)
