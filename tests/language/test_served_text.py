"""The text of `sdkit plan` for a served teacher, and which addresses are loopback addresses."""

import pytest

from sdkit.language.rules.served import is_loopback
from sdkit.language.specs import (
    DataSpec,
    Distillation,
    EvaluationSpec,
    ExperimentSpec,
    ForwardKl,
    FrozenWeights,
    InlineSource,
    ModelSpec,
    OptimizerSpec,
    RegexReward,
    ReverseKl,
    RoutedWeights,
    SampledTokenSupport,
    ServedWeights,
    ShapeSpec,
    Suite,
    Table,
    TeacherSpec,
    TopKSupport,
    TrainingSpec,
)
from sdkit.plan.accelerators import Machine
from sdkit.plan.plan import make_plan

SERVED = ServedWeights(url="http://127.0.0.1:8000", model="big")
ROWS = DataSpec(source=InlineSource(rows=(Table({"prompt": "one"}),)))
SHAPE = ShapeSpec(parameters=2**30, hidden_size=8, num_hidden_layers=1, vocab_size=16, max_position_embeddings=64)
ENTROPY = "the teacher's entropy is not measured: a server returns only the likeliest tokens"


def make_served_plan(weights, k, evaluation=None):
    term = Distillation(divergence=ReverseKl(), support=SampledTokenSupport())
    if k:
        top = TopKSupport(k=k, chosen_by="teacher", remainder="tail_bucket")
        term = Distillation(divergence=ForwardKl(), support=top)
    spec = ExperimentSpec(
        teacher=TeacherSpec(weights=weights),
        losses=Table({"distil": term}),
        model=ModelSpec(path="org/name"),
        data=ROWS,
        rewards=Table({"right": RegexReward(pattern=".")}),
        evaluation=evaluation,
        optimizer=OptimizerSpec(lr=1),
        training=TrainingSpec(steps=1, prompts_per_step=1),
    )
    return make_plan(spec, Machine(), SHAPE)


def teacher_lines(weights, k, **changes):
    return [line for line in make_served_plan(weights, k, **changes).derived if "teacher" in line]


def test_served_teacher_needs_no_memory():
    plan = make_served_plan(SERVED, 20)
    assert (
        "teacher: the model big served at http://127.0.0.1:8000, sees the student's prompt "
        "(no weights here, 8 requests at once)"
    ) in plan.roles
    assert [share.label for share in plan.memory.shares if share.label.startswith("teacher")] == []


def test_plan_names_what_each_server_returns():
    request = "each server is asked for the sampled token's log-probability"
    assert teacher_lines(SERVED, 20) == [f"{request} and for the teacher's 20 likeliest tokens", ENTROPY]
    assert teacher_lines(SERVED, 21)[0] == (
        f"{request} and for the teacher's 21 likeliest tokens, so it must be started with --max-logprobs 21 or more"
    )
    assert make_served_plan(SERVED, 0).derived[-2:] == (request, ENTROPY)


def test_other_routes_are_limited_to_the_same_top_k():
    routed = RoutedWeights(by="field", routes=Table({"a": SERVED, "b": FrozenWeights()}))
    assert teacher_lines(routed, 4)[-1] == ("the other routes' teachers are limited to their 4 likeliest tokens, too")
    assert "the other routes" not in teacher_lines(RoutedWeights(by="f", routes=Table({"a": SERVED})), 4)[-1]


def test_teacher_lift_is_not_measured():
    evaluation = EvaluationSpec(suites=Table({"held_out": Suite(data=ROWS, score="right")}))
    line = "evaluation.teacher_lift is not measured: a served teacher does not sample"
    assert line in teacher_lines(SERVED, 4, evaluation=evaluation)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("2130706433", False),
    ],
)
def test_loopback_addresses(host, expected):
    assert is_loopback(host) == expected
