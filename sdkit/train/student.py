"""The student model with its objective, as one module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve
from torch import Tensor, nn

from sdkit.batches import LogitTransform, MicroBatch, TeacherScores, Tokens
from sdkit.language.specs import Loss, Table
from sdkit.losses.chunks import projected_loss, scored_logprobs, token_logprobs, token_logprobs_and_entropy
from sdkit.losses.objective import Objective, UserDivergence, sampler_ratio
from sdkit.losses.policy_terms import sequence_means
from sdkit.models.weights import Weights


class Student(nn.Module):
    """The student model with its objective: its forward pass returns the loss, so logits never leave the module.

    Call it within `weights.sharding.run_forward`, or as DeepSpeed's module.
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
        self.rows = rows  # number of token ids whose logits are compared
        self.functions = functions

    @property
    def head(self) -> Tensor:
        """The output projection of the compared ids, [rows, H]; use it within `Sharding.run_with_head`."""
        return self.weights.head[: self.rows]

    @property
    def transform(self) -> LogitTransform:
        """The transform from head × hidden to the logits of these ids; use it within `Sharding.run_with_head`."""
        return self.weights.transform.first(self.rows)

    def forward(
        self, batch: MicroBatch, scores: TeacherScores | None, reference: TeacherScores | None, losses: Table[Loss]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the sums of its metrics over the counted tokens."""
        hidden = self.weights.selected_states(batch.student)
        with_head = self.weights.sharding.run_with_head
        return with_head(self._projected_loss, hidden, batch, scores, reference, losses)

    def _projected_loss(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        scores: TeacherScores | None,
        reference: TeacherScores | None,
        losses: Table[Loss],
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
        self, batch: MicroBatch, hidden: Tensor, scores: TeacherScores | None, objective: Objective
    ) -> Tokens:
        """Return the tokens with their sequence-level ratio and means, if a term needs them.

        Chunks cannot compute these: they take complete sequences.
        """
        tokens, losses = batch.tokens, objective.losses
        needs_ratio = objective.needs_sequence_ratio and tokens.sampler_logprobs is not None
        if not needs_ratio and not objective.needs_sequence_means:
            return tokens
        old = tokens.old_logprobs
        if old is None or objective.needs_sequence_means:
            current = self._logprobs(hidden, tokens.token)
        else:
            current = old
        if needs_ratio:
            trainer = current if old is None else old
            tokens = evolve(tokens, ratio=sampler_ratio(losses, trainer, tokens, batch.rows))
        if objective.needs_sequence_means:
            teacher = scores and scored_logprobs(scores, tokens.token, self.temperature, self.chunk_tokens)
            means = sequence_means(losses, current, teacher, tokens, batch.rows)
            tokens = evolve(tokens, sequence_means=means)
        return tokens

    def _logprobs(self, hidden: Tensor, token: Tensor) -> Tensor:
        settings = self.temperature, self.chunk_tokens, self.transform
        return token_logprobs(hidden, self.head, token, *settings)

    @torch.no_grad()
    def token_statistics(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return each counted token's log-probability and entropy at the sampling temperature, both [M] float32."""
        scores = self.weights.scores(batch.student, self.rows)
        return token_logprobs_and_entropy(scores, batch.tokens.token, self.temperature, self.chunk_tokens)
