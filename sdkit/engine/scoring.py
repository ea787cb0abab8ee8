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
    RoutedScores,
    Sequences,
    TeacherScores,
    ToldScores,
)
from sdkit.components.teachers import Teacher
from sdkit.engine.packing import sequences
from sdkit.losses.chunks import narrowed
from sdkit.plan_memory import pulls_to_reference
from sdkit.schedules import plain
from sdkit.specs import (
    Blend,
    ExtrapolateBlend,
    GeometricBlend,
    ProductBlend,
    TrustRegionBlend,
    tokens_told,
)

if TYPE_CHECKING:
    from sdkit.engine.world import World


@torch.no_grad()
def refer(world: World, batch: MicroBatch) -> TeacherScores | None:
    """What the frozen start model says of the counted tokens under the student's own prompt, where a term asks."""
    if world.reference is None or not pulls_to_reference(world.spec):
        return None
    return world.reference.ask(0, batch.student, world.rows)


@torch.no_grad()
def score(
    world: World, batch: MicroBatch, reference: TeacherScores | None = None
) -> TeacherScores | None:
    """What the teacher says of the counted tokens under its own prompt, with what it is blended with.

    `reference` saves a second pass of the start model, where it was asked before (`refer`).
    """
    if world.teacher is None or batch.teacher is None:
        return None
    blend = world.blend
    own, other = (1.0, 0.0) if blend is None else _powers(blend)
    if blend is None or other == 0:
        return _asked(world, world.teacher, batch, batch.teacher)
    prompt = batch.teacher if isinstance(blend, TrustRegionBlend) else batch.student
    beside = _beside(world, prompt, reference)
    if own == 0:  # what has no power is not asked
        return beside
    told = _asked(world, world.teacher, batch, batch.teacher)
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


def _beside(world: World, prompt: Sequences, reference: TeacherScores | None) -> TeacherScores:
    """What the weights say that the teacher is blended with."""
    assert world.beside is not None
    if reference and world.beside is world.reference:
        return reference
    return world.beside.ask(0, prompt, world.rows)


def _asked(world: World, teacher: Teacher, batch: MicroBatch, asked: Sequences) -> TeacherScores:
    """Each sequence scored by the teacher of its route, all of one route together."""
    routes = sorted(set(batch.teacher_routes)) or [0]
    if world.plan.zero_stage == 3:
        routes = list(range(len(teacher.leaves)))  # every rank runs every teacher
    row, token = batch.tokens.row, batch.tokens.token
    if len(routes) == 1:
        return _ask(world, teacher, routes[0], asked, token)
    part, place = torch.empty_like(row), torch.empty_like(row)
    answers: list[TeacherScores] = []
    for number, route in enumerate(routes):
        members = [i for i, own in enumerate(batch.teacher_routes) if own == route]
        mine = torch.isin(row, torch.tensor(members, device=row.device))
        answers.append(_ask(world, teacher, route, _only(world, asked, members), token[mine]))
        part[mine] = number
        place[mine] = torch.arange(int(mine.sum()), device=row.device)
    told = [each for each in answers if isinstance(each, ToldScores)]
    if told:
        return _joined(told, part)
    return RoutedScores(parts=tuple(answers), part=part, place=place, vocabulary=world.rows)


def _ask(
    world: World, teacher: Teacher, route: int, asked: Sequences, token: Tensor
) -> TeacherScores:
    """One route's answer.  Beside a served teacher every other tells as little as it does: the figures of a step must
    not depend on which routes stand in a micro-batch.
    """
    found = teacher.ask(route, asked, world.rows)
    k = tokens_told(world.spec)
    if k is None or isinstance(found, ToldScores):
        return found
    return narrowed(found, token, k, world.spec.training.chunk_tokens)


def _joined(answers: list[ToldScores], part: Tensor) -> ToldScores:
    """What several told, token by token.  part [M]: whose answer a token has."""
    count, k = len(part), answers[0].ids.shape[-1]
    ids = part.new_empty(count, k)
    logprobs = answers[0].logprobs.new_empty(count, k)
    sampled = answers[0].sampled.new_empty(count)
    for number, each in enumerate(answers):
        mine = part == number
        ids[mine], logprobs[mine], sampled[mine] = each.ids, each.logprobs, each.sampled
    return ToldScores(ids=ids, logprobs=logprobs, sampled=sampled)


def _only(world: World, asked: Sequences, members: list[int]) -> Sequences:
    """A forward pass over some of the sequences."""
    texts = [asked.texts[i] for i in members]
    return sequences(
        [t.prompt for t in texts],
        [t.completion for t in texts],
        [t.kept for t in texts],
        world.longest_pack,
        world.device,
    )
