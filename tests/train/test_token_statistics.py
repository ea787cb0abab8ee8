"""The measuring pass, and what is made of it: against plain torch on the tiny model, and through whole runs."""

import math

import pytest
import torch
from tinyruns import (
    collect,
    compute_token_statistics,
    distil,
    evaluate_objective,
    evaluated,
    held_out_loss,
    make_spec,
    masters,
    prepare_rollouts,
    rollout,
    rollouts_of,
    silent,
    teacher,
    train_step,
    training,
)

from sdkit.language.errors import BadData
from sdkit.language.specs import (
    STATISTICS,
    CrossEntropy,
    DatasetSamples,
    Distillation,
    DriftWeight,
    FileWeight,
    ForwardKl,
    FrozenWeights,
    GroupRelative,
    ImportanceSpec,
    LogRatio,
    MaskSpec,
    OldPolicyRatio,
    OptimizerSpec,
    PassRateWeight,
    PerplexityWeight,
    PerToken,
    PolicyGradient,
    RegexReward,
    ReverseKl,
    RouteSpec,
    SampledTokenSupport,
    SuccessfulSibling,
    Table,
    TeacherEntropyWeight,
    UserTurn,
    VocabularySupport,
)
from sdkit.rewards.scorer import ScoredCompletion, Scorer
from sdkit.train.smoke import smoke

# The first step of Adam is −lr · g / (|g| + eps): with eps far above |g| and lr = eps it is −g.
MINUS_GRADIENT = OptimizerSpec(lr=1e4, eps=1e4, max_grad_norm=1e9)
REWARDS = Table({"right": RegexReward(pattern=".")})
JOINT = PerToken(denominator="joint")
GROUPS = rollout(completions_per_prompt=3)


def logprobs(causal, prompt, rollout, temperature=1.0):
    """Of the whole vocabulary at each completion token, [T, V]."""
    ids = torch.tensor([[*prompt, *rollout.completion_ids]])
    logits = causal(ids).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def picked(logprobs, rollout):
    return logprobs.gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


def entropy(logprobs):
    return -(logprobs.exp() * logprobs).sum(-1)


def gradient_of_step(trainer, batch):
    before = masters(trainer)
    measured = train_step(trainer, batch)
    return measured, {name: before[name] - value for name, value in masters(trainer).items()}


def check_step(trainer, batch, loss):
    """The step is the gradient of a loss by hand."""
    parameters = [p for _, p in trainer.models.student.causal.named_parameters()]
    expected = torch.autograd.grad(loss, parameters)
    measured, found = gradient_of_step(trainer, batch)
    assert measured.metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert measured.metrics["grad_norm"] > 1e-4
    for (_, value), wanted in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-3)


def in_turn(*rewards):
    """A scorer that gives these rewards to the rollouts of a step, in order."""
    return Scorer(lambda pairs: [ScoredCompletion(reward=float(rewards[i % len(rewards)])) for i in range(len(pairs))])


@pytest.fixture
def open_judged_trainer(open_tiny):
    def opened(*rewards, **changes):
        trainer = open_tiny(**({"rewards": REWARDS, "rollout": GROUPS} | changes))
        trainer.setup.data.train_rewards = {"right": in_turn(*rewards)}
        return trainer

    return opened


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_pass_measures_what_plain_torch_does(open_tiny, budget):
    trainer = open_tiny(rollout=rollout(temperature=0.7), training=training(micro_batch_tokens=budget, chunk_tokens=5))
    batch = compute_token_statistics(trainer, rollouts_of(trainer), STATISTICS)
    for r in batch:
        with torch.no_grad():
            student = logprobs(trainer.models.student.causal, r.prompt_ids, r, 0.7)
            told = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r, 0.7)
        wanted = {
            "student_logprobs": picked(student, r),
            "student_entropy": entropy(student),
            "teacher_logprobs": picked(told, r),
            "teacher_entropy": entropy(told),
        }
        for name, values in wanted.items():
            found = torch.tensor(r.token_statistics[name])
            torch.testing.assert_close(found, values, atol=1e-4, rtol=0)


def test_only_what_is_asked_is_measured(open_tiny):
    plain = rollouts_of(open_tiny())
    assert all(not r.token_statistics and r.old_logprobs is None for r in plain)
    trainer = open_tiny(losses=distil(mask=MaskSpec(student_entropy_top=0.5)))
    assert {tuple(r.token_statistics) for r in rollouts_of(trainer)} == {("student_entropy",)}


