"""Blended teachers on the tiny model: scores by hand, gradients, schedules, routes, shared and refused models."""

import pytest
import torch
from attrs import evolve
from tinyruns import (
    COLUMNS,
    LORA,
    MINUS_GRADIENT,
    advance,
    assert_equal,
    distil,
    evaluate_objective,
    hidden_states,
    lines,
    make_spec,
    masters,
    model,
    resize_model,
    rollouts_of,
    rows,
    score_teacher,
    silent_console,
    teacher,
    train,
    train_step,
    training,
    with_evaluation,
)

from sdkit.batches import BlendedScores, HiddenStateScores
from sdkit.language.errors import BadData
from sdkit.language.specs import (
    DataSpec,
    EmaWeights,
    ExternalWeights,
    ExtrapolateBlend,
    FrozenWeights,
    GeometricBlend,
    InlineSource,
    LogRatio,
    OptimizerSpec,
    PolicyGradient,
    ProductBlend,
    ReferenceKl,
    RoutedWeights,
    Schedule,
    StudentWeights,
    Table,
    TrustRegionBlend,
)
from sdkit.losses.scores import logits as logits_of
from sdkit.train.collate import collate_completions
from sdkit.train.smoke import smoke

BLENDS = {
    "trust region": TrustRegionBlend(student_share=0.3),
    "product": ProductBlend(student_power=0.8),
    "geometric": GeometricBlend(teacher_share=0.6),
    "extrapolate": ExtrapolateBlend(factor=1.25),
}
EVERY_BLEND = pytest.mark.parametrize("blend", BLENDS.values(), ids=BLENDS)
BOTH_FORMS = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture
def open_trainer(open_tiny, tiny_folder):
    """Opens a trainer whose student differs from the start model, so that no two parts of a blend are equal."""

    def make_trainer(blend, weights=None, lora=None, noise=0.05, **changes):
        teacher_spec = evolve(teacher(weights or EmaWeights(update_rate=0.1)), blend=blend)
        parts = {"model": model(tiny_folder, lora=lora), "optimizer": MINUS_GRADIENT}
        trainer = open_tiny(make_spec(tiny_folder, **(parts | {"teacher": teacher_spec} | changes)))
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, p in trainer.learner.zero.named:
                p.add_(noise * torch.randn(p.shape, generator=draw))
        return trainer

    return make_trainer


def plain_logits(weights, prompt, completion, ids=None):
    """Logits of these weights at each completion token of one sequence.  -> [T, V]"""
    with weights.active() as causal:
        logits = causal(torch.tensor([[*prompt, *completion]])).logits
    return logits[0, len(prompt) - 1 : -1, :ids]


def blend_logits(trainer, blend, r, base=None):
    """The blend's logits at each completion token of a rollout."""
    prompt, teacher_prompt = r.prompt_ids, r.teacher_prompt_ids
    completion, ids = r.completion_ids, trainer.models.compared_ids
    with torch.no_grad():
        t = plain_logits(trainer.models.teacher.leaves[r.teacher_route].weights, teacher_prompt, completion, ids)
        match blend:
            case TrustRegionBlend(student_share=c):
                return (1 - c) * t + c * plain_logits(trainer.models.student, teacher_prompt, completion, ids)
            case ProductBlend(student_power=b):
                return t + b * plain_logits(trainer.models.student, prompt, completion, ids)
            case GeometricBlend(teacher_share=w):
                start = plain_logits(trainer.models.reference.weights, prompt, completion, ids)
                return (1 - w) * start + w * t
            case ExtrapolateBlend(factor=f):
                start = plain_logits(base or trainer.models.reference.weights, prompt, completion, ids)
                return f * t + (1 - f) * start


def plain_loss(trainer, blend, batch, base=None):
    """Mean forward KL to the blend, by a loop over rollouts."""
    total, tokens = 0.0, 0
    for r in batch:
        s = plain_logits(
            trainer.models.student, r.prompt_ids, r.completion_ids, trainer.models.compared_ids
        ).log_softmax(-1)
        q = blend_logits(trainer, blend, r, base).log_softmax(-1)
        total = total + (q.exp() * (q - s)).sum()
        tokens += len(r.completion_ids)
    return total / tokens


def assert_step_matches_loop(trainer, blend, base=None):
    """Asserts that value and gradient of a step are those of the loop."""
    batch = rollouts_of(trainer)
    expected = plain_loss(trainer, blend, batch, base)
    named = dict(trainer.learner.zero.named)
    slopes = torch.autograd.grad(expected, named.values())
    assert evaluate_objective(trainer, batch)["loss"] == pytest.approx(expected.item(), abs=2e-5)
    before = {name: p.detach().clone() for name, p in named.items()}
    assert train_step(trainer, batch).applied
    assert max(slope.abs().max() for slope in slopes) > 1e-3
    for (name, p), slope in zip(named.items(), slopes, strict=True):
        torch.testing.assert_close(before[name] - p.detach(), slope, atol=5e-5, rtol=2e-3)


