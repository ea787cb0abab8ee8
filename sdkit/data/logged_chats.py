"""Completions of the data set as token ids: a text, or the turns of a logged chat.

A logged chat becomes what a trajectory of the same turns would be: every turn of the assistant is encoded apart and closed
by its end token, and what the chat template writes between two turns belongs to the messages in between.  Nothing is read off
a rendering of the chat as a whole, where templates may print earlier turns in another form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from attrs import frozen

from sdkit.batches import Message, Row
from sdkit.data.dummy_chats import USER, check_opens_turn, cut_at, end_of_turns, in_json, text_before_end
from sdkit.data.prompts import Ids, Prompter
from sdkit.data.turn_ends import append_end_token
from sdkit.language.errors import BadData, first_of
from sdkit.language.row_text import Turns
from sdkit.spans import ASSISTANT, Ending, Span

ANSWER = "sdkitanswer"
"""Stands for an answer in a dummy chat; no chat template contains it."""
ENDS_OF_CALLS = ("<|call|>", "<|eom_id|>")
"""End tokens of tool calls, in templates that end an answer with another token."""


@frozen(kw_only=True)
class LoggedCompletion:
    """A completion of the data set."""

    ids: Ids
    spans: tuple[Span, ...] = ()  # none: a text, which is one turn

    def cut(self, limit: int) -> LoggedCompletion:
        """Returns the first `limit` tokens, without messages that no turn follows."""
        ids = self.ids[:limit]
        if not self.spans or len(ids) == len(self.ids):
            return LoggedCompletion(ids=ids, spans=self.spans)
        last = max(i for i, span in enumerate(self.spans) if span.sampled and span.start < limit)
        kept, end = self.spans[: last + 1], min(self.spans[last].end, limit)
        spans = (*kept[:-1], Span(role=ASSISTANT, turn=kept[-1].turn, start=kept[-1].start, end=end))
        return LoggedCompletion(ids=ids[:end], spans=spans)

    def ending(self, limit: int) -> Ending | None:
        """Why the trajectory of a chat ends; None for a text."""
        if not self.spans:
            return None
        return "done" if len(self.ids) <= limit else "max_tokens"


@frozen(kw_only=True)
class _Frame:
    """What the chat template writes for one turn and the messages that follow it."""

    call: str | None  # the turn with its tool calls, without its end token; None: the answer as it is
    end: str  # from the end token to the text of the first message
    after: tuple[str, ...]  # after the text of each message; the last one ends with the next generation prompt
    escaped: tuple[bool, ...]  # of each message, whether its text is printed as a JSON string


class CompletionEncoder:
    """Encodes completions of the data set; `end` is the token that the chat template writes after an answer."""

    def __init__(self, prompter: Prompter, end: int | None) -> None:
        self.prompter = prompter
        self.end = end

    def encode(self, row: Row, column: str) -> LoggedCompletion:
        """Returns a row's completion, each turn with its end token.  Raises BadData naming the row."""
        value = row.columns.get(column)
        if not isinstance(value, Turns):
            end = -1 if self.end is None else self.end
            return LoggedCompletion(ids=self.prompter.completion_ids(row.text(column) or "", end))
        end = end_of_turns(self.prompter.tokenizer, self.end)
        ids: list[int] = []
        spans: list[Span] = []
        for turn, (answer, messages, is_last) in enumerate(_turns(value), 1):
            for role, part, body in self._parts(row, answer, () if is_last else messages, end):
                start = len(ids)
                ids += part
                within = body and (start + body[0], start + body[1])
                spans.append(Span(role=role, turn=turn, start=start, end=len(ids), body=within))
        return LoggedCompletion(ids=tuple(ids), spans=tuple(spans))

    def turns(self, row: Row, column: str) -> list[Ids]:
        """Returns each of the assistant's turns in a row's chat as `encode` has it, without what stands in between.

        Calls are lines of text where the environment's tools are called so.  Raises BadData naming the row.
        """
        value, calls = row.columns.get(column), self.prompter.calls_of(row)
        if not isinstance(value, Turns):
            raise BadData(f"row {row.index}: '{column}' has no turns of a chat")
        end = end_of_turns(self.prompter.tokenizer, self.end)
        answers = [message for message in value if message["role"] == ASSISTANT]
        try:
            written = [calls.written(answer) if calls else answer for answer in answers]
        except BadData as fault:
            raise BadData(f"row {row.index}: {fault.message}", hint=fault.hint) from None
        return [next(self._parts(row, answer, (), end))[1] for answer in written]

    def changed_by_template(self, row: Row, column: str) -> bool:
        """Whether the chat template prints the chat as a whole otherwise than `encode` does."""
        value = row.columns.get(column)
        if not isinstance(value, Turns):
            return False
        used = value[: max(i for i, message in enumerate(value) if message["role"] == ASSISTANT) + 1]
        chat = [*self.prompter.messages(row), *used]
        decode = self.prompter.tokenizer.decode
        text = decode([*self.prompter.student_ids(row), *self.encode(row, column).ids])
        whole = decode(self.prompter.encode(self.prompter.chat(row, chat, generation_prompt=False)))
        return not whole.startswith(text)

    def _parts(
        self, row: Row, answer: Message, messages: Sequence[Message], end: int
    ) -> Iterator[tuple[str, Ids, tuple[int, int] | None]]:
        """The role, the ids and the body of a turn and of each message after it."""
        encode = self.prompter.encode
        if not messages and not answer.get("tool_calls"):
            yield ASSISTANT, self.prompter.completion_ids(answer["content"], end), None
            return
        frame = self._frame(row, answer, messages)
        before = encode(frame.end)
        self._check_end(row, frame, before, end)
        if frame.call is None:
            yield ASSISTANT, self.prompter.completion_ids(answer["content"], end), None
        else:
            yield ASSISTANT, append_end_token(encode(frame.call), before[0], None), None
        before = before[1:]
        # Results that `_frame` made up for a last call belong to no message.
        for message, after, escaped in zip(messages, frame.after, frame.escaped, strict=bool(messages)):
            text = in_json(message["content"]) if escaped else message["content"]
            body = encode(self.prompter.control.hide(text))
            yield message["role"], (*before, *body, *encode(after)), (len(before), len(before) + len(body))
            before = ()

    def _check_end(self, row: Row, frame: _Frame, before: Ids, end: int) -> None:
        """Raise BadData unless the turn is closed by an end token of its own."""
        if before[:1] != (end,) and frame.call is None:
            raise text_before_end(f"row {row.index}: ")
        check_opens_turn(self.prompter.tokenizer, before[1:], f"row {row.index}: ")

    def _frame(self, row: Row, answer: Message, messages: Sequence[Message]) -> _Frame:
        """Cut a dummy chat, rendered with the turn, at markers in place of the messages' texts."""
        calls = answer.get("tool_calls")
        shown = self.prompter.hidden(answer) if calls else {**answer, "content": ANSWER}
        following = messages or [_result(call) for call in calls or ()]
        markers = [f'sdkit"{number}"message' for number in range(len(following))]
        dummies = [{**message, "content": marker} for message, marker in zip(following, markers, strict=True)]
        rendered = self.prompter.chat(row, [USER, shown, *dummies])
        cut = cut_at(rendered, markers)
        if cut is None:
            raise BadData(f"row {row.index}: the chat template does not print every message of the chat once")
        pieces, escaped = cut
        if calls:
            start = self.prompter.chat(row, [USER])
            if not pieces[0].startswith(start):
                raise BadData(f"row {row.index}: the chat template opens a turn with tool calls in another way")
            call, end = self._until_end(row, pieces[0][len(start) :])
        else:
            if rendered.count(ANSWER) != 1:
                raise BadData(f"row {row.index}: the chat template does not print earlier turns as they are")
            call, end = None, pieces[0].partition(ANSWER)[2]
        return _Frame(call=call, end=end, after=tuple(pieces[1:]), escaped=escaped)

    def _until_end(self, row: Row, text: str) -> tuple[str, str]:
        """The text up to its first end token, and from there on."""
        tokenizer = self.prompter.tokenizer
        names = {tokenizer.decode([self.end]), tokenizer.eos_token, *ENDS_OF_CALLS}.intersection(
            self.prompter.control.ids
        )
        places = [place for name in names if (place := text.find(name)) >= 0]
        if not places:
            raise BadData(f"row {row.index}: the chat template ends a turn with tool calls by no known end token")
        return text[: min(places)], text[min(places) :]


