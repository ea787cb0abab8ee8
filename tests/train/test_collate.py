"""Micro-batches: positions are aligned, token ids are reused, and the split changes no gradient."""

import itertools

import pytest
import torch
from attrs import evolve
from one_rank import all_gather

from sdkit.batches import Rollout, RolloutBatch, Row
from sdkit.language.specs import (
    CrossEntropy,
    Distillation,
    ForwardKl,
    MaskSpec,
    PerSequence,
    PerTurn,
    Table,
    VocabularySupport,
)
from sdkit.spans import Span
from sdkit.train.collate import collate
from sdkit.train.loss_masks import build_loss_masks

CPU = torch.device("cpu")


def rollout(prompt, teacher, completion, group=0):
    row = Row(index=0, messages=({"role": "user", "content": "x"},), columns={}, raw={})
    return Rollout(
        row=row,
        group=group,
        prompt_ids=tuple(prompt),
        teacher_prompt_ids=None if teacher is None else tuple(teacher),
        completion_ids=tuple(completion),
        sampler_logprobs=tuple(-0.1 * (i + 1) for i in range(len(completion))),
        policy_version=0,
        finished=True,
    )


def distil(**changes):
    return Distillation(divergence=ForwardKl(), support=VocabularySupport(), **changes)


def clone(x):
    return x.clone()


def collate_rollouts(rollouts, losses, *rest):
    batch = RolloutBatch(rollouts=tuple(rollouts))
    return collate(list(build_loss_masks(batch, losses, all_gather=all_gather)), losses, *rest)


def test_states_predict_the_next_token_under_both_prompts():
    batch = collate_rollouts(
        [rollout([1, 2, 3], [9, 8, 7, 6, 5], [10, 11, 12])], Table({"d": distil()}), 100, clone, CPU
    )
    (micro,) = batch.micro_batches
    for sequences in (micro.student, micro.teacher):
        flat = sequences.input_ids.flatten()
        assert flat[sequences.predictor_index + 1].tolist() == [10, 11, 12]
    assert micro.tokens.token.tolist() == [10, 11, 12]


def test_skipped_tokens_stay_in_the_sequence_but_are_not_projected():
    term = distil(mask=MaskSpec(skip_first=2))
    (micro,) = collate_rollouts([rollout([1], [2], [10, 11, 12])], Table({"d": term}), 100, clone, CPU).micro_batches
    assert micro.tokens.token.tolist() == [12]
    assert micro.student.input_ids.tolist() == [[1, 10, 11, 12]]
    torch.testing.assert_close(micro.tokens.sampler_logprobs, torch.tensor([-0.3]))


def test_row_without_teacher_has_no_distillation_weight_but_counts_as_row():
    losses = Table({"d": distil(average=PerSequence(empty_rows="count"))})
    rollouts = [rollout([1], [2], [10, 11]), rollout([1], None, [12, 13], group=1)]
    batch = collate_rollouts(rollouts, losses, 100, clone, CPU)
    weights = torch.cat([m.tokens.weights["d"] for m in batch.micro_batches])
    assert weights.sum().item() == 0.5
    assert (batch.counts["d"].rows, batch.counts["d"].filled_rows, batch.counts["d"].tokens) == (2, 1, 2)


def test_terms_with_different_masks_share_tokens():
    losses = Table({"d": distil(mask=MaskSpec(skip_first=1)), "c": CrossEntropy()})
    (micro,) = collate_rollouts([rollout([1], [2], [10, 11])], losses, 100, clone, CPU).micro_batches
    assert micro.tokens.weights["d"].tolist() == [0.0, 1.0]
    assert micro.tokens.weights["c"].tolist() == [0.5, 0.5]
    assert micro.tokens.counts("d").tolist() == [False, True]
    assert micro.tokens.counts("c") is None  # all, which is known without asking a device


def test_budget_limits_padded_tokens_and_keeps_every_rollout():
    rollouts = [rollout([1] * n, [2] * n, [3] * (1 + n % 4), group=n) for n in range(1, 20)]
    batch = collate_rollouts(rollouts, Table({"d": distil()}), 64, clone, CPU)
    sizes = [max(m.student.input_ids.numel(), m.teacher.input_ids.numel()) for m in batch.micro_batches]
    assert max(sizes) <= 64
    assert sum(m.rows for m in batch.micro_batches) == len(batch.order) == 19
    assert len(batch.micro_batches) > 3


def test_weights_sum_to_one_over_all_micro_batches():
    rollouts = [rollout([1], [2], [3] * n, group=n) for n in (1, 5, 9, 2)]
    batch = collate_rollouts(rollouts, Table({"d": distil(average=PerSequence())}), 12, clone, CPU)
    total = sum(m.tokens.weights["d"].sum() for m in batch.micro_batches)
    torch.testing.assert_close(total, torch.tensor(1.0))


def spans(*lengths):
    """Turns and observations of these lengths, in alternation."""
    ends = list(itertools.accumulate(lengths))
    return tuple(
        Span(role="user" if i % 2 else "assistant", turn=i // 2 + 1, start=end - length, end=end)
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
    )


def test_average_per_turn_is_the_mean_of_the_turns_means():
    term = distil(average=PerTurn(), mask=MaskSpec(skip_first=1))
    turns = evolve(rollout([1], [2], range(10, 22)), spans=spans(3, 4, 5))
    alone = rollout([1], [2], [30, 31, 32], group=1)
    for budget in (1, 1000):
        batch = collate_rollouts([turns, alone], Table({"d": term}), budget, clone, CPU)
        assert (batch.counts["d"].turns, batch.counts["d"].tokens) == (3, 2 + 5 + 2)
        weights = {
            token: weight
            for micro in batch.micro_batches
            for token, weight in zip(micro.tokens.token.tolist(), micro.tokens.weights["d"].tolist(), strict=True)
        }
        means = dict.fromkeys((11, 12), 1 / 2) | dict.fromkeys(range(17, 22), 1 / 5) | dict.fromkeys((31, 32), 1 / 2)
        assert weights == {token: pytest.approx(share / 3) for token, share in means.items()}


def test_average_per_turn_of_single_turns_is_per_sequence():
    rollouts = [rollout([1], [2], [3] * n, group=n) for n in (1, 5, 0, 2)]
    by_average = [
        torch.cat([m.tokens.weights["d"] for m in collate_rollouts(rollouts, terms, 12, clone, CPU).micro_batches])
        for terms in (Table({"d": distil(average=average)}) for average in (PerTurn(), PerSequence()))
    ]
    torch.testing.assert_close(*by_average)


def test_mask_numbers_sampled_tokens_across_turns():
    term = distil(mask=MaskSpec(skip_first=1, prefix=4))
    turns = evolve(rollout([1], [2], range(10, 22)), spans=spans(3, 4, 5))
    (micro,) = collate_rollouts([turns], Table({"d": term}), 1000, clone, CPU).micro_batches
    assert micro.tokens.token.tolist() == [11, 12, 17]
