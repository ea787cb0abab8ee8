"""Groups with rewards: the teacher's prompts, advantages, and the KL to the reference."""

import math

import pytest
import torch
from tinyruns import collect, compute_token_statistics, prepare_rollouts, scorer_of, train_step, training

from sdkit.batches import RolloutBatch
from sdkit.language.specs import (
    AdvantageAdd,
    ClipSpec,
    Distillation,
    Feedback,
    ForwardKl,
    FrozenWeights,
    GroupRelative,
    OptimizerSpec,
    OverlongPenalty,
    PolicyGradient,
    ReferenceKl,
    RegexReward,
    RolloutSpec,
    SuccessfulSibling,
    Table,
    TeacherSpec,
    TrainingSpec,
    TransformersBackend,
    UserTurn,
    VocabularySupport,
)

GROUP = 4
ROLLOUT = RolloutSpec(max_new_tokens=8, completions_per_prompt=GROUP, backend=TransformersBackend())
REWARDS = Table({"right": RegexReward(pattern=".")})
TEACHER = TeacherSpec(
    weights=FrozenWeights(),
    sees=UserTurn(
        template="{prompt}{solution}{feedback}",
        slots=Table(
            {
                "solution": SuccessfulSibling(wrap="\nSolution: {value}"),
                "feedback": Feedback(when="no_solution", wrap="\nFeedback: {value}"),
            }
        ),
        requires="any",
    ),
)
DISTIL = Table({"distil": Distillation(divergence=ForwardKl(), support=VocabularySupport())})


@pytest.fixture
def open_group_trainer(open_tiny):
    def make_trainer(scorer, **changes):
        trainer = open_tiny(**({"rollout": ROLLOUT, "rewards": REWARDS} | changes))
        trainer.setup.data.train_rewards = {"right": scorer}
        return trainer

    return make_trainer


def collect_first(trainer):
    return collect(trainer, 0)


def batch_of(trainer):
    return prepare_rollouts(trainer, collect_first(trainer).batch)


def test_teacher_sees_the_first_other_success_of_the_group(open_group_trainer):
    trainer = open_group_trainer(scorer_of(0, 1, 0, 1), teacher=TEACHER, losses=DISTIL)
    decode = trainer.setup.data.tokenizer.decode
    batch = list(collect_first(trainer).batch)
    for start in range(0, len(batch), GROUP):
        group = batch[start : start + GROUP]
        texts = [decode(r.completion_ids, skip_special_tokens=True).strip() for r in group]
        for index, rollout in enumerate(group):
            solution = texts[3] if index == 1 else texts[1]
            if solution:
                assert f"Solution: {solution}" in decode(rollout.teacher_prompt_ids)
            assert rollout.prompt_ids == trainer.setup.data.student_ids(rollout.row)


def test_without_success_and_feedback_there_is_no_gradient(open_group_trainer):
    trainer = open_group_trainer(scorer_of(0), teacher=TEACHER, losses=DISTIL)
    collected = collect_first(trainer)
    assert all(r.teacher_prompt_ids is None for r in collected.batch)
    result = train_step(trainer, prepare_rollouts(trainer, collected.batch))
    assert result.metrics["grad_norm"] == 0
    assert result.metrics["distil/empty_rows"] == 1
    assert result.metrics["loss"] == 0


def test_feedback_is_used_if_no_rollout_succeeded(open_group_trainer):
    trainer = open_group_trainer(scorer_of(0, feedback="off by one"), teacher=TEACHER, losses=DISTIL)
    decode = trainer.setup.data.tokenizer.decode
    for rollout in collect_first(trainer).batch:
        assert "Feedback: off by one" in decode(rollout.teacher_prompt_ids)
        assert rollout.filled_slots == ("feedback",)


def test_advantages_are_rewards_minus_the_group_mean(open_group_trainer):
    losses = Table({"policy": PolicyGradient(advantage=GroupRelative())})
    trainer = open_group_trainer(scorer_of(1, 0, 0, 1, 0, 0, 0, 0), teacher=None, losses=losses)
    advantages = [r.advantage for r in collect_first(trainer).batch]
    assert advantages[:8] == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_overlong_completions_lose_advantage_but_no_reward(open_group_trainer):
    """Up to 0.5 is subtracted over the last 4 of 8 tokens; the reward itself stays 1."""
    spec = GroupRelative(baseline="none", overlong=OverlongPenalty(stretch=4, amount=0.5))
    losses = Table({"policy": PolicyGradient(advantage=spec)})
    batch = collect_first(open_group_trainer(scorer_of(1), teacher=None, losses=losses)).batch
    penalties = [0.5 * max(0, len(r.completion_ids) - 4) / 4 for r in batch]
    assert max(penalties) == 0.5
    assert [r.advantage for r in batch] == [1 - x for x in penalties]
    assert {r.reward for r in batch} == {1.0}