def encode_all(encoder: CompletionEncoder, rows: Iterable[Row], column: str) -> list[tuple[Row, Ids]]:
    """Returns each row with the ids of its completion.  Raises BadData that names each faulty row."""
    completions: list[tuple[Row, Ids]] = []
    faults: list[BadData] = []
    for row in rows:
        try:
            completions.append((row, encoder.encode(row, column).ids))
        except BadData as fault:
            faults.append(fault)
    if faults:
        raise BadData(first_of(list(dict.fromkeys(fault.message for fault in faults))), hint=faults[0].hint)
    return completions


def _turns(chat: Turns) -> Iterator[tuple[Message, list[Message], bool]]:
    """Each turn of the assistant, the messages after it, and whether it is the last."""
    groups = [list(group) for _, group in groupby(chat, key=lambda message: message["role"] == ASSISTANT)]
    for place in range(0, len(groups), 2):
        (answer,) = groups[place]
        yield answer, groups[place + 1] if place + 1 < len(groups) else [], place + 2 >= len(groups)


def _result(call: Any) -> Message:
    """A tool's result to follow a call."""
    identity = {"tool_call_id": call["id"]} if "id" in call else {}
    return {"role": "tool", "content": "", "name": call["function"]["name"], **identity}


def control_text(row: Row, column: str) -> str:
    """The text of a column in which spelled-out control tokens are read as such; of a logged chat, the assistant's answers."""
    value = row.columns.get(column)
    if not isinstance(value, Turns):
        return row.text(column) or ""
    return "\n".join(m["content"] for m in value if m["role"] == ASSISTANT and not m.get("tool_calls"))


def unanswered(row: Row, column: str) -> bool:
    """Whether a row's logged chat goes on after the assistant's last turn."""
    value = row.columns.get(column)
    return isinstance(value, Turns) and value[-1]["role"] != ASSISTANT
