"""Teacher weights: live, frozen, averaged or copied, with full fine-tuning and with adapters."""

import pytest
import torch
from tinyruns import (
    LORA,
    PRECISIONS,
    advance,
    assert_equal,
    hidden_states,
    masters,
    model,
    rollouts_of,
    silent_console,
    teacher,
    training,
)

from sdkit.language.schedules import scalar_at
from sdkit.language.specs import CopyWeights, EmaWeights, FrozenWeights, OptimizerSpec, Schedule, StudentWeights
from sdkit.models.weights import Weights

EVERY_FORM = pytest.mark.parametrize(
    ("dtype", "stage", "lora"),
    [(dtype, stage, lora) for dtype, stage in PRECISIONS for lora in (None, LORA)],
    ids=lambda value: {None: "full", LORA: "lora"}.get(value) or str(value),
)
ONE_FORM = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture
def open_trainer(open_tiny, tiny_folder):
    def make_trainer(weights, dtype="float32", stage=0, lora=None, lr=1e-2, **more):
        return open_tiny(
            model=model(tiny_folder, dtype, lora),
            teacher=teacher(weights),
            training=training(zero_stage=stage, **more),
            optimizer=OptimizerSpec(lr=lr),
        )

    return make_trainer


def differs(before, after):
    return (before - after).abs().max() > 0


@EVERY_FORM
def test_live_teacher_is_the_student(open_trainer, dtype, stage, lora):
    trainer = open_trainer(StudentWeights(), dtype, stage, lora)
    start = hidden_states(trainer, trainer.models.student)
    advance(trainer)
    assert_equal(
        hidden_states(trainer, trainer.models.teacher.weights), hidden_states(trainer, trainer.models.student)
    )
    assert differs(start, hidden_states(trainer, trainer.models.student))


@EVERY_FORM
def test_frozen_teacher_stays_the_start_model(open_trainer, dtype, stage, lora):
    trainer = open_trainer(FrozenWeights(), dtype, stage, lora)
    start = hidden_states(trainer, trainer.models.student)
    advance(trainer)
    assert_equal(hidden_states(trainer, trainer.models.teacher.weights), start)
    assert differs(start, hidden_states(trainer, trainer.models.student))


@EVERY_FORM
def test_average_teacher_follows_the_float32_masters(open_trainer, dtype, stage, lora):
    rate = 0.3
    trainer = open_trainer(EmaWeights(update_rate=rate), dtype, stage, lora)
    expected = masters(trainer)
    for _ in range(4):
        advance(trainer, 1)
        current = masters(trainer)
        expected = {name: value.lerp(current[name], rate) for name, value in expected.items()}
    assert trainer.models.teacher.shadow.keys() == expected.keys()
    for name, value in expected.items():
        assert trainer.models.teacher.shadow[name].dtype == torch.float32
        assert_equal(trainer.models.teacher.shadow[name], value)
        assert_equal(trainer.models.teacher.parameters[name], value.to(trainer.models.teacher.parameters[name].dtype))
    assert differs(
        hidden_states(trainer, trainer.models.teacher.weights), hidden_states(trainer, trainer.models.student)
    )


@EVERY_FORM
def test_rate_0_is_frozen_and_rate_1_is_live(open_trainer, dtype, stage, lora):
    frozen = open_trainer(EmaWeights(update_rate=0.0), dtype, stage, lora)
    start = hidden_states(frozen, frozen.models.student)
    advance(frozen)
    assert_equal(hidden_states(frozen, frozen.models.teacher.weights), start)
    live = open_trainer(EmaWeights(update_rate=1.0), dtype, stage, lora)
    advance(live)
    assert_equal(hidden_states(live, live.models.teacher.weights), hidden_states(live, live.models.student))


@EVERY_FORM
def test_only_the_student_is_trained(open_trainer, dtype, stage, lora):
    trainer = open_trainer(EmaWeights(update_rate=0.5), dtype, stage, lora)
    trainable = {n for n, p in trainer.models.student.model.named_parameters() if p.requires_grad}
    assert {n for n, _ in trainer.learner.masters()} == trainable
    teacher_tensors = {id(t) for t in trainer.models.teacher.parameters.values()}
    optimized = {id(p) for g in trainer.learner.zero.engine.basic_optimizer.param_groups for p in g["params"]}
    assert not teacher_tensors & ({id(p) for _, p in trainer.learner.zero.named} | optimized)
    assert not any(t.requires_grad for t in trainer.models.teacher.parameters.values())
    if lora:
        assert trainable == {n for n, _ in trainer.models.student.model.named_parameters() if ".default." in n}
    else:
        assert not any(p.requires_grad for p in trainer.models.teacher.weights.model.parameters())
        assert trainable == {n for n, _ in trainer.models.student.model.named_parameters()}


