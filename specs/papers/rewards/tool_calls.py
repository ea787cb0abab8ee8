"""Tool calls against the reference calls, by the rule of the released verifiers.

The rule is that of `verl/utils/reward_score/feedback/tooluse.py` in lasgroup/SDPO at 0e6d510 and of `eval_tooluse.py` in
Self-Distillation at 4b1c3db, which agree: the names after "Action:" must be those of the reference, in any order and each
as often; the JSON objects after "Action Input:", merged into one, must equal the reference's, merged likewise.  An object
is read up to its first closing brace, so one that holds another object cannot be right; it is kept as it is, because
published numbers rest on it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

ACTION = re.compile(r"Action:\s*(\w+)")
ACTION_INPUT = re.compile(r"Action Input:\s*(\{.*?\})", re.DOTALL)


def same_calls(completion: str, row: Mapping[str, Any]) -> tuple[float, str | None]:
    """1 where the completion calls what the column `answer` says, else 0 and what differs."""
    reference = _reference(row["answer"])
    wanted = [call["Action"] for call in reference]
    wanted_input = _merged(call["Action_Input"] for call in reference)
    called, given = ACTION.findall(completion), _merged(ACTION_INPUT.findall(completion))
    differs = []
    if Counter(called) != Counter(wanted):
        differs.append(f"The actions are {called}, but should be {wanted}.")
    if given != wanted_input:
        differs.append(f"The action inputs are {given}, but should be {wanted_input}.")
    return (0.0, " ".join(differs)) if differs else (1.0, None)


def _reference(answer: Any) -> list[Mapping[str, Any]]:
    """A list of {Action, Action_Input}, as it is or as JSON."""
    return json.loads(answer) if isinstance(answer, str) else list(answer)


def _merged(texts: Iterable[Any]) -> dict[str, Any]:
    """All objects as one, later keys over earlier ones; what is no JSON object counts as empty."""
    merged: dict[str, Any] = {}
    for text in texts:
        try:
            read = json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError:
            continue
        if isinstance(read, Mapping):
            merged.update(read)
    return merged
