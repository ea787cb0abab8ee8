"""Filters of rollouts, mixtures of samplers, and texts that begin the answer."""

import json

import pytest
import torch
from tinyruns import collect, prepare_rollouts, train_step

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
from sdkit.rewards.scorer import ScoredCompletion, Scorer
from sdkit.train import loop
from sdkit.train.rollout_filters import filter_rollouts
from sdkit.train.rollout_sampler import resolve_sampler

BACKEND = TransformersBackend()
REWARDS = Table({"right": RegexReward(pattern=".")})
DISTIL = Table({"distil": Distillation(divergence=ForwardKl(), support=VocabularySupport())})


def judged(*rewards):
    """A scorer that gives these rewards to the rollouts of a step, in order."""
    return Scorer(
        lambda pairs: [
            ScoredCompletion(reward=float(rewards[i % len(rewards)]), feedback=None) for i in range(len(pairs))
        ]
    )


ROW = Row(index=0, messages=({"role": "user", "content": "Q"},), columns={}, raw={})


def batch_of(rewards, ids=None):
    """Groups of two; every completion is its own number, or one of `ids`."""
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


def text(ids):
    return " ".join(str(i) for i in ids if i)


REWARDED = [1.0, 0.2, 0.0, 1.0, 0.5, 0.5]
CASES = [
    ((), [0, 1, 2, 3, 4, 5], {}),
    ((RewardAtLeast(threshold=0.5),), [0, 3, 4, 5], {"reward_at_least": 4 / 6}),
    ((NonConstantGroup(),), [0, 1, 2, 3], {"non_constant_group": 4 / 6}),
    ((NonConstantGroup(), RewardAtLeast()), [0, 3], {"non_constant_group": 4 / 6, "reward_at_least": 2 / 6}),
]


@pytest.mark.parametrize(("keep", "places", "shares"), CASES, ids=str)
def test_a_rollout_passes_every_filter_or_goes(keep, places, shares):
    found, passed = filter_rollouts(keep, batch_of(REWARDED), text)
    assert [r.completion_ids[0] - 1 for r in found] == places
    assert passed == pytest.approx(shares)


def test_white_space_and_special_tokens_say_nothing():
    batch = batch_of([0.0] * 4, ids=[(0,), (7,), (), (0, 0)])
    found, passed = filter_rollouts((NonEmpty(),), batch, text)
    assert [r.completion_ids for r in found] == [(7,)]
    assert passed == {"non_empty": 0.25}


def test_nothing_passes_nothing():
    found, passed = filter_rollouts((NonEmpty(),), RolloutBatch(rollouts=()), text)
    assert len(found) == 0
    assert passed == {"non_empty": 0.0}


class Lines:
    """A report that only remembers the figures of each step."""

    def __init__(self):
        self.metrics = []

    def step(self, step, collected, metrics, server_messages):
        self.metrics.append(dict(metrics))


@pytest.fixture
def one_step(open_tiny):
    def stepped(scorer, **changes):
        trainer = open_tiny(**({"rewards": REWARDS} | changes))
        trainer.setup.data.train_rewards = {"right": scorer}
        report = Lines()
        loop._train_on_batch(trainer, report, 0)
        return trainer, report.metrics[0]

    return stepped


def test_only_what_is_kept_is_trained_on(one_step):
    rollout = RolloutSpec(max_new_tokens=8, completions_per_prompt=2, backend=BACKEND, keep=(RewardAtLeast(),))
    imitate = Table({"imitate": CrossEntropy()})
    trainer, metrics = one_step(judged(1, 0), rollout=rollout, teacher=None, losses=imitate)
    assert metrics["keep/reward_at_least"] == metrics["rollout/kept"] == 0.5
    assert metrics["imitate/tokens"] < metrics["rollout/tokens"]
    assert metrics["reward/right"] == 0.5  # of all that were sampled
    assert trainer.progress.optimizer_steps == 1