def test_a_rollout_without_teacher_has_no_measures_of_it(open_judged_trainer):
    sees = UserTurn(template="{prompt}{s}", slots=Table({"s": SuccessfulSibling(wrap=" {value}")}))
    losses = distil(weight=TeacherEntropyWeight(rate=1.0))
    trainer = open_judged_trainer(0, 0, 1, teacher=teacher(FrozenWeights(), sees), losses=losses)
    for r in rollouts_of(trainer):
        assert ("teacher_entropy" in r.token_statistics) == (r.teacher_prompt_ids is not None)


def test_the_plan_says_what_is_measured_and_why(open_tiny):
    losses = distil(
        weight=TeacherEntropyWeight(rate=1.0), importance=ImportanceSpec(old_policy=OldPolicyRatio(cap=2.0))
    )
    trainer = open_tiny(losses=losses, training=training(updates_per_rollout=2))
    assert trainer.setup.plan.statistics == (
        "student log-probabilities for training.updates_per_rollout",
        "teacher entropy for losses.distil.weight",
    )
    assert open_tiny().setup.plan.statistics == ()


def test_the_pass_moves_nothing_and_the_second_update_sees_its_figures(open_tiny):
    losses = distil(mask=MaskSpec(student_entropy_top=0.5), weight=TeacherEntropyWeight(rate=1.0))
    trainer = open_tiny(
        losses=losses, optimizer=OptimizerSpec(lr=1e-2), training=training(updates_per_rollout=2, steps=1)
    )
    before = masters(trainer)
    whole = rollouts_of(trainer)
    for name, value in masters(trainer).items():
        assert torch.equal(value, before[name])
    tokens = sum(len(r.completion_ids) for r in whole)
    assert sum(len(r.loss_masks["distil"].positions) for r in whole) == math.ceil(0.5 * tokens)
    first, second = whole.split(2)
    assert train_step(trainer, first).applied
    again = prepare_rollouts(trainer, whole)
    assert [r.token_statistics for r in again] != [r.token_statistics for r in whole]
    assert train_step(trainer, second).applied


@pytest.mark.parametrize("budget", [60, 10**6])
def test_the_unsure_fifth_of_the_batch(open_tiny, budget):
    trainer = open_tiny(
        losses=distil(mask=MaskSpec(student_entropy_top=0.2, skip_first=1)),
        optimizer=MINUS_GRADIENT,
        training=training(micro_batch_tokens=budget),
    )
    batch = rollouts_of(trainer)
    causal, kls, spreads = trainer.models.student.causal, [], []
    for r in batch:
        student = logprobs(causal, r.prompt_ids, r)[1:]
        told = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r)[1:].detach()
        kls.append((told.exp() * (told - student)).sum(-1))
        spreads.append(entropy(student).detach())
    kept = torch.cat(spreads).topk(math.ceil(0.2 * sum(map(len, kls)) - 1e-9)).indices
    check_step(trainer, batch, torch.cat(kls)[kept].mean())


def test_routed_by_outcome_with_a_joint_denominator(open_judged_trainer):
    """Failed rollouts with a sibling's success distil, weighted by the teacher's sureness; the others go by their advantage."""
    sees = UserTurn(template="{prompt}{s}", slots=Table({"s": SuccessfulSibling(wrap=" {value}")}))
    distilled = Distillation(
        divergence=ReverseKl(), support=VocabularySupport(), weight=TeacherEntropyWeight(rate=1.0), average=JOINT
    )
    policy = PolicyGradient(advantage=GroupRelative(), average=JOINT)
    trainer = open_judged_trainer(
        *(1, 0, 0, 0, 0, 0),
        teacher=teacher(FrozenWeights(), sees),
        losses=Table({"distil": distilled, "policy": policy}),
        route=RouteSpec(when="failed_with_context", then=("distil",), otherwise=("policy",)),
        optimizer=MINUS_GRADIENT,
    )
    batch = rollouts_of(trainer)
    tokens = sum(len(r.completion_ids) for r in batch)
    kls, sure, pulled = [], [], []
    for r in batch:
        student = logprobs(trainer.models.student.causal, r.prompt_ids, r)
        if r.reward < 1 and r.teacher_prompt_ids is not None:
            told = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r).detach()
            kls.append((student.exp() * (student - told)).sum(-1))
            sure.append((-entropy(told)).exp())
        else:
            now = picked(student, r)
            pulled.append(-(now - now.detach()).exp() * r.advantage)
    weights = torch.cat(sure) / torch.cat(sure).mean()
    loss = ((weights * torch.cat(kls)).sum() + torch.cat(pulled).sum()) / tokens
    figures = evaluate_objective(trainer, batch)
    assert figures["route/then"] == pytest.approx(len(kls) / len(batch))
    assert figures["route/then"] + figures["route/otherwise"] == pytest.approx(1)
    check_step(trainer, batch, loss)


