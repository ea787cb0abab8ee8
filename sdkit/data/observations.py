"""Observations between two turns of the student, as token ids.

What was sampled is never encoded again.  A dummy chat is rendered once, and cut at markers in its texts: what the chat
template writes between the end of an answer and the start of the next one.  An observation's own text is encoded apart,
with spelled-out control tokens as plain text, so it can forge no role.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from sdkit.batches import Message as ChatMessage
from sdkit.data import dummy_chats
from sdkit.data.call_formats import call_messages
from sdkit.data.dummy_chats import ROW, check_opens_turn, cut_at, end_of_turns, in_json, text_before_end
from sdkit.data.prompts import Ids, Prompter
from sdkit.language.errors import BadData
from sdkit.spans import Message

ANSWER, TEXT = "sdkitanswer", "sdkitobservation"
"""Texts of the dummy chat that no chat template contains, with a number and a quotation mark."""
LARGEST_TOKEN = 64
"""Characters per token to which a text is cut before it is encoded; few tokens are longer."""
USER, RESULT = Message(role="user", content=""), Message(role="tool", content="")


@frozen(kw_only=True)
class ObservationPart:
    """The ids of one message after a turn, and where its own text stands; the last one ends with a generation prompt."""

    role: str
    ids: Ids
    body: tuple[int, int]
    cut_tokens: int  # of its text, which the limit cut off


@frozen(kw_only=True)
class _Scaffold:
    """What the chat template writes around the texts of some messages after a turn."""

    end: int  # the token that ends the turn before them
    before: Ids  # between that token and the first text
    after: tuple[Ids, ...]  # after each text
    escaped: tuple[bool, ...]  # whether a text is written as in a JSON string


class ObservationEncoder:
    """Encodes what the student is shown after one of its turns.

    `end` is the token that the template writes after an answer.  Raises BadData if the chat template cannot continue a
    chat with a user message this way, or with the results of tools.
    """

    def __init__(self, prompter: Prompter, end: int | None) -> None:
        self.prompter = prompter
        self._end = end_of_turns(prompter.tokenizer, end)
        self._scaffolds: dict[tuple[tuple[str, str | None], ...], _Scaffold] = {}
        self._scaffold((USER,))
        if prompter.calls:
            self._scaffold(prompter.calls.observation([RESULT]))

    def encode(self, messages: Sequence[Message], *, closed: bool, limit: int) -> list[ObservationPart]:
        """Returns the parts after a turn; `closed`: whether an end token was sampled at its end.

        Texts are cut to `limit` tokens together.  Characters that are no text are replaced.
        """
        shown = self.prompter.calls.observation(messages) if self.prompter.calls else messages
        roles = [message.role for message in messages]
        scaffold = self._scaffold(shown)
        before = scaffold.before if closed else (scaffold.end, *scaffold.before)
        parts: list[ObservationPart] = []
        left = limit
        for role, message, following, escaped in zip(roles, shown, scaffold.after, scaffold.escaped, strict=False):
            body = self._encode_text(message.content, limit, escaped=escaped)
            kept = body[:left]
            left -= len(kept)
            within = (len(before), len(before) + len(kept))
            ids = (*before, *kept, *following)
            parts.append(ObservationPart(role=role, ids=ids, body=within, cut_tokens=len(body) - len(kept)))
            before = ()
        return parts

    def _encode_text(self, text: str, limit: int, *, escaped: bool) -> Ids:
        text = text[: limit * LARGEST_TOKEN]
        return self.prompter.foreign_ids(in_json(text) if escaped else text)

    def _scaffold(self, messages: Sequence[Message]) -> _Scaffold:
        key = tuple((message.role, message.name) for message in messages)
        if key not in self._scaffolds:
            self._scaffolds[key] = self._cut(messages)
        return self._scaffolds[key]

    def _cut(self, messages: Sequence[Message]) -> _Scaffold:
        """Render a chat with such messages, and cut it at their texts."""
        answers, texts, chat = self._dummy(messages)
        rendered = self.prompter.chat(ROW, chat)
        cut = cut_at(rendered, texts)
        if cut is None or any(rendered.count(text) != 1 for text in answers):
            raise BadData("the chat template does not print earlier turns as they are")
        (first, *rest), escaped = cut
        end, before = self._split_at_end(
            self.prompter.encode(first.partition(answers[-1])[2]), is_answer=not _has_results(messages)
        )
        return _Scaffold(end=end, before=before, after=tuple(map(self.prompter.encode, rest)), escaped=escaped)

    def _split_at_end(self, ids: Ids, *, is_answer: bool) -> tuple[int, Ids]:
        """The token that ends a turn, and the ids behind it; only a tool call has text of its own before that token."""
        special = {self._end, *self.prompter.control.ids.values()}
        if is_answer and ids[:1] and ids[0] not in special:
            raise text_before_end()
        place = next((place for place, i in enumerate(ids) if i in special), None)
        if place is None:
            raise BadData("the chat template ends a turn without an end token")
        check_opens_turn(self.prompter.tokenizer, ids[place + 1 :])
        return ids[place], ids[place + 1 :]

    def _dummy(self, messages: Sequence[Message]) -> tuple[list[str], list[str], list[ChatMessage]]:
        """A chat with such messages: the texts in the turn before them, their texts, and the chat."""
        texts = [f'{TEXT}{number}"x' for number in range(len(messages))]
        calls, names = self.prompter.calls, [message.name for message in messages if message.role == "tool"]
        if calls and names:
            answers = [f"{ANSWER}{number}x" for number in range(len(names))]
            turn = call_messages(calls.tools, names, answers)
        else:
            answers = [ANSWER]
            turn = {"role": "assistant", "content": ANSWER}
        shown = [_chat_message(m, text) for m, text in zip(messages, texts, strict=True)]
        return answers, texts, [dummy_chats.USER, turn, *shown]


def _chat_message(message: Message, text: str) -> ChatMessage:
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": text, **named}


def _has_results(messages: Sequence[Message]) -> bool:
    return any(message.role == "tool" for message in messages)
