"""What a context's writer is shown of a rollout, and what its answer says.  Knows nothing of servers or tokens.

An answer is text, or has one JSON object in it: between lines of other text or in a fence, after the thinking.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sdkit.batches import Completion
from sdkit.data.thinking import without_thinking
from sdkit.data.turn_outcomes import Decode
from sdkit.language.errors import shorten
from sdkit.language.specs import Slot, Written

BRACES = 100
"""How many braces of an answer may begin its JSON object."""
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into texts


def transcript(completion: Completion, decode: Decode) -> str:
    """Returns all turns of a completion and what followed each, in order, each after its turn's number and its role."""
    ids = completion.ids
    parts = [(s.turn, s.role, decode(ids[slice(*(s.body or (s.start, s.end)))])) for s in completion.parts]
    parts += [(completion.parts[-1].turn, role, text) for role, text in completion.unanswered]
    return "\n".join(f"[turn {turn}, {role}] {text.strip()}" for turn, role, text in parts)


def written_text(slot: Written, answer: str, turn: int) -> str:
    """Returns the text of a slot in a writer's answer, for a turn if the slot differs by turn; "" if there is none."""
    value = _value(slot, answer)
    if slot.of == "turn":
        value = value.get(str(turn)) if isinstance(value, Mapping) else None
    return value.strip() if isinstance(value, str) else ""


def answer_fault(slots: Iterable[Slot], answer: str) -> str | None:
    """Returns what a writer's answer lacks of what the slots take, or None.

    Texts of single turns may be missing, not that of the trajectory.
    """
    return next(_faults(slots, answer), None)


def scripted_answer(slots: Iterable[Slot], text: str, turn: int) -> str:
    """Returns an answer with `text` for every slot that is written, of single turns for this one."""
    written = [slot for slot in slots if isinstance(slot, Written)]
    texts = {slot.key: text if slot.of == "trajectory" else {str(turn): text} for slot in written if slot.key}
    return json.dumps(texts, ensure_ascii=False) if texts else text


def _faults(slots: Iterable[Slot], answer: str) -> Iterator[str]:
    for slot in slots:
        if not isinstance(slot, Written):
            continue
        if slot.key is not None and _json_object(without_thinking(answer)) is None:
            yield "it has no JSON object"
        elif slot.of == "turn":
            value = _value(slot, answer)
            if not isinstance(value, Mapping | None) or not all(isinstance(v, str) for v in (value or {}).values()):
                yield f"at {shorten(slot.key)} is no object with texts by the number of the turn"
        elif not written_text(slot, answer, 1):
            yield "it is empty" if slot.key is None else f"there is no text at {shorten(slot.key)}"


def _value(slot: Written, answer: str) -> Any:
    text = without_thinking(answer)
    return text if slot.key is None else (_json_object(text) or {}).get(slot.key)


def _json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, which may begin at one of its first braces; None if there is none."""
    for brace in itertools.islice(re.finditer(r"\{", text), BRACES):
        try:
            return _DECODER.raw_decode(text, brace.start())[0]
        except (ValueError, RecursionError):
            continue
    return None
