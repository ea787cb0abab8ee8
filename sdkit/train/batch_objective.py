"""The objective of a spec as a function of tensors, for training loops outside sdkit.

Shapes: N completions, T tokens of the longest one, V vocabulary, M counted tokens of all completions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from sdkit.batches import Rollout, RolloutBatch, Row, TopKLogprobs
from sdkit.data.text_spans import Decode
from sdkit.language.schedules import at_step
from sdkit.language.specs import LossSpec, MethodSpec, required_statistics
from sdkit.losses.distributions import Distributions
from sdkit.losses.objective import Objective, with_sequence_statistics
from sdkit.losses.scores import weighted_sum, widen
from sdkit.losses.support import sampled_token
from sdkit.spans import Span
from sdkit.train.advantages import with_advantages
from sdkit.train.collate import CollatedBatch, collate
from sdkit.train.loss_masks import build_loss_masks
from sdkit.train.step import token_means
from sdkit.user_code.divergences import open_user_divergences
from sdkit.user_code.token_weights import open_user_weights

PROMPT = (0,)
"""Stands for every prompt: the objective reads none, but a rollout must have one."""


def build_rollout_batch(
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    groups: Tensor | None = None,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    has_teacher: Tensor | None = None,
    spans: Sequence[Sequence[Span]] = (),
) -> RolloutBatch:
    """Return the rollouts of one optimizer step.

    completion_ids [N, T] long; completion_mask [N, T], 1 on tokens, padding on the right.
    groups [N] long: completions of the same prompt have the same number and are neighbours (default: no two share one).
    rewards [N]; advantages [N] replace those that the spec would compute from the rewards.
    sampler_logprobs and old_logprobs [N, T]: log-probabilities of the tokens when sampled, and under the trainer before
    the first of several updates on the batch, at the sampling temperature.
    has_teacher [N] bool: whether the teacher has a prompt for the completion (default: for all).
    spans: the turns and observations of each completion, in order and without gaps (default: one turn each).
    Raises ValueError if the mask is not a right-padded one or a group is not contiguous.
    """
    mask = completion_mask.bool()
    lengths: list[int] = mask.sum(-1).tolist()
    right_padded = torch.arange(mask.shape[1]) < torch.tensor(lengths)[:, None]
    if completion_ids.shape != mask.shape or not torch.equal(mask.cpu(), right_padded):
        raise ValueError("completion_mask must have the shape of completion_ids, with all 1s before the first 0")
    group_of: list[int] = list(range(len(lengths))) if groups is None else groups.tolist()
    reward_of: list[float] | None = None if rewards is None else rewards.tolist()

    def tokens(values: Tensor, row: int) -> tuple[Any, ...]:
        return tuple(values[row, : lengths[row]].tolist())

    def rollout(row: int) -> Rollout:
        same_group = [i for i, group in enumerate(group_of) if group == group_of[row]]
        return Rollout(
            row=Row(index=row, messages=(), columns={}, raw={}),
            group=group_of[row],
            prompt_ids=PROMPT,
            teacher_prompt_ids=PROMPT if has_teacher is None or has_teacher[row] else None,
            completion_ids=tokens(completion_ids, row),
            spans=tuple(spans[row]) if spans else (),
            sampler_logprobs=None if sampler_logprobs is None else tokens(sampler_logprobs, row),
            old_logprobs=None if old_logprobs is None else tokens(old_logprobs, row),
            policy_version=0,
            finished=True,
            reward=None if reward_of is None else reward_of[row],
            advantage=None if advantages is None else advantages[row].item(),
            group_rewards=() if reward_of is None else tuple(reward_of[i] for i in same_group),
        )

    batch = RolloutBatch(rollouts=tuple(rollout(row) for row in range(len(lengths))))
    batch.check()
    return batch


def build_objective(
    spec: MethodSpec,
    step: int = 0,
    *,
    folder: str | os.PathLike[str] = ".",
    special_ids: Collection[int] = (),
    decode: Decode | None = None,
) -> BatchObjective:
    """Return the objective of a spec at an optimizer step; schedules have their value after `step` steps.

    `folder` is where paths of the spec to your own divergences and weights start.  `special_ids` are the tokenizer's
    special tokens (`tokenizer.all_special_ids`), for `mask.special_tokens: leave_out`; `decode` gives the text of token
    ids, for `mask.spans`.  Raises BadData if your function fails its test.
    """
    return BatchObjective(at_step(spec, step), Path(folder), special_ids, decode)


class BatchObjective:
    """The objective at one optimizer step.  A call takes all rollouts of the step, since its averages are over them."""

    def __init__(self, spec: MethodSpec, folder: Path, special_ids: Collection[int], decode: Decode | None) -> None:
        """`spec` has no schedules (`at_step`)."""
        self._spec = spec
        self._special_ids = special_ids
        self._decode = decode
        divergences = open_user_divergences(spec.losses, folder)
        self._objective = Objective(spec.losses, spec.rollout.temperature, divergences)
        self._weight_functions = open_user_weights(spec.losses, folder)
        self._statistics = required_statistics(spec.losses)
        self._blend = spec.blend

    @property
    def losses(self) -> Mapping[str, LossSpec]:
        """The loss terms by name, with a number in place of each schedule."""
        return self._spec.losses

    @property
    def needs_teacher(self) -> bool:
        """Whether a call needs the teacher's logits."""
        return self._objective.needs_teacher or any(name.startswith("teacher") for name in self._statistics)

    @property
    def needs_reference(self) -> bool:
        """Whether a call needs the start model's logits after the student's prompt."""
        return self._objective.needs_reference

    @property
    def needs_partner(self) -> bool:
        """Whether a call needs the logits of the model that `teacher.blend` names."""
        return self._blend is not None

    def __call__(
        self,
        batch: RolloutBatch,
        student_logits: Tensor,
        teacher: Tensor | TopKLogprobs | None = None,
        *,
        reference_logits: Tensor | None = None,
        partner_logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, a scalar with gradient, and the metrics of the loss terms as `sdkit train` logs them.

        student_logits [N, T, V], of any float dtype: column t has the logits that predict completion token t.
        teacher [N, T, V]: the same after the teacher's prompt; or TopKLogprobs with [N, T] in place of [M].
        reference_logits [N, T, V]: of the frozen start model after the student's prompt.
        partner_logits [N, T, V]: of the model that the teacher is blended with.
        Log-probabilities over the vocabulary may take the place of logits.  Only the student gets a gradient.  Logits at
        padding are not read.  Raises ValueError if an input that the spec needs is missing or has another shape.
        """
        teacher = self._blended(teacher, partner_logits)
        self._check_shapes(batch, student_logits, teacher, reference_logits)
        batch = self._with_masks(batch, student_logits, teacher)
        # One micro-batch of all rollouts, sorted by length.
        collated = collate(list(batch), self._spec.losses, sys.maxsize, torch.clone, student_logits.device)
        [part], tokens = collated.micro_batches, collated.micro_batches[0].tokens
        at = _logit_index(batch, collated)
        student, reference = student_logits[at], None if reference_logits is None else reference_logits[at]
        counted = _select(teacher, at)

        sides = Distributions(student.detach(), counted)

        def student_logprobs() -> Tensor:
            return sampled_token(sides.student(self._temperature), tokens.token)

        def teacher_logprobs() -> Tensor | None:
            return None if counted is None else sides.teacher_logprobs(tokens.token, self._temperature)

        arguments = self._objective, tokens, part.rows, student_logprobs, teacher_logprobs
        tokens = with_sequence_statistics(*arguments)
        loss, sums = self._objective(student, counted, tokens, reference)
        metrics = token_means({name: value.item() for name, value in sums.items()})
        return loss, metrics | {f"{name}/tokens": counts.tokens for name, counts in collated.counts.items()}

    @property
    def _temperature(self) -> float:
        return self._spec.rollout.temperature

    def _blended(self, teacher: Tensor | TopKLogprobs | None, partner: Tensor | None) -> Tensor | TopKLogprobs | None:
        """Return the teacher's logits, blended as the spec says."""
        if self._blend is None:
            return teacher
        if not isinstance(teacher, Tensor) or partner is None:
            raise ValueError("teacher.blend needs the teacher's logits and partner_logits")
        return weighted_sum([widen(teacher), widen(partner)], self._blend.factors)

    def _check_shapes(
        self, batch: RolloutBatch, student: Tensor, teacher: Tensor | TopKLogprobs | None, reference: Tensor | None
    ) -> None:
        """Raises ValueError if an input is missing or has another shape."""
        longest = max(len(r.completion_ids) for r in batch)
        if student.dim() != 3 or student.shape[0] != len(batch) or student.shape[1] < longest:
            expected = f"[{len(batch)}, at least {longest}, vocabulary]"
            raise ValueError(f"student_logits must have the shape {expected}, not {list(student.shape)}")
        given = {"teacher": (teacher, self.needs_teacher), "reference_logits": (reference, self.needs_reference)}
        for name, (value, needed) in given.items():
            if value is None and needed:
                raise ValueError(f"this objective needs {name}")
            if isinstance(value, Tensor) and value.shape != student.shape:
                raise ValueError(f"{name} has the shape {list(value.shape)}, student_logits {list(student.shape)}")

    @torch.no_grad()
    def _with_masks(self, batch: RolloutBatch, student: Tensor, teacher: Tensor | TopKLogprobs | None) -> RolloutBatch:
        """Return the rollouts with advantages and loss masks, as the engine builds them before the first update."""
        if any(r.advantage is None for r in batch):
            batch = with_advantages(self.losses, batch, _gather_alone, self._spec.rollout.max_new_tokens)
        rollouts = [self._with_statistics(r, i, student, teacher) for i, r in enumerate(batch)]
        return build_loss_masks(
            RolloutBatch(rollouts=tuple(rollouts)),
            self.losses,
            all_gather=_gather_alone,
            route=self._spec.route,
            special=self._special_ids,
            functions=self._weight_functions,
            decode=self._decode,
        )

    def _with_statistics(
        self, rollout: Rollout, row: int, student: Tensor, teacher: Tensor | TopKLogprobs | None
    ) -> Rollout:
        """Return the rollout with the token statistics that the loss terms need."""
        token = torch.tensor(rollout.completion_ids, dtype=torch.long, device=student.device)
        at = torch.full_like(token, row), torch.arange(len(token), device=student.device)
        sides = Distributions(student[at], _select(teacher, at))
        values: dict[str, Tensor] = {}
        for name in self._statistics:
            side, _, figure = name.partition("_")
            if side == "teacher" and rollout.teacher_prompt_ids is None:
                continue
            if figure == "entropy":
                values |= sides.entropies(self._temperature, side)
            elif side == "student":
                values[name] = sampled_token(sides.student(self._temperature), token)
            else:
                values[name] = sides.teacher_logprobs(token, self._temperature)
        return evolve(rollout, token_statistics={name: tuple(x.tolist()) for name, x in values.items()})


def _logit_index(batch: RolloutBatch, collated: CollatedBatch) -> tuple[Tensor, Tensor]:
    """Return row and column of the logits of each counted token, both [M]."""
    [part] = collated.micro_batches
    rows = {rollout.row.index: row for row, rollout in enumerate(batch)}
    order = torch.tensor([rows[rollout.row.index] for rollout in collated.order], device=part.tokens.row.device)
    columns = [position for text in part.student.texts for position in text.positions]
    return order[part.tokens.row], torch.tensor(columns, dtype=torch.long, device=order.device)


def _gather_alone(values: Tensor) -> tuple[Tensor, slice]:
    """`collectives.all_gather` of a single process."""
    return values, slice(0, len(values))


def _select(scores: Tensor | TopKLogprobs | None, at: tuple[Tensor, Tensor]) -> Tensor | TopKLogprobs | None:
    if isinstance(scores, TopKLogprobs):
        return TopKLogprobs(ids=scores.ids[at], logprobs=scores.logprobs[at], sampled=scores.sampled[at])
    return None if scores is None else scores.detach()[at]
