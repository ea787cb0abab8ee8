"""Slots that speak of rollouts: successful siblings, feedback, the own attempt."""

import pytest

from sdkit.batches import Attempt, GroupOutcome
from sdkit.data.teacher_context import slot_values
from sdkit.language.specs import ColumnSlot, Feedback, OwnAttempt, SuccessfulSibling, Table, UserTurn


def attempts(*pairs):
    return tuple(Attempt(text=text, reward=reward, feedback=f"about {text}") for text, reward in pairs)


def seen(make_row, group, own=0, requires="any", seed=0, **slots):
    sees = UserTurn(template="{prompt}", slots=Table(slots), requires=requires)
    return slot_values(make_row("Q"), sees, GroupOutcome(group=group, own=own, seed=seed))


GROUP = attempts(("a", 0.0), ("b", 1.0), ("c", 2.0), ("d", 0.0))


def test_the_first_success_is_shown(make_row):
    assert seen(make_row, GROUP, s=SuccessfulSibling()) == {"s": "b"}


def test_nobody_sees_its_own_success(make_row):
    assert seen(make_row, GROUP, own=1, s=SuccessfulSibling()) == {"s": "c"}
    assert seen(make_row, GROUP, own=1, s=SuccessfulSibling(exclude_self=False)) == {"s": "b"}
    lone = attempts(("a", 0.0), ("b", 1.0))
    assert seen(make_row, lone, own=1, s=SuccessfulSibling()) is None


def test_the_order_of_the_group_decides_first_but_not_best(make_row):
    turned = tuple(reversed(GROUP))
    assert seen(make_row, turned, s=SuccessfulSibling()) == {"s": "c"}
    assert seen(make_row, turned, s=SuccessfulSibling(pick="best")) == {"s": "c"}
    assert seen(make_row, GROUP, s=SuccessfulSibling(pick="best")) == {"s": "c"}


def test_a_random_pick_depends_on_the_seed_alone(make_row):
    picks = [seen(make_row, GROUP, seed=i, s=SuccessfulSibling(pick="random"))["s"] for i in range(40)]
    again = [seen(make_row, GROUP, seed=i, s=SuccessfulSibling(pick="random"))["s"] for i in range(40)]
    assert picks == again
    assert set(picks) == {"b", "c"}


def test_a_group_of_failures_has_no_teacher(make_row):
    failures = attempts(("a", 0.0), ("b", 0.99))
    assert seen(make_row, failures, s=SuccessfulSibling()) is None
    assert seen(make_row, failures, s=SuccessfulSibling(threshold=0.5)) == {"s": "b"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>hm\nhm</think> 4", "4"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("hm</think>4", "4"),
        ("x <think>never closed", "x"),
        ("<think>never closed", None),
        ("hm</think>", None),
    ],
)
def test_thinking_is_stripped(make_row, text, left):
    group = attempts(("a", 0.0), (text, 1.0))
    assert seen(make_row, group, s=SuccessfulSibling()) == (left and {"s": left})
    assert seen(make_row, group, own=1, s=OwnAttempt()) == (left and {"s": left})
    kept = seen(make_row, group, s=SuccessfulSibling(strip_thinking=False))
    assert kept == {"s": text.strip()}


def test_an_answer_that_is_known_is_shown(make_row):
    group = (Attempt(text="hm", reward=1.0, answer=""), Attempt(text="hm 4", reward=1.0, answer="4"))
    assert seen(make_row, group, s=SuccessfulSibling()) == {"s": "4"}
    assert seen(make_row, group, own=1, s=SuccessfulSibling()) is None
    assert seen(make_row, group, s=OwnAttempt(strip_thinking=False)) == {"s": "hm"}


def test_feedback_is_the_own_one_and_gives_way_to_a_solution(make_row):
    always, otherwise = Feedback(), Feedback(when="no_solution")
    assert seen(make_row, GROUP, own=3, f=always) == {"f": "about d"}
    both = seen(make_row, GROUP, own=3, s=SuccessfulSibling(), f=otherwise)
    assert both == {"s": "b", "f": ""}
    failures = attempts(("a", 0.0), ("b", 0.0))
    assert seen(make_row, failures, own=1, s=SuccessfulSibling(), f=otherwise) == {"s": "", "f": "about b"}


def test_empty_feedback_is_none(make_row):
    silent = (Attempt(text="a", reward=0.0, feedback=" \n"), Attempt(text="b", reward=0.0))
    assert seen(make_row, silent, own=0, f=Feedback()) is None
    assert seen(make_row, silent, own=1, f=Feedback()) is None


def test_wrap_stands_around_a_value_only(make_row):
    wrapped = SuccessfulSibling(wrap="Solution: {value}!")
    other = ColumnSlot(name="hint", wrap="({value})")
    assert seen(make_row, GROUP, s=wrapped, h=other) == {"s": "Solution: b!", "h": ""}


def test_values_are_never_read_as_templates(make_row):
    group = attempts(("{prompt} {x}", 1.0), ("b", 0.0))
    found = seen(make_row, group, own=1, s=SuccessfulSibling(wrap="<{value}>"))
    assert found == {"s": "<{prompt} {x}>"}


def test_the_own_attempt(make_row):
    assert seen(make_row, GROUP, own=2, o=OwnAttempt()) == {"o": "c"}


def test_without_evidence_such_slots_are_empty(make_row):
    sees = UserTurn(template="{prompt}", slots=Table({"s": SuccessfulSibling()}), requires="any")
    assert slot_values(make_row("Q"), sees) is None
