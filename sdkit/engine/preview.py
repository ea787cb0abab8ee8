"""`sdkit plan --data N`: student and teacher prompt side by side, with the splice point marked.  Loads no weights."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sdkit.components.data import load_rows
from sdkit.components.prompts import Prompter
from sdkit.engine.models import load_tokenizer, locate
from sdkit.specs import DatasetSamples, ExperimentSpec

SPLICE = "▶ completion goes here"


def preview(spec: ExperimentSpec, base: Path, count: int, console: Console) -> None:
    """Render the first `count` training rows.  Raises BadData where a row cannot be used."""
    tokenizer = load_tokenizer(spec.model, locate(spec.model.path, base))
    prompter = Prompter(tokenizer, dict(spec.model.chat_template_options))
    for row in load_rows(spec.data, base)[:count]:
        student = prompter.student_ids(row)
        views = [_panel("student", tokenizer.decode(student), len(student))]
        if spec.teacher:
            prompt = prompter.teacher_ids(row, spec.teacher.sees)
            if prompt is None:
                views.append(
                    Panel(
                        Text("no teacher: a slot that the context requires is empty"),
                        title="teacher",
                    )
                )
            else:
                cut = f", {prompt.cut_tokens} context tokens cut" if prompt.cut_tokens else ""
                views.append(_panel("teacher", tokenizer.decode(prompt.ids), len(prompt.ids), cut))
        if isinstance(spec.rollout.sampled_by, DatasetSamples):
            own = str(row.columns[spec.rollout.sampled_by.column])
            views.append(Panel(Text(own), title="completion, from the data set"))
        console.rule(f"row {row.index}")
        side_by_side = Table.grid(expand=True)
        for _ in views:
            side_by_side.add_column(ratio=1)
        side_by_side.add_row(*views)
        console.print(side_by_side)


def _panel(who: str, text: str, tokens: int, note: str = "") -> Panel:
    body = Text(text)
    body.append(SPLICE, style="bold green")
    return Panel(body, title=f"{who}: {tokens} tokens{note}")
