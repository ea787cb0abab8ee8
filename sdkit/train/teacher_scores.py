"""Scores a micro-batch with the teacher, its blend partner and the reference model.

Scoring runs before the student's forward pass, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from sdkit.batches import (
    BlendedScores,
    HiddenStateScores,
    MicroBatch,
    PaddedSequences,
    RoutedScores,
    TeacherScores,
    TopKLogprobs,
)
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
    pass_tokens: int  # of a forward pass, padding included, if its rows can be split
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
        return self._score(self.models.blend_partner, 0, prompt)

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
        scores = self._score(teacher, route, sequences)
        if self.top_k is None or isinstance(scores, TopKLogprobs):
            return scores
        return top_k_logprobs(scores, token, self.top_k, self.chunk_tokens)

    def _score(self, teacher: Teacher, route: int, sequences: PaddedSequences) -> TeacherScores:
        """Return the scores of one teacher: in one forward pass, or in several if a trajectory's rows exceed the budget.

        Under ZeRO stage 3, where every rank needs equally many passes, it is one.
        """
        compared, texts = self.models.compared_ids, sequences.texts
        widest = max((len(text.prompt) + len(text.completion) for text in texts), default=0)
        rows = max(1, self.pass_tokens // max(widest, 1))
        if self.all_routes or len(texts) <= rows or sequences.input_ids.numel() <= self.pass_tokens:
            return teacher.score(route, sequences, compared)
        starts = range(0, len(texts), rows)
        parts = [self._select_sequences(sequences, range(start, len(texts))[:rows]) for start in starts]
        return _joined([teacher.score(route, part, compared) for part in parts])

    def _select_sequences(self, sequences: PaddedSequences, members: Sequence[int]) -> PaddedSequences:
        """Return a padded batch of some of the sequences."""
        texts = [sequences.texts[i] for i in members]
        return pad_sequences(
            [t.prompt for t in texts],
            [t.completion for t in texts],
            [t.positions for t in texts],
            self.models.longest_pack,
            self.models.device,
        )


def _joined(parts: Sequence[TeacherScores]) -> TeacherScores:
    """Return the scores of consecutive sequences as one."""
    if all(isinstance(part, TopKLogprobs) for part in parts):
        known = [part for part in parts if isinstance(part, TopKLogprobs)]
        return TopKLogprobs(
            ids=torch.cat([part.ids for part in known]),
            logprobs=torch.cat([part.logprobs for part in known]),
            sampled=torch.cat([part.sampled for part in known]),
        )
    states = [part for part in parts if isinstance(part, HiddenStateScores)]
    return evolve(states[0], hidden=torch.cat([part.hidden for part in states]))


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
