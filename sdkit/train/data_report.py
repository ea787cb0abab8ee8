"""`sdkit validate --data N`: loads and checks all rows as a run does, and prints what is odd about them.

Loads no weights but a reward model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from sdkit.batches import Row
from sdkit.data.logged_chats import unanswered
from sdkit.data.rows import drop_duplicates
from sdkit.language import columns
from sdkit.language.errors import counted
from sdkit.language.row_text import is_empty
from sdkit.language.specs import ExperimentSpec
from sdkit.models.embedding_ids import known_ids
from sdkit.models.loading import resolve_model
from sdkit.stdout import print_warning
from sdkit.train.inputs import RunData, checked_data
from sdkit.train.preview import show_prompts
from sdkit.train.report import warn_of_control_tokens

SHORTEST_LEAK = 20
"""Characters of the shortest text whose occurrence in the student's prompt is no coincidence."""
ROWS_LISTED = 5


def report_data(spec: ExperimentSpec, base: Path, console: Console, shown: int) -> RunData:
    """Load and check the rows of a run, print what is odd about them, and the prompts of the first `shown` rows.

    Raises BadData as a run would.
    """
    located = resolve_model(spec.model.path, base)
    data, longest = checked_data(spec, base, located, known_ids(spec, base, located))
    show_prompts(spec, data.prompter, data.train[:shown], console)
    suites = [f"{counted(len(rows), 'prompt')} in suite {name}" for name, rows in data.suites.items()]
    sizes = ", ".join([counted(len(data.train), "training row"), *suites])
    console.print(
        f"data: {sizes}; longest prompt and completion: {longest} tokens",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for line in data.observations.describe() if data.observations else ():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    warn_of_control_tokens(console, data)
    if data.completions and (text := data.completions.warning(spec.rollout.max_new_tokens)):
        print_warning(console, text, f"set rollout.max_new_tokens: {data.completions.longest}, or drop these rows")
    for text in oddities(data):
        print_warning(console, text)
    return data


def oddities(data: RunData) -> Iterator[str]:
    """What is odd about rows that a run accepts: overlap, repeats, empty columns, cut contexts, leaks."""
    if data.dropped:
        yield f"{counted(data.dropped, 'training row')} dropped, because a suite holds the same prompt"
    if repeats := drop_duplicates(data.train, data.task_columns)[1]:
        yield f"{counted(repeats, 'training row')} with the prompt of an earlier row"
    for name, repeats in data.dropped_repeats.items():
        if repeats:
            yield f"{counted(repeats, 'row')} of suite {name} dropped, with the prompt of an earlier row"
    for column in sorted(columns.text_columns(data.spec, None)):
        if empty := [row for row in data.train if is_empty(row.columns.get(column))]:
            yield f"'{column}' is empty in {_named(empty)}"
    if data.cut_contexts:
        most = max(tokens for _, tokens in data.cut_contexts)
        rows = _named([row for row, _ in data.cut_contexts])
        yield f"the teacher's context is cut at teacher.sees.max_prompt_tokens, by up to {most} tokens, in {rows}"
    yield from _odd_chats(data)
    for column in sorted({*columns.shown_columns(data.spec), *_answers(data.spec)}):
        if leaks := [row for row in data.train if _leaks(row, column)]:
            yield f"the student's prompt has the text of '{column}' in {_named(leaks)}"


def _odd_chats(data: RunData) -> Iterator[str]:
    """What is odd about logged chats that a run accepts: an unanswered end, a template that changes earlier turns."""
    if not columns.logs_chats(data.spec):
        return
    column, encoder = data.spec.rollout.sampled_by.completion_column or "", data.completion_encoder
    if cut := [row for row in data.train if unanswered(row, column)]:
        yield f"'{column}' goes on after the assistant's last turn, which is left out, in {_named(cut)}"
    if changed := [row for row in data.train if encoder.changed_by_template(row, column)]:
        yield (
            f"the chat template prints '{column}' in another form than the run trains on, such as without the thinking of "
            f"earlier turns or the white space around a text, in {_named(changed)}"
        )


def _answers(spec: ExperimentSpec) -> Iterable[str]:
    return columns.answer_columns(spec, columns.training_rewards(spec))


def _leaks(row: Row, column: str) -> bool:
    text = (row.text(column) or "").strip()
    return len(text) >= SHORTEST_LEAK and any(text in message["content"] for message in row.messages)


def _named(rows: Sequence[Row]) -> str:
    """`2 rows: 3, 7`."""
    more = ", …" if len(rows) > ROWS_LISTED else ""
    return f"{counted(len(rows), 'row')}: {', '.join(str(row.index) for row in rows[:ROWS_LISTED])}{more}"
