"""Token statistics and loss masks of a rollout batch, computed before its first update.

The extra forward pass runs only if a loss term needs it (`required_statistics`), and once per rollout batch:
all updates on the batch see the same statistics.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from attrs import evolve
from torch import Tensor

from sdkit.batches import MicroBatch, Rollout, RolloutBatch, TeacherScores, TopKLogprobs
from sdkit.distributed import collectives
from sdkit.language.specs import Blend, Statistic, required_statistics
from sdkit.losses.chunks import scored_logprobs, token_logprobs_and_entropy
from sdkit.train.collate import collate_completions, empty_micro_batch
from sdkit.train.learner import Learner
from sdkit.train.loss_masks import build_loss_masks
from sdkit.train.step_specs import StepSpecs
from sdkit.train.student import Student


def prepare_rollouts(
    learner: Learner, rollouts: RolloutBatch, specs: StepSpecs, *, with_old_logprobs: bool = False
) -> RolloutBatch:
    """Return the rollouts with all that `train_step` needs, or `evaluate_objective` (which needs no old logprobs).

    Call it on the full rollout batch, before the batch is split into several updates.
    """
    names = set(required_statistics(specs.losses))
    if with_old_logprobs:
        names.add("student_logprobs")
    if names:
        rollouts = compute_token_statistics(learner, rollouts, names, specs.blend)
    if with_old_logprobs:
        rollouts = RolloutBatch(
            rollouts=tuple(evolve(r, old_logprobs=r.token_statistics["student_logprobs"]) for r in rollouts)
        )
    rollouts.check()
    return build_loss_masks(
        rollouts,
        specs.losses,
        all_gather=collectives.all_gather,
        route=specs.route,
        special=learner.models.special_ids,
        functions=learner.user_weights,
        decode=learner.decode,
    )


@torch.no_grad()
def compute_token_statistics(
    learner: Learner, rollouts: RolloutBatch, names: Collection[Statistic], blend: Blend | None
) -> RolloutBatch:
    """Return the rollouts with these statistics of every sampled token, at the sampling temperature.

    A rollout without a teacher prompt gets no teacher statistics.  Tokens that were not sampled get 0.
    """
    needs_teacher = any(name.startswith("teacher") for name in names)
    budget, device, longest_pack = learner.micro_batch_tokens, learner.models.device, learner.models.longest_pack
    statistics: dict[int, dict[str, tuple[float, ...]]] = {}  # by the id() of the rollout
    batches = [*collate_completions(list(rollouts), budget, device, longest_pack, teacher=needs_teacher)]
    empty = empty_micro_batch((), teacher=needs_teacher, device=device)
    batches += [((), empty)] * (collectives.all_reduce_max(len(batches)) - len(batches))
    for part, batch in batches:
        sizes = [len(r.sampled) for r in part]
        by_name = {
            name: [_per_token(r, x.tolist()) for r, x in zip(part, values.split(sizes), strict=True)]
            for name, values in _batch_statistics(learner, batch, names, blend)
        }
        for i, rollout in enumerate(part):
            statistics[id(rollout)] = {
                name: values[i]
                for name, values in by_name.items()
                if rollout.teacher_prompt_ids is not None or not name.startswith("teacher")
            }
    return RolloutBatch(rollouts=tuple(evolve(r, token_statistics=statistics[id(r)]) for r in rollouts))


def _per_token(rollout: Rollout, values: Sequence[float]) -> tuple[float, ...]:
    """Return one value per completion token: those of the sampled tokens, 0 for the others."""
    per_token = [0.0] * len(rollout.completion_ids)
    for position, value in zip(rollout.sampled, values, strict=True):
        per_token[position] = value
    return tuple(per_token)


def _batch_statistics(
    learner: Learner, batch: MicroBatch, names: Collection[Statistic], blend: Blend | None
) -> Iterator[tuple[Statistic, Tensor]]:
    """Yield each statistic in `names` with its values, [M]; the teacher's only if the batch has its prompts."""
    student_names: tuple[Statistic, ...] = ("student_logprobs", "student_entropy")
    pairs: list[tuple[Statistic, Tensor]] = []
    if set(student_names) & set(names):
        pairs += zip(student_names, learner.student.token_statistics(batch), strict=True)
    if scores := learner.scorer.score_teacher(batch, blend):
        pairs += _teacher_statistics(learner.student, scores, batch.tokens.token)
    yield from (pair for pair in pairs if pair[0] in names)


def _teacher_statistics(student: Student, scores: TeacherScores, token: Tensor) -> Iterator[tuple[Statistic, Tensor]]:
    """Yield the teacher's statistics, without its entropy if only its top-k log-probabilities are known."""
    settings = student.temperature, student.chunk_tokens
    if isinstance(scores, TopKLogprobs):
        yield "teacher_logprobs", scored_logprobs(scores, token, *settings)
        return
    logprobs, entropy = token_logprobs_and_entropy(scores, token, *settings)
    yield "teacher_logprobs", logprobs
    yield "teacher_entropy", entropy
