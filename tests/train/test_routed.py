"""A teacher for each value of a column: it scores its own rows, for any split into micro-batches."""

import pytest
import torch
from attrs import evolve
from tinyruns import (
    LORA,
    MINUS_GRADIENT,
    SEES_DEMONSTRATION,
    advance,
    assert_equal,
    evaluate_objective,
    hidden_states,
    lines,
    make_spec,
    masters,
    model,
    rollout,
    rollouts_of,
    rows,
    silent_console,
    train,
    train_step,
    training,
    with_evaluation,
)

from sdkit.language.errors import BadData
from sdkit.language.specs import (
    CopyWeights,
    DataSpec,
    EmaWeights,
    ExternalWeights,
    FrozenWeights,
    InlineSource,
    LogRatio,
    PolicyGradient,
    RoutedWeights,
    StudentWeights,
    Table,
    TeacherSpec,
)
from sdkit.train.smoke import smoke

COLUMNS = Table({n: n for n in ("prompt", "demonstration", "answer")} | {"domain": "domain"})
DOMAINS = ("math", "code", "math", "chat", "code", "math")


def routed_data(domains=DOMAINS, start=0):
    rows_with_domains = zip(rows(len(domains), start), domains, strict=True)
    return DataSpec(
        source=InlineSource(rows=tuple(Table({**row, "domain": d}) for row, d in rows_with_domains)), columns=COLUMNS
    )


def routed_teacher(**routes):
    return TeacherSpec(weights=RoutedWeights(by="domain", routes=Table(routes)), sees=SEES_DEMONSTRATION)


@pytest.fixture
def open_trainer(open_tiny, tiny_folder, other_folder):
    def make_trainer(routes=None, lora=None, **changes):
        routes = routes or {
            "math": FrozenWeights(),
            "code": ExternalWeights(path=str(other_folder), dtype="float32"),
            "chat": StudentWeights(),
        }
        parts = {"data": routed_data(), "training": training(prompts_per_step=6)}
        return open_tiny(
            make_spec(
                tiny_folder,
                **({"teacher": routed_teacher(**routes), "model": model(tiny_folder, lora=lora)} | parts | changes),
            )
        )

    return make_trainer


