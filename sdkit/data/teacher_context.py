"""What the teacher sees: the slots of its context filled, and the chat around them.  Knows nothing of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import assert_never

from sdkit.batches import Attempt, GroupOutcome, Message, Row
from sdkit.data.thinking import without_thinking
from sdkit.language.errors import BadData, nearest
from sdkit.language.specs import (
    AnswerStart,
    ColumnSlot,
    EarlierTurns,
    Feedback,
    OwnAttempt,
    Sees,
    Slot,
    SuccessfulSibling,
    SystemMessage,
    TextSlot,
    UserTurn,
    Verdict,
    Wording,
)
from sdkit.language.templates import Field, fill, parse

parsed = lru_cache(maxsize=256)(parse)


def slot_values(
    row: Row,
    sees: Sees,
    evidence: GroupOutcome | None = None,
    hidden: Callable[[str], str] = lambda text: text,
) -> dict[str, str] | None:
    """The text of every slot, "" where there is none; None where `requires` is not met.

    A text of the spec is always there, so `requires: any` asks for one of the others.  `hidden` is applied to the
    others, which rows and rollouts have written.
    """
    found = {name: _slot_value(slot, row, evidence) for name, slot in sees.slots.items()}
    for name, slot in sees.slots.items():
        if not isinstance(slot, Wording):
            found[name] = hidden(found[name])
    solved = any(
        found[name] for name, slot in sees.slots.items() if isinstance(slot, SuccessfulSibling)
    )
    for name, slot in sees.slots.items():
        if isinstance(slot, Feedback) and slot.when == "no_solution" and solved:
            found[name] = ""
    filled = [found[n] != "" for n, slot in sees.slots.items() if not isinstance(slot, Wording)]
    met = all(filled) if sees.requires == "all" else any(filled) or not filled
    if not met:
        return None
    return {name: _wrapped(slot, found[name]) for name, slot in sees.slots.items()}


def _slot_value(slot: Slot, row: Row, evidence: GroupOutcome | None) -> str:
    match slot:
        case ColumnSlot():
            return row.text(slot.name) or ""
        case TextSlot():
            return slot.text
        case SuccessfulSibling():
            return _sibling(slot, evidence) if evidence else ""
        case Feedback():
            return (evidence.group[evidence.own].feedback or "").strip() if evidence else ""
        case OwnAttempt():
            return _shown(evidence.group[evidence.own], slot.strip_thinking) if evidence else ""
        case Verdict(threshold=threshold, success=success, failure=failure):
            won = evidence and evidence.group[evidence.own].reward >= threshold
            return success if won else failure
        case _:
            assert_never(slot)


def _sibling(slot: SuccessfulSibling, evidence: GroupOutcome) -> str:
    """The successful completion that the teacher is shown (Hübotter 2026, §2: the first of the group)."""
    successes = [
        attempt
        for place, attempt in enumerate(evidence.group)
        if attempt.reward >= slot.threshold and not (slot.exclude_self and place == evidence.own)
    ]
    if not successes:
        return ""
    match slot.pick:
        case "first":
            chosen = successes[0]
        case "best":
            chosen = max(successes, key=lambda attempt: attempt.reward)
        case "random":
            chosen = random.Random(evidence.seed).choice(successes)
        case _:
            assert_never(slot.pick)
    return _shown(chosen, slot.strip_thinking)


def _shown(attempt: Attempt, strip_thinking: bool) -> str:
    if not strip_thinking:
        return attempt.text.strip()
    return without_thinking(attempt.text) if attempt.answer is None else attempt.answer


def _wrapped(slot: Slot, value: str) -> str:
    if isinstance(slot, Wording) or value == "":
        return value
    return fill(parsed(slot.wrap), lambda field: value if str(field) == "value" else f"{{{field}}}")


def teacher_messages(row: Row, sees: Sees, values: Mapping[str, str]) -> list[Message]:
    """The row's chat with the context in place; texts of rows and slots are inserted, never interpreted.

    Raises BadData where a template names what is neither a slot nor the prompt.
    """
    lookup = slot_lookup({**values, "prompt": row.prompt_text})
    system = [m for m in row.messages[:1] if m["role"] == "system"]
    rest = list(row.messages[len(system) :])
    match sees:
        case UserTurn():
            last = max(i for i, m in enumerate(rest) if m["role"] == "user")
            rest[last] = {"role": "user", "content": fill(parsed(sees.template), lookup)}
        case SystemMessage():
            own = [m["content"] for m in system]
            content = "\n\n".join([*own, fill(parsed(sees.template), lookup)])
            system = [{"role": "system", "content": content}]
        case EarlierTurns():
            for position, turn in enumerate(sees.turns):
                rest[2 * position : 2 * position] = [
                    {"role": "user", "content": fill(parsed(turn.user), lookup)},
                    {"role": "assistant", "content": fill(parsed(turn.assistant), lookup)},
                ]
        case AnswerStart():
            pass  # the chat is the row's; what begins the answer comes after it
        case _:
            assert_never(sees)
    return [*system, *rest]


def slot_lookup(values: Mapping[str, str]) -> Callable[[Field], str]:
    def look_up(field: Field) -> str:
        if str(field) not in values:
            like = nearest(str(field), values)
            raise BadData(
                f"a template of teacher.sees names {{{field}}}, which is not a slot",
                hint=f"did you mean {{{like}}}?" if like else None,
            )
        return values[str(field)]

    return look_up
