"""The rows of a teacher whose context differs by turn: their number, tokens and passes in the plan."""

import pytest
from attrs import evolve
from tinyruns import make_spec, rollout, teacher, training

from sdkit.language.specs import Feedback, FrozenWeights, NextTurns, RetryEnvironment, ShapeSpec, Table, UserTurn
from sdkit.plan import memory
from sdkit.plan.machine import machine_for
from sdkit.plan.operations import shared_prompt_operations
from sdkit.plan.plan import make_plan
from sdkit.plan.teacher_rows import sampled_context_tokens, teacher_rows
from sdkit.plan.time import _scored_rows

SHAPE = ShapeSpec(
    parameters=10**6,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    vocab_size=500,
    max_position_embeddings=1024,
)
BY_TURN = UserTurn(
    template="{prompt} {f} {n}",
    slots=Table({"f": Feedback(of="turn"), "n": NextTurns(how_many=2)}),
    max_prompt_tokens=50,
)


@pytest.fixture
def spec():
    environment = RetryEnvironment(max_turns=4, max_observation_tokens=10, max_trajectory_tokens=400)
    return make_spec(
        "nowhere",
        environment=environment,
        teacher=teacher(FrozenWeights(), BY_TURN),
        rollout=rollout(max_new_tokens=100, max_prompt_tokens=20),
    )


def test_rows_have_the_prompt_and_all_turns_up_to_their_own(spec):
    views = teacher_rows(spec)
    # Turns of 100 tokens: 50 + 100, 50 + 200, 50 + 300, 50 + 400.
    assert (views.rows, views.longest, views.tokens, views.padded) == (4, 450, 1200, 1800)
    assert sampled_context_tokens(spec) == 100 + 2 * 10
    assert teacher_rows(evolve(spec, environment=None)) is None
    assert teacher_rows(evolve(spec, teacher=teacher(FrozenWeights()))) is None


@pytest.mark.parametrize(
    ("budget", "stage", "text"),
    [
        (8192, 0, "in one pass of 1800 tokens"),
        (1000, 0, "in 2 passes of at most 1000 tokens"),
        (1000, 3, "in one pass of 1800 tokens"),
    ],
)
def test_plan_says_what_the_rows_cost(spec, budget, stage, text):
    small = evolve(spec, training=training(micro_batch_tokens=budget, zero_stage=stage))
    (line,) = [role for role in make_plan(small, machine_for(small), None).roles if "one for each turn" in role]
    assert line == (
        "teacher's rows: one for each turn, up to 4 a trajectory, the longest of 450 tokens; together 1200, 2.7 times one "
        f"row of all turns, {text}"
    )


@pytest.mark.parametrize(("budget", "stage", "tokens"), [(8192, 0, 7200), (1000, 0, 1000), (1000, 3, 1800)])
def test_memory_of_a_pass_over_the_rows(spec, budget, stage, tokens):
    small = evolve(spec, training=training(micro_batch_tokens=budget, zero_stage=stage))  # 4 prompts in float32
    run = memory._Run(spec=small, stage=stage, ranks=1, shape=SHAPE)
    ((label, size),) = memory._teacher_items(run)
    assert label == f"one layer of a pass over {tokens} tokens of the teacher's rows"
    assert size == tokens * (12 * 64 + 12 * 128)
    assert memory._teacher_items(evolve(run, spec=evolve(small, environment=None))) == ()


def test_operations_of_rows(spec):
    by_turn = _scored_rows(spec, SHAPE, 3, 50, 400)
    alone = sum(shared_prompt_operations(SHAPE, 3, 50 + 100 * k, 3, 100) for k in range(4))
    assert by_turn == pytest.approx(alone)
    once = evolve(spec, teacher=teacher(FrozenWeights()))
    assert _scored_rows(once, SHAPE, 3, 50, 400) == shared_prompt_operations(SHAPE, 3, 50, 3, 400)
