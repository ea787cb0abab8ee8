"""The student model with its objective, as one module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve
from torch import Tensor, nn

from sdkit.batches import LogitTransform, MicroBatch, TeacherScores, Tokens
from sdkit.language.specs import LossTerm, Table
from sdkit.losses.chunks import (
    projected_loss,
    scored_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)
from sdkit.losses.objective import Objective, UserDivergence, sampler_ratio
from sdkit.losses.policy_terms import sequence_means
from sdkit.models.weights import Weights


class Student(nn.Module):
    """The student with its objective: a forward pass returns the loss, so logits never leave it.

    To be called within a run of the weights' shards.
    """

    def __init__(
        self,
        weights: Weights,
        temperature: float,
        chunk_tokens: int,
        rows: int,
        functions: Mapping[str, UserDivergence] | None = None,
    ) -> None:
        super().__init__()
        self.model = weights.model
        self.weights = weights
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.rows = rows  # ids that are compared
        self.functions = functions

    @property
    def head(self) -> Tensor:
        """The output projection of the ids that are compared, [rows, H]; within `Shards.with_head`."""
        return self.weights.head[: self.rows]

    @property
    def transform(self) -> LogitTransform:
        """How logits of these ids follow from head × hidden; within `Shards.with_head`."""
        return self.weights.transform.first(self.rows)

    def forward(
        self,
        batch: MicroBatch,
        scores: TeacherScores | None,
        reference: TeacherScores | None,
        losses: Table[LossTerm],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.weights.selected_states(batch.student)
        with_head = self.weights.sharding.run_with_head
        return with_head(self._projected_loss, hidden, batch, scores, reference, losses)

    def _projected_loss(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        scores: TeacherScores | None,
        reference: TeacherScores | None,
        losses: Table[LossTerm],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective = Objective(losses, self.temperature, self.functions)
        return projected_loss(
            hidden,
            self.head,
            scores,
            self._with_sequence_statistics(batch, hidden.detach(), scores, objective),
            objective,
            self.chunk_tokens,
            reference,
            self.transform,
        )

    @torch.no_grad()
    def _with_sequence_statistics(
        self,
        batch: MicroBatch,
        hidden: Tensor,
        scores: TeacherScores | None,
        objective: Objective,
    ) -> Tokens:
        """The tokens with what takes whole sequences to know, where a term needs it."""
        tokens, losses = batch.tokens, objective.losses
        ratio = objective.needs_sequence_ratio and tokens.sampler_logprobs is not None
        if not ratio and not objective.needs_sequence_means:
            return tokens
        then = tokens.old_logprobs
        if then is None or objective.needs_sequence_means:
            now = self._logprobs(hidden, tokens.token)
        else:
            now = then
        if ratio:
            before = now if then is None else then
            tokens = evolve(tokens, ratio=sampler_ratio(losses, before, tokens, batch.rows))
        if objective.needs_sequence_means:
            teacher = scores and scored_logprobs(
                scores, tokens.token, self.temperature, self.chunk_tokens
            )
            means = sequence_means(losses, now, teacher, tokens, batch.rows)
            tokens = evolve(tokens, sequence_means=means)
        return tokens

    def _logprobs(self, hidden: Tensor, token: Tensor) -> Tensor:
        settings = self.temperature, self.chunk_tokens, self.transform
        return token_logprobs(hidden, self.head, token, *settings)

    @torch.no_grad()
    def token_statistics(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each counted token, and entropy, at the sampling temperature.  -> twice [M] float32"""
        scores = self.weights.scores(batch.student, self.rows)
        return token_logprobs_and_entropy(
            scores, batch.tokens.token, self.temperature, self.chunk_tokens
        )