@EVERY_FORM
def test_skipped_step_changes_no_weights(open_trainer, dtype, stage, lora):
    trainer = open_trainer(EmaWeights(update_rate=0.5), dtype, stage, lora)
    before, start = masters(trainer), dict(trainer.models.teacher.state())
    _, parameter = trainer.learner.zero.named[0]
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    (result,) = advance(trainer, 1)
    hook.remove()
    assert not result.applied
    assert trainer.progress.optimizer_steps == 0
    for name, value in masters(trainer).items():
        assert_equal(value, before[name])
        assert_equal(trainer.models.teacher.shadow[name], start[name])
    (result,) = advance(trainer, 1)
    assert result.applied
    assert any(differs(value, before[name]) for name, value in masters(trainer).items())


@pytest.mark.parametrize(
    ("weights", "updates"),
    [
        (EmaWeights(update_rate=0.5, every="optimizer_step"), [1, 2, 3, 4]),
        (EmaWeights(update_rate=0.5, every="rollout_batch"), [2, 4]),
        (CopyWeights(every=2), [2, 4]),
        (CopyWeights(every=3), [3]),
        (FrozenWeights(), []),
    ],
)
def test_teacher_is_updated_at_its_interval(open_trainer, tmp_path, monkeypatch, weights, updates):
    from sdkit.runs import directory
    from sdkit.train import loop
    from sdkit.train.report import Report

    trainer = open_trainer(weights, steps=2, updates_per_rollout=2)
    calls = []
    if updates:
        follow = trainer.models.teacher._update_shadow
        monkeypatch.setattr(
            trainer.models.teacher,
            "_update_shadow",
            lambda *arguments: (
                calls.append((trainer.learner.zero.engine.global_steps, arguments[1])) or follow(*arguments)
            ),
        )
    run = directory.create(tmp_path / "run")
    loop.run(trainer, Report(run, silent_console(), trainer.setup))
    assert trainer.progress.optimizer_steps == 4
    rate = getattr(weights, "update_rate", 1.0)
    assert calls == [(update, rate) for update in updates]


@ONE_FORM
def test_copy_stays_until_its_next_renewal(open_trainer, lora):
    trainer = open_trainer(CopyWeights(every=2), lora=lora)
    advance(trainer, 2)
    renewed = hidden_states(trainer, trainer.models.student)
    assert_equal(hidden_states(trainer, trainer.models.teacher.weights), renewed)
    advance(trainer, 1)
    assert_equal(hidden_states(trainer, trainer.models.teacher.weights), renewed)
    assert differs(hidden_states(trainer, trainer.models.student), renewed)


def test_update_rate_can_be_scheduled(open_trainer):
    rate = Schedule(start=1.0, to=0.0, steps=2)
    trainer = open_trainer(EmaWeights(update_rate=rate))
    expected = masters(trainer)
    for share in (0.5, 0.0, 0.0):
        advance(trainer, 1)
        current = masters(trainer)
        expected = {name: value.lerp(current[name], share) for name, value in expected.items()}
    for name, value in expected.items():
        assert_equal(trainer.models.teacher.shadow[name], value)


def test_scheduled_scalar_values():
    linear, cosine = (Schedule(start=2.0, to=4.0, steps=4, shape=s) for s in ("linear", "cosine"))
    assert [scalar_at(linear, step) for step in (0, 1, 2, 4, 9)] == [2.0, 2.5, 3.0, 4.0, 4.0]
    assert scalar_at(cosine, 2) == pytest.approx(3.0)
    assert scalar_at(cosine, 1) == pytest.approx(3 - 2**-0.5)
    assert scalar_at(0.7, 5) == 0.7


def test_distance_is_relative_to_the_student(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.25))
    (result,) = advance(trainer, 1)
    current = masters(trainer)
    squared_distance = sum((trainer.models.teacher.shadow[n] - v).square().sum() for n, v in current.items())
    squared_norm = sum(v.square().sum() for v in current.values())
    assert result.metrics["teacher_distance"] == pytest.approx((squared_distance / squared_norm).sqrt().item())


def test_state_restores_an_average(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.5), "bfloat16", 1)
    advance(trainer, 2)
    state = {name: value.clone() for name, value in trainer.models.teacher.state().items()}
    expected = hidden_states(trainer, trainer.models.teacher.weights)
    advance(trainer, 1)
    assert differs(hidden_states(trainer, trainer.models.teacher.weights), expected)
    trainer.models.teacher.load_state(state)
    assert_equal(hidden_states(trainer, trainer.models.teacher.weights), expected)


