"""Writes a run file from a method page, a data file and a few answers: what `sdkit new` does."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from sdkit.data.sources import Raw, read_source
from sdkit.language import specs
from sdkit.language.bundled import PREFIX
from sdkit.language.errors import BadData, UnreadableInput, counted, did_you_mean, listed, shorten
from sdkit.language.introspection import keys_of
from sdkit.language.method_pages import MethodPage, columns_of_method, method_page, needs_turns
from sdkit.language.model_shapes import shape_at
from sdkit.language.row_text import Fault
from sdkit.language.rules.rollouts import reward_users
from sdkit.language.scalars import compact
from sdkit.plan.machine import emulates_bfloat16

Ask = Callable[[str, Sequence[str]], str]
"""Asks a question with these choices, if there are any, and returns the answer."""

ROWS_READ = 1000
PROMPTS_PER_STEP = 32
OPTIMIZER = """\
optimizer:
  lr: 1.0e-5 # for all weights of a 7B model (arXiv 2601.19897, 2601.20802); larger with LoRA"""
RETRY = specs.RetryEnvironment(max_turns=3, max_observation_tokens=128)
ENVIRONMENT = f"""\
environment: # what follows a turn: the reward's feedback; docs/environments.md has games, tools and code of your own
  kind: retry
  reward: correct
  max_turns: {RETRY.max_turns}
  max_observation_tokens: {RETRY.max_observation_tokens}"""
PROMPT_TOKENS = 2048  # room for a prompt whose length no key limits
ENDINGS: Mapping[str, type] = {
    ".jsonl": specs.JsonLinesSource,
    ".ndjson": specs.JsonLinesSource,
    ".json": specs.JsonSource,
    ".csv": specs.CsvSource,
    ".parquet": specs.ParquetSource,
}
GUESSES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "problem", "messages", "conversation", "input", "query", "instruction", "text"),
    "demonstration": ("completion", "response", "output", "golden_response", "solution", "target", "answer"),
    "solution": ("demonstration", "rationale", "reasoning", "completion", "response", "output", "answer"),
    "answer": ("golden_answer", "final_answer", "label", "target", "solution"),
    "context": ("passage", "document", "instruction", "system"),
    "instruction": ("system", "context"),
    "reply": ("feedback", "next_message"),
    "domain": ("category", "subject", "source", "task"),
    "tests": ("test", "test_cases", "test_list"),
    "system": ("system_prompt",),
}
"""sdkit's name of a column → names that data sets have for it, likeliest first."""
TEXTS = ("demonstration", "solution")
"""Names whose values are more than one word: a column of numbers or letters is not guessed for them."""
REWARDS: Mapping[str, str] = {
    "exact": "1 if the whole completion is the answer",
    "number": "1 if the last number of the completion is the answer",
    "choice": "1 if the last capital letter of the completion is the answer",
    "math_verify": "1 if math-verify finds the completion equal to the answer",
    "python_tests": "1 if the program in the completion passes the tests",
}
"""Kinds of rewards that need no further keys, and what they do."""


@frozen(kw_only=True)
class Answers:
    """What the user says about a new run; None or empty: not said."""

    method: str
    data: str
    model: str
    columns: Mapping[str, str] = field(factory=dict)  # sdkit's name → the data's
    reward: str | None = None  # a kind of REWARDS, or FILE.py:FUNCTION
    teachers: Sequence[str] = ()  # models, in the order of the page's routes
    writer: str | None = None  # the model that writes slots of the context, by its server's name for it
    max_new_tokens: int | None = None
    steps: int | None = None


