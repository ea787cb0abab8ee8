"""Token statistics and what uses them: against plain torch on the tiny model, and in complete runs."""

import math

import pytest
import torch
from tinyruns import (
    MINUS_GRADIENT,
    collect,
    compute_token_statistics,
    distil,
    evaluate_objective,
    held_out_loss,
    make_spec,
    masters,
    prepare_rollouts,
    rollout,
    rollouts_of,
    scorer_of,
    silent_console,
    teacher,
    train_step,
    training,
    with_evaluation,
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
from sdkit.train.smoke import smoke

REWARDS = Table({"right": RegexReward(pattern=".")})
JOINT = PerToken(denominator="joint")
GROUPS = rollout(completions_per_prompt=3)


def logprobs(causal, prompt, rollout, temperature=1.0):
    """Log-probabilities of the full vocabulary at each completion token, [T, V]."""
    ids = torch.tensor([[*prompt, *rollout.completion_ids]])
    logits = causal(ids).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def sampled_logprobs(logprobs, rollout):
    return logprobs.gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


def entropy(logprobs):
    return -(logprobs.exp() * logprobs).sum(-1)


def gradient_of_step(trainer, batch):
    before = masters(trainer)
    result = train_step(trainer, batch)
    return result, {name: before[name] - value for name, value in masters(trainer).items()}


def assert_step_matches(trainer, batch, loss):
    """Asserts that the step is the gradient of `loss`."""
    parameters = [p for _, p in trainer.models.student.causal.named_parameters()]
    expected = torch.autograd.grad(loss, parameters)
    result, actual = gradient_of_step(trainer, batch)
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert result.metrics["grad_norm"] > 1e-4
    for (_, value), reference in zip(actual.items(), expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-3)


@pytest.fixture
def open_trainer_with_rewards(open_tiny):
    def make_trainer(*rewards, **changes):
        trainer = open_tiny(**({"rewards": REWARDS, "rollout": GROUPS} | changes))
        trainer.setup.data.train_rewards = {"right": scorer_of(*rewards)}
        return trainer

    return make_trainer


@pytest.mark.parametrize("budget", [1, 10**6])
def test_token_statistics_match_plain_torch(open_tiny, budget):
    trainer = open_tiny(rollout=rollout(temperature=0.7), training=training(micro_batch_tokens=budget, chunk_tokens=5))
    batch = compute_token_statistics(trainer, rollouts_of(trainer), STATISTICS)
    for r in batch:
        with torch.no_grad():
            student = logprobs(trainer.models.student.causal, r.prompt_ids, r, 0.7)
            teacher_logprobs = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r, 0.7)
        expected = {
            "student_logprobs": sampled_logprobs(student, r),
            "student_entropy": entropy(student),
            "teacher_logprobs": sampled_logprobs(teacher_logprobs, r),
            "teacher_entropy": entropy(teacher_logprobs),
        }
        for name, values in expected.items():
            actual = torch.tensor(r.token_statistics[name])
            torch.testing.assert_close(actual, values, atol=1e-4, rtol=0)


def test_only_needed_statistics_are_computed(open_tiny):
    plain = rollouts_of(open_tiny())
    assert all(not r.token_statistics and r.old_logprobs is None for r in plain)
    trainer = open_tiny(losses=distil(mask=MaskSpec(student_entropy_top=0.5)))
    assert {tuple(r.token_statistics) for r in rollouts_of(trainer)} == {("student_entropy",)}


def test_rollout_without_teacher_has_no_teacher_statistics(open_trainer_with_rewards):
    sees = UserTurn(template="{prompt}{s}", slots=Table({"s": SuccessfulSibling(wrap=" {value}")}))
    losses = distil(weight=TeacherEntropyWeight(rate=1.0))
    trainer = open_trainer_with_rewards(0, 0, 1, teacher=teacher(FrozenWeights(), sees), losses=losses)
    for r in rollouts_of(trainer):
        assert ("teacher_entropy" in r.token_statistics) == (r.teacher_prompt_ids is not None)


