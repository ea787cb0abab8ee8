"""The student model with its objective, as one module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdkit.batches import LogitTransform, MicroBatch, TeacherScores, Tokens
from sdkit.language.specs import Loss, Table
from sdkit.losses.chunks import projected_loss, scored_logprobs, token_logprobs, token_logprobs_and_entropy
from sdkit.losses.objective import Objective, UserDivergence, with_sequence_statistics
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
        objective = Objective(losses, self.temperature, self.functions, per_token=torch.is_grad_enabled())
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

    def _with_sequence_statistics(
        self, batch: MicroBatch, hidden: Tensor, scores: TeacherScores | None, objective: Objective
    ) -> Tokens:
        """Return the tokens with their sequence-level ratio and means, if a term needs them."""
        token, settings = batch.tokens.token, (self.temperature, self.chunk_tokens)

        def current() -> Tensor:
            return token_logprobs(hidden, self.head, token, *settings, self.transform)

        def teacher() -> Tensor | None:
            return scores and scored_logprobs(scores, token, *settings)

        return with_sequence_statistics(objective, batch.tokens, batch.rows, current, teacher)

    @torch.no_grad()
    def token_statistics(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return each counted token's log-probability and entropy at the sampling temperature, both [M] float32."""
        scores = self.weights.scores(batch.student, self.rows)
        return token_logprobs_and_entropy(scores, batch.tokens.token, self.temperature, self.chunk_tokens)
