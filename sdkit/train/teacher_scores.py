"""What the teacher, what it is blended with and the reference say of a micro-batch: before the student's forward pass,
without gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

from sdkit.batches import (
    BlendedScores,
    MicroBatch,
    PaddedSequences,
    RoutedScores,
    TeacherScores,
    TopKLogprobs,
)
from sdkit.language.schedules import plain
from sdkit.language.specs import (
    Blend,
    ExtrapolateBlend,
    GeometricBlend,
    ProductBlend,
    TrustRegionBlend,
    tokens_told,
)
from sdkit.losses.chunks import top_k_logprobs
from sdkit.models.packing import pad_sequences
from sdkit.models.teachers import Teacher
from sdkit.plan.memory import pulls_to_reference

if TYPE_CHECKING:
    from sdkit.train.state import TrainState


@torch.no_grad()
def score_reference(world: TrainState, batch: MicroBatch) -> TeacherScores | None:
    """What the frozen start model says of the counted tokens under the student's own prompt, where a term asks."""
    if world.reference is None or not pulls_to_reference(world.spec):
        return None
    return world.reference.score(0, batch.student, world.compared_ids)


@torch.no_grad()
def score_teacher(
    world: TrainState, batch: MicroBatch, reference: TeacherScores | None = None
) -> TeacherScores | None:
    """What the teacher says of the counted tokens under its own prompt, with what it is blended with.

    `reference` saves a second pass of the start model, where it was asked before (`refer`).
    """
    if world.teacher is None or batch.teacher is None:
        return None
    blend = world.blend
    own, other = (1.0, 0.0) if blend is None else _powers(blend)
    if blend is None or other == 0:
        return _score_by_route(world, world.teacher, batch, batch.teacher)
    prompt = batch.teacher if isinstance(blend, TrustRegionBlend) else batch.student
    beside = _score_blend_partner(world, prompt, reference)
    if own == 0:  # what has no power is not asked
        return beside
    told = _score_by_route(world, world.teacher, batch, batch.teacher)
    return BlendedScores(parts=(told, beside), factors=(own, other))


def _powers(blend: Blend) -> tuple[float, float]:
    """Those of the teacher and of what it is blended with.  Where one of them is 0, the other is 1."""
    match blend:
        case TrustRegionBlend(student_share=share):
            return 1 - plain(share), plain(share)
        case ProductBlend(student_power=power):
            return 1.0, plain(power)
        case GeometricBlend(teacher_share=share):
            return plain(share), 1 - plain(share)
        case ExtrapolateBlend(factor=factor):
            return plain(factor), 1 - plain(factor)
        case _:
            assert_never(blend)


def _score_blend_partner(
    world: TrainState, prompt: PaddedSequences, reference: TeacherScores | None
) -> TeacherScores:
    """What the weights say that the teacher is blended with."""
    assert world.blend_partner is not None
    if reference and world.blend_partner is world.reference:
        return reference
    return world.blend_partner.score(0, prompt, world.compared_ids)


def _score_by_route(
    world: TrainState, teacher: Teacher, batch: MicroBatch, asked: PaddedSequences
) -> TeacherScores:
    """Each sequence scored by the teacher of its route, all of one route together."""
    routes = sorted(set(batch.teacher_routes)) or [0]
    if world.plan.zero_stage == 3:
        routes = list(range(len(teacher.leaves)))  # every rank runs every teacher
    row, token = batch.tokens.row, batch.tokens.token
    if len(routes) == 1:
        return _score_route(world, teacher, routes[0], asked, token)
    part, place = torch.empty_like(row), torch.empty_like(row)
    answers: list[TeacherScores] = []
    for number, route in enumerate(routes):
        members = [i for i, own in enumerate(batch.teacher_routes) if own == route]
        mine = torch.isin(row, torch.tensor(members, device=row.device))
        answers.append(
            _score_route(
                world, teacher, route, _select_sequences(world, asked, members), token[mine]
            )
        )
        part[mine] = number
        place[mine] = torch.arange(int(mine.sum()), device=row.device)
    told = [each for each in answers if isinstance(each, TopKLogprobs)]
    if told:
        return _merge_top_k(told, part)
    return RoutedScores(parts=tuple(answers), part=part, place=place, vocabulary=world.compared_ids)


def _score_route(
    world: TrainState, teacher: Teacher, route: int, asked: PaddedSequences, token: Tensor
) -> TeacherScores:
    """One route's answer.  Beside a served teacher every other tells as little as it does: the figures of a step must
    not depend on which routes stand in a micro-batch.
    """
    found = teacher.score(route, asked, world.compared_ids)
    k = tokens_told(world.spec)
    if k is None or isinstance(found, TopKLogprobs):
        return found
    return top_k_logprobs(found, token, k, world.spec.training.chunk_tokens)


def _merge_top_k(answers: list[TopKLogprobs], part: Tensor) -> TopKLogprobs:
    """What several told, token by token.  part [M]: whose answer a token has."""
    count, k = len(part), answers[0].ids.shape[-1]
    ids = part.new_empty(count, k)
    logprobs = answers[0].logprobs.new_empty(count, k)
    sampled = answers[0].sampled.new_empty(count)
    for number, each in enumerate(answers):
        mine = part == number
        ids[mine], logprobs[mine], sampled[mine] = each.ids, each.logprobs, each.sampled
    return TopKLogprobs(ids=ids, logprobs=logprobs, sampled=sampled)


def _select_sequences(
    world: TrainState, asked: PaddedSequences, members: list[int]
) -> PaddedSequences:
    """A forward pass over some of the sequences."""
    texts = [asked.texts[i] for i in members]
    return pad_sequences(
        [t.prompt for t in texts],
        [t.completion for t in texts],
        [t.positions for t in texts],
        world.longest_pack,
        world.device,
    )
