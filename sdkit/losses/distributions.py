"""Log-probabilities of student, teacher and reference over the vocabulary, for one chunk of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.batches import TopKLogprobs
from sdkit.losses.divergence import entropy
from sdkit.losses.scores import sampled_logprobs
from sdkit.losses.support import sampled_token


class Distributions:
    """Log-softmax and entropy of student, teacher and reference, each computed once per temperature.

    For a teacher that returned only its top k log-probabilities (`top_k`) neither is available.
    """

    def __init__(
        self, student_logits: Tensor, teacher: Tensor | TopKLogprobs | None, reference_logits: Tensor | None = None
    ) -> None:
        self._logits = {"student": student_logits}
        self.top_k = teacher if isinstance(teacher, TopKLogprobs) else None
        teacher_logits = None if isinstance(teacher, TopKLogprobs) else teacher
        for side, logits in (("teacher", teacher_logits), ("reference", reference_logits)):
            if logits is not None:
                if logits.shape != student_logits.shape:
                    sizes = f"{tuple(student_logits.shape)} and {tuple(logits.shape)}"
                    raise ValueError(f"logits of student and {side} differ in shape: {sizes}")
                self._logits[side] = logits
        self._logprobs: dict[tuple[str, float], Tensor] = {}
        self._probabilities: dict[tuple[str, float], Tensor] = {}
        self._entropy: dict[tuple[str, float], Tensor] = {}

    def student(self, temperature: float) -> Tensor:
        """Log-probabilities [C, V], float32 (float64 for float64 logits)."""
        return self._log_softmax("student", temperature)

    def has_sampled_logprobs(self, temperature: float) -> bool:
        """Whether the teacher's log-probability of the sampled token is known at this temperature."""
        return self.top_k is None or temperature == 1

    def teacher_logprobs(self, token: Tensor, temperature: float, counts: Tensor | None = None) -> Tensor:
        """Returns the teacher's log-probability of each sampled token.  [C] long -> [C], detached.

        `counts` is as in `student_and` (default: all).  Raises ValueError if a top-k teacher is asked for a temperature
        other than 1.
        """
        if self.top_k is None:
            return sampled_token(self.student_and("teacher", temperature, counts)[1], token)
        return sampled_logprobs(self.top_k, temperature)

    def student_and(self, side: str, temperature: float, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the student's and the other side's log-probabilities, twice [C, V].

        counts [C] bool marks the tokens that matter (None: all do).  At all others the other side is the student itself:
        an infinite difference would give a NaN gradient even with a weight of 0.
        """
        student, other = self.student(temperature), self._log_softmax(side, temperature).detach()
        # Asking is free on a CPU only: elsewhere the host would wait for the device, once a chunk.
        if counts is not None and not (counts.device.type == "cpu" and bool(counts.all())):
            other = torch.where(counts[:, None], other, student.detach())
        return student, other

    def entropies(self, temperature: float, *sides: str) -> dict[str, Tensor]:
        """Returns {SIDE_entropy: [C]} over the full vocabulary, detached; a top-k teacher's is left out."""
        known = [side for side in sides if side != "teacher" or self.top_k is None]
        for side in known:
            if (side, temperature) not in self._entropy:
                logprobs, probabilities = self._log_softmax(side, temperature), self.probabilities(side, temperature)
                self._entropy[side, temperature] = entropy(logprobs.detach(), probabilities.detach())
        return {f"{side}_entropy": self._entropy[side, temperature] for side in known}

    def probabilities(self, side: str, temperature: float) -> Tensor:
        """Returns exp of the side's log-probabilities, [C, V], with the student's gradient."""
        if (side, temperature) not in self._probabilities:
            self._probabilities[side, temperature] = self._log_softmax(side, temperature).exp()
        return self._probabilities[side, temperature]

    def _log_softmax(self, side: str, temperature: float) -> Tensor:
        if (side, temperature) not in self._logprobs:
            if side not in self._logits:
                raise ValueError(f"this objective needs the {side}'s logits")
            logits = self._logits[side]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            scaled = wide if temperature == 1 else wide / temperature
            self._logprobs[side, temperature] = scaled.log_softmax(-1)
        return self._logprobs[side, temperature]