def test_a_batch_of_which_nothing_is_kept_changes_nothing_and_the_run_goes_on(one_step):
    rollout = RolloutSpec(max_new_tokens=8, backend=BACKEND, keep=(RewardAtLeast(),))
    teacher = TeacherSpec(weights=EmaWeights(update_rate=0.5, every="rollout_batch"))
    trainer, metrics = one_step(judged(0), rollout=rollout, teacher=teacher, losses=DISTIL)
    assert metrics["rollout/kept"] == 0
    assert "loss" not in metrics
    assert "teacher_distance" not in metrics
    assert (trainer.progress.step, trainer.progress.optimizer_steps) == (1, 0)
    json.dumps(metrics)


def mixture(share):
    by = MixtureSamples(student_share=share, column="answer")
    return RolloutSpec(max_new_tokens=8, backend=BACKEND, sampled_by=by)


def test_the_coin_is_the_batchs_own_and_always_falls_the_same_way(open_tiny):
    trainer = open_tiny(rollout=mixture(0.3), losses=DISTIL)
    by, seed = trainer.specs.sampled_by, trainer.setup.spec.training.seed
    tossed, again = ([resolve_sampler(by, seed, ("rollout", n), evaluation=False) for n in range(400)] for _ in "ab")
    assert tossed == again
    by_student = sum(isinstance(one, StudentSamples) for one in tossed)
    assert 90 < by_student < 150  # 120 expected, standard deviation 9
    assert {one.column for one in tossed if isinstance(one, DatasetSamples)} == {"answer"}
    assert isinstance(resolve_sampler(by, seed, ("evaluation", 0), evaluation=True), StudentSamples)


@pytest.mark.parametrize(("share", "student"), [(0.0, False), (1.0, True)])
def test_a_batch_is_one_samplers_altogether(open_tiny, share, student):
    trainer = open_tiny(rollout=mixture(share), losses=DISTIL)
    gathered = collect(trainer, 0)
    assert gathered.figures["by_student"] == student
    decode = trainer.setup.data.tokenizer.decode
    for rollout in gathered.batch:
        said = decode(rollout.completion_ids, skip_special_tokens=True)
        assert (said == rollout.row.columns["answer"]) is not student
        assert (rollout.sampler_logprobs is None) is not student
    assert train_step(trainer, prepare_rollouts(trainer, gathered.batch)).applied


START = AnswerStart(
    template="{attempt}\n\n{verdict}\n\n",
    slots=Table(
        {"attempt": OwnAttempt(), "verdict": Verdict(success="Let me rephrase.", failure="Wait, that is wrong.")}
    ),
)


def test_the_teacher_reads_the_attempt_and_a_verdict_before_it_scores_the_attempt(open_tiny):
    rollout = RolloutSpec(max_new_tokens=8, backend=BACKEND)
    teacher = TeacherSpec(weights=FrozenWeights(), sees=START)
    trainer = open_tiny(rollout=rollout, teacher=teacher, losses=DISTIL, rewards=REWARDS)
    trainer.setup.data.train_rewards = {"right": judged(1, 0)}
    gathered = collect(trainer, 0)
    tokenizer = trainer.setup.data.tokenizer
    for rollout in gathered.batch:
        seen = rollout.teacher_prompt_ids
        if seen is None:  # the attempt says nothing
            continue
        own = len(rollout.prompt_ids)
        assert seen[:own] == rollout.prompt_ids
        attempt = tokenizer.decode(rollout.completion_ids, skip_special_tokens=True).strip()
        verdict = "Let me rephrase." if rollout.reward else "Wait, that is wrong."
        assert tokenizer.decode(seen[own:]) == f"{attempt}\n\n{verdict}\n\n"
    assert sum(r.teacher_prompt_ids is not None for r in gathered.batch) > 1
    measured = train_step(trainer, prepare_rollouts(trainer, gathered.batch))
    assert torch.tensor(measured.metrics["grad_norm"]) > 0
