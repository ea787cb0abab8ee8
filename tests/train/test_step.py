"""One optimizer step: gradients under any split, metrics, and the prompts of student and teacher."""

from itertools import pairwise

import pytest
import torch
from tinyruns import (
    LORA,
    MINUS_GRADIENT,
    advance,
    assert_equal,
    distil,
    evaluate_objective,
    held_out_loss,
    make_spec,
    masters,
    model,
    rollout,
    rollouts_of,
    score_teacher,
    silent_console,
    teacher,
    train_step,
    training,
    with_evaluation,
)

from sdkit.distributed import collectives
from sdkit.language.specs import (
    ColumnSlot,
    CrossEntropy,
    Distillation,
    EmaWeights,
    FrozenWeights,
    ImportanceSpec,
    Jsd,
    MaskSpec,
    OldPolicyRatio,
    OptimizerSpec,
    PerSequence,
    ReverseKl,
    SamplerRatio,
    Schedule,
    StudentWeights,
    Table,
    TopKSupport,
    UserTurn,
    VocabularySupport,
)
from sdkit.runs import directory
from sdkit.train import loop
from sdkit.train.collate import collate
from sdkit.train.report import Report
from sdkit.train.step_specs import learning_rate

SAMPLER = ImportanceSpec(sampler=SamplerRatio(cap=2.0, level="sequence_mean"))
OBJECTIVES = {
    "forward": distil(average=PerSequence(empty_rows="count"), importance=SAMPLER),
    "jsd": distil(
        divergence=Jsd(teacher_share=0.3),
        support=TopKSupport(k=20, chosen_by="student", remainder="tail_bucket"),
        mask=MaskSpec(skip_first=2),
    ),
    "two terms": Table(
        {
            "distil": Distillation(divergence=ReverseKl(), support=VocabularySupport()),
            "imitate": CrossEntropy(coefficient=0.5, average=PerSequence(empty_rows="skip")),
        }
    ),
}


def gradient_and_metrics(open_tiny, folder, losses, **sizes):
    """Gradient and metrics of one step, split according to `sizes`."""
    trainer = open_tiny(
        model=model(folder, lora=sizes.pop("lora", None)),
        losses=losses,
        optimizer=MINUS_GRADIENT,
        training=training(**sizes),
        rollout=rollout(completions_per_prompt=2, max_new_tokens=10),
    )
    before = masters(trainer)
    (result,) = advance(trainer, 1)
    gradient = {name: before[name] - value for name, value in masters(trainer).items()}
    metrics = {k: v for k, v in result.metrics.items() if k != "padding"}
    return gradient, metrics


@pytest.mark.parametrize("losses", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_split_of_a_step_changes_nothing(open_tiny, tiny_folder, losses, lora):
    unsplit = {"micro_batch_tokens": 10**6, "chunk_tokens": 1000, "lora": lora}
    gradient, metrics = gradient_and_metrics(open_tiny, tiny_folder, losses, **unsplit)
    assert metrics["grad_norm"] > 1e-2
    for cut in (
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 100},
        {"chunk_tokens": 1},
        {"chunk_tokens": 7},
        {"share_prompts": False},
        {"share_prompts": False, "micro_batch_tokens": 100},
    ):
        other, other_metrics = gradient_and_metrics(open_tiny, tiny_folder, losses, **(unsplit | cut))
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=1e-3)


def test_step_matches_the_gradient_of_plain_torch(open_tiny, tiny_folder):
    """The step equals the forward KL by hand, one sequence at a time."""
    trainer = open_tiny(optimizer=MINUS_GRADIENT, losses=distil(average=PerSequence()))
    batch = rollouts_of(trainer)
    causal = trainer.models.student.causal
    parameters = [p for _, p in causal.named_parameters()]
    loss = sum(forward_kl_by_hand(causal, r) for r in batch) / len(batch)
    expected = torch.autograd.grad(loss, parameters)
    before = masters(trainer)
    result = train_step(trainer, batch)
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, value), gradient in zip(masters(trainer).items(), expected, strict=True):
        torch.testing.assert_close(before[name] - value, gradient, atol=1e-5, rtol=1e-3)


