"""Scores a micro-batch with the teacher, its blend partner and the reference model.

Scoring runs before the student's forward pass, without gradients.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from sdkit.batches import BlendedScores, MicroBatch, PaddedSequences, RoutedScores, TeacherScores, TopKLogprobs
from sdkit.language.specs import Blend
from sdkit.losses.chunks import top_k_logprobs
from sdkit.models.operations import pass_operations
from sdkit.models.packing import pad_sequences
from sdkit.models.teachers import Teacher
from sdkit.train.models import Models


@frozen(eq=False, kw_only=True)
class TeacherScorer:
    """The models that score the student's tokens, and how they do it."""

    models: Models
    has_reference_term: bool  # whether a loss term compares the student with the reference
    top_k: int | None  # every teacher returns so many likeliest tokens only, because one of them is served
    chunk_tokens: int
    all_routes: bool  # ZeRO stage 3 gathers parameters on all ranks, so every rank runs every teacher

    @torch.no_grad()
    def score_reference(self, batch: MicroBatch) -> TeacherScores | None:
        """Return the reference's scores of the counted tokens after the student's prompt; None if no term uses them."""
        if self.models.reference is None or not self.has_reference_term:
            return None
        return self.models.reference.score(0, batch.student, self.models.compared_ids)

    @torch.no_grad()
    def score_teacher(
        self, batch: MicroBatch, blend: Blend | None, reference: TeacherScores | None = None
    ) -> TeacherScores | None:
        """Return the teacher's scores of the counted tokens after its own prompt, blended if there is a blend.

        Returns None if there is no teacher.  Pass the `reference` scores if they are known: a blend with the start
        model then needs no second forward pass.
        """
        if self.models.teacher is None or batch.teacher is None:
            return None
        teacher_factor, partner_factor = blend.factors if blend else (1.0, 0.0)
        if blend is None or partner_factor == 0:
            return self._score_by_route(self.models.teacher, batch, batch.teacher)
        prompt = batch.teacher if blend.partner_prompt == "teacher" else batch.student
        partner = self._score_blend_partner(prompt, reference)
        if teacher_factor == 0:  # saves the teacher's forward pass
            return partner
        teacher = self._score_by_route(self.models.teacher, batch, batch.teacher)
        return BlendedScores(parts=(teacher, partner), factors=(teacher_factor, partner_factor))

    def operations(self, batch: MicroBatch, blend: Blend | None) -> float:
        """Return the operations of `score_reference` and of `score_teacher` with its result; nan if not known."""
        models, passes = self.models, []
        if self.has_reference_term and models.reference:
            passes.append((models.reference, batch.student.texts))
        if models.teacher and batch.teacher:
            teacher_factor, partner_factor = blend.factors if blend else (1.0, 0.0)
            if blend and partner_factor and not (passes and models.blend_partner is models.reference):
                prompt = batch.teacher if blend.partner_prompt == "teacher" else batch.student
                passes.append((models.blend_partner, prompt.texts))
            if teacher_factor:
                texts = batch.teacher.texts
                passes += [
                    (leaf, [texts[i] for i in _on_route(batch, number)])
                    for number, leaf in enumerate(models.teacher.leaves)
                ]
        return sum(pass_operations(one.weights, texts) for one, texts in passes if one and one.weights)

    def _score_blend_partner(self, prompt: PaddedSequences, reference: TeacherScores | None) -> TeacherScores:
        """Return the scores of the model that the teacher is blended with."""
        assert self.models.blend_partner is not None
        if reference and self.models.blend_partner is self.models.reference:
            return reference
        return self.models.blend_partner.score(0, prompt, self.models.compared_ids)

    def _score_by_route(self, teacher: Teacher, batch: MicroBatch, sequences: PaddedSequences) -> TeacherScores:
        """Score each rollout by the teacher of its route, with one forward pass per route."""
        routes = range(len(teacher.leaves)) if self.all_routes else sorted(set(batch.teacher_routes)) or [0]
        row, token = batch.tokens.row, batch.tokens.token
        if len(routes) == 1:
            return self._score_route(teacher, routes[0], sequences, token)
        part, place = torch.empty_like(row), torch.empty_like(row)
        scores: list[TeacherScores] = []
        for number, route in enumerate(routes):
            members = [i for i, r in enumerate(batch.teacher_routes) if r == route]
            on_route = torch.isin(row, torch.tensor(members, device=row.device))
            selected = self._select_sequences(sequences, _on_route(batch, route))
            scores.append(self._score_route(teacher, route, selected, token[on_route]))
            part[on_route] = number
            place[on_route] = torch.arange(int(on_route.sum()), device=row.device)
        top_k = [s for s in scores if isinstance(s, TopKLogprobs)]
        if top_k:  # then all are: see _score_route
            return _merge_top_k(top_k, part)
        return RoutedScores(parts=tuple(scores), part=part, place=place, vocabulary=self.models.compared_ids)

    def _score_route(self, teacher: Teacher, route: int, sequences: PaddedSequences, token: Tensor) -> TeacherScores:
        """Return the scores of one route's teacher.

        If any teacher is served, every local teacher is reduced to top-k log-probabilities too, so that the numbers of
        a step do not depend on which routes share a micro-batch.
        """
        scores = teacher.score(route, sequences, self.models.compared_ids)
        if self.top_k is None or isinstance(scores, TopKLogprobs):
            return scores
        return top_k_logprobs(scores, token, self.top_k, self.chunk_tokens)

    def _select_sequences(self, sequences: PaddedSequences, members: list[int]) -> PaddedSequences:
        """Return a padded batch of some of the sequences."""
        texts = [sequences.texts[i] for i in members]
        return pad_sequences(
            [t.prompt for t in texts],
            [t.completion for t in texts],
            [t.positions for t in texts],
            self.models.longest_pack,
            self.models.device,
        )


def _on_route(batch: MicroBatch, route: int) -> list[int]:
    """Return the teacher's sequences of the rollouts on a route, by index."""
    return [i for i, rollout in enumerate(batch.teacher_rows) if batch.teacher_routes[rollout] == route]


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