def test_plan_names_the_statistics_and_their_users(open_tiny):
    losses = distil(
        weight=TeacherEntropyWeight(rate=1.0), importance=ImportanceSpec(old_policy=OldPolicyRatio(cap=2.0))
    )
    trainer = open_tiny(losses=losses, training=training(updates_per_rollout=2))
    assert trainer.setup.plan.statistics == (
        "student log-probabilities for training.updates_per_rollout",
        "teacher entropy for losses.distil.weight",
    )
    assert open_tiny().setup.plan.statistics == ()


def test_statistics_change_no_weights_and_stay_for_the_second_update(open_tiny):
    losses = distil(mask=MaskSpec(student_entropy_top=0.5), weight=TeacherEntropyWeight(rate=1.0))
    trainer = open_tiny(
        losses=losses, optimizer=OptimizerSpec(lr=1e-2), training=training(updates_per_rollout=2, steps=1)
    )
    before = masters(trainer)
    batch = rollouts_of(trainer)
    for name, value in masters(trainer).items():
        assert torch.equal(value, before[name])
    tokens = sum(len(r.completion_ids) for r in batch)
    assert sum(len(r.loss_masks["distil"].positions) for r in batch) == math.ceil(0.5 * tokens)
    first, second = batch.split(2)
    assert train_step(trainer, first).applied
    recomputed = prepare_rollouts(trainer, batch)
    assert [r.token_statistics for r in recomputed] != [r.token_statistics for r in batch]
    assert train_step(trainer, second).applied


@pytest.mark.parametrize("budget", [60, 10**6])
def test_mask_on_the_largest_student_entropies(open_tiny, budget):
    trainer = open_tiny(
        losses=distil(mask=MaskSpec(student_entropy_top=0.2, skip_first=1)),
        optimizer=MINUS_GRADIENT,
        training=training(micro_batch_tokens=budget),
    )
    batch = rollouts_of(trainer)
    causal, kls, entropies = trainer.models.student.causal, [], []
    for r in batch:
        student = logprobs(causal, r.prompt_ids, r)[1:]
        teacher_logprobs = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r)[1:].detach()
        kls.append((teacher_logprobs.exp() * (teacher_logprobs - student)).sum(-1))
        entropies.append(entropy(student).detach())
    largest = torch.cat(entropies).topk(math.ceil(0.2 * sum(map(len, kls)) - 1e-9)).indices
    assert_step_matches(trainer, batch, torch.cat(kls)[largest].mean())


def test_routed_terms_with_a_joint_denominator(open_trainer_with_rewards):
    """Failed rollouts with a successful sibling distil, weighted by teacher entropy; others use the policy gradient."""
    sees = UserTurn(template="{prompt}{s}", slots=Table({"s": SuccessfulSibling(wrap=" {value}")}))
    distillation = Distillation(
        divergence=ReverseKl(), support=VocabularySupport(), weight=TeacherEntropyWeight(rate=1.0), average=JOINT
    )
    policy = PolicyGradient(advantage=GroupRelative(), average=JOINT)
    trainer = open_trainer_with_rewards(
        *(1, 0, 0, 0, 0, 0),
        teacher=teacher(FrozenWeights(), sees),
        losses=Table({"distil": distillation, "policy": policy}),
        route=RouteSpec(when="failed_with_context", then=("distil",), otherwise=("policy",)),
        optimizer=MINUS_GRADIENT,
    )
    batch = rollouts_of(trainer)
    tokens = sum(len(r.completion_ids) for r in batch)
    kls, confidences, policy_losses = [], [], []
    for r in batch:
        student = logprobs(trainer.models.student.causal, r.prompt_ids, r)
        if r.reward < 1 and r.teacher_prompt_ids is not None:
            teacher_logprobs = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r).detach()
            kls.append((student.exp() * (student - teacher_logprobs)).sum(-1))
            confidences.append((-entropy(teacher_logprobs)).exp())
        else:
            sampled = sampled_logprobs(student, r)
            policy_losses.append(-(sampled - sampled.detach()).exp() * r.advantage)
    weights = torch.cat(confidences) / torch.cat(confidences).mean()
    loss = ((weights * torch.cat(kls)).sum() + torch.cat(policy_losses).sum()) / tokens
    figures = evaluate_objective(trainer, batch)
    assert figures["route/then"] == pytest.approx(len(kls) / len(batch))
    assert figures["route/then"] + figures["route/otherwise"] == pytest.approx(1)
    assert_step_matches(trainer, batch, loss)


