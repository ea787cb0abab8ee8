"""Filters of rollouts, mixtures of samplers, and contexts that start the answer."""

import contextlib
import json

import pytest
import torch
from tinyruns import collect, prepare_rollouts, scorer_of, train_step

from sdkit.batches import Rollout, RolloutBatch, Row
from sdkit.language.specs import (
    AnswerStart,
    CrossEntropy,
    DatasetSamples,
    Distillation,
    EmaWeights,
    ForwardKl,
    FrozenWeights,
    MixtureSamples,
    NonConstantGroup,
    NonEmpty,
    OwnAttempt,
    RegexReward,
    RewardAtLeast,
    RolloutSpec,
    StudentSamples,
    Table,
    TeacherSpec,
    TransformersBackend,
    Verdict,
    VocabularySupport,
)
from sdkit.train import loop
from sdkit.train.rollout_filters import filter_rollouts
from sdkit.train.rollout_sampler import resolve_sampler

BACKEND = TransformersBackend()
REWARDS = Table({"right": RegexReward(pattern=".")})
DISTIL = Table({"distil": Distillation(divergence=ForwardKl(), support=VocabularySupport())})


ROW = Row(index=0, messages=({"role": "user", "content": "Q"},), columns={}, raw={})


def batch_of(rewards, ids=None):
    """Groups of two; the ids of completion i are (i + 1,) or `ids[i]`."""
    rollouts = [
        Rollout(
            row=ROW,
            group=i // 2,
            prompt_ids=(1,),
            teacher_prompt_ids=None,
            completion_ids=ids[i] if ids else (i + 1,),
            sampler_logprobs=None,
            policy_version=0,
            finished=True,
            reward=reward,
            group_rewards=tuple(rewards[i - i % 2 : i - i % 2 + 2]),
        )
        for i, reward in enumerate(rewards)
    ]
    return RolloutBatch(rollouts=tuple(rollouts))


def text_of(ids):
    return " ".join(str(i) for i in ids if i)


REWARDED = [1.0, 0.2, 0.0, 1.0, 0.5, 0.5]
CASES = [
    ((), [0, 1, 2, 3, 4, 5], {}),
    ((RewardAtLeast(threshold=0.5),), [0, 3, 4, 5], {"reward_at_least": 4 / 6}),
    ((NonConstantGroup(),), [0, 1, 2, 3], {"non_constant_group": 4 / 6}),
    ((NonConstantGroup(), RewardAtLeast()), [0, 3], {"non_constant_group": 4 / 6, "reward_at_least": 2 / 6}),
]


@pytest.mark.parametrize(("keep", "indices", "shares"), CASES, ids=str)
def test_rollout_must_pass_every_filter(keep, indices, shares):
    filtered, pass_shares = filter_rollouts(keep, batch_of(REWARDED), text_of)
    assert [r.completion_ids[0] - 1 for r in filtered] == indices
    assert pass_shares == pytest.approx(shares)


def test_white_space_and_special_tokens_count_as_empty():
    batch = batch_of([0.0] * 4, ids=[(0,), (7,), (), (0, 0)])
    filtered, pass_shares = filter_rollouts((NonEmpty(),), batch, text_of)
    assert [r.completion_ids for r in filtered] == [(7,)]
    assert pass_shares == {"non_empty": 0.25}


def test_filter_of_an_empty_batch():
    filtered, pass_shares = filter_rollouts((NonEmpty(),), RolloutBatch(rollouts=()), text_of)
    assert len(filtered) == 0
    assert pass_shares == {"non_empty": 0.0}


class MetricsReport:
    """A report that only records the metrics of each step."""

    def __init__(self):
        self.metrics = []

    def part(self, name, total=None):
        return contextlib.nullcontext(lambda *_: None)

    def step(self, step, collected, metrics, *_):
        self.metrics.append(dict(metrics))


@pytest.fixture
def one_step(open_tiny):
    def train_one_step(scorer, **changes):
        trainer = open_tiny(**({"rewards": REWARDS} | changes))
        trainer.setup.data.train_rewards = {"right": scorer}
        report = MetricsReport()
        loop._train_on_batch(trainer, report, 0)
        return trainer, report.metrics[0]

    return train_one_step


