"""What the teacher is: live, frozen, averaged or copied weights, with full fine-tuning and with adapters."""

import pytest
import torch
from tinyruns import LORA, PRECISIONS, advance, masters, model, rollouts_of, same, silent, states, teacher, training

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
    def opened(weights, dtype="float32", stage=0, lora=None, lr=1e-2, **more):
        return open_tiny(
            model=model(tiny_folder, dtype, lora),
            teacher=teacher(weights),
            training=training(zero_stage=stage, **more),
            optimizer=OptimizerSpec(lr=lr),
        )

    return opened


def moved(before, after):
    return (before - after).abs().max() > 0


@EVERY_FORM
def test_a_live_teacher_is_the_student(open_trainer, dtype, stage, lora):
    trainer = open_trainer(StudentWeights(), dtype, stage, lora)
    start = states(trainer, trainer.models.student)
    advance(trainer)
    same(states(trainer, trainer.models.teacher.weights), states(trainer, trainer.models.student))
    assert moved(start, states(trainer, trainer.models.student))


@EVERY_FORM
def test_a_frozen_teacher_stays_the_start_model(open_trainer, dtype, stage, lora):
    trainer = open_trainer(FrozenWeights(), dtype, stage, lora)
    start = states(trainer, trainer.models.student)
    advance(trainer)
    same(states(trainer, trainer.models.teacher.weights), start)
    assert moved(start, states(trainer, trainer.models.student))


@EVERY_FORM
def test_an_average_is_the_float32_average_of_the_masters(open_trainer, dtype, stage, lora):
    rate = 0.3
    trainer = open_trainer(EmaWeights(update_rate=rate), dtype, stage, lora)
    expected = masters(trainer)
    for _ in range(4):
        advance(trainer, 1)
        now = masters(trainer)
        expected = {name: value.lerp(now[name], rate) for name, value in expected.items()}
    assert trainer.models.teacher.shadow.keys() == expected.keys()
    for name, value in expected.items():
        assert trainer.models.teacher.shadow[name].dtype == torch.float32
        same(trainer.models.teacher.shadow[name], value)
        same(trainer.models.teacher.parameters[name], value.to(trainer.models.teacher.parameters[name].dtype))
    assert moved(states(trainer, trainer.models.teacher.weights), states(trainer, trainer.models.student))


@EVERY_FORM
def test_rate_0_is_frozen_and_rate_1_is_live(open_trainer, dtype, stage, lora):
    still = open_trainer(EmaWeights(update_rate=0.0), dtype, stage, lora)
    start = states(still, still.models.student)
    advance(still)
    same(states(still, still.models.teacher.weights), start)
    close = open_trainer(EmaWeights(update_rate=1.0), dtype, stage, lora)
    advance(close)
    same(states(close, close.models.teacher.weights), states(close, close.models.student))


@EVERY_FORM
def test_only_the_student_is_trained(open_trainer, dtype, stage, lora):
    trainer = open_trainer(EmaWeights(update_rate=0.5), dtype, stage, lora)
    asked = {n for n, p in trainer.models.student.model.named_parameters() if p.requires_grad}
    assert {n for n, _ in trainer.learner.masters()} == asked
    own = {id(t) for t in trainer.models.teacher.parameters.values()}
    optimized = {id(p) for g in trainer.learner.zero.engine.basic_optimizer.param_groups for p in g["params"]}
    assert not own & ({id(p) for _, p in trainer.learner.zero.named} | optimized)
    assert not any(t.requires_grad for t in trainer.models.teacher.parameters.values())
    if lora:
        assert asked == {n for n, _ in trainer.models.student.model.named_parameters() if ".default." in n}
    else:
        assert not any(p.requires_grad for p in trainer.models.teacher.weights.model.parameters())
        assert asked == {n for n, _ in trainer.models.student.model.named_parameters()}


@EVERY_FORM
def test_a_skipped_step_moves_nothing(open_trainer, dtype, stage, lora):
    trainer = open_trainer(EmaWeights(update_rate=0.5), dtype, stage, lora)
    before, start = masters(trainer), dict(trainer.models.teacher.state())
    _, parameter = trainer.learner.zero.named[0]
    spoiled = parameter.register_hook(lambda gradient: gradient * float("nan"))
    (measured,) = advance(trainer, 1)
    spoiled.remove()
    assert not measured.applied
    assert trainer.progress.optimizer_steps == 0
    for name, value in masters(trainer).items():
        same(value, before[name])
        same(trainer.models.teacher.shadow[name], start[name])
    (measured,) = advance(trainer, 1)
    assert measured.applied
    assert any(moved(value, before[name]) for name, value in masters(trainer).items())


