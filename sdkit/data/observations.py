"""Observations between two turns of the student, as token ids.

What was sampled is never encoded again.  A dummy chat is rendered once, and cut at markers in its texts: what the chat
template writes between the end of an answer and the start of the next one.  An observation's own text is encoded apart,
with spelled-out control tokens as plain text, so it can forge no role.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from sdkit.batches import Row
from sdkit.data.prompts import Ids, Prompter
from sdkit.language.errors import BadData
from sdkit.spans import Message

ANSWER, TEXT = "sdkitanswer", "sdkitobservation"
"""Texts of the dummy chat that no chat template contains; messages are numbered."""
LARGEST_TOKEN = 64
"""Characters per token to which a text is cut before it is encoded; few tokens are longer."""
USER = Message(role="user", content="")


@frozen(kw_only=True)
class ObservationPart:
    """The ids of one message after a turn, and where its own text stands; the last one ends with a generation prompt."""

    role: str
    ids: Ids
    body: tuple[int, int]
    cut_tokens: int  # of its text, which the limit cut off


class ObservationEncoder:
    """Encodes what the student is shown after one of its turns.

    `end` is the token that the template writes after an answer.  Raises BadData if the chat template cannot continue a
    chat with a user message this way.
    """

    def __init__(self, prompter: Prompter, end: int | None, limit: int) -> None:
        self.prompter = prompter
        self.limit = limit  # tokens of a message's text
        if prompter.tokenizer.chat_template is None or end is None:
            raise BadData(
                "several turns need a chat template, which the tokenizer does not have",
                hint="use an instruction-tuned model",
            )
        self._end = end
        self._scaffolds: dict[tuple[tuple[str, str | None], ...], list[Ids]] = {}
        self._scaffold((USER,))

    def encode(self, messages: Sequence[Message], *, closed: bool) -> list[ObservationPart]:
        """Returns the parts after a turn; `closed`: whether an end token was sampled at its end.

        Texts are cut to `limit` tokens.  Characters that are no text are replaced.
        """
        before, *after = self._scaffold(messages)
        before = before if closed else (self._end, *before)
        parts: list[ObservationPart] = []
        for number, message in enumerate(messages):
            body = self._encode_text(message.content)
            kept, following = body[: self.limit], after[number]
            within = (len(before), len(before) + len(kept))
            ids = (*before, *kept, *following)
            parts.append(ObservationPart(role=message.role, ids=ids, body=within, cut_tokens=len(body) - len(kept)))
            before = ()
        return parts

    def _encode_text(self, text: str) -> Ids:
        control = self.prompter.control
        text = text[: self.limit * LARGEST_TOKEN].encode("utf-8", "replace").decode()
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
        return control.encode(control.hide(text), add_special_tokens=False)

    def _scaffold(self, messages: Sequence[Message]) -> list[Ids]:
        """What the template writes around the texts of such messages: before the first, and after each of them."""
        key = tuple((message.role, message.name) for message in messages)
        if key not in self._scaffolds:
            before, *after = map(self.prompter.text_ids, self._around_texts(messages))
            self._check_end(before)
            self._scaffolds[key] = [before[1:], *after]
        return self._scaffolds[key]

    def _check_end(self, before: Ids) -> None:
        if before[:1] != (self._end,):
            raise BadData("the chat template writes something between an answer and its end token")
        if not self.prompter.tokenizer.decode(before[1:]).strip():
            raise BadData(
                "the chat template ends an answer with the token that opens the next turn",
                hint="use a model whose answers have an end token of their own",
            )

    def _around_texts(self, messages: Sequence[Message]) -> list[str]:
        """The texts between an answer and the next generation prompt, cut at the messages' texts."""
        texts = [f"{TEXT}{number}x" for number in range(len(messages))]
        chat = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": ANSWER},
            *({"role": m.role, "content": text} for m, text in zip(messages, texts, strict=True)),
        ]
        dummy = Row(index=0, messages=tuple(chat), columns={}, raw={})
        rendered = self.prompter.chat(dummy, chat)
        if any(rendered.count(text) != 1 for text in (ANSWER, *texts)):
            raise BadData("the chat template does not print earlier turns as they are")
        rest = rendered.partition(ANSWER)[2]
        pieces: list[str] = []
        for text in texts:
            piece, _, rest = rest.partition(text)
            pieces.append(piece)
        return [*pieces, rest]