def test_prompts_half_solved_weigh_most(open_judged_trainer):
    trainer = open_judged_trainer(
        *(1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1),
        losses=distil(weight=PassRateWeight(power=0.5)),
        optimizer=MINUS_GRADIENT,
    )
    batch = rollouts_of(trainer)
    loss = torch.zeros(())
    worth = [math.sqrt(2) / 3, 0.0, math.sqrt(2) / 3, 0.0]
    for r in batch:
        student = logprobs(trainer.models.student.causal, r.prompt_ids, r)
        told = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r).detach()
        loss = loss + worth[r.group] * (told.exp() * (told - student)).sum()
    check_step(trainer, batch, loss / sum(len(r.completion_ids) for r in batch))


def test_right_ones_by_the_students_perplexity_wrong_ones_by_the_teachers(open_judged_trainer):
    wrong = Distillation(
        divergence=ReverseKl(), support=SampledTokenSupport(), weight=PerplexityWeight(of="teacher", power=-1.0)
    )
    right = CrossEntropy(weight=PerplexityWeight(of="student", power=1.0))
    trainer = open_judged_trainer(
        *(1, 0, 1, 0, 1, 0),
        losses=Table({"wrong": wrong, "right": right}),
        route=RouteSpec(when="failed", then=("wrong",), otherwise=("right",)),
        optimizer=MINUS_GRADIENT,
    )
    batch = rollouts_of(trainer)
    parts = {"wrong": [], "right": []}
    for r in batch:
        now = picked(logprobs(trainer.models.student.causal, r.prompt_ids, r), r)
        with torch.no_grad():
            told = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r)
        told = picked(told, r)
        name, side, power = ("right", now.detach(), 1) if r.reward else ("wrong", told, -1)
        each = -now if r.reward else (now.detach() - told) * now
        parts[name].append((r.group, (-side.mean()).exp() ** power, each))
    loss = torch.zeros(())
    for held in parts.values():
        tokens = sum(len(each) for _, _, each in held)
        for group, worth, each in held:
            peers = [w for g, w, _ in held if g == group]
            loss = loss + each.sum() * worth / (sum(peers) / len(peers)) / tokens
    check_step(trainer, batch, loss)


def test_tokens_that_the_teacher_finds_absurd_are_left_out(open_tiny):
    """And the others weigh by the drift before them, over counted tokens alone."""
    floor = -0.01
    term = PolicyGradient(advantage=LogRatio(floor=floor, below_floor="leave_out"), weight=DriftWeight(strength=0.5))
    trainer = open_tiny(losses=Table({"pull": term}), optimizer=MINUS_GRADIENT)
    batch = rollouts_of(trainer)
    loss, counted, tokens = torch.zeros(()), 0, 0
    for r in batch:
        now = picked(logprobs(trainer.models.student.causal, r.prompt_ids, r), r)
        with torch.no_grad():
            told = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r)
        worth = picked(told, r) - now.detach()
        kept = worth >= floor
        now, worth = now[kept], worth[kept]
        before = worth.abs().cumsum(0) - worth.abs()
        weights = 1 + 0.5 * (1 - before / worth.abs().sum().clamp(min=1e-30))
        loss = loss - (weights * worth * (now - now.detach()).exp()).sum()
        counted, tokens = counted + int(kept.sum()), tokens + len(kept)
    assert 0 < counted < tokens
    check_step(trainer, batch, loss / counted)


def test_a_data_sets_completions_have_entropies_too(open_tiny):
    losses = Table({"imitate": CrossEntropy(mask=MaskSpec(student_entropy_top=0.5))})
    sampled_by = DatasetSamples(column="demonstration")
    trainer = open_tiny(losses=losses, teacher=None, rollout=rollout(sampled_by=sampled_by))
    batch = rollouts_of(trainer)
    tokens = sum(len(r.completion_ids) for r in batch)
    assert train_step(trainer, batch).metrics["imitate/tokens"] == math.ceil(0.5 * tokens)


