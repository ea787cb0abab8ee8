"""Every component describes itself and answers the questions of its union."""

import types
from typing import Any, Literal, get_args, get_origin

import pytest
from attrs import evolve

from sdkit.language.introspection import is_spec, keys_of, members
from sdkit.language.specs import (
    Advantage,
    Average,
    Blend,
    Component,
    Divergence,
    Environment,
    ExperimentSpec,
    GroupRelative,
    Keep,
    Loss,
    SampledBy,
    Schedule,
    Sees,
    Support,
    Table,
    TeacherWeights,
    Weight,
)

QUESTIONS: dict[Any, tuple[str, ...]] = {
    Divergence: ("has_entries", "zero_when_equal", "details"),
    Support: ("top_k", "zero_when_equal"),
    Average: (),
    Advantage: ("group_relative", "log_ratio", "zero_when_equal"),
    Weight: ("statistics", "reward_setting", "needs_group", "value_alone"),
    Blend: ("base", "partner_prompt", "sums_to_one", "starts_as_student", "factors", "changes_student"),
    TeacherWeights: ("is_stored", "is_other_model", "follows_student", "cannot_sample", "describe_place"),
    Sees: (),
    SampledBy: ("is_on_policy", "completion_column", "uses_teacher_weights", "uses_teacher_prompt"),
    Keep: ("needs_reward",),
    Environment: ("error_limit",),
    Loss: (
        "needs_teacher",
        "zero_when_equal",
        "uses_old_logprobs",
        "sampler_ratio",
        "masking_floor",
        "token_weight",
        "needs_teacher_prompt",
        "statistics",
    ),
}
KINDS = [(union, cls) for union in QUESTIONS for cls in members(union)]
IDS = [cls.__name__ for _, cls in KINDS]
NUMBERS = (0.5, 1, 64, 0.9, -1.0)


def smallest(tp):
    """An instance with values for the required keys only."""
    return tp(**{key.field: value_of(key.type, key.range) for key in keys_of(tp).values() if key.required})


def value_of(tp, range=None):
    tp = members(tp)[0]
    if is_spec(tp):
        return smallest(tp)
    if get_origin(tp) is Literal:
        return get_args(tp)[0]
    if get_origin(tp) is Table:
        return Table({"one": value_of(get_args(tp)[0])})
    if get_origin(tp) is tuple:
        return (value_of(get_args(tp)[0]),)
    if tp is str:
        return "word"
    return next(tp(n) for n in NUMBERS if range is None or range.accepts(tp(n)))


def description(union, component):
    return component.describe(1.0) if union == Loss else component.describe()


@pytest.mark.parametrize(("union", "cls"), KINDS, ids=IDS)
def test_component_describes_itself_in_one_line(union, cls):
    text = description(union, smallest(cls))
    assert text.strip() == text != ""
    assert not set("{}\n") & set(text)


@pytest.mark.parametrize(("union", "cls"), KINDS, ids=IDS)
def test_schedule_appears_in_the_description(union, cls):
    component = GroupRelative(scale="group_std") if cls is GroupRelative else smallest(cls)  # else eps is not used
    for key in keys_of(cls).values():
        if Schedule in members(key.type):
            end = next(float(n) for n in NUMBERS if key.range.accepts(n))
            moving = evolve(component, **{key.field: Schedule(start=end, to=end, steps=7)})
            assert f"{end:g} → {end:g} over 7 steps" in description(union, moving)


@pytest.mark.parametrize(("union", "cls"), KINDS, ids=IDS)
def test_component_answers_every_question(union, cls):
    component = smallest(cls)
    for question in QUESTIONS[union]:
        answer = getattr(component, question)
        if isinstance(answer, types.MethodType):
            answer(*(False,) * (question == "describe_place"))


def test_every_component_is_tested():
    reached = set()

    def visit(tp):
        for part in members(tp):
            if is_spec(part) and part not in reached:
                reached.add(part)
                for key in keys_of(part).values():
                    visit(key.type)
            for inner in get_args(part):
                visit(inner)

    visit(ExperimentSpec)
    components = {cls for cls in reached if issubclass(cls, Component)}
    assert components == {cls for union, cls in KINDS if union != Loss}