@pytest.mark.parametrize(
    ("weights", "moves"),
    [
        (EmaWeights(update_rate=0.5, every="optimizer_step"), [1, 2, 3, 4]),
        (EmaWeights(update_rate=0.5, every="rollout_batch"), [2, 4]),
        (CopyWeights(every=2), [2, 4]),
        (CopyWeights(every=3), [3]),
        (FrozenWeights(), []),
    ],
)
def test_when_the_teacher_follows(open_trainer, tmp_path, monkeypatch, weights, moves):
    from sdkit.runs import directory
    from sdkit.train import loop
    from sdkit.train.report import Report

    trainer = open_trainer(weights, steps=2, updates_per_rollout=2)
    seen = []
    if moves:
        follow = trainer.models.teacher._update_shadow
        monkeypatch.setattr(
            trainer.models.teacher,
            "_update_shadow",
            lambda *given: seen.append((trainer.learner.zero.engine.global_steps, given[1])) or follow(*given),
        )
    run = directory.create(tmp_path / "run", tensorboard=False)
    loop.run(trainer, Report(run, silent(), trainer.setup))
    assert trainer.progress.optimizer_steps == 4
    rate = getattr(weights, "update_rate", 1.0)
    assert seen == [(update, rate) for update in moves]


@ONE_FORM
def test_a_copy_is_the_student_of_its_last_renewal(open_trainer, lora):
    trainer = open_trainer(CopyWeights(every=2), lora=lora)
    advance(trainer, 2)
    renewed = states(trainer, trainer.models.student)
    same(states(trainer, trainer.models.teacher.weights), renewed)
    advance(trainer, 1)
    same(states(trainer, trainer.models.teacher.weights), renewed)
    assert moved(states(trainer, trainer.models.student), renewed)


def test_a_schedule_moves_the_rate(open_trainer):
    rate = Schedule(start=1.0, to=0.0, steps=2)
    trainer = open_trainer(EmaWeights(update_rate=rate))
    expected = masters(trainer)
    for share in (0.5, 0.0, 0.0):
        advance(trainer, 1)
        now = masters(trainer)
        expected = {name: value.lerp(now[name], share) for name, value in expected.items()}
    for name, value in expected.items():
        same(trainer.models.teacher.shadow[name], value)


def test_a_scheduled_scalar():
    line, curve = (Schedule(start=2.0, to=4.0, steps=4, shape=s) for s in ("linear", "cosine"))
    assert [scalar_at(line, step) for step in (0, 1, 2, 4, 9)] == [2.0, 2.5, 3.0, 4.0, 4.0]
    assert scalar_at(curve, 2) == pytest.approx(3.0)
    assert scalar_at(curve, 1) == pytest.approx(3 - 2**-0.5)
    assert scalar_at(0.7, 5) == 0.7


def test_distance_is_relative_to_the_student(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.25))
    (measured,) = advance(trainer, 1)
    now = masters(trainer)
    apart = sum((trainer.models.teacher.shadow[n] - v).square().sum() for n, v in now.items())
    size = sum(v.square().sum() for v in now.values())
    assert measured.metrics["teacher_distance"] == pytest.approx((apart / size).sqrt().item())


def test_a_state_restores_an_average(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.5), "bfloat16", 1)
    advance(trainer, 2)
    kept = {name: value.clone() for name, value in trainer.models.teacher.state().items()}
    seen = states(trainer, trainer.models.teacher.weights)
    advance(trainer, 1)
    assert moved(states(trainer, trainer.models.teacher.weights), seen)
    trainer.models.teacher.load_state(kept)
    same(states(trainer, trainer.models.teacher.weights), seen)


def test_an_incomplete_walk_over_the_masters_is_refused(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.5))
    some = list(trainer.learner.masters())[:-1]
    with pytest.raises(RuntimeError, match="teacher tensors were updated"):
        trainer.models.teacher.follow(lambda: iter(some), EmaWeights(update_rate=0.5), "optimizer_step", 1)


