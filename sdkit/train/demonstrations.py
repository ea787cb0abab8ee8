"""Turns of demonstrations that trajectories start with: which they are, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from sdkit.batches import Row
from sdkit.data.logged_chats import CompletionEncoder
from sdkit.data.prompts import Ids
from sdkit.language.errors import BadData, first_of
from sdkit.language.specs import StartsWith
from sdkit.losses.token_weights import ROUNDING


def count_demonstrated(turns: int, spec: StartsWith) -> int:
    """Return how many turns of a demonstration of `turns` a trajectory starts with: the rest is left to the student.

    `spec` has no schedules.
    """
    return max(turns - math.floor(spec.turns_left + ROUNDING), 0)


def demonstrated_turns(encoder: CompletionEncoder, spec: StartsWith | None, row: Row) -> Sequence[Ids]:
    """Return the turns that a row's trajectory starts with, as token ids.  `spec` has no schedules.

    Raises BadData as `CompletionEncoder.turns` does.
    """
    if spec is None:
        return ()
    turns = encoder.turns(row, spec.column)
    return turns[: count_demonstrated(len(turns), spec)]


def check_demonstrations(
    encoder: CompletionEncoder, column: str, rows: Iterable[Row], limit: int
) -> list[tuple[Row, Ids]]:
    """Return each row with the ids of all turns of its demonstration.

    Raises BadData that names the rows without a chat, and those with a turn that has more than `limit` tokens or whose tool
    calls cannot be read.
    """
    checked: list[tuple[Row, Ids]] = []
    faults: list[str] = []
    for row in rows:
        try:
            turns = encoder.turns(row, column)
        except BadData as fault:
            faults.append(fault.message)
            continue
        faults += list(_faults(encoder, row, column, turns, limit))[:1]
        checked.append((row, tuple(i for turn in turns for i in turn)))
    if faults:
        raise BadData(first_of(list(dict.fromkeys(faults))))
    return checked


def _faults(encoder: CompletionEncoder, row: Row, column: str, turns: Sequence[Ids], limit: int) -> Iterator[str]:
    prompter = encoder.prompter
    prompt, calls = prompter.student_ids(row), prompter.calls_of(row)
    for number, ids in enumerate(turns, 1):
        where = f"row {row.index}: turn {number} of '{column}'"
        if len(ids) > limit:
            yield f"{where} has {len(ids)} tokens, more than rollout.max_new_tokens, {limit}"
        if calls and (fault := calls.read(prompter.tokenizer, prompt, ids)[1]):
            yield f"{where} has {fault}"
