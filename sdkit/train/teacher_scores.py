"""Scores a micro-batch with the teacher, its blend partner and the reference model.

Scoring runs before the student's forward pass, without gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkit.batches import BlendedScores, MicroBatch, PaddedSequences, RoutedScores, TeacherScores, TopKLogprobs
from sdkit.language.specs import tokens_told
from sdkit.losses.chunks import top_k_logprobs
from sdkit.models.packing import pad_sequences
from sdkit.models.teachers import Teacher
from sdkit.plan.memory import has_reference_term

if TYPE_CHECKING:
    from sdkit.train.state import TrainState


@torch.no_grad()
def score_reference(state: TrainState, batch: MicroBatch) -> TeacherScores | None:
    """Return the reference model's scores of the counted tokens after the student's prompt; None if no term uses them.

    The reference is the frozen start model.
    """
    if state.reference is None or not has_reference_term(state.spec):
        return None
    return state.reference.score(0, batch.student, state.compared_ids)


@torch.no_grad()
def score_teacher(
    state: TrainState, batch: MicroBatch, reference: TeacherScores | None = None
) -> TeacherScores | None:
    """Return the teacher's scores of the counted tokens after its own prompt, blended if the spec says so.

    Returns None if there is no teacher.  Pass the `reference` scores if they are known: a blend with the start model then
    needs no second forward pass.
    """
    if state.teacher is None or batch.teacher is None:
        return None
    blend = state.blend
    teacher_factor, partner_factor = blend.factors if blend else (1.0, 0.0)
    if blend is None or partner_factor == 0:
        return _score_by_route(state, state.teacher, batch, batch.teacher)
    prompt = batch.teacher if blend.partner_prompt == "teacher" else batch.student
    partner = _score_blend_partner(state, prompt, reference)
    if teacher_factor == 0:  # saves the teacher's forward pass
        return partner
    teacher = _score_by_route(state, state.teacher, batch, batch.teacher)
    return BlendedScores(parts=(teacher, partner), factors=(teacher_factor, partner_factor))


def _score_blend_partner(state: TrainState, prompt: PaddedSequences, reference: TeacherScores | None) -> TeacherScores:
    """Return the scores of the model that the teacher is blended with."""
    assert state.blend_partner is not None
    if reference and state.blend_partner is state.reference:
        return reference
    return state.blend_partner.score(0, prompt, state.compared_ids)


def _score_by_route(
    state: TrainState, teacher: Teacher, batch: MicroBatch, sequences: PaddedSequences
) -> TeacherScores:
    """Score each sequence by the teacher of its route, with one forward pass per route."""
    routes = sorted(set(batch.teacher_routes)) or [0]
    if state.plan.zero_stage == 3:
        routes = list(
            range(len(teacher.leaves))
        )  # parameters are gathered by all ranks, so every rank runs every teacher
    row, token = batch.tokens.row, batch.tokens.token
    if len(routes) == 1:
        return _score_route(state, teacher, routes[0], sequences, token)
    part, place = torch.empty_like(row), torch.empty_like(row)
    scores: list[TeacherScores] = []
    for number, route in enumerate(routes):
        members = [i for i, r in enumerate(batch.teacher_routes) if r == route]
        on_route = torch.isin(row, torch.tensor(members, device=row.device))
        selected = _select_sequences(state, sequences, members)
        scores.append(_score_route(state, teacher, route, selected, token[on_route]))
        part[on_route] = number
        place[on_route] = torch.arange(int(on_route.sum()), device=row.device)
    top_k = [s for s in scores if isinstance(s, TopKLogprobs)]
    if top_k:  # then all are: see _score_route
        return _merge_top_k(top_k, part)
    return RoutedScores(parts=tuple(scores), part=part, place=place, vocabulary=state.compared_ids)


def _score_route(
    state: TrainState, teacher: Teacher, route: int, sequences: PaddedSequences, token: Tensor
) -> TeacherScores:
    """Return the scores of one route's teacher.

    If any teacher is served, every local teacher is reduced to top-k log-probabilities too, so that the numbers of a step
    do not depend on which routes share a micro-batch.
    """
    scores = teacher.score(route, sequences, state.compared_ids)
    k = tokens_told(state.spec)
    if k is None or isinstance(scores, TopKLogprobs):
        return scores
    return top_k_logprobs(scores, token, k, state.spec.training.chunk_tokens)


def _merge_top_k(scores: list[TopKLogprobs], part: Tensor) -> TopKLogprobs:
    """Merge the scores of several teachers into one.  part [M] long: index into `scores` of each token's teacher."""
    count, k = len(part), scores[0].ids.shape[-1]
    ids = part.new_empty(count, k)
    logprobs = scores[0].logprobs.new_empty(count, k)
    sampled = scores[0].sampled.new_empty(count)
    for number, s in enumerate(scores):
        on_route = part == number
        ids[on_route], logprobs[on_route], sampled[on_route] = s.ids, s.logprobs, s.sampled
    return TopKLogprobs(ids=ids, logprobs=logprobs, sampled=sampled)


def _select_sequences(state: TrainState, sequences: PaddedSequences, members: list[int]) -> PaddedSequences:
    """Return a padded batch of some of the sequences."""
    texts = [sequences.texts[i] for i in members]
    return pad_sequences(
        [t.prompt for t in texts],
        [t.completion for t in texts],
        [t.positions for t in texts],
        state.longest_pack,
        state.device,
    )