def forward_kl_by_hand(causal, rollout):
    length = len(rollout.completion_ids)

    def logprobs(prompt):
        ids = torch.tensor([[*prompt, *rollout.completion_ids]])
        return causal(ids).logits[0, -length - 1 : -1].log_softmax(-1)

    teacher_logprobs = logprobs(rollout.teacher_prompt_ids).detach()
    return (teacher_logprobs.exp() * (teacher_logprobs - logprobs(rollout.prompt_ids))).sum(-1).mean()


OLD_RATIO = distil(importance=ImportanceSpec(old_policy=OldPolicyRatio(cap=2.0)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_old_logprobs_are_those_before_the_first_update(open_tiny, temperature, budget):
    trainer = open_tiny(
        losses=OLD_RATIO,
        rollout=rollout(temperature=temperature),
        training=training(micro_batch_tokens=budget, updates_per_rollout=2),
    )
    batch = rollouts_of(trainer)
    for r in batch:
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        with torch.no_grad():
            logits = trainer.models.student.causal(ids).logits[0, len(r.prompt_ids) - 1 : -1]
        all_logprobs = (logits / temperature).log_softmax(-1)
        expected = all_logprobs.gather(-1, torch.tensor(r.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(r.old_logprobs), expected, atol=1e-4, rtol=0)
        # The sampler here is the trainer itself.
        torch.testing.assert_close(torch.tensor(r.sampler_logprobs), expected, atol=1e-4, rtol=0)


def test_ratio_is_one_at_the_first_update_only(open_tiny):
    trainer = open_tiny(
        losses=OLD_RATIO, optimizer=OptimizerSpec(lr=1e-2), training=training(updates_per_rollout=2, steps=1)
    )
    assert trainer.setup.plan.needs_old_logprobs
    first, second = rollouts_of(trainer).split(2)
    assert train_step(trainer, first).metrics["distil/old_ratio"] == pytest.approx(1.0, abs=1e-4)
    later_ratio = train_step(trainer, second).metrics["distil/old_ratio"]
    assert abs(later_ratio - 1) > 1e-2
    assert trainer.progress.optimizer_steps == 2


def test_batch_is_split_into_complete_groups(open_tiny):
    trainer = open_tiny(rollout=rollout(completions_per_prompt=3), training=training(prompts_per_step=5))
    parts = rollouts_of(trainer).split(2)
    groups = [{r.group for r in part} for part in parts]
    assert groups[0] | groups[1] == set(range(5))
    assert not groups[0] & groups[1]
    assert sum(map(len, parts)) == 15


def test_single_update_needs_no_old_logprobs(open_tiny):
    assert not open_tiny(losses=OLD_RATIO).setup.plan.needs_old_logprobs


def single_micro_batch(trainer, batch):
    (micro,) = collate(
        list(batch), trainer.setup.spec.losses, 10**6, collectives.all_reduce_sum, trainer.models.device
    ).micro_batches
    return micro


def test_teacher_scores_the_students_completion(open_tiny):
    trainer = open_tiny()
    micro = single_micro_batch(trainer, rollouts_of(trainer))
    for side in (micro.student, micro.teacher):
        assert torch.equal(side.input_ids.flatten()[side.predictor_index + 1], micro.tokens.token)
    assert not torch.equal(micro.student.input_ids, micro.teacher.input_ids)


def test_another_teacher_prompt_changes_the_teacher_alone(open_tiny):
    sees = UserTurn(
        template="{prompt} POISON {demonstration}", slots=Table({"demonstration": ColumnSlot(name="demonstration")})
    )
    plain, changed = open_tiny(), open_tiny(teacher=teacher(FrozenWeights(), sees))
    a, b = rollouts_of(plain), rollouts_of(changed)
    assert [r.completion_ids for r in a] == [r.completion_ids for r in b]
    assert [r.prompt_ids for r in a] == [r.prompt_ids for r in b]
    one, other = single_micro_batch(plain, a), single_micro_batch(changed, b)
    with torch.no_grad():
        torch.testing.assert_close(
            plain.models.student.hidden(one.student), changed.models.student.hidden(other.student)
        )
    scores = score_teacher(plain, one), score_teacher(changed, other)
    assert (scores[0].hidden - scores[1].hidden).abs().mean() > 1e-2


def test_teacher_equal_to_the_student_gives_no_gradient(open_tiny):
    trainer = open_tiny(teacher=teacher(StudentWeights(), sees=None))
    (result,) = advance(trainer, 1)
    assert result.metrics["distil/forward_kl"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["grad_norm"] < 1e-4


def test_live_teacher_gets_no_gradient(open_tiny):
    """The gradient with a live teacher equals that with a frozen one while their weights are equal."""
    gradients = []
    for weights in (StudentWeights(), FrozenWeights()):
        trainer = open_tiny(teacher=teacher(weights), optimizer=MINUS_GRADIENT)
        before = masters(trainer)
        advance(trainer, 1)
        gradients.append({name: before[name] - value for name, value in masters(trainer).items()})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def learning_rates(total=10, **changes):
    spec = OptimizerSpec(**({"lr": 2.0} | changes))
    return [learning_rate(spec, update, total) for update in range(total + 1)]


def test_learning_rates():
    assert learning_rates(4) == [2.0] * 5
    assert learning_rates(4, warmup_steps=2) == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert learning_rates(4, lr_scheduler_type="linear") == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert learning_rates(4, lr_scheduler_type="linear", final_share=0.5) == [2.0, 1.75, 1.5, 1.25, 1.0]
    assert learning_rates(4, lr_scheduler_type="cosine") == pytest.approx([2, 1 + 2**-0.5, 1, 1 - 2**-0.5, 0])
    assert learning_rates(6, lr_scheduler_type="linear", warmup_steps=2) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    falling = learning_rates(50, lr_scheduler_type="cosine", warmup_steps=5, final_share=0.1)
    assert all(a > b for a, b in pairwise(falling[5:]))
    assert min(falling[5:]) == pytest.approx(0.2)


def test_logged_learning_rate_is_the_one_used(open_tiny):
    trainer = open_tiny(optimizer=OptimizerSpec(lr=1e-3, lr_scheduler_type="linear", warmup_steps=2))
    logged = [m.metrics["lr"] for m in advance(trainer)]
    assert logged == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert trainer.learner.zero.engine.basic_optimizer.param_groups[0]["lr"] == logged[-1]


def test_scheduled_coefficient_scales_the_loss(open_tiny):
    losses = Table({"imitate": CrossEntropy(coefficient=Schedule(start=0.0, to=1.0, steps=2))})
    trainer = open_tiny(losses=losses, teacher=None)
    shares = [m.metrics["loss/imitate"] / m.metrics["imitate/token_loss"] for m in advance(trainer)]
    assert shares == pytest.approx([0.0, 0.5, 1.0])


def test_metrics_of_the_objective_are_measured_on_held_out_prompts(open_tiny, tiny_folder):
    trainer = open_tiny(with_evaluation(make_spec(tiny_folder, losses=OBJECTIVES["two terms"])))
    (result,) = advance(trainer, 1)
    update = {"grad_norm", "lr", "padding", "teacher_distance"}
    held_out = held_out_loss(trainer)
    assert "distil/teacher_entropy" in result.metrics
    for prefix in ("eval/", "eval/more/"):
        names = {k.removeprefix(prefix) for k in held_out if k.startswith(prefix)}
        assert set(result.metrics) - update <= names
    assert held_out["eval/distil/tokens"] == 3 * 8  # loss_prompts × tokens


def test_evaluating_the_objective_changes_no_weight(open_tiny):
    trainer = open_tiny(teacher=teacher(EmaWeights(update_rate=0.5)))
    before = masters(trainer)
    metrics = evaluate_objective(trainer, rollouts_of(trainer))
    for name, value in masters(trainer).items():
        assert_equal(value, before[name])
    assert trainer.progress.optimizer_steps == 0
    assert metrics["loss"] == pytest.approx(advance(trainer, 1)[0].metrics["loss"])


def test_policy_version_counts_applied_updates(open_tiny, tmp_path):
    trainer = open_tiny(training=training(steps=2, updates_per_rollout=2))
    run = directory.create(tmp_path / "run")
    loop.run(trainer, Report(run, silent_console(), trainer.setup))
    assert [line["policy_version"] for line in run.history()] == [2, 4]
    assert {r.policy_version for r in rollouts_of(trainer)} == {4}


def test_forward_kl_decreases_on_a_repeated_batch(open_tiny):
    trainer = open_tiny(optimizer=OptimizerSpec(lr=3e-3))
    batch = rollouts_of(trainer)
    losses = [train_step(trainer, batch).metrics["loss"] for _ in range(8)]
    assert losses[-1] < 0.6 * losses[0]
