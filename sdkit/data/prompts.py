"""Prompts of student and teacher as token ids, from the chat template.  Knows nothing of completions or weights.

The sampled ids of a completion are appended to both prompts, so both must end with the same generation prompt.  Only the
contents of slots are ever truncated, never the generation prompt, the prompt, or a template's own text.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from attrs import evolve, frozen

from sdkit.batches import GroupOutcome, Message, Row, TurnOutcome
from sdkit.data import dummy_chats
from sdkit.data.call_formats import CallFormat
from sdkit.data.control_tokens import ControlTokens
from sdkit.data.printed_tools import PrintedTools
from sdkit.data.teacher_context import parsed, slot_lookup, slot_values, teacher_messages
from sdkit.data.thinking import TAGS, opening_tag
from sdkit.data.turn_ends import append_end_token, encode_prompt
from sdkit.language.errors import BadData, blaming, first_of, listed, one_line
from sdkit.language.specs import AnswerStart, Sees, Slot, UserTurn, Wording, Written, is_by_turn
from sdkit.language.templates import Field, fill
from sdkit.models.loading import fixed_date
from sdkit.models.prefix import common_length

Ids = tuple[int, ...]
FIRST_TURN = TurnOutcome()
PROMPT = Field("prompt")


@frozen(kw_only=True)
class TeacherPrompt:
    """The teacher's prompt."""

    ids: Ids  # of a turn after the first: with the turns before it
    messages: tuple[Message, ...]
    cut_tokens: int  # how many tokens were cut from the slots to fit
    filled: tuple[str, ...] = ()  # names of the non-empty slots


