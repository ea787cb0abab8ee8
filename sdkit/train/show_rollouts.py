"""`sdkit rollouts`: a step's recorded rollouts as text, each token coloured by the divergence of teacher and student."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from sdkit.language.errors import BadEnvironment, UnreadableInput, counted, shorten
from sdkit.language.specs import ExperimentSpec
from sdkit.models.loading import load_tokenizer, resolve_model
from sdkit.runs.directory import MARK, read_lines, step_file
from sdkit.runs.samples import ending_of, turn_heading
from sdkit.spans import ASSISTANT, OBSERVATION, TURNS, rewards_by_turn

Record = Mapping[str, Any]
SCALE = ((0.1, ""), (0.5, "black on #fee8a0"), (1.0, "black on #fdae61"), (2.0, "black on #f46d43"))
"""A token's style by its divergence in nats: below each bound; tokens above the last one have `LARGEST`."""
LARGEST = "white on #a50026"
PAGE_WIDTH = 110
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


def select(recorded: str, row: int | None, first: int) -> tuple[Path, Sequence[Record]]:
    """The run that RUN or RUN@STEP names, and at most `first` rollouts of that step, or of the newest.

    Raises UnreadableInput if there are none.
    """
    folder, at, number = recorded.rpartition("@")
    run, step = (Path(folder), number) if at and number.isdecimal() else (Path(recorded), "")
    if not (run / MARK).is_file():
        raise UnreadableInput(f"{run} is not a run directory: it has no {MARK}", hint="name one as RUN or RUN@STEP")
    steps = sorted(int(path.stem.removeprefix("step_")) + 1 for path in (run / "rollouts").glob("step_*.jsonl"))
    if not steps or (step and int(step) not in steps):
        known = f"there are steps {steps[0]} to {steps[-1]}" if steps else "the run has none yet"
        raise UnreadableInput(f"{run} has no rollouts of step {step or 1}", hint=known)
    records = read_lines(run / step_file("rollouts", int(step or steps[-1]) - 1))
    selected = [record for record in records if row in (None, record["row"])]
    if not selected:
        rows = ", ".join(map(str, sorted({record["row"] for record in records})))
        raise UnreadableInput(f"row {row} has no rollout in {shorten(recorded)}", hint=f"the rows are {rows}")
    return run, selected[:first]


def show(spec: ExperimentSpec, base: Path, records: Sequence[Record], console: Console, *, prompts: bool) -> None:
    """Print the rollouts; `prompts`: with the prompts of student and teacher."""
    tokenizer = load_tokenizer(spec.model, resolve_model(spec.model.path, base))
    for record in records:
        console.print(f"[bold]{escape(_heading(record))}[/]", highlight=False)
        if prompts:
            for name in ("prompt_ids", "teacher_prompt_ids"):
                if ids := record[name]:
                    console.print(Text(tokenizer.decode(ids), style="dim"))
        console.print(_turns(tokenizer, record) if "spans" in record else _coloured(tokenizer, record), end="\n\n")
    if any(record.get("token_divergence") for record in records):
        console.print(_legend())


def write_page(spec: ExperimentSpec, base: Path, records: Sequence[Record], page: Path, *, prompts: bool) -> None:
    """Write the rollouts as a web page.  Raises UnreadableInput if the name is not one of a page."""
    if page.suffix.lower() != ".html":
        raise UnreadableInput(f"{page} is not the name of a page: it must end in .html")
    console = Console(file=io.StringIO(), record=True, width=PAGE_WIDTH, color_system="truecolor", force_terminal=True)
    show(spec, base, records, console, prompts=prompts)
    try:
        console.save_html(str(page), inline_styles=True)
    except OSError as error:
        raise BadEnvironment(f"cannot write {page}: {error.strerror}") from None


def _heading(record: Record) -> str:
    """A rollout's row and group, its length, its ending, scores and mean divergence."""
    length = counted(len(record["completion_ids"]), "token")
    parts = [f"row {record['row']}, group {record['group']}", length if record["finished"] else f"{length}, cut"]
    parts += ending_of(record)
    parts += [f"{name} {value:.3g}" for name, value in record.get("scores", {}).items()]
    known = [value for value in record.get("token_divergence") or () if value is not None]
    parts += [f"divergence {sum(known) / len(known):.3g} nats a token"] if known else []
    return ", ".join(parts)


def _turns(tokenizer: Any, record: Record) -> Text:
    """A trajectory, part by part, each under its turn and role; what was not sampled in a colour of its own."""
    text = Text()
    for part in parts_of(record):
        text.append(f"{turn_heading(part)}\n", "bold dim")
        if part["role"] == ASSISTANT:
            text.append(_coloured(tokenizer, record, part["start"], part["end"]))
        else:
            text.append(tokenizer.decode(record["completion_ids"][part["start"] : part["end"]]), OBSERVATION)
        text.append("\n")
    text.rstrip()
    return text


def parts_of(record: Record) -> list[dict[str, Any]]:
    """The spans of a recorded trajectory, with the rewards of its turns."""
    spans = record["spans"]
    turns = sum(span["role"] in TURNS for span in spans)
    rewards = rewards_by_turn(turns, record.get("turn_rewards") or (), record.get("ending"))
    return [{**span, "reward": rewards.get(span["turn"]) if span["role"] in TURNS else None} for span in spans]


def _coloured(tokenizer: Any, record: Record, start: int = 0, end: int | None = None) -> Text:
    """Tokens `start` to `end` of the completion, each in the style of its divergence."""
    ids = record["completion_ids"]
    values = record.get("token_divergence") or [None] * len(ids)
    text = Text()
    for piece, value in token_pieces(tokenizer.decode, zip(ids[start:end], values[start:end], strict=True)):
        text.append(piece, _style(value))
    return text


def token_pieces(
    decode: Callable[[list[int]], str], tokens: Iterable[tuple[int, float | None]]
) -> Iterator[tuple[str, float | None]]:
    """The text of each token with its value; the tokens of one character together, with their largest value."""
    ids: list[int] = []
    values: list[float] = []
    for token, value in tokens:
        ids.append(token)
        values += [] if value is None else [value]
        piece = decode(ids)
        if not piece.endswith(INCOMPLETE):
            yield piece, max(values, default=None)
            ids, values = [], []
    if ids:
        yield decode(ids), max(values, default=None)


def _style(value: float | None) -> str:
    if value is None:
        return "dim"
    return next((style for bound, style in SCALE if abs(value) < bound), LARGEST)


def _legend() -> Text:
    legend = Text("divergence of teacher and student, nats: ")
    for (bound, style), below in zip(SCALE, (0.0, *(bound for bound, _ in SCALE)), strict=False):
        legend.append(f" {below:g} to {bound:g} ", style)
    legend.append(f" above {SCALE[-1][0]:g} ", LARGEST)
    return legend.append("; no loss counts the pale tokens", "dim")
