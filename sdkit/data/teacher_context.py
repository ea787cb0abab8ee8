"""The teacher's context: fills its slots and builds the chat around them.  Knows nothing of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import assert_never

from sdkit.batches import Attempt, GroupOutcome, Message, Row, TurnOutcome
from sdkit.data.thinking import without_thinking
from sdkit.data.written import written_text
from sdkit.language import specs
from sdkit.language.errors import BadData, nearest
from sdkit.language.templates import Field, fill, parse

parsed = lru_cache(maxsize=256)(parse)


def slot_values(
    row: Row,
    sees: specs.Sees,
    evidence: GroupOutcome | None = None,
    turn: TurnOutcome | None = None,
    hide: Callable[[specs.Slot, str], str] = lambda slot, text: text,
) -> dict[str, str] | None:
    """Returns the text of every slot ("" if it is empty), or None if `requires` is not met.

    A slot whose text is in the spec is never empty, so `requires: any` asks for one of the others.  `hide` is applied to
    the others, whose text comes from rows and rollouts.  `turn` fills the slots that differ by turn, and what was written.
    """
    texts = _slot_texts(row, sees.slots, evidence, turn)
    for name, slot in sees.slots.items():
        if not isinstance(slot, specs.Wording):
            texts[name] = hide(slot, texts[name])
    filled = [texts[n] != "" for n, slot in sees.slots.items() if not isinstance(slot, specs.Wording)]
    met = all(filled) if sees.requires == "all" else any(filled) or not filled
    if not met:
        return None
    return {name: _wrap(slot, texts[name]) for name, slot in sees.slots.items()}


def writer_question(row: Row, writer: specs.Writer, evidence: GroupOutcome | None, trajectory: str) -> str:
    """Returns the question to a context's writer about a rollout, whose turns `trajectory` has as text."""
    texts = _slot_texts(row, writer.slots, evidence, None)
    values = {name: _wrap(slot, texts[name]) for name, slot in writer.slots.items()}
    values |= {"prompt": row.prompt_text, "trajectory": trajectory}
    return fill(parsed(writer.prompt), slot_lookup(values))


def _slot_texts(
    row: Row, slots: Mapping[str, specs.Slot], evidence: GroupOutcome | None, turn: TurnOutcome | None
) -> dict[str, str]:
    """The text of each slot before it is wrapped, "" of one that gives way to another."""
    texts = {name: _slot_value(slot, row, evidence, turn) for name, slot in slots.items()}
    solved = any(texts[name] for name, slot in slots.items() if isinstance(slot, specs.SuccessfulSibling))

    def gives_way(slot: specs.Slot) -> bool:
        match slot:
            case specs.Feedback(when="no_solution"):
                return solved
            case specs.Written(unless=str(other)):
                return texts[other] != ""
            case _:
                return False

    return {name: "" if gives_way(slots[name]) else text for name, text in texts.items()}


def _slot_value(slot: specs.Slot, row: Row, evidence: GroupOutcome | None, turn: TurnOutcome | None) -> str:
    match slot:
        case specs.ColumnSlot():
            return row.text(slot.name) or ""
        case specs.TextSlot():
            return slot.text
        case specs.SuccessfulSibling():
            return _sibling(slot, evidence) if evidence else ""
        case specs.Feedback(of="turn"):
            return ((turn and turn.feedback) or "").strip()
        case specs.NextTurns():
            return _next_turns(slot, turn) if turn else ""
        case specs.Written():
            return written_text(slot, turn.written, turn.number) if turn else ""
        case specs.Feedback():
            return (evidence.group[evidence.own].feedback or "").strip() if evidence else ""
        case specs.OwnAttempt():
            return _attempt_text(evidence.group[evidence.own], slot.strip_thinking) if evidence else ""
        case specs.Verdict(threshold=threshold, success=success, failure=failure):
            succeeded = evidence and evidence.group[evidence.own].reward >= threshold
            return success if succeeded else failure
        case _:
            assert_never(slot)


def _next_turns(slot: specs.NextTurns, turn: TurnOutcome) -> str:
    """What followed a turn, its messages apart by blank lines."""
    later = turn.later if slot.how_many == "all" else turn.later[: int(slot.how_many)]
    texts = [text.strip() for messages in later for role, text in messages if role in slot.roles]
    return "\n\n".join(filter(None, texts))


def _sibling(slot: specs.SuccessfulSibling, evidence: GroupOutcome) -> str:
    """The successful completion that the teacher sees (Hübotter 2026, §2: the first of the group)."""
    successes = [
        attempt
        for place, attempt in enumerate(evidence.group)
        if attempt.reward >= slot.threshold and not (slot.exclude_self and place == evidence.own)
    ]
    if not successes:
        return ""
    match slot.pick:
        case "first":
            sibling = successes[0]
        case "best":
            sibling = max(successes, key=lambda attempt: attempt.reward)
        case "random":
            sibling = random.Random(evidence.seed).choice(successes)
        case _:
            assert_never(slot.pick)
    return _attempt_text(sibling, slot.strip_thinking)


def _attempt_text(attempt: Attempt, strip_thinking: bool) -> str:
    if not strip_thinking:
        return attempt.text.strip()
    return without_thinking(attempt.text) if attempt.answer is None else attempt.answer


def _wrap(slot: specs.Slot, value: str) -> str:
    if isinstance(slot, specs.Wording) or value == "":
        return value
    return fill(parsed(slot.wrap), lambda field: value if str(field) == "value" else f"{{{field}}}")


def teacher_messages(row: Row, sees: specs.Sees, values: Mapping[str, str]) -> list[Message]:
    """Returns the row's chat with the teacher's context; texts of rows and slots are inserted, never interpreted.

    Raises BadData if a template names a field that is neither a slot nor the prompt.
    """
    lookup = slot_lookup({**values, "prompt": row.prompt_text})
    system = [m for m in row.messages[:1] if m["role"] == "system"]
    rest = list(row.messages[len(system) :])
    match sees:
        case specs.UserTurn():
            last = max(i for i, m in enumerate(rest) if m["role"] == "user")
            rest[last] = {"role": "user", "content": fill(parsed(sees.template), lookup)}
        case specs.SystemMessage():
            own = [m["content"] for m in system]
            content = "\n\n".join([*own, fill(parsed(sees.template), lookup)])
            system = [{"role": "system", "content": content}]
        case specs.EarlierTurns():
            for position, turn in enumerate(sees.turns):
                rest[2 * position : 2 * position] = [
                    {"role": "user", "content": fill(parsed(turn.user), lookup)},
                    {"role": "assistant", "content": fill(parsed(turn.assistant), lookup)},
                ]
        case specs.AnswerStart():
            pass  # the start of the answer follows the chat, which is unchanged
        case _:
            assert_never(sees)
    return [*system, *rest]


def slot_lookup(values: Mapping[str, str]) -> Callable[[Field], str]:
    """Returns a function from a template's field to its text; it raises BadData for an unknown field."""

    def look_up(field: Field) -> str:
        if str(field) not in values:
            like = nearest(str(field), values)
            raise BadData(
                f"a template of teacher.sees names {{{field}}}, which is not a slot",
                hint=f"did you mean {{{like}}}?" if like else None,
            )
        return values[str(field)]

    return look_up
