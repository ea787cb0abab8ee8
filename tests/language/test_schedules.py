"""Schedules anywhere in a spec are listed and resolved; nothing else changes."""

import pytest

from sdkit.language.introspection import is_spec, keys_of, members
from sdkit.language.schedules import at_step, half_cosine, scalar_at, schedules
from sdkit.language.specs import (
    AdvantageAdd,
    ClipSpec,
    Distillation,
    DivergenceClip,
    Jsd,
    PolicyGradient,
    PositionWeight,
    Schedule,
    Table,
    VocabularySupport,
    divergences,
    loss_parts,
    losses,
    teachers,
    token_weights,
)

MOVES = Schedule(start=0.2, to=0.6, steps=4)
LOSSES = Table(
    {
        "distil": Distillation(
            divergence=Jsd(teacher_share=MOVES),
            support=VocabularySupport(),
            clip=DivergenceClip(token=2.0, log_ratio=(-5.0, 5.0)),
            weight=PositionWeight(smallest=0.25, middle=MOVES, width=0.1),
        ),
        "policy": PolicyGradient(advantage=AdvantageAdd(group_weight=MOVES), clip=ClipSpec(low=0.2, high=0.3)),
    }
)


def test_every_schedule_is_listed_with_its_path():
    assert {path for path, _ in schedules(LOSSES)} == {
        ("distil", "divergence", "teacher_share"),
        ("distil", "weight", "middle"),
        ("policy", "advantage", "group_weight"),
    }


@pytest.mark.parametrize(("step", "value"), [(0, 0.2), (1, 0.3), (4, 0.6), (9, 0.6)])
def test_schedules_resolve_to_the_value_of_a_step(step, value):
    resolved = at_step(LOSSES, step)
    distil, policy = resolved["distil"], resolved["policy"]
    assert isinstance(distil, Distillation)
    assert isinstance(policy, PolicyGradient)
    assert distil.divergence.teacher_share == pytest.approx(value)
    assert distil.weight.middle == pytest.approx(value)
    assert policy.advantage.group_weight == pytest.approx(value)
    assert list(schedules(resolved)) == []
    assert distil.clip == LOSSES["distil"].clip
    assert policy.clip is LOSSES["policy"].clip


def test_every_number_of_losses_and_teachers_can_be_scheduled():
    """Except counts, and the reward threshold of a success, which belongs to the task."""
    modules = (loss_parts, losses, divergences, token_weights, teachers)
    fixed = {
        (cls.__name__, name)
        for module in modules
        for cls in vars(module).values()
        if is_spec(cls) and cls.__module__ == module.__name__
        for name, key in keys_of(cls).items()
        if float in members(key.type) and Schedule not in members(key.type)
    }
    assert fixed == {
        ("PassRateWeight", "threshold"),
        ("RouteSpec", "threshold"),
        ("ServedWeights", "request_seconds"),
        ("ServedWeights", "deadline_seconds"),
    }


def test_spec_without_schedules_is_returned_itself():
    constant = Table({"policy": PolicyGradient(advantage=AdvantageAdd())})
    assert at_step(constant, 3)["policy"] is constant["policy"]


def test_cosine_has_flat_ends():
    moves = Schedule(start=1.0, to=0.0, steps=10, shape="cosine")
    values = [scalar_at(moves, step) for step in range(11)]
    assert values[0] == 1
    assert values[5] == pytest.approx(0.5)
    assert values[10] == pytest.approx(0)
    assert values[0] - values[1] < values[4] - values[5]


def test_half_cosine_rises_or_falls():
    assert [half_cosine(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.5, 1])
    assert [half_cosine(p, falling=True) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