def test_pass_rate_weight_is_largest_for_half_solved_prompts(open_trainer_with_rewards):
    trainer = open_trainer_with_rewards(
        *(1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1),
        losses=distil(weight=PassRateWeight(power=0.5)),
        optimizer=MINUS_GRADIENT,
    )
    batch = rollouts_of(trainer)
    loss = torch.zeros(())
    weights = [math.sqrt(2) / 3, 0.0, math.sqrt(2) / 3, 0.0]
    for r in batch:
        student = logprobs(trainer.models.student.causal, r.prompt_ids, r)
        teacher_logprobs = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r).detach()
        loss = loss + weights[r.group] * (teacher_logprobs.exp() * (teacher_logprobs - student)).sum()
    assert_step_matches(trainer, batch, loss / sum(len(r.completion_ids) for r in batch))


def test_perplexity_weights_of_routed_terms(open_trainer_with_rewards):
    wrong = Distillation(
        divergence=ReverseKl(), support=SampledTokenSupport(), weight=PerplexityWeight(of="teacher", power=-1.0)
    )
    right = CrossEntropy(weight=PerplexityWeight(of="student", power=1.0))
    trainer = open_trainer_with_rewards(
        *(1, 0, 1, 0, 1, 0),
        losses=Table({"wrong": wrong, "right": right}),
        route=RouteSpec(when="failed", then=("wrong",), otherwise=("right",)),
        optimizer=MINUS_GRADIENT,
    )
    batch = rollouts_of(trainer)
    parts = {"wrong": [], "right": []}
    for r in batch:
        sampled = sampled_logprobs(logprobs(trainer.models.student.causal, r.prompt_ids, r), r)
        with torch.no_grad():
            teacher_logprobs = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r)
        teacher_logprobs = sampled_logprobs(teacher_logprobs, r)
        name, side, power = ("right", sampled.detach(), 1) if r.reward else ("wrong", teacher_logprobs, -1)
        token_losses = -sampled if r.reward else (sampled.detach() - teacher_logprobs) * sampled
        parts[name].append((r.group, (-side.mean()).exp() ** power, token_losses))
    loss = torch.zeros(())
    for terms in parts.values():
        tokens = sum(len(token_losses) for _, _, token_losses in terms)
        for group, factor, token_losses in terms:
            peers = [w for g, w, _ in terms if g == group]
            loss = loss + token_losses.sum() * factor / (sum(peers) / len(peers)) / tokens
    assert_step_matches(trainer, batch, loss)


def test_tokens_below_the_log_ratio_floor_are_left_out(open_tiny):
    """The remaining tokens are weighted by the drift before them, over counted tokens."""
    floor = -0.01
    term = PolicyGradient(advantage=LogRatio(floor=floor, below_floor="leave_out"), weight=DriftWeight(strength=0.5))
    trainer = open_tiny(losses=Table({"pull": term}), optimizer=MINUS_GRADIENT)
    batch = rollouts_of(trainer)
    loss, counted, tokens = torch.zeros(()), 0, 0
    for r in batch:
        sampled = sampled_logprobs(logprobs(trainer.models.student.causal, r.prompt_ids, r), r)
        with torch.no_grad():
            teacher_logprobs = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r)
        log_ratios = sampled_logprobs(teacher_logprobs, r) - sampled.detach()
        above_floor = log_ratios >= floor
        sampled, log_ratios = sampled[above_floor], log_ratios[above_floor]
        before = log_ratios.abs().cumsum(0) - log_ratios.abs()
        weights = 1 + 0.5 * (1 - before / log_ratios.abs().sum().clamp(min=1e-30))
        loss = loss - (weights * log_ratios * (sampled - sampled.detach()).exp()).sum()
        counted, tokens = counted + int(above_floor.sum()), tokens + len(above_floor)
    assert 0 < counted < tokens
    assert_step_matches(trainer, batch, loss / counted)