def test_update_from_incomplete_masters_is_refused(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.5))
    some = list(trainer.learner.masters())[:-1]
    with pytest.raises(RuntimeError, match="teacher tensors were updated"):
        trainer.models.teacher.follow(lambda: iter(some), EmaWeights(update_rate=0.5), "optimizer_step", 1)


@pytest.mark.parametrize("weights", [EmaWeights(update_rate=0.3), CopyWeights(every=1)])
@pytest.mark.parametrize(("dtype", "stage"), PRECISIONS)
def test_adapter_teachers_leave_the_base_unchanged(open_trainer, weights, dtype, stage):
    trainer = open_trainer(weights, dtype, stage, LORA)
    base = {n: p.detach().clone() for n, p in trainer.models.student.model.named_parameters() if ".lora_" not in n}
    assert len(base) > 10
    advance(trainer)
    parameters = dict(trainer.models.student.model.named_parameters())
    for name, value in base.items():
        assert_equal(parameters[name].detach(), value)


def test_teacher_adapter_starts_as_the_students(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.3), lora=LORA)
    parameters = dict(trainer.models.student.model.named_parameters())
    students = {n: p for n, p in parameters.items() if ".default." in n}
    assert len(students) == 2 * 7 * 2  # two factors of seven projections of two layers
    for name, parameter in students.items():
        assert_equal(parameters[name.replace(".default.", ".teacher.")].detach(), parameter.detach())
    assert any(".lora_A." in name and differs(p, 0 * p) for name, p in students.items())


def adapter_states(weights):
    from peft.tuners.lora import LoraLayer

    layers = [m for m in weights.model.modules() if isinstance(m, LoraLayer)]
    return [(layer.active_adapters, layer.disable_adapters) for layer in layers]


def test_active_adapter_is_restored_after_the_block(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.3), lora=LORA)
    advance(trainer)
    outside = adapter_states(trainer.models.student)
    with Weights(trainer.models.student.model, None).active():
        assert adapter_states(trainer.models.student) == [(["default"], True)] * len(outside)
        with trainer.models.teacher.weights.active():
            assert adapter_states(trainer.models.student) == [(["teacher"], False)] * len(outside)
        assert adapter_states(trainer.models.student) == [(["default"], True)] * len(outside)
    assert adapter_states(trainer.models.student) == outside
    with pytest.raises(ZeroDivisionError), trainer.models.teacher.weights.active():
        _ = 1 / 0
    assert adapter_states(trainer.models.student) == outside
    assert all(p.requires_grad == (".default." in n) for n, p in trainer.models.student.model.named_parameters())


@pytest.mark.parametrize("owner", ["student", "teacher", "base"])
def test_merged_copy_matches_the_adapter(open_trainer, owner):
    from transformers import LlamaForCausalLM

    trainer = open_trainer(EmaWeights(update_rate=0.3), lora=LORA)
    advance(trainer)
    before = {n: p.detach().clone() for n, p in trainer.models.student.model.named_parameters()}
    weights = {
        "student": trainer.models.student,
        "teacher": trainer.models.teacher.weights,
        "base": Weights(trainer.models.student.model, None),
    }[owner]
    plain = LlamaForCausalLM(trainer.models.student.causal.config).eval()
    loading = plain.load_state_dict(dict(weights.named_tensors()), strict=False)
    assert loading.missing_keys == ["lm_head.weight"]  # tied
    assert not loading.unexpected_keys
    batch = rollouts_of(trainer)
    ids = torch.tensor([[*r.prompt_ids, *r.completion_ids][:20] for r in batch])
    with torch.no_grad(), weights.active() as causal:
        torch.testing.assert_close(plain(ids).logits, causal(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    for name, parameter in trainer.models.student.model.named_parameters():
        assert_equal(parameter.detach(), before[name])


def test_plain_model_streams_its_own_tensors(open_tiny):
    trainer = open_tiny()
    streamed = dict(trainer.models.student.named_tensors())
    for name, parameter in trainer.models.student.model.named_parameters():
        assert_equal(streamed.pop(name), parameter.detach())
    assert not streamed


@pytest.mark.parametrize("seed", [0, 1])
def test_adapters_are_initialized_from_the_runs_seed(open_trainer, seed):
    torch.manual_seed(5)
    first, *others = (open_trainer(FrozenWeights(), lora=LORA, seed=s) for s in (seed, seed, seed + 1))
    assert torch.initial_seed() == 5
    torch.testing.assert_close(masters(others[0]), masters(first), atol=0, rtol=0)
    assert any(differs(value, masters(first)[name]) for name, value in masters(others[1]).items())
