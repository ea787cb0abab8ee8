"""What is known of a rollout batch before its first update: the measuring pass, and which tokens count.

The pass is taken only where something asks for it (`measures.py`), and once per batch; all updates on the batch see the
same figures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor

from sdkit.batches import MicroBatch, RolloutBatch, TeacherScores, TopKLogprobs
from sdkit.distributed import collectives
from sdkit.language.required_statistics import Statistic, required_statistics
from sdkit.losses.chunks import scored_logprobs, token_logprobs_and_entropy
from sdkit.train.collate import collate_completions, empty_micro_batch
from sdkit.train.loss_masks import build_loss_masks
from sdkit.train.teacher_scores import score_teacher

if TYPE_CHECKING:
    from sdkit.train.state import TrainState


def prepare_rollouts(
    state: TrainState, rollouts: RolloutBatch, *, training: bool = True
) -> RolloutBatch:
    """The rollouts as `train_step` takes them, and `measure` (where `training` is False).

    Call it on the whole batch, before it is dealt into several updates.
    """
    old = training and state.plan.needs_old_logprobs
    asked = set(required_statistics(state.spec.losses)) | ({"student_logprobs"} if old else set())
    if asked:
        rollouts = compute_token_statistics(state, rollouts, asked)
    if old:
        told = [evolve(r, old_logprobs=r.token_statistics["student_logprobs"]) for r in rollouts]
        rollouts = RolloutBatch(rollouts=tuple(told))
    rollouts.check()
    return build_loss_masks(
        rollouts,
        state.losses,
        everywhere=collectives.all_gather,
        route=state.spec.route,
        special=state.special_ids,
        functions=state.data.user_weights,
    )


@torch.no_grad()
def compute_token_statistics(
    state: TrainState, rollouts: RolloutBatch, asked: Collection[Statistic]
) -> RolloutBatch:
    """The rollouts with these figures of each completion token, at the sampling temperature.

    The teacher's are missing where a rollout has no teacher prompt.
    """
    of_teacher = any(name.startswith("teacher") for name in asked)
    budget = state.spec.training.micro_batch_tokens
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    batches = [
        *collate_completions(
            list(rollouts), budget, state.device, state.longest_pack, teacher=of_teacher
        )
    ]
    empty = empty_micro_batch((), teacher=of_teacher, device=state.device)
    batches += [((), empty)] * (collectives.all_reduce_max(len(batches)) - len(batches))
    for part, batch in batches:
        sizes = [len(r.completion_ids) for r in part]
        held = {
            name: [tuple(x.tolist()) for x in values.split(sizes)]
            for name, values in _batch_statistics(state, batch, asked)
        }
        for place, rollout in enumerate(part):
            found[id(rollout)] = {
                name: values[place]
                for name, values in held.items()
                if rollout.teacher_prompt_ids is not None or not name.startswith("teacher")
            }
    return RolloutBatch(rollouts=tuple(evolve(r, token_statistics=found[id(r)]) for r in rollouts))


def _batch_statistics(
    state: TrainState, batch: MicroBatch, asked: Collection[Statistic]
) -> Iterator[tuple[Statistic, Tensor]]:
    """Each figure that is asked for, [M]; the teacher's where the batch has its prompts."""
    of_student: tuple[Statistic, ...] = ("student_logprobs", "student_entropy")
    pairs: list[tuple[Statistic, Tensor]] = []
    if set(of_student) & set(asked):
        pairs += zip(of_student, state.student_module.token_statistics(batch), strict=True)
    if scores := score_teacher(state, batch):
        pairs += _teacher_statistics(state, scores, batch.tokens.token)
    yield from (pair for pair in pairs if pair[0] in asked)


def _teacher_statistics(
    state: TrainState, scores: TeacherScores, token: Tensor
) -> Iterator[tuple[Statistic, Tensor]]:
    """The teacher's figures; without its entropy where it told of a few ids alone."""
    settings = state.spec.rollout.temperature, state.spec.training.chunk_tokens
    if isinstance(scores, TopKLogprobs):
        yield "teacher_logprobs", scored_logprobs(scores, token, *settings)
        return
    own, spread = token_logprobs_and_entropy(scores, token, *settings)
    yield "teacher_logprobs", own
    yield "teacher_entropy", spread
