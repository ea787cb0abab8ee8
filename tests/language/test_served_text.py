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


def planned(weights, k, evaluation=None):
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


def told(weights, k, **given):
    return [line for line in planned(weights, k, **given).derived if "teacher" in line]


def test_its_role_costs_no_memory():
    plan = planned(SERVED, 20)
    assert (
        "teacher: the model big served at http://127.0.0.1:8000, sees the student's prompt "
        "(no weights here, 8 requests at once)"
    ) in plan.roles
    assert [share.label for share in plan.memory if share.label.startswith("teacher")] == []


def test_what_each_server_is_asked_for():
    asked = "each server is asked for the sampled token's log-probability"
    assert told(SERVED, 20) == [f"{asked} and for the teacher's 20 likeliest tokens", ENTROPY]
    assert told(SERVED, 21)[0] == (
        f"{asked} and for the teacher's 21 likeliest tokens, so it must be started with --max-logprobs 21 or more"
    )
    assert planned(SERVED, 0).derived[-2:] == (asked, ENTROPY)


def test_other_routes_tell_as_little():
    routed = RoutedWeights(by="field", routes=Table({"a": SERVED, "b": FrozenWeights()}))
    assert told(routed, 4)[-1] == ("the other routes' teachers are limited to their 4 likeliest tokens, too")
    assert "the other routes" not in told(RoutedWeights(by="f", routes=Table({"a": SERVED})), 4)[-1]


def test_the_lift_is_not_measured():
    evaluation = EvaluationSpec(suites=Table({"held_out": Suite(data=ROWS, score="right")}))
    line = "evaluation.teacher_lift is not measured: a served teacher does not sample"
    assert line in told(SERVED, 4, evaluation=evaluation)


@pytest.mark.parametrize(
    ("host", "here"),
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
def test_this_machine(host, here):
    assert is_loopback(host) == here
