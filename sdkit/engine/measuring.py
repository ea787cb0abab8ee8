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

from sdkit.batches import MicroBatch, RolloutBatch, TeacherScores, ToldScores
from sdkit.engine import ranks
from sdkit.engine.collate import whole_completions, without_rows
from sdkit.engine.counting import count_tokens
from sdkit.engine.scoring import score
from sdkit.losses.chunks import scored_logprobs, token_measures
from sdkit.measures import Measure, measured

if TYPE_CHECKING:
    from sdkit.engine.world import World


def ready(world: World, rollouts: RolloutBatch, *, training: bool = True) -> RolloutBatch:
    """The rollouts as `train_step` takes them, and `measure` (where `training` is False).

    Call it on the whole batch, before it is dealt into several updates.
    """
    old = training and world.plan.needs_old_logprobs
    asked = set(measured(world.spec.losses)) | ({"student_logprobs"} if old else set())
    if asked:
        rollouts = take_measures(world, rollouts, asked)
    if old:
        told = [evolve(r, old_logprobs=r.measures["student_logprobs"]) for r in rollouts]
        rollouts = RolloutBatch(rollouts=tuple(told))
    rollouts.check()
    return count_tokens(
        rollouts,
        world.losses,
        everywhere=ranks.everywhere,
        route=world.spec.route,
        special=world.special_ids,
        functions=world.data.user_weights,
    )


@torch.no_grad()
def take_measures(world: World, rollouts: RolloutBatch, asked: Collection[Measure]) -> RolloutBatch:
    """The rollouts with these figures of each completion token, at the sampling temperature.

    The teacher's are missing where a rollout has no teacher prompt.
    """
    of_teacher = any(name.startswith("teacher") for name in asked)
    budget = world.spec.training.micro_batch_tokens
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    batches = [
        *whole_completions(
            list(rollouts), budget, world.device, world.longest_pack, teacher=of_teacher
        )
    ]
    empty = without_rows((), teacher=of_teacher, device=world.device)
    batches += [((), empty)] * (ranks.most(len(batches)) - len(batches))
    for part, batch in batches:
        sizes = [len(r.completion_ids) for r in part]
        held = {
            name: [tuple(x.tolist()) for x in values.split(sizes)]
            for name, values in _figures(world, batch, asked)
        }
        for place, rollout in enumerate(part):
            found[id(rollout)] = {
                name: values[place]
                for name, values in held.items()
                if rollout.teacher_prompt_ids is not None or not name.startswith("teacher")
            }
    return RolloutBatch(rollouts=tuple(evolve(r, measures=found[id(r)]) for r in rollouts))


def _figures(
    world: World, batch: MicroBatch, asked: Collection[Measure]
) -> Iterator[tuple[Measure, Tensor]]:
    """Each figure that is asked for, [M]; the teacher's where the batch has its prompts."""
    of_student: tuple[Measure, ...] = ("student_logprobs", "student_entropy")
    pairs: list[tuple[Measure, Tensor]] = []
    if set(of_student) & set(asked):
        pairs += zip(of_student, world.module.measures(batch), strict=True)
    if scores := score(world, batch):
        pairs += _of_teacher(world, scores, batch.tokens.token)
    yield from (pair for pair in pairs if pair[0] in asked)


def _of_teacher(
    world: World, scores: TeacherScores, token: Tensor
) -> Iterator[tuple[Measure, Tensor]]:
    """The teacher's figures; without its entropy where it told of a few ids alone."""
    settings = world.spec.rollout.temperature, world.spec.training.chunk_tokens
    if isinstance(scores, ToldScores):
        yield "teacher_logprobs", scored_logprobs(scores, token, *settings)
        return
    own, spread = token_measures(scores, token, *settings)
    yield "teacher_logprobs", own
    yield "teacher_entropy", spread
