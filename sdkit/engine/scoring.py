"""What the teacher, and the reference, say of a micro-batch: before the student's forward pass, without gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkit.batches import (
    MicroBatch,
    RoutedScores,
    Sequences,
    TeacherScores,
    ToldScores,
)
from sdkit.components.teachers import Teacher
from sdkit.engine.packing import sequences
from sdkit.losses.chunks import narrowed
from sdkit.specs import tokens_told

if TYPE_CHECKING:
    from sdkit.engine.world import World


@torch.no_grad()
def score(world: World, batch: MicroBatch) -> TeacherScores | None:
    """What the teacher says of the counted tokens under its own prompt."""
    if world.teacher is None or batch.teacher is None:
        return None
    return _asked(world, world.teacher, batch, batch.teacher)


@torch.no_grad()
def refer(world: World, batch: MicroBatch) -> TeacherScores | None:
    """What the frozen start model says of the counted tokens under the student's own prompt."""
    if world.reference is None:
        return None
    return world.reference.ask(0, batch.student, world.rows)


def _asked(world: World, teacher: Teacher, batch: MicroBatch, asked: Sequences) -> TeacherScores:
    """Each sequence scored by the teacher of its route, all of one route together."""
    routes = sorted(set(batch.teacher_routes))
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
