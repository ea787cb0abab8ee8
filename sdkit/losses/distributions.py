"""Both sides' log-probabilities over the vocabulary, for one chunk of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.losses.divergence import entropy


class Distributions:
    """Log-softmax and entropy of student and teacher, each computed once per temperature."""

    def __init__(self, student_logits: Tensor, teacher_logits: Tensor | None) -> None:
        if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
            sizes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
            raise ValueError(f"logits of student and teacher differ in shape: {sizes}")
        self._logits = {"student": student_logits, "teacher": teacher_logits}
        self._logprobs: dict[tuple[str, float], Tensor] = {}
        self._entropy: dict[tuple[str, float], Tensor] = {}

    def student(self, temperature: float) -> Tensor:
        """Log-probabilities [C, V], float32 (float64 for float64 logits)."""
        return self._at("student", temperature)

    def teacher(self, temperature: float) -> Tensor:
        """Log-probabilities [C, V], detached.  Raises ValueError where there is no teacher."""
        return self._at("teacher", temperature).detach()

    def entropies(self, temperature: float, *sides: str) -> dict[str, Tensor]:
        """{side_entropy: [C]} over the full vocabulary, detached."""
        for side in sides:
            if (side, temperature) not in self._entropy:
                held = entropy(self._at(side, temperature).detach())
                self._entropy[side, temperature] = held
        return {f"{side}_entropy": self._entropy[side, temperature] for side in sides}

    def _at(self, side: str, temperature: float) -> Tensor:
        if (side, temperature) not in self._logprobs:
            logits = self._logits[side]
            if logits is None:
                raise ValueError("this objective needs the teacher's logits")
            wide = logits if logits.dtype == torch.float64 else logits.float()
            scaled = wide if temperature == 1 else wide / temperature
            self._logprobs[side, temperature] = scaled.log_softmax(-1)
        return self._logprobs[side, temperature]