def plain_loss(trainer, batch):
    """Mean forward KL by a loop over rollouts, each against the model of its route."""
    leaves = dict(zip(("math", "code", "chat"), trainer.models.teacher.leaves, strict=True))
    total, tokens = 0.0, 0
    for r in batch:

        def logprobs(causal, prompt, r=r):
            ids = torch.tensor([[*prompt, *r.completion_ids]])
            return causal(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

        s = logprobs(trainer.models.student.causal, r.prompt_ids)
        teacher_weights = leaves[r.row.columns["domain"]].weights
        with torch.no_grad():
            t = logprobs(teacher_weights.causal, r.teacher_prompt_ids)
        total = total + (t.exp() * (t - s)).sum()
        tokens += len(r.completion_ids)
    return total / tokens


def gradient(trainer, batch):

    before = masters(trainer)
    assert train_step(trainer, batch).applied
    return {name: before[name] - value for name, value in masters(trainer).items()}


def test_each_row_is_scored_by_its_own_teacher(open_trainer):
    trainer = open_trainer(optimizer=MINUS_GRADIENT)
    batch = rollouts_of(trainer)
    assert sorted(r.teacher_route for r in batch) == [0, 0, 0, 1, 1, 2]
    expected = plain_loss(trainer, batch)
    named = dict(trainer.models.student.causal.named_parameters())
    slopes = dict(zip(named, torch.autograd.grad(expected, named.values()), strict=True))
    assert evaluate_objective(trainer, batch)["loss"] == pytest.approx(expected.item(), abs=1e-5)
    for name, value in gradient(trainer, batch).items():
        torch.testing.assert_close(value, slopes[name], atol=2e-5, rtol=1e-3)


def test_split_into_micro_batches_changes_nothing(open_trainer):
    groups = rollout(completions_per_prompt=3)
    results = []
    for budget, share in ((10**6, True), (10**6, False), (200, True), (90, False)):
        cut = training(prompts_per_step=6, micro_batch_tokens=budget, share_prompts=share)
        trainer = open_trainer(optimizer=MINUS_GRADIENT, rollout=groups, training=cut)
        batch = rollouts_of(trainer)
        results.append((evaluate_objective(trainer, batch)["loss"], gradient(trainer, batch)))
    for loss, slopes in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        for name, value in slopes.items():
            torch.testing.assert_close(value, results[0][1][name], atol=2e-5, rtol=1e-3)


def test_one_prompt_can_have_two_teachers(open_trainer):
    """Rollouts of the same prompt share a row of the forward pass, even with different routes."""
    twice = tuple(Table({**row, "domain": d}) for row in rows(3) for d in ("math", "code"))
    both_routes = DataSpec(source=InlineSource(rows=twice), columns=COLUMNS)
    trainer = open_trainer(data=both_routes)
    batch = rollouts_of(trainer)
    assert evaluate_objective(trainer, batch)["loss"] == pytest.approx(plain_loss(trainer, batch).item(), abs=1e-5)


def test_routes_to_one_model_equal_that_model(open_trainer, open_tiny, tiny_folder):
    same_teacher = dict.fromkeys(("math", "code", "chat"), FrozenWeights())
    trainer = open_trainer(same_teacher)
    assert len({id(leaf) for leaf in trainer.models.teacher.leaves}) == 1
    changes = {"data": routed_data(), "training": training(prompts_per_step=6)}
    plain = open_tiny(make_spec(tiny_folder, **changes))
    actual, expected = (advance(w, 2)[-1].metrics for w in (trainer, plain))
    assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_each_route_is_updated_at_its_own_rate(open_trainer, lora):
    routes = {"math": EmaWeights(update_rate=0.3), "code": CopyWeights(every=2), "chat": FrozenWeights()}
    trainer = open_trainer(routes, lora=lora)
    average, copied, frozen = trainer.models.teacher.leaves
    start = hidden_states(trainer, trainer.models.student)
    expected = masters(trainer)
    (first,) = advance(trainer, 1)
    current = masters(trainer)
    for name, value in expected.items():
        assert_equal(average.shadow[name], value.lerp(current[name], 0.3))
    assert_equal(hidden_states(trainer, copied.weights), start)
    assert_equal(hidden_states(trainer, frozen.weights), start)
    assert first.metrics["teacher_distance"] > 0
    advance(trainer, 1)
    assert_equal(hidden_states(trainer, copied.weights), hidden_states(trainer, trainer.models.student))
    assert_equal(hidden_states(trainer, frozen.weights), start)
    assert (hidden_states(trainer, average.weights) - hidden_states(trainer, trainer.models.student)).abs().max() > 0


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_state_restores_every_route(open_trainer, lora):
    routes = {"math": EmaWeights(update_rate=0.3), "code": EmaWeights(update_rate=0.9)}
    trainer = open_trainer(routes, lora=lora, data=routed_data(("math", "code") * 3))
    advance(trainer, 1)
    state = {name: t.clone() for name, t in trainer.models.teacher.state().items()}
    expected = [hidden_states(trainer, leaf.weights) for leaf in trainer.models.teacher.leaves]
    assert (expected[0] - expected[1]).abs().max() > 0
    advance(trainer, 1)
    trainer.models.teacher.load_state(state)
    for leaf, before in zip(trainer.models.teacher.leaves, expected, strict=True):
        assert_equal(hidden_states(trainer, leaf.weights), before)


def test_log_ratio_and_token_statistics_use_the_routes(open_trainer):
    terms = Table({"pull": PolicyGradient(advantage=LogRatio(center="sequence", floor=-9.0, below_floor="leave_out"))})
    trainer = open_trainer(losses=terms)
    batch = rollouts_of(trainer)
    leaves = trainer.models.teacher.leaves
    for r in batch:
        causal = leaves[r.teacher_route].weights.causal
        ids = torch.tensor([[*r.teacher_prompt_ids, *r.completion_ids]])
        with torch.no_grad():
            logprobs = causal(ids).logits[0, len(r.teacher_prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs[range(len(r.completion_ids)), r.completion_ids].tolist()
        assert r.token_statistics["teacher_logprobs"] == pytest.approx(expected, abs=1e-4)
    (result,) = advance(trainer, 1)
    assert result.metrics["grad_norm"] > 0


def test_row_without_a_route_is_named(open_trainer):
    domains = ("math", "code", "math", "poetry", "code", None)
    with pytest.raises(BadData) as caught:
        open_trainer(data=routed_data(domains))
    assert str(caught.value) == (
        "row 3: domain is 'poetry', which is not one of 'math', 'code', 'chat'\n"
        "row 5: domain is null, which is not one of 'math', 'code', 'chat'"
    )


def test_held_out_row_without_a_route_is_refused(open_trainer, tiny_folder):
    spec = with_evaluation(make_spec(tiny_folder))
    suites = {
        name: evolve(suite, data=routed_data(("math", "poetry"), 100))
        for name, suite in spec.evaluation.suites.items()
    }
    evaluation = evolve(spec.evaluation, suites=Table(suites))
    with pytest.raises(BadData, match="row 1: domain is 'poetry'"):
        open_trainer(evaluation=evaluation, rewards=spec.rewards)


def test_complete_run_with_evaluation(tiny_folder, other_folder, tmp_path, process_group):
    base = make_spec(
        tiny_folder,
        data=routed_data(),
        teacher=routed_teacher(math=EmaWeights(update_rate=0.1), code=FrozenWeights(), chat=StudentWeights()),
    )
    spec = with_evaluation(base)
    suites = {
        name: evolve(suite, data=routed_data(("math", "code", "chat"), 100 * (1 + i)))
        for i, (name, suite) in enumerate(spec.evaluation.suites.items())
    }
    spec = evolve(spec, evaluation=evolve(spec.evaluation, suites=Table(suites)))
    folder = train(spec, tmp_path / "run")
    assert any("eval/loss" in line for line in lines(folder / "metrics.jsonl"))


def test_smoke_runs_every_route(process_group, tiny_folder):
    spec = make_spec(
        tiny_folder,
        teacher=routed_teacher(math=ExternalWeights(path="org/never-there"), code=FrozenWeights()),
        data=routed_data(("math", "code")),
    )
    assert len(smoke(spec, silent_console())) == 2
