"""What the teacher, and the reference, say of a micro-batch: before the student's forward pass, without gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdkit.batches import HiddenScores, MicroBatch, RoutedScores, Sequences, TeacherScores
from sdkit.components.teachers import Teacher
from sdkit.engine.packing import sequences

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
    weights = world.reference.weights
    hidden = weights.hidden(batch.student)
    return HiddenScores(hidden=hidden, head=weights.whole_head()[: world.rows])


def _asked(world: World, teacher: Teacher, batch: MicroBatch, asked: Sequences) -> TeacherScores:
    """Each sequence scored by the teacher of its route, all of one route together."""
    routes = sorted(set(batch.teacher_routes)) or [0]
    if world.plan.zero_stage == 3:
        routes = list(range(len(teacher.leaves)))  # every rank runs every teacher
    if len(routes) == 1:
        return teacher.ask(routes[0], asked, world.rows)
    row = batch.tokens.row
    part, place = torch.empty_like(row), torch.empty_like(row)
    answers: list[TeacherScores] = []
    for number, route in enumerate(routes):
        members = [i for i, own in enumerate(batch.teacher_routes) if own == route]
        answers.append(teacher.ask(route, _only(world, asked, members), world.rows))
        mine = torch.isin(row, torch.tensor(members, device=row.device))
        part[mine] = number
        place[mine] = torch.arange(int(mine.sum()), device=row.device)
    return RoutedScores(parts=tuple(answers), part=part, place=place, vocabulary=world.rows)


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