@pytest.mark.parametrize("weights", [EmaWeights(update_rate=0.3), CopyWeights(every=1)])
@pytest.mark.parametrize(("dtype", "stage"), PRECISIONS)
def test_adapters_leave_the_base_alone(open_trainer, weights, dtype, stage):
    trainer = open_trainer(weights, dtype, stage, LORA)
    base = {n: p.detach().clone() for n, p in trainer.models.student.model.named_parameters() if ".lora_" not in n}
    assert len(base) > 10
    advance(trainer)
    parameters = dict(trainer.models.student.model.named_parameters())
    for name, value in base.items():
        same(parameters[name].detach(), value)


def test_the_second_adapter_starts_as_the_students(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.3), lora=LORA)
    parameters = dict(trainer.models.student.model.named_parameters())
    mine = {n: p for n, p in parameters.items() if ".default." in n}
    assert len(mine) == 2 * 7 * 2  # two factors of seven projections of two layers
    for name, parameter in mine.items():
        same(parameters[name.replace(".default.", ".teacher.")].detach(), parameter.detach())
    assert any(".lora_A." in name and moved(p, 0 * p) for name, p in mine.items())


def switches(weights):
    from peft.tuners.lora import LoraLayer

    layers = [m for m in weights.model.modules() if isinstance(m, LoraLayer)]
    return [(layer.active_adapters, layer.disable_adapters) for layer in layers]


def test_whose_weights_are_on_ends_with_the_block(open_trainer):
    trainer = open_trainer(EmaWeights(update_rate=0.3), lora=LORA)
    advance(trainer)
    outside = switches(trainer.models.student)
    with Weights(trainer.models.student.model, None).active():
        assert switches(trainer.models.student) == [(["default"], True)] * len(outside)
        with trainer.models.teacher.weights.active():
            assert switches(trainer.models.student) == [(["teacher"], False)] * len(outside)
        assert switches(trainer.models.student) == [(["default"], True)] * len(outside)
    assert switches(trainer.models.student) == outside
    with pytest.raises(ZeroDivisionError), trainer.models.teacher.weights.active():
        _ = 1 / 0
    assert switches(trainer.models.student) == outside
    assert all(p.requires_grad == (".default." in n) for n, p in trainer.models.student.model.named_parameters())


@pytest.mark.parametrize("whose", ["student", "teacher", "base"])
def test_a_merged_copy_says_what_the_adapter_says(open_trainer, whose):
    from transformers import LlamaForCausalLM

    trainer = open_trainer(EmaWeights(update_rate=0.3), lora=LORA)
    advance(trainer)
    before = {n: p.detach().clone() for n, p in trainer.models.student.model.named_parameters()}
    weights = {
        "student": trainer.models.student,
        "teacher": trainer.models.teacher.weights,
        "base": Weights(trainer.models.student.model, None),
    }[whose]
    plain = LlamaForCausalLM(trainer.models.student.causal.config).eval()
    found = plain.load_state_dict(dict(weights.named_tensors()), strict=False)
    assert found.missing_keys == ["lm_head.weight"]  # tied
    assert not found.unexpected_keys
    batch = rollouts_of(trainer)
    ids = torch.tensor([[*r.prompt_ids, *r.completion_ids][:20] for r in batch])
    with torch.no_grad(), weights.active() as causal:
        torch.testing.assert_close(plain(ids).logits, causal(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    for name, parameter in trainer.models.student.model.named_parameters():
        same(parameter.detach(), before[name])


def test_a_plain_model_streams_its_own_tensors(open_tiny):
    trainer = open_tiny()
    streamed = dict(trainer.models.student.named_tensors())
    for name, parameter in trainer.models.student.model.named_parameters():
        same(streamed.pop(name), parameter.detach())
    assert not streamed


@pytest.mark.parametrize("seed", [0, 1])
def test_adapters_are_drawn_from_the_runs_seed(open_trainer, seed):
    torch.manual_seed(5)
    first, *others = (open_trainer(FrozenWeights(), lora=LORA, seed=s) for s in (seed, seed, seed + 1))
    assert torch.initial_seed() == 5
    torch.testing.assert_close(masters(others[0]), masters(first), atol=0, rtol=0)
    assert any(moved(value, masters(first)[name]) for name, value in masters(others[1]).items())
