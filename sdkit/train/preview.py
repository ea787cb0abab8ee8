"""`sdkit plan --data N` and `sdkit validate --data N`: prints student and teacher prompts side by side and marks where the completion goes.

Loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sdkit.batches import Attempt, GroupOutcome, Row, TurnOutcome
from sdkit.data.logged_chats import CompletionEncoder
from sdkit.data.observations import ObservationEncoder
from sdkit.data.prompts import Prompter
from sdkit.data.rows import load_rows
from sdkit.data.teacher_context import writer_question
from sdkit.data.turn_ends import end_token
from sdkit.data.written import scripted_answer
from sdkit.language.errors import counted
from sdkit.language.row_text import Turns, message_text
from sdkit.language.schedules import at_step
from sdkit.language.specs import ExperimentSpec, OfRollouts, StartsWith
from sdkit.language.tasksets import data_in_full
from sdkit.models.loading import load_tokenizer, resolve_model
from sdkit.spans import ASSISTANT, OBSERVATION, Message, Span
from sdkit.train.demonstrations import count_demonstrated

SPLICE = "▶ completion goes here"
SCRIPTED = GroupOutcome(group=[Attempt(text="‹an answer›", reward=0.0, feedback="‹feedback›")], own=0, seed=0)
"""What a context may say about a completion, in place of what is known after sampling."""
TAKE_OVER = "▶ the student takes over"


def preview(spec: ExperimentSpec, base: Path, count: int, console: Console) -> None:
    """Print the prompts of the first `count` training rows as the source has them.  Raises BadData if a row is unusable."""
    tokenizer = load_tokenizer(spec.model, resolve_model(spec.model.path, base))
    keep_text = spec.model.control_tokens == "text"
    prompter = Prompter(tokenizer, dict(spec.model.chat_template_kwargs), keep_text=keep_text)
    show_prompts(spec, prompter, load_rows(data_in_full(spec, spec.data), base)[:count], console)


def show_prompts(spec: ExperimentSpec, prompter: Prompter, rows: Iterable[Row], console: Console) -> None:
    """Print the prompts of rows, student and teacher side by side, and a completion if the data has them."""
    tokenizer = prompter.tokenizer
    end = end_token(tokenizer, prompter.options)
    for row in rows:
        student = prompter.student_ids(row)
        views = [_panel("student", tokenizer.decode(student), len(student))]
        if spec.teacher:
            teacher = prompter.teacher_ids(row, spec.teacher.sees)
            if spec.environment and spec.teacher.sees and spec.teacher.sees.by_turn:
                views.append(_scripted_view(spec, prompter, end, row))
            elif teacher is None:
                views.append(Panel(Text(_no_teacher(spec)), title="teacher"))
            else:
                cut = f", {teacher.cut_tokens} context tokens cut" if teacher.cut_tokens else ""
                views.append(_panel("teacher", tokenizer.decode(teacher.ids), len(teacher.ids), cut))
        if column := spec.rollout.sampled_by.completion_column:
            views.append(_completion(spec, prompter, end, row, column))
        if start := spec.rollout.starts_with:
            views.append(_demonstration(at_step(start, 0), row))
        table = Table.grid(expand=True)
        for _ in views:
            table.add_column(ratio=1)
        table.add_row(*views)
        console.rule(f"row {row.index}")
        console.print(table)
        if spec.writer:
            question = writer_question(row, spec.writer, SCRIPTED, "‹the turns, and what the student was shown›")
            console.print(Panel(Text(question), title="question to the writer, about a completion with reward 0"))


def _scripted_view(spec: ExperimentSpec, prompter: Prompter, end: int | None, row: Row) -> Panel:
    """The teacher's prompt of the second turn of a scripted trajectory, for a context that differs by turn.

    Raises BadData if the chat template cannot continue a chat.
    """
    assert spec.environment is not None
    assert spec.sees is not None
    encoder = ObservationEncoder(prompter, end)
    answer = (*prompter.text_ids("‹first answer›"), *([] if end is None else [end]))
    shown = Message(role="user", content="‹what the student was shown after it›")
    (observed,) = encoder.encode([shown], closed=True, limit=spec.environment.max_observation_tokens)
    turn = TurnOutcome(
        history=answer + observed.ids,
        last_user=(len(answer) + observed.body[0], len(answer) + observed.body[1]),
        feedback="‹feedback on the second answer›",
        later=[[("user", "‹what the student was shown after the second answer›")]],
        number=2,
        written=scripted_answer(spec.slots.values(), "‹what the writer wrote›", 2),
    )
    prompt = prompter.teacher_ids(row, spec.sees, SCRIPTED, turn)
    if prompt is None:
        return Panel(Text(_no_teacher(spec)), title="teacher")
    return _panel("teacher, turn 2 of a scripted trajectory", prompter.tokenizer.decode(prompt.ids), len(prompt.ids))


def _no_teacher(spec: ExperimentSpec) -> str:
    later = [name for name, slot in spec.slots.items() if isinstance(slot, OfRollouts)]
    if later:
        return f"known after sampling (slots: {', '.join(later)})"
    return "no teacher: a slot that the context requires is empty"


def _completion(spec: ExperimentSpec, prompter: Prompter, end: int | None, row: Row, column: str) -> Panel:
    """A completion from the data set with its end tokens, truncated as the run would truncate it."""
    if end is None:  # only the model's generation settings name it, and no model is loaded here
        return Panel(Text(row.text(column) or ""), title="completion, from the data set")
    logged, limit = CompletionEncoder(prompter, end).encode(row, column), spec.rollout.max_new_tokens
    kept = logged.cut(limit)
    note = f", cut to {len(kept.ids)}" if len(logged.ids) > limit else ""
    turns = f", {counted(sum(s.sampled for s in kept.spans), 'turn')} trained" if kept.spans else ""
    text = Text()
    for span in kept.spans or (Span(role=ASSISTANT, turn=1, start=0, end=len(kept.ids)),):
        text.append(prompter.tokenizer.decode(kept.ids[span.start : span.end]), "" if span.sampled else OBSERVATION)
    return Panel(text, title=f"completion, from the data set: {counted(len(logged.ids), 'token')}{note}{turns}")


def _demonstration(start: StartsWith, row: Row) -> Panel:
    """The turns of a row's demonstration, marked where the student takes over in the first step."""
    chat = row.columns[start.column]
    turns = [turn for turn in chat if turn["role"] == ASSISTANT] if isinstance(chat, Turns) else []
    shown = count_demonstrated(len(turns), start)
    text = Text("\n".join(map(message_text, turns[:shown])), OBSERVATION)
    title = f"demonstration: the first {shown} of {counted(len(turns), 'turn')}"
    return Panel(text.append(f"\n{TAKE_OVER}", style="bold green"), title=title)


def _panel(title: str, text: str, tokens: int, note: str = "") -> Panel:
    body = Text(text)
    body.append(SPLICE, style="bold green")
    return Panel(body, title=f"{title}: {tokens} tokens{note}")