def test_only_kept_rollouts_are_trained_on(one_step):
    rollout = RolloutSpec(max_new_tokens=8, completions_per_prompt=2, backend=BACKEND, keep=(RewardAtLeast(),))
    imitate = Table({"imitate": CrossEntropy()})
    trainer, metrics = one_step(scorer_of(1, 0), rollout=rollout, teacher=None, losses=imitate)
    assert metrics["keep/reward_at_least"] == metrics["rollout/kept"] == 0.5
    assert metrics["imitate/tokens"] < metrics["rollout/tokens"]
    assert metrics["reward/right"] == 0.5  # over all sampled rollouts
    assert trainer.progress.optimizer_steps == 1


def test_batch_without_kept_rollouts_changes_nothing(one_step):
    rollout = RolloutSpec(max_new_tokens=8, backend=BACKEND, keep=(RewardAtLeast(),))
    teacher = TeacherSpec(weights=EmaWeights(update_rate=0.5, every="rollout_batch"))
    trainer, metrics = one_step(scorer_of(0), rollout=rollout, teacher=teacher, losses=DISTIL)
    assert metrics["rollout/kept"] == 0
    assert "loss" not in metrics
    assert "teacher_distance" not in metrics
    assert (trainer.progress.step, trainer.progress.optimizer_steps) == (1, 0)
    json.dumps(metrics)


def mixture_rollout(share):
    by = MixtureSamples(student_share=share, column="answer")
    return RolloutSpec(max_new_tokens=8, backend=BACKEND, sampled_by=by)


def test_mixture_choice_is_random_but_reproducible(open_tiny):
    trainer = open_tiny(rollout=mixture_rollout(0.3), losses=DISTIL)
    by, seed = trainer.specs.sampled_by, trainer.setup.spec.training.seed
    choices, repeated = (
        [resolve_sampler(by, seed, ("rollout", n), evaluation=False) for n in range(400)] for _ in "ab"
    )
    assert choices == repeated
    by_student = sum(isinstance(choice, StudentSamples) for choice in choices)
    assert 90 < by_student < 150  # 120 expected, standard deviation 9
    assert {choice.column for choice in choices if isinstance(choice, DatasetSamples)} == {"answer"}
    assert isinstance(resolve_sampler(by, seed, ("evaluation", 0), evaluation=True), StudentSamples)


@pytest.mark.parametrize(("share", "student"), [(0.0, False), (1.0, True)])
def test_mixture_batch_has_a_single_sampler(open_tiny, share, student):
    trainer = open_tiny(rollout=mixture_rollout(share), losses=DISTIL)
    collected = collect(trainer, 0)
    assert collected.figures["by_student"] == student
    decode = trainer.setup.data.tokenizer.decode
    for rollout in collected.batch:
        completion = decode(rollout.completion_ids, skip_special_tokens=True)
        assert (completion == rollout.row.columns["answer"]) is not student
        assert (rollout.sampler_logprobs is None) is not student
    assert train_step(trainer, prepare_rollouts(trainer, collected.batch)).applied


START = AnswerStart(
    template="{attempt}\n\n{verdict}\n\n",
    slots=Table(
        {"attempt": OwnAttempt(), "verdict": Verdict(success="Let me rephrase.", failure="Wait, that is wrong.")}
    ),
)


def test_teacher_prompt_contains_the_attempt_and_a_verdict(open_tiny):
    rollout = RolloutSpec(max_new_tokens=8, backend=BACKEND)
    teacher = TeacherSpec(weights=FrozenWeights(), sees=START)
    trainer = open_tiny(rollout=rollout, teacher=teacher, losses=DISTIL, rewards=REWARDS)
    trainer.setup.data.train_rewards = {"right": scorer_of(1, 0)}
    collected = collect(trainer, 0)
    tokenizer = trainer.setup.data.tokenizer
    for rollout in collected.batch:
        teacher_prompt = rollout.teacher_prompt_ids
        if teacher_prompt is None:  # an empty attempt
            continue
        prompt_length = len(rollout.prompt_ids)
        assert teacher_prompt[:prompt_length] == rollout.prompt_ids
        attempt = tokenizer.decode(rollout.completion_ids, skip_special_tokens=True).strip()
        verdict = "Let me rephrase." if rollout.reward else "Wait, that is wrong."
        assert tokenizer.decode(teacher_prompt[prompt_length:]) == f"{attempt}\n\n{verdict}\n\n"
    assert sum(r.teacher_prompt_ids is not None for r in collected.batch) > 1
    result = train_step(trainer, prepare_rollouts(trainer, collected.batch))
    assert torch.tensor(result.metrics["grad_norm"]) > 0
