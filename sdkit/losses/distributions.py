"""All sides' log-probabilities over the vocabulary, for one chunk of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.losses.divergence import entropy


class Distributions:
    """Log-softmax and entropy of student, teacher and reference, each computed once per temperature."""

    def __init__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        reference_logits: Tensor | None = None,
    ) -> None:
        self._logits = {"student": student_logits}
        for side, logits in (("teacher", teacher_logits), ("reference", reference_logits)):
            if logits is not None:
                if logits.shape != student_logits.shape:
                    sizes = f"{tuple(student_logits.shape)} and {tuple(logits.shape)}"
                    raise ValueError(f"logits of student and {side} differ in shape: {sizes}")
                self._logits[side] = logits
        self._logprobs: dict[tuple[str, float], Tensor] = {}
        self._entropy: dict[tuple[str, float], Tensor] = {}

    def student(self, temperature: float) -> Tensor:
        """Log-probabilities [C, V], float32 (float64 for float64 logits)."""
        return self._at("student", temperature)

    def teacher(self, temperature: float) -> Tensor:
        """Log-probabilities [C, V], detached.  Raises ValueError where there is no teacher."""
        return self._at("teacher", temperature).detach()

    def against(self, side: str, temperature: float, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Student and the other side, twice [C, V]; counts [C] bool says which tokens matter.

        Elsewhere the other side is the student itself: an infinite difference would make a NaN on the way back, even
        under a weight of 0.
        """
        student, other = self.student(temperature), self._at(side, temperature).detach()
        if not bool(counts.all()):
            other = torch.where(counts[:, None], other, student.detach())
        return student, other

    def entropies(self, temperature: float, *sides: str) -> dict[str, Tensor]:
        """{side_entropy: [C]} over the full vocabulary, detached."""
        for side in sides:
            if (side, temperature) not in self._entropy:
                held = entropy(self._at(side, temperature).detach())
                self._entropy[side, temperature] = held
        return {f"{side}_entropy": self._entropy[side, temperature] for side in sides}

    def _at(self, side: str, temperature: float) -> Tensor:
        if (side, temperature) not in self._logprobs:
            if side not in self._logits:
                raise ValueError(f"this objective needs the {side}'s logits")
            logits = self._logits[side]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            scaled = wide if temperature == 1 else wide / temperature
            self._logprobs[side, temperature] = scaled.log_softmax(-1)
        return self._logprobs[side, temperature]