class Prompter:
    """Encodes rows with one tokenizer and one set of chat-template options.

    Without a chat template, the contents of the messages are joined by blank lines.  A chat template that prints the
    date prints `now`.  With `keep_text`, control tokens spelled out in rows and rollouts are encoded as plain text.
    Raises BadData if the chat template never reads one of the options.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any], *, now: datetime | None = None, keep_text: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options)
        self.now = now or datetime.now()
        self.control = ControlTokens(tokenizer)
        self.keep_text = keep_text
        self.calls: CallFormat | None = None  # how tools are shown; None: there are none that every row has
        self.calls_of: Callable[[Row], CallFormat | None] = lambda row: None  # how a row's are shown
        self._printed_tools = PrintedTools(
            lambda chat, tools: self._apply_template(dummy_chats.ROW, chat, tools or None)
        )
        template = tokenizer.chat_template
        for name in self.options:
            if template is None:
                raise BadData(f"the tokenizer has no chat template to take the option '{name}'")
            if name not in str(template):
                raise BadData(f"the chat template never reads the option '{name}'")

    def with_tools(self, calls: CallFormat) -> Prompter:
        """Returns a prompter that shows tools in every chat."""
        other = copy.copy(self)
        other.calls, other.calls_of = calls, lambda row: calls
        return other

    def with_tools_by_row(self, calls_of: Callable[[Row], CallFormat | None]) -> Prompter:
        """Returns a prompter that shows each row's own tools, if it has some."""
        other = copy.copy(self)
        other.calls_of = calls_of
        return other

    def ids(self, row: Row, messages: Sequence[Message], *, generation_prompt: bool = True) -> Ids:
        """Returns the messages as token ids.  Raises BadData naming the row if the chat template rejects them."""
        if self.tokenizer.chat_template is not None:
            return self.encode(self.chat(row, messages, generation_prompt=generation_prompt))
        if row.tools or any(m.get("tool_calls") for m in messages):
            raise BadData(f"row {row.index}: the tokenizer has no chat template to print tools with")
        text = "\n\n".join(m["content"] for m in messages)
        if self.control.has_hidden(text):
            return self.control.encode(text, add_special_tokens=True)
        return encode_prompt(self.tokenizer, text)

    def text_ids(self, text: str) -> Ids:
        """Returns the ids of a text outside the chat, such as a completion."""
        return self.encode(self._hide(text))

    def foreign_ids(self, text: str) -> Ids:
        """Returns the ids of a text of unknown origin, such as an observation: control tokens in it are plain text."""
        return self.encode(self.control.hide_foreign(text))

    def completion_ids(self, text: str, end: int) -> Ids:
        """Returns a data set's completion as token ids, ended by `end` unless the text ends with an end token."""
        return append_end_token(self.text_ids(text), end, self.tokenizer.eos_token_id)

    def encode(self, text: str) -> Ids:
        """Returns the ids of a rendered text: control tokens as such, hidden ones as plain text."""
        if self.control.has_hidden(text):
            return self.control.encode(text, add_special_tokens=False)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _hide(self, text: str) -> str:
        return self.control.hide(text) if self.keep_text else text

    def _hide_slot(self, slot: Slot, text: str) -> str:
        """What an environment or a writer says forges no role, as in an observation."""
        foreign = is_by_turn(slot) or isinstance(slot, Written)
        return self.control.hide_foreign(text) if foreign else self._hide(text)

    def hidden(self, message: Message) -> Message:
        """Returns a message whose content and tool calls have their control tokens hidden."""
        calls = {"tool_calls": _each_text(message["tool_calls"], self.control.hide)} if "tool_calls" in message else {}
        return {**message, "content": self.control.hide(message["content"]), **calls}

    def messages(self, row: Row) -> tuple[Message, ...]:
        """Returns the row's chat; with `keep_text`, its control tokens are hidden."""
        if not self.keep_text:
            return row.messages
        try:
            return tuple(self.hidden(m) for m in row.messages)
        except BadData as error:
            raise BadData(f"row {row.index}: {error.message}") from None

    def chat(
        self,
        row: Row,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Renders the messages with the chat template, and the tools if there are some: these, the environment's or the row's.

        Raises BadData naming the row if the template rejects them, or prints no tools though the row has some.
        """
        if calls := self.calls_of(row):
            messages, tools = calls.shown(messages), calls.shown_tools
        elif tools is None:
            self._printed_tools.check(row, messages)
            tools = [_each_text(tool, self._hide) for tool in row.tools]
        return self._apply_template(row, messages, tools or None, generation_prompt=generation_prompt)

    def _apply_template(
        self,
        row: Row,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        generation_prompt: bool = True,
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=None if tools is None else list(tools),  # some templates describe an empty list
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **fixed_date(self.tokenizer, self.now),
                **self.options,
            )
        except Exception as error:  # a template is a program, and may raise anything
            roles = listed(m["role"] for m in messages)
            raise BadData(
                f"row {row.index}: the chat template refuses messages of the roles {roles}: {one_line(error)}"
            ) from error

    def student_ids(self, row: Row) -> Ids:
        """Returns the student's prompt with its generation prompt.  Raises BadData as `ids` does."""
        return self.ids(row, self.messages(row))

    def generation_prompt(self, row: Row, messages: Sequence[Message]) -> Ids:
        """Returns the ids at the end of the prompt that start the assistant's turn; none without a chat template."""
        if self.tokenizer.chat_template is None:
            return ()
        full = self.ids(row, messages)
        bare = self.ids(row, messages, generation_prompt=False)
        return full[common_length(full, bare) :]

    def opening(self, row: Row) -> str:
        """Returns the thinking tag that the generation prompt of a row leaves open, or ""."""
        prompt = self.tokenizer.decode(self.generation_prompt(row, row.messages))
        tag = opening_tag(prompt)
        if not tag or tag in dict(TAGS):
            return tag
        # A tag that names the assistant also precedes the text of its finished messages.
        finished = (*row.messages, {"role": "assistant", "content": "ok"})
        try:
            ids = self.ids(row, finished, generation_prompt=False)
        except BadData:
            return tag
        names_assistant = _without_whitespace(prompt) + "ok" in _without_whitespace(self.tokenizer.decode(ids))
        return "" if names_assistant else tag

    def teacher_ids(
        self, row: Row, sees: Sees | None, evidence: GroupOutcome | None = None, turn: TurnOutcome = FIRST_TURN
    ) -> TeacherPrompt | None:
        """Returns the teacher's prompt, truncated to `max_prompt_tokens`; None if a required slot is empty.

        `evidence` fills the slots about rollouts, `turn` those about one turn, which the prompt then precedes, and those
        that were written.  The turns before it are its own ids, and do not count for `max_prompt_tokens`.  Raises BadData
        naming the row if the prompt is too long even with empty slots.
        """
        if sees is None:
            return TeacherPrompt(ids=self.student_ids(row), messages=row.messages, cut_tokens=0)
        values = slot_values(row, sees, evidence, turn, self._hide_slot)
        row = evolve(row, messages=self.messages(row))
        if values is None:
            return None
        full = self._with_slots(row, sees, values, turn)
        limit = sees.max_prompt_tokens
        if limit is None or len(full.ids) - len(turn.history) <= limit:
            return full
        truncated = self._truncate_slots(row, sees, values, turn, limit + len(turn.history))
        return evolve(truncated, cut_tokens=len(full.ids) - len(truncated.ids))

    def _with_slots(self, row: Row, sees: Sees, values: Mapping[str, str], turn: TurnOutcome) -> TeacherPrompt:
        filled = tuple(name for name, value in values.items() if value)
        if isinstance(sees, UserTurn) and turn.last_user:
            ids = self.ids(row, row.messages) + self._in_last_user_turn(sees, values, turn.history, turn.last_user)
            return TeacherPrompt(ids=ids, messages=row.messages, cut_tokens=0, filled=filled)
        messages = tuple(teacher_messages(row, sees, values))
        ids = self.ids(row, messages) + turn.history
        if isinstance(sees, AnswerStart):
            text = fill(parsed(sees.template), slot_lookup({**values, "prompt": row.prompt_text}))
            ids += self.encode(text)
        return TeacherPrompt(ids=ids, messages=messages, cut_tokens=0, filled=filled)

    def _in_last_user_turn(
        self, sees: UserTurn, values: Mapping[str, str], history: Ids, text: tuple[int, int]
    ) -> Ids:
        """Returns a history whose last user turn is the template; `text` is where its own text stands, for {prompt}."""
        start, end = text
        template = parsed(sees.template)
        places = [number for number, part in enumerate(template) if part == PROMPT]
        pieces = [template[a + 1 : b] for a, b in itertools.pairwise([-1, *places, len(template)])]
        texts = [self.encode(fill(piece, slot_lookup(values))) for piece in pieces]
        ids = (*history[:start], *texts[0])
        for following in texts[1:]:
            ids += (*history[start:end], *following)
        return ids + history[end:]

    def _truncate_slots(
        self, row: Row, sees: Sees, values: Mapping[str, str], turn: TurnOutcome, limit: int
    ) -> TeacherPrompt:
        """Truncates the slots to a common number of tokens, the largest that fits, so the longest lose most."""
        names = (name for name, slot in sees.slots.items() if not isinstance(slot, Wording))
        starts = {name: self._token_starts(values[name]) for name in names}

        def with_slots_of(count: int) -> TeacherPrompt:
            cut = {n: _truncate(values[n], at, count, sees.cut) for n, at in starts.items()}
            return self._with_slots(row, sees, {**values, **cut}, turn)

        best = with_slots_of(0)
        if len(best.ids) > limit:
            raise BadData(
                f"row {row.index}: the teacher's prompt has {len(best.ids) - len(turn.history)} tokens with every slot "
                f"empty, more than {sees.max_prompt_tokens}",
                hint="raise teacher.sees.max_prompt_tokens, or drop the row",
            )
        low, high = 0, max(map(len, starts.values()), default=0)
        while high - low > 1:  # `low` fits, `high` does not
            middle = (low + high) // 2
            candidate = with_slots_of(middle)
            if len(candidate.ids) <= limit:
                low, best = middle, candidate
            else:
                high = middle
        return best

    def _token_starts(self, text: str) -> list[int]:
        """Start offsets of the tokens of a text; of its characters if the tokenizer is not a fast one."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]]


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {_each_text(key, change): _each_text(item, change) for key, item in value.items()}
        case list() | tuple():
            return [_each_text(item, change) for item in value]
        case _:
            return value


def _without_whitespace(text: str) -> str:
    return "".join(text.split())


def _truncate(text: str, starts: Sequence[int], count: int, cut: str) -> str:
    """The first `count` tokens of a text, or the last ones with `cut: start`."""
    if count >= len(starts):
        return text
    if cut == "end":
        return text[: starts[count]]
    return text[starts[len(starts) - count] :] if count else ""


def check_generation_prompt(prompter: Prompter, row: Row, teacher: TeacherPrompt) -> None:
    """Raises BadData unless both prompts of a row end with the same generation prompt.

    Some chat templates switch the thinking mode on the text of a message.  The teacher would then score the completion
    as the continuation of a different turn.
    """
    of_student = prompter.generation_prompt(row, row.messages)
    of_teacher = prompter.generation_prompt(row, teacher.messages)
    if of_student != of_teacher:
        decode = prompter.tokenizer.decode
        raise BadData(
            f"row {row.index}: before the completion the student's prompt ends with {decode(of_student)!r} and the "
            f"teacher's with {decode(of_teacher)!r}, so the teacher would score a completion of another turn",
            hint="give both the same thinking mode: see the text of teacher.sees",
        )


def check_prompts(
    prompter: Prompter, rows: Iterable[Row], sees: Sees | None = None, max_prompt_tokens: int | None = None
) -> list[tuple[Ids, TeacherPrompt | None]]:
    """Returns both prompts of every row.  Raises BadData that names each faulty row and its fault."""
    faults: list[BadData] = []
    prompts: list[tuple[Ids, TeacherPrompt | None]] = []
    for row in rows:
        try:
            student = prompter.student_ids(row)
            if max_prompt_tokens is not None and len(student) > max_prompt_tokens:
                message = f"row {row.index}: prompt of {len(student)} tokens, more than {max_prompt_tokens}"
                faults.append(BadData(message, path=("rollout", "max_prompt_tokens")))
            with blaming("teacher", "sees"):
                teacher = prompter.teacher_ids(row, sees)
                if teacher is not None and sees is not None:
                    check_generation_prompt(prompter, row, teacher)
            prompts.append((student, teacher))
        except BadData as error:
            faults.append(error)
    if faults:
        message = first_of([fault.message for fault in faults])
        raise BadData(message, hint=faults[0].hint, path=faults[0].path)
    return prompts


def check_repeatable(prompter: Prompter, rows: Iterable[Row], times: int = 8) -> None:
    """Raises BadData if the chat template renders the same messages differently, or draws random numbers."""
    if prompter.tokenizer.chat_template is None:
        return
    for row in rows:
        before = random.getstate()
        texts = {prompter.chat(row, row.messages) for _ in range(times)}
        if len(texts) > 1 or random.getstate() != before:
            raise BadData(
                f"row {row.index}: the chat template renders the same messages differently each time, "
                "so the run could not be repeated or resumed"
            )