def test_special_tokens_do_not_count(open_tiny):
    losses = Table({"imitate": CrossEntropy(mask=MaskSpec(special_tokens="leave_out"))})
    sampled_by = DatasetSamples(column="demonstration")
    trainer = open_tiny(losses=losses, teacher=None, rollout=rollout(sampled_by=sampled_by))
    assert trainer.setup.data.tokenizer.eos_token_id in trainer.models.special_ids
    for r in collect(trainer, 0).batch:
        assert not set(r.completion_ids[:-1]) & trainer.models.special_ids
    for r in rollouts_of(trainer):
        ended = r.completion_ids[-1] in trainer.models.special_ids
        assert len(r.loss_masks["imitate"].positions) == len(r.completion_ids) - ended


def test_nothing_unsure_is_no_gradient_and_no_nan(open_tiny):
    trainer = open_tiny(losses=distil(mask=MaskSpec(teacher_entropy_above=1e3)))
    measured = train_step(trainer, rollouts_of(trainer))
    assert measured.metrics["grad_norm"] == 0
    assert measured.metrics["loss"] == 0
    assert measured.metrics["distil/empty_rows"] == 1
    assert all(math.isfinite(value) for value in measured.metrics.values())


def test_held_out_prompts_are_routed_and_measured_as_well(open_tiny, tiny_folder):
    losses = distil(weight=TeacherEntropyWeight(rate=1.0))
    route = RouteSpec(when="failed", then=("distil",))
    spec = evaluated(make_spec(tiny_folder, losses=losses, route=route, reward="right"))
    found = held_out_loss(open_tiny(spec))
    assert 0 <= found["eval/route/then"] <= 1
    assert math.isfinite(found["eval/loss"])


def test_a_miniature_takes_the_pass(tiny_folder):
    losses = Table(
        {
            "distil": Distillation(
                divergence=ForwardKl(),
                support=VocabularySupport(),
                mask=MaskSpec(teacher_entropy_above=8.0, student_entropy_top=0.5),
                weight=TeacherEntropyWeight(rate=1.0),
                average=JOINT,
            ),
            "policy": PolicyGradient(advantage=GroupRelative(), average=JOINT),
        }
    )
    route = RouteSpec(when="failed_with_context", then=("distil",), otherwise=("policy",))
    spec = make_spec(tiny_folder, losses=losses, rollout=GROUPS, route=route, rewards=REWARDS, reward="right")
    lines = smoke(spec, silent(), steps=2)
    trained = [line for line in lines if "grad_norm" in line]
    assert len(trained) == 2
    assert all(0 < line["route/then"] < 1 and line["time/measure"] > 0 for line in trained)


TEACHERS_CHOICE = FileWeight(file="mine.py", function="bold", given=("teacher_logprobs", "length"))


@pytest.fixture
def bold(tmp_path):
    body = "    return counts * teacher_logprobs.exp() * length[:, None]"
    (tmp_path / "mine.py").write_text(f"def bold(counts, teacher_logprobs, length):\n{body}\n")


def test_a_users_weight_trains(open_tiny, bold):
    trainer = open_tiny(losses=distil(weight=TEACHERS_CHOICE), optimizer=MINUS_GRADIENT)
    batch = rollouts_of(trainer)
    loss = torch.zeros(())
    for r in batch:
        student = logprobs(trainer.models.student.causal, r.prompt_ids, r)
        told = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r).detach()
        kl = (told.exp() * (told - student)).sum(-1)
        loss = loss + (picked(told, r).exp() * len(kl) * kl).sum()
    check_step(trainer, batch, loss / sum(len(r.completion_ids) for r in batch))


def test_a_miniature_finds_the_users_file(tiny_folder, bold, tmp_path):
    lines = smoke(make_spec(tiny_folder, losses=distil(weight=TEACHERS_CHOICE)), silent(), home=tmp_path)
    assert sum("grad_norm" in line for line in lines) == 2


def test_a_users_weight_is_tried_out_before_a_weight_is_loaded(open_tiny, tmp_path):
    (tmp_path / "mine.py").write_text("def bold(counts):\n    return -1.0 * counts\n")
    with pytest.raises(BadData, match=r"bold in mine\.py returned -1"):
        open_tiny(losses=distil(weight=FileWeight(file="mine.py", function="bold")))