def one_micro_batch(trainer):
    """The rollouts of a batch, and one micro-batch with all their completion tokens."""
    rollouts = list(rollouts_of(trainer))
    ((order, batch),) = collate_completions(rollouts, 10**6, trainer.models.device, 0, teacher=True)
    return order, batch


@BOTH_FORMS
@EVERY_BLEND
def test_value_and_gradient_match_the_blend_by_hand(open_trainer, blend, lora):
    trainer = open_trainer(blend, lora=lora)
    start = None if trainer.models.reference is None else hidden_states(trainer, trainer.models.reference.weights)
    assert_step_matches_loop(trainer, blend)
    if start is not None:
        assert_equal(hidden_states(trainer, trainer.models.reference.weights), start)
        assert (hidden_states(trainer, trainer.models.student) - start).abs().max() > 1e-3
    if lora and trainer.models.reference:
        assert trainer.models.reference.weights.model is trainer.models.student.model


@pytest.mark.parametrize("padded", [False, True], ids=["equal heads", "padded heads"])
def test_base_can_be_another_model(open_trainer, tiny_folder, other_folder, tmp_path, padded):
    base = resize_model(other_folder, tmp_path / "base", 420) if padded else other_folder
    blend = ExtrapolateBlend(factor=1.5, base=ExternalWeights(path=str(base), dtype="float32"))
    trainer = open_trainer(blend, FrozenWeights())
    assert trainer.models.reference is None
    assert trainer.models.compared_ids == 404
    assert trainer.models.ids_below == (404 if padded else None)
    assert_step_matches_loop(trainer, blend, trainer.models.blend_partner.weights)
    assert not any(p.requires_grad for p in trainer.models.blend_partner.weights.model.parameters())


def test_base_that_also_teaches_is_loaded_once(open_trainer, other_folder):
    other = ExternalWeights(path=str(other_folder), dtype="float32")
    routed = RoutedWeights(by="answer", routes=Table({str(2 * i): other for i in range(6)}))
    trainer = open_trainer(ExtrapolateBlend(factor=1.25, base=other), routed)
    assert trainer.models.blend_partner is trainer.models.teacher.leaves[0]


@EVERY_BLEND
def test_every_route_is_blended(open_trainer, other_folder, blend):
    weights = RoutedWeights(
        by="domain",
        routes=Table(
            {
                "math": FrozenWeights(),
                "code": ExternalWeights(path=str(other_folder), dtype="float32"),
                "chat": StudentWeights(),
            }
        ),
    )
    domains = ("math", "code", "math", "chat", "code", "math")
    rows_with_domains = zip(rows(6), domains, strict=True)
    source = InlineSource(rows=tuple(Table({**row, "domain": d}) for row, d in rows_with_domains))
    columns = Table({**COLUMNS, "domain": "domain"})
    trainer = open_trainer(
        blend, weights, data=DataSpec(source=source, columns=columns), training=training(prompts_per_step=6)
    )
    assert_step_matches_loop(trainer, blend)