@frozen(kw_only=True)
class _Data:
    """A data file: its source as in the run file, its first rows, and whether these are all."""

    source: Mapping[str, Any]
    rows: Sequence[Raw]
    complete: bool

    @property
    def columns(self) -> list[str]:
        """The names that rows have, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def has_texts(self, column: str) -> bool:
        """Whether a value of the column has several words."""
        return any(len(str(row.get(column, "")).split()) > 1 for row in self.rows)

    def ends_in_answers(self, columns: Mapping[str, Any]) -> bool:
        """Whether the prompts are chats whose last turn is the assistant's."""
        chats = [row.get(columns["prompt"]) for row in self.rows]
        lasts = [chat[-1] for chat in chats if isinstance(chat, list) and chat]
        return bool(lasts) and all(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in lasts)

    @property
    def held_out(self) -> int:
        """How many of the first rows to evaluate on."""
        return min(100, max(1, len(self.rows) // 5)) if self.complete else 100


def write_run_file(target: Path, answers: Answers, ask: Ask | None) -> str:
    """Returns the text of a run file for the path `target`; `ask` is for what the answers and the data leave open.

    Raises UnreadableInput if something is open and there is no `ask`, or if an answer does not fit; BadData if the data
    cannot be read.
    """
    page, folder = method_page(answers.method), target.resolve().parent
    data = _read_data(answers.data, folder)
    needs_reward = needs_turns(page.spec) or next(reward_users(page.spec), None) is not None
    names = ["prompt", *columns_of_method(page.spec)]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        is_last_turn = (
            name in TEXTS and name not in (*answers.columns, *data.columns) and data.ends_in_answers(columns)
        )
        columns[name] = {"last_turn": columns["prompt"]} if is_last_turn else _column(name, data, answers, names, ask)
        if page.spec.rollout.starts_with and name == page.spec.rollout.starts_with.column:
            columns[name] = {"turns": columns["prompt"] if is_last_turn else columns[name]}
    optional = [name for name in ("system", "answer", "tests") if name not in columns]
    columns |= {name: column for name in optional if (column := _guess(name, data, answers, names))}
    columns |= {name: column for name, column in answers.columns.items() if name not in columns}
    reward = _reward(answers, columns, data, folder, needs_reward, ask)
    sections = [
        _head(page, target.name),
        _model(answers, folder),
        _data(data, columns, answers),
        *_method_parts(page, answers, folder, ask),
        *_scores(reward, data),
        *([ENVIRONMENT] if needs_turns(page.spec) else ()),
        OPTIMIZER,
        _training(page, answers, data, folder),
    ]
    return "\n\n".join(sections) + "\n"


def _read_data(data: str, folder: Path) -> _Data:
    path = Path(data).expanduser()
    kind = specs.DiskSource if path.is_dir() else ENDINGS.get(path.suffix.lower())
    if kind is None and not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        return _Data(source={"kind": "hub", "path": data, "split": "train"}, rows=(), complete=False)
    if kind is None:
        known = "a folder of save_to_disk, or the id of a data set on the hub"
        raise UnreadableInput(f"{data}: data is a file that ends in {listed(ENDINGS)}, {known}")
    read = read_source(kind(path=os.fspath(path)), Path(), ROWS_READ)
    rows = [row for _, row in read if not isinstance(row, Fault)]
    if not rows:
        fault = next((f"{place}: {row}" for place, row in read), f"{data} has no rows")
        raise BadData(fault)
    source = {"kind": kind.kind, "path": _relative(path, folder)}
    return _Data(source=source, rows=rows, complete=len(read) < ROWS_READ)


def _relative(path: Path, folder: Path) -> str:
    """The path from the run file's folder; an absolute or home path stays one."""
    return path.as_posix() if path.is_absolute() else Path(os.path.relpath(path, folder)).as_posix()


def _model_path(model: str, folder: Path) -> str:
    """A model's path from the run file's folder; a bundled name or a hub id stays as it is."""
    path = Path(model).expanduser()
    if model.startswith(PREFIX) or not path.is_dir():
        return model
    relative = _relative(path, folder)
    return relative if relative.startswith(("/", ".")) else f"./{relative}"


def _column(name: str, data: _Data, answers: Answers, names: Sequence[str], ask: Ask | None) -> str:
    """The source's column for sdkit's `name`: given, of the same name, guessed, or asked for."""
    if column := _guess(name, data, answers, names):
        return column
    question = f"which column of {answers.data} is {shorten(name)}?"
    if ask:
        return _known(ask(question, data.columns), data)
    there = f"; there are {listed(data.columns)}" if data.columns else ""
    raise UnreadableInput(f"{question[:-1]}{there}", hint=f"--column {name}=NAME")


def _guess(name: str, data: _Data, answers: Answers, names: Sequence[str]) -> str | None:
    if name in answers.columns:
        return _known(answers.columns[name], data)
    if name in data.columns:
        return name
    guesses = (guess for guess in GUESSES.get(name, ()) if guess in data.columns and guess not in names)
    return next((guess for guess in guesses if name not in TEXTS or data.has_texts(guess)), None)


def _known(column: str, data: _Data) -> str:
    if data.columns and column not in data.columns:
        hint = did_you_mean(column, data.columns) or f"there are {listed(data.columns)}"
        raise UnreadableInput(f"the data has no column {shorten(column)}", hint=hint)
    return column


def _reward(
    answers: Answers, columns: Mapping[str, str], data: _Data, folder: Path, needed: bool, ask: Ask | None
) -> Mapping[str, Any] | None:
    """The reward's keys; None if the method needs none and the data has nothing to score by."""
    if answers.reward and ".py:" in answers.reward:
        file, _, function = answers.reward.rpartition(":")
        return {"kind": "file", "file": _relative(Path(file).expanduser(), folder), "function": function}
    kind = answers.reward or _guess_reward(columns, data)
    if kind is None and needed and ask:
        kind = ask("which reward scores a completion?", list(REWARDS))
    if kind is None and needed:
        message = f"method {answers.method} needs a reward, and the data has no column 'answer' or 'tests'"
        raise UnreadableInput(message, hint="--column answer=NAME, or --reward FILE.py:FUNCTION")
    if kind is None:
        return None
    if kind not in REWARDS:
        raise UnreadableInput(
            f"{shorten(kind)} is not one of {listed(REWARDS)} or FILE.py:FUNCTION", hint=did_you_mean(kind, REWARDS)
        )
    wanted = "tests" if kind == "python_tests" else "answer"
    if wanted not in columns:
        raise UnreadableInput(f"reward {kind} reads the column {shorten(wanted)}", hint=f"--column {wanted}=NAME")
    return {"kind": kind}


def _guess_reward(columns: Mapping[str, str], data: _Data) -> str | None:
    if "tests" in columns:
        return "python_tests"
    if "answer" not in columns:
        return None
    answers = [str(row[columns["answer"]]).strip() for row in data.rows if columns["answer"] in row]
    if answers and all(re.fullmatch(r"[-+]?[\d,]*\.?\d+", text) for text in answers):
        return "number"
    return "choice" if answers and all(re.fullmatch("[A-Z]", text) for text in answers) else "exact"


def _head(page: MethodPage, name: str) -> str:
    paper = f" ({'arXiv ' if page.paper[0].isdecimal() else ''}{page.paper})" if page.paper else ""
    usage = (
        f"`sdkit plan {name} --data 2` shows batches, memory and prompts, `sdkit train {name}` runs it, "
        f"`sdkit show {name}` prints every value, defaults included, and `sdkit explain KEY` explains a key."
    )
    lines = [line for text in (f"{page.summary}{paper}.", usage) for line in textwrap.wrap(text, 100)]
    return "\n".join([*(f"# {line}" for line in lines), f"method: {page.name}"])


def _text(path: str) -> str:
    """A path as YAML, without quotes where none are needed."""
    return path if re.fullmatch(r"[A-Za-z./][\w./:-]*[\w/]", path) else compact(path, flow=True)


def _model(answers: Answers, folder: Path) -> str:
    lines = ["model:", f"  path: {_text(_model_path(answers.model, folder))}"]
    if emulates_bfloat16():
        lines.append("  dtype: float32 # this processor has no bfloat16 instructions; on a GPU remove this line")
    return "\n".join([*lines, "  # lora: {r: 32, lora_alpha: 64} # adapters in place of all weights"])


def _data(data: _Data, columns: Mapping[str, str], answers: Answers) -> str:
    lines = [
        "data:",
        f"  source: {compact(dict(data.source), flow=True)}",
        "  columns: # sdkit's name: the data's name",
    ]
    for name, column in columns.items():
        is_guess = name not in answers.columns and column in GUESSES.get(name, ())
        guessed = " # guessed from its name" if is_guess else ""
        lines.append(f"    {name}: {compact(column, flow=True)}{guessed}")
    return "\n".join(lines)


def _method_parts(page: MethodPage, answers: Answers, folder: Path, ask: Ask | None) -> Iterator[str]:
    """What the run file changes of its method page: lengths that fit the model, and other models as teachers."""
    new, prompt = _lengths(page.spec, answers, folder)
    if new != page.spec.rollout.max_new_tokens:
        yield f"rollout:\n  max_new_tokens: {new} # the page says {page.spec.rollout.max_new_tokens}"
    teacher: dict[str, Any] = {}
    paths = [path for path, _ in page.spec.external_teachers()]
    models = list(answers.teachers)
    if not models and ask:
        models = [ask(f"which model is the teacher ({'.'.join(path)})?", ()) for path in paths]
    if len(models) != len(paths):
        hint = "give --teacher MODEL for each" if paths else "leave out --teacher"
        wanted = counted(len(paths), "teacher model")
        raise UnreadableInput(f"method {page.name} needs {wanted}, and {len(models)} are given", hint=hint)
    for path, model in zip(paths, models, strict=True):
        inner = teacher
        for key in path[1:]:
            inner = inner.setdefault(key, {})
        inner["path"] = _model_path(model, folder)
    sees: dict[str, Any] = {}
    comments: dict[str, str] = {}
    if page.spec.sees and prompt != page.spec.sees.max_prompt_tokens:
        sees["max_prompt_tokens"] = prompt
        comments["max_prompt_tokens"] = " # with the completion, the model's whole context"
    if writer := _writer(page, answers, ask):
        sees["writer"] = writer
        comments["writer"] = " # of the server at http://127.0.0.1:8000, if no url names another"
    if teacher or sees:
        lines = [f"  {key}: {compact(value, flow=True)}" for key, value in teacher.items()]
        inner = [f"    {key}: {compact(value, flow=True)}{comments[key]}" for key, value in sees.items()]
        yield "\n".join(["teacher:", *lines, *(["  sees:", *inner] if inner else [])])


def _writer(page: MethodPage, answers: Answers, ask: Ask | None) -> dict[str, str] | None:
    """What the run file says of the context's writer; None if there is none."""
    model = answers.writer
    if page.spec.writer and model is None and ask:
        model = ask("which model writes about rollouts, by its server's name for it?", ())
    if (model is None) == bool(page.spec.writer):
        needs, hint = ("a", "give --writer MODEL") if page.spec.writer else ("no", "leave out --writer")
        raise UnreadableInput(f"method {page.name} needs {needs} writer", hint=hint)
    return None if model is None else {"model": model}


def _lengths(spec: specs.MethodSpec, answers: Answers, folder: Path) -> tuple[int, int | None]:
    """The longest completion and teacher prompt, in tokens, that fit the model if its context is known."""
    new = answers.max_new_tokens or spec.rollout.max_new_tokens
    prompt = spec.sees.max_prompt_tokens if spec.sees else None
    shape = shape_at(_model_path(answers.model, folder), folder)
    if shape:
        context = shape.max_position_embeddings
        new = min(new, answers.max_new_tokens or _turn_tokens(spec, context * 3 // 4))
        longest = _longest(spec, new)
        prompt = min(prompt, context - longest) if prompt and longest < context else prompt
    return new, prompt


def _longest(spec: specs.MethodSpec, new: int) -> int:
    """The tokens of a completion whose turns have `new` tokens each."""
    return RETRY.longest(new) if needs_turns(spec) else new


def _turn_tokens(spec: specs.MethodSpec, tokens: int) -> int:
    """The most tokens of a turn such that a completion has at most so many."""
    return max(1, (tokens - _longest(spec, 0)) // (_longest(spec, 1) - _longest(spec, 0)))


def _scores(reward: Mapping[str, Any] | None, data: _Data) -> Iterator[str]:
    """The reward, and an evaluation by it on the first rows."""
    if not reward:
        yield "# No evaluation: without a column `answer` there is nothing to score by (docs/tutorial.md adds one)."
        return
    comment = f" # {REWARDS[reward['kind']]}" if reward["kind"] in REWARDS else ""
    yield f"rewards:\n  correct: {compact(dict(reward), flow=True)}{comment}"
    yield "\n".join(
        [
            "evaluation:",
            "  suites:",
            "    held_out: # the first rows; training leaves out rows with their prompts",
            f"      data: {{source: {compact(dict(data.source), flow=True)}, limit: {data.held_out}}}",
            "      score: correct",
        ]
    )


def _training(page: MethodPage, answers: Answers, data: _Data, folder: Path) -> str:
    new, prompt = _lengths(page.spec, answers, folder)
    size = min(PROMPTS_PER_STEP, max(1, len(data.rows) - data.held_out)) if data.complete else PROMPTS_PER_STEP
    length = f"  steps: {answers.steps}" if answers.steps else "  epochs: 1"
    lines = ["training:", length, f"  prompts_per_step: {size}"]
    if (need := _longest(page.spec, new) + (prompt or PROMPT_TOKENS)) > keys_of(specs.TrainingSpec)[
        "micro_batch_tokens"
    ].default:
        lines.append(f"  micro_batch_tokens: {need} # the longest sequence: prompt and completion")
    return "\n".join(lines)