def test_completions_of_the_data_set_have_entropies(open_tiny):
    losses = Table({"imitate": CrossEntropy(mask=MaskSpec(student_entropy_top=0.5))})
    sampled_by = DatasetSamples(column="demonstration")
    trainer = open_tiny(losses=losses, teacher=None, rollout=rollout(sampled_by=sampled_by))
    batch = rollouts_of(trainer)
    tokens = sum(len(r.completion_ids) for r in batch)
    assert train_step(trainer, batch).metrics["imitate/tokens"] == math.ceil(0.5 * tokens)


def test_special_tokens_are_not_counted(open_tiny):
    losses = Table({"imitate": CrossEntropy(mask=MaskSpec(special_tokens="leave_out"))})
    sampled_by = DatasetSamples(column="demonstration")
    trainer = open_tiny(losses=losses, teacher=None, rollout=rollout(sampled_by=sampled_by))
    assert trainer.setup.data.tokenizer.eos_token_id in trainer.models.special_ids
    for r in collect(trainer, 0).batch:
        assert not set(r.completion_ids[:-1]) & trainer.models.special_ids
    for r in rollouts_of(trainer):
        ended = r.completion_ids[-1] in trainer.models.special_ids
        assert len(r.loss_masks["imitate"].positions) == len(r.completion_ids) - ended


def test_mask_without_tokens_gives_no_gradient_and_no_nan(open_tiny):
    trainer = open_tiny(losses=distil(mask=MaskSpec(teacher_entropy_above=1e3)))
    result = train_step(trainer, rollouts_of(trainer))
    assert result.metrics["grad_norm"] == 0
    assert result.metrics["loss"] == 0
    assert result.metrics["distil/empty_rows"] == 1
    assert all(math.isfinite(value) for value in result.metrics.values())


def test_held_out_prompts_are_routed_and_have_statistics(open_tiny, tiny_folder):
    losses = distil(weight=TeacherEntropyWeight(rate=1.0))
    route = RouteSpec(when="failed", then=("distil",))
    spec = with_evaluation(make_spec(tiny_folder, losses=losses, route=route, reward="right"))
    metrics = held_out_loss(open_tiny(spec))
    assert 0 <= metrics["eval/route/then"] <= 1
    assert math.isfinite(metrics["eval/loss"])


def test_smoke_computes_statistics(tiny_folder):
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
    lines = smoke(spec, silent_console(), steps=2)
    trained = [line for line in lines if "grad_norm" in line]
    assert len(trained) == 2
    assert all(0 < line["route/then"] < 1 and line["time/measure"] > 0 for line in trained)


TEACHERS_CHOICE = FileWeight(file="mine.py", function="bold", given=("teacher_logprobs", "length"))


@pytest.fixture
def user_weight_file(tmp_path):
    body = "    return counts * teacher_logprobs.exp() * length[:, None]"
    (tmp_path / "mine.py").write_text(f"def bold(counts, teacher_logprobs, length):\n{body}\n")


def test_user_weight_trains(open_tiny, user_weight_file):
    trainer = open_tiny(losses=distil(weight=TEACHERS_CHOICE), optimizer=MINUS_GRADIENT)
    batch = rollouts_of(trainer)
    loss = torch.zeros(())
    for r in batch:
        student = logprobs(trainer.models.student.causal, r.prompt_ids, r)
        teacher_logprobs = logprobs(trainer.models.teacher.weights.causal, r.teacher_prompt_ids, r).detach()
        kl = (teacher_logprobs.exp() * (teacher_logprobs - student)).sum(-1)
        loss = loss + (sampled_logprobs(teacher_logprobs, r).exp() * len(kl) * kl).sum()
    assert_step_matches(trainer, batch, loss / sum(len(r.completion_ids) for r in batch))


def test_smoke_finds_the_users_file(tiny_folder, user_weight_file, tmp_path):
    lines = smoke(make_spec(tiny_folder, losses=distil(weight=TEACHERS_CHOICE)), silent_console(), home=tmp_path)
    assert sum("grad_norm" in line for line in lines) == 2


def test_user_weight_is_tried_before_models_load(open_tiny, tmp_path):
    (tmp_path / "mine.py").write_text("def bold(counts):\n    return -1.0 * counts\n")
    with pytest.raises(BadData, match=r"bold in mine\.py returned -1"):
        open_tiny(losses=distil(weight=FileWeight(file="mine.py", function="bold")))