@EVERY_BLEND
def test_token_statistics_and_advantages_use_the_blend(open_trainer, blend):
    pull = PolicyGradient(advantage=LogRatio(center="sequence", floor=-9.0, below_floor="leave_out"))
    trainer = open_trainer(blend, losses=Table({"pull": pull}))
    batch = rollouts_of(trainer)
    for r in batch:
        logprobs = blend_logits(trainer, blend, r).log_softmax(-1)
        expected = logprobs[range(len(r.completion_ids)), r.completion_ids].tolist()
        assert r.token_statistics["teacher_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert train_step(trainer, batch).metrics["grad_norm"] > 0


def test_scheduled_share_has_the_value_of_the_optimizer_step(open_trainer):
    """student_share is 0, then ½, then 1, which leaves nothing of the teacher."""
    trainer = open_trainer(
        TrustRegionBlend(student_share=Schedule(start=0, to=1, steps=2)), training=training(steps=4)
    )
    _, batch = one_micro_batch(trainer)
    at_zero = [score_teacher(trainer, batch)]
    assert isinstance(at_zero[0], HiddenStateScores)
    assert_equal(at_zero[0].hidden, trainer.models.teacher.weights.hidden(batch.teacher))
    (result,) = advance(trainer, 1)
    assert result.metrics["teacher/blend/student_share"] == 0.0
    order, batch = one_micro_batch(trainer)
    at_half = score_teacher(trainer, batch)
    assert isinstance(at_half, BlendedScores)
    assert at_half.factors == (0.5, 0.5)
    half_blend = TrustRegionBlend(student_share=0.5)
    expected = torch.cat([blend_logits(trainer, half_blend, r) for r in order])
    torch.testing.assert_close(logits_of(at_half, slice(None)), expected, atol=1e-4, rtol=1e-4)
    advance(trainer, 2)
    _, batch = one_micro_batch(trainer)
    at_one = score_teacher(trainer, batch)
    assert isinstance(at_one, HiddenStateScores)
    with torch.no_grad():
        assert_equal(at_one.hidden, trainer.models.student.hidden(batch.teacher))


@pytest.mark.parametrize(
    "blend",
    [
        TrustRegionBlend(student_share=0.0),
        ProductBlend(student_power=0.0),
        GeometricBlend(teacher_share=1.0),
        ExtrapolateBlend(factor=1.0),
    ],
    ids=BLENDS,
)
def test_blend_at_its_limit_is_the_teacher(open_trainer, blend):
    trainer, plain = open_trainer(blend), open_trainer(None)
    limit, expected = (w for w in (trainer, plain))
    assert_equal(*(score_teacher(w, one_micro_batch(w)[1]).hidden for w in (limit, expected)))
    assert_step_matches_loop(trainer, TrustRegionBlend(student_share=0.0))


def test_start_model_is_evaluated_once_for_a_term_and_a_blend(open_trainer):
    losses = Table({**distil(), "stay": ReferenceKl(estimator="vocabulary", coefficient=0.1)})
    trainer = open_trainer(GeometricBlend(teacher_share=0.5), losses=losses)
    assert trainer.models.blend_partner is trainer.models.reference
    _, batch = one_micro_batch(trainer)
    reference = trainer.learner.scorer.score_reference(batch)
    assert score_teacher(trainer, batch, reference).parts[1] is reference
    metrics = evaluate_objective(trainer, rollouts_of(trainer))
    assert metrics["stay/reference_kl"] > 0


def test_reference_of_a_blend_is_not_used_by_terms(open_trainer):
    trainer = open_trainer(GeometricBlend(teacher_share=0.5))
    assert trainer.models.reference is not None
    assert trainer.learner.scorer.score_reference(one_micro_batch(trainer)[1]) is None


def test_frozen_teacher_is_the_start_model_of_its_blend(open_trainer):
    trainer = open_trainer(GeometricBlend(teacher_share=0.5), FrozenWeights())
    assert trainer.models.blend_partner is trainer.models.reference is trainer.models.teacher
    assert_step_matches_loop(trainer, GeometricBlend(teacher_share=0.5))


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 2), ("bfloat16", 1)])
@pytest.mark.parametrize("blend", [BLENDS["trust region"], BLENDS["product"]], ids=["seen", "own"])
def test_live_student_is_a_partner_under_zero(open_trainer, tiny_folder, blend, dtype, stage):
    trainer = open_trainer(
        blend,
        model=model(tiny_folder, dtype),
        training=training(zero_stage=stage),
        optimizer=OptimizerSpec(lr=1e-3),
        noise=0.0,
    )
    before = masters(trainer)
    assert all(m.applied and m.metrics["grad_norm"] > 0 for m in advance(trainer, 2))
    assert any((value - before[name]).abs().max() > 0 for name, value in masters(trainer).items())


def test_base_with_another_vocabulary_is_refused(open_trainer, other_folder, tmp_path):
    from transformers import AutoTokenizer

    other_vocabulary = tmp_path / "odd"
    resize_model(other_folder, other_vocabulary, 405)
    tokenizer = AutoTokenizer.from_pretrained(other_vocabulary)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other_vocabulary)
    blend = ExtrapolateBlend(factor=1.25, base=ExternalWeights(path=str(other_vocabulary)))
    with pytest.raises(BadData, match="has another vocabulary than the student"):
        open_trainer(blend)


def test_base_without_rows_for_every_token_is_refused(open_trainer, other_folder, tmp_path):
    small = resize_model(other_folder, tmp_path / "small", 403)
    blend = ExtrapolateBlend(factor=1.25, base=ExternalWeights(path=str(small)))
    with pytest.raises(BadData, match="the base of the blend has 403 output rows for 404"):
        open_trainer(blend)


def test_complete_run_samples_the_teacher_lift_without_the_blend(tiny_folder, other_folder, tmp_path, process_group):
    base = ExternalWeights(path=str(other_folder))
    teacher_spec = evolve(
        teacher(FrozenWeights()), blend=ExtrapolateBlend(factor=Schedule(start=1, to=1.5, steps=2), base=base)
    )
    folder = train(with_evaluation(make_spec(tiny_folder, teacher=teacher_spec)), tmp_path / "run")
    trained = [x for x in lines(folder / "metrics.jsonl") if "grad_norm" in x]
    assert [x["teacher/blend/factor"] for x in trained] == [1.0, 1.25, 1.5]
    assert any("eval/loss" in x for x in lines(folder / "metrics.jsonl"))


@pytest.mark.parametrize(
    "blend",
    [
        TrustRegionBlend(student_share=0.01),
        ProductBlend(student_power=Schedule(start=0.8, to=0, steps=1000)),
        GeometricBlend(teacher_share=0.5),
        ExtrapolateBlend(factor=1.25, base=ExternalWeights(path="org/never-there", revision="main")),
    ],
    ids=BLENDS,
)
def test_smoke_runs_every_blend(process_group, tiny_folder, blend):
    weights = ExternalWeights(path="org/not-there-either")
    spec = make_spec(tiny_folder, teacher=evolve(teacher(weights), blend=blend))
    assert len(smoke(spec, silent_console())) == 2
