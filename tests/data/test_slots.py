"""Slots filled from rollouts: successful siblings, feedback, the rollout's own attempt."""

import pytest

from sdkit.batches import Attempt, GroupOutcome
from sdkit.data.teacher_context import slot_values
from sdkit.language.specs import ColumnSlot, Feedback, OwnAttempt, SuccessfulSibling, Table, UserTurn


def attempts(*pairs):
    return tuple(Attempt(text=text, reward=reward, feedback=f"about {text}") for text, reward in pairs)


def slots_of(make_row, group, own=0, requires="any", seed=0, **slots):
    sees = UserTurn(template="{prompt}", slots=Table(slots), requires=requires)
    return slot_values(make_row("Q"), sees, GroupOutcome(group=group, own=own, seed=seed))


GROUP = attempts(("a", 0.0), ("b", 1.0), ("c", 2.0), ("d", 0.0))


def test_first_success_is_shown(make_row):
    assert slots_of(make_row, GROUP, s=SuccessfulSibling()) == {"s": "b"}


def test_own_success_is_not_shown(make_row):
    assert slots_of(make_row, GROUP, own=1, s=SuccessfulSibling()) == {"s": "c"}
    assert slots_of(make_row, GROUP, own=1, s=SuccessfulSibling(exclude_self=False)) == {"s": "b"}
    one_success = attempts(("a", 0.0), ("b", 1.0))
    assert slots_of(make_row, one_success, own=1, s=SuccessfulSibling()) is None


def test_group_order_decides_for_first_but_not_for_best(make_row):
    reversed_group = tuple(reversed(GROUP))
    assert slots_of(make_row, reversed_group, s=SuccessfulSibling()) == {"s": "c"}
    assert slots_of(make_row, reversed_group, s=SuccessfulSibling(pick="best")) == {"s": "c"}
    assert slots_of(make_row, GROUP, s=SuccessfulSibling(pick="best")) == {"s": "c"}


def test_random_pick_depends_only_on_the_seed(make_row):
    picks = [slots_of(make_row, GROUP, seed=i, s=SuccessfulSibling(pick="random"))["s"] for i in range(40)]
    again = [slots_of(make_row, GROUP, seed=i, s=SuccessfulSibling(pick="random"))["s"] for i in range(40)]
    assert picks == again
    assert set(picks) == {"b", "c"}


def test_group_without_success_has_no_teacher_prompt(make_row):
    failures = attempts(("a", 0.0), ("b", 0.99))
    assert slots_of(make_row, failures, s=SuccessfulSibling()) is None
    assert slots_of(make_row, failures, s=SuccessfulSibling(threshold=0.5)) == {"s": "b"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>hm\nhm</think> 4", "4"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("hm</think>4", "4"),
        ("x <think>never closed", "x"),
        ("<think>never closed", None),
        ("hm</think>", None),
    ],
)
def test_thinking_is_stripped(make_row, text, answer):
    group = attempts(("a", 0.0), (text, 1.0))
    assert slots_of(make_row, group, s=SuccessfulSibling()) == (answer and {"s": answer})
    assert slots_of(make_row, group, own=1, s=OwnAttempt()) == (answer and {"s": answer})
    unstripped = slots_of(make_row, group, s=SuccessfulSibling(strip_thinking=False))
    assert unstripped == {"s": text.strip()}


def test_known_answer_is_shown(make_row):
    group = (Attempt(text="hm", reward=1.0, answer=""), Attempt(text="hm 4", reward=1.0, answer="4"))
    assert slots_of(make_row, group, s=SuccessfulSibling()) == {"s": "4"}
    assert slots_of(make_row, group, own=1, s=SuccessfulSibling()) is None
    assert slots_of(make_row, group, s=OwnAttempt(strip_thinking=False)) == {"s": "hm"}


def test_feedback_is_the_rollouts_own_and_yields_to_a_solution(make_row):
    always, otherwise = Feedback(), Feedback(when="no_solution")
    assert slots_of(make_row, GROUP, own=3, f=always) == {"f": "about d"}
    both = slots_of(make_row, GROUP, own=3, s=SuccessfulSibling(), f=otherwise)
    assert both == {"s": "b", "f": ""}
    failures = attempts(("a", 0.0), ("b", 0.0))
    assert slots_of(make_row, failures, own=1, s=SuccessfulSibling(), f=otherwise) == {"s": "", "f": "about b"}


def test_empty_feedback_counts_as_none(make_row):
    without_feedback = (Attempt(text="a", reward=0.0, feedback=" \n"), Attempt(text="b", reward=0.0))
    assert slots_of(make_row, without_feedback, own=0, f=Feedback()) is None
    assert slots_of(make_row, without_feedback, own=1, f=Feedback()) is None


def test_wrap_applies_only_to_a_value(make_row):
    wrapped = SuccessfulSibling(wrap="Solution: {value}!")
    other = ColumnSlot(name="hint", wrap="({value})")
    assert slots_of(make_row, GROUP, s=wrapped, h=other) == {"s": "Solution: b!", "h": ""}


def test_values_are_not_read_as_templates(make_row):
    group = attempts(("{prompt} {x}", 1.0), ("b", 0.0))
    values = slots_of(make_row, group, own=1, s=SuccessfulSibling(wrap="<{value}>"))
    assert values == {"s": "<{prompt} {x}>"}


def test_own_attempt_is_shown(make_row):
    assert slots_of(make_row, GROUP, own=2, o=OwnAttempt()) == {"o": "c"}


def test_rollout_slots_are_empty_without_rollouts(make_row):
    sees = UserTurn(template="{prompt}", slots=Table({"s": SuccessfulSibling()}), requires="any")
    assert slot_values(make_row("Q"), sees) is None
