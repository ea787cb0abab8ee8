"""Asks the writer of the teacher's context about a batch of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from attrs import evolve

from sdkit.batches import Completion, GroupOutcome, Row
from sdkit.data.teacher_context import writer_question
from sdkit.data.written import answer_fault, transcript
from sdkit.distributed import collectives
from sdkit.language.errors import ProcessDied
from sdkit.language.specs import Writer
from sdkit.serving.writer import WriterClient
from sdkit.train.inputs import RunData

SEEDS = 2**31
"""Seeds that every server accepts are below this."""


def with_answers(
    client: WriterClient,
    data: RunData,
    rows: Sequence[Row],
    completions: Sequence[Completion],
    outcomes: Sequence[GroupOutcome | None],
    seeds: Sequence[int],
    *,
    training: bool,
) -> list[Completion]:
    """Return the completions with the writer's answers; those of a recording have theirs, and are not asked about.

    In `training`, raises ProcessDied if the writer fails about more than `max_failed_share` of the rollouts of all ranks.
    """
    decode = partial(data.tokenizer.decode, skip_special_tokens=True)

    def question(row: Row, completion: Completion, outcome: GroupOutcome | None) -> str:
        row = row if completion.opening is None else row.with_opening(completion.opening)
        return writer_question(row, client.spec, outcome, transcript(completion, decode))

    asked = [i for i, c in enumerate(completions) if c.written is None and c.ending != "environment_error"]
    questions = [(question(rows[i], completions[i], outcomes[i]), seeds[i] % SEEDS) for i in asked]
    answers = client.ask(questions, partial(answer_fault, data.spec.slots.values()))
    if training:
        _check_share(client.spec, [answer.fault for answer in answers if answer.fault], len(asked))
    answered = dict(zip(asked, answers, strict=True))
    return [evolve(c, written=answered[i].text) if i in answered else c for i, c in enumerate(completions)]


def _check_share(spec: Writer, faults: Sequence[str], asked: int) -> None:
    """Raise ProcessDied if the writer failed about too many rollouts of all ranks."""
    failed, total = collectives.all_reduce_sum(torch.tensor([len(faults), asked])).tolist()
    if failed > spec.max_failed_share * total:
        first = f": {faults[0]}" if faults else ""
        raise ProcessDied(
            f"the writer {spec.model} failed about {failed} of {total} rollouts{first}",
            path=("teacher", "sees", "writer"),
            hint=f"mend it, or raise max_failed_share, which is {spec.max_failed_share:g}",
        )