def test_summed_advantage_counts_rollouts_without_a_teacher(open_group_trainer):
    """Group 0 has a success, so its failures have a teacher prompt; group 1 has none."""
    sum_of_advantages = AdvantageAdd(group_relative=GroupRelative(baseline="none"), log_ratio_weight=0.5)
    losses = Table({"policy": PolicyGradient(advantage=sum_of_advantages)})
    trainer = open_group_trainer(scorer_of(1, 0, 0, 0, 0.5, 0, 0, 0), teacher=TEACHER, losses=losses)
    batch = batch_of(trainer)
    has_teacher = [r.teacher_prompt_ids is not None for r in batch][:8]
    assert has_teacher == [False, True, True, True, False, False, False, False]
    result = train_step(trainer, batch)
    assert result.metrics["policy/empty_rows"] == 0
    reward_only = Table({"policy": PolicyGradient(advantage=GroupRelative(baseline="none"))})
    trainer = open_group_trainer(scorer_of(1, 0, 0, 0, 0.5, 0, 0, 0), teacher=None, losses=reward_only)
    without = train_step(trainer, batch_of(trainer))
    assert without.metrics["policy/tokens"] == result.metrics["policy/tokens"]
    assert without.metrics["grad_norm"] != result.metrics["grad_norm"]


def test_rewarded_completions_become_likelier(open_group_trainer):
    losses = Table({"policy": PolicyGradient(advantage=GroupRelative(), clip=ClipSpec(low=0.2, high=0.2))})
    trainer = open_group_trainer(scorer_of(1, 0, 0, 0), teacher=None, losses=losses)
    batch = batch_of(trainer)
    best = [r for r in batch if (r.advantage or 0) > 0]
    before = _logprob(trainer, best)
    for _ in range(3):
        train_step(trainer, batch)
    assert _logprob(trainer, best) > before


def test_two_updates_share_the_old_logprobs(open_group_trainer):
    """The ratio of a later update is relative to the weights before the batch's first update."""
    losses = Table({"policy": PolicyGradient(advantage=GroupRelative())})
    trainer = open_group_trainer(
        scorer_of(1, 0, 0, 0),
        teacher=None,
        losses=losses,
        optimizer=OptimizerSpec(lr=1e-2),
        training=TrainingSpec(steps=1, prompts_per_step=2, updates_per_rollout=2, zero_stage=0),
    )
    first, second = batch_of(trainer).split(2)
    metrics_of_first = train_step(trainer, first).metrics
    assert metrics_of_first["policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics_of_first["policy/old_kl"] == pytest.approx(0, abs=1e-6)
    scored = compute_token_statistics(trainer, second, {"student_logprobs"})
    ratios = [
        math.exp(after - before)
        for r, m in zip(second, scored, strict=True)
        for before, after in zip(r.old_logprobs, m.token_statistics["student_logprobs"], strict=True)
    ]
    metrics_of_second = train_step(trainer, second).metrics
    assert abs(metrics_of_second["policy/ratio"] - 1) > 1e-3
    assert metrics_of_second["policy/ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    kl = sum(ratio - 1 - math.log(ratio) for ratio in ratios) / len(ratios)
    assert metrics_of_second["policy/old_kl"] == pytest.approx(kl, rel=1e-3)


def test_equal_rewards_give_no_gradient(open_group_trainer):
    losses = Table({"policy": PolicyGradient(advantage=GroupRelative())})
    trainer = open_group_trainer(scorer_of(1), teacher=None, losses=losses)
    assert train_step(trainer, batch_of(trainer)).metrics["grad_norm"] == 0


def test_reference_kl_grows_with_the_distance_from_the_start(open_group_trainer):
    losses = Table(
        {"policy": PolicyGradient(advantage=GroupRelative()), "anchor": ReferenceKl(estimator="vocabulary")}
    )
    trainer = open_group_trainer(scorer_of(1, 0, 0, 0), teacher=None, losses=losses)
    batch = batch_of(trainer)
    first = train_step(trainer, batch).metrics
    assert first["loss/anchor"] == pytest.approx(0, abs=1e-6)
    later = train_step(trainer, batch).metrics
    assert later["loss/anchor"] > 1e-6
    start = trainer.models.reference.weights.head.clone()
    train_step(trainer, batch)
    assert torch.equal(trainer.models.reference.weights.head, start)


def test_micro_batches_change_no_gradient(open_group_trainer):
    losses = Table({"policy": PolicyGradient(advantage=GroupRelative(), ratio="sequence")})
    norms = []
    for budget in (64, 8192):
        sizes = training(micro_batch_tokens=budget)
        trainer = open_group_trainer(scorer_of(1, 0, 0, 1), teacher=None, losses=losses, training=sizes)
        norms.append(train_step(trainer, batch_of(trainer)).metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0


def _logprob(trainer, rollouts):
    names = {"student_logprobs"}
    scored = compute_token_statistics(trainer, RolloutBatch(rollouts=tuple(rollouts)), names)
    return sum(sum(r.token_statistics["student_logprobs"]) for r in scored)
