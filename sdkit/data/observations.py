"""Observations between two turns of the student, as token ids.

What was sampled is never encoded again.  A dummy chat is rendered once, and cut at markers in its texts: what the chat
template writes between the end of an answer and the start of the next one.  An observation's own text is encoded apart,
with spelled-out control tokens as plain text, so it can forge no role.
"""

from __future__ import annotations

from attrs import frozen

from sdkit.batches import Row
from sdkit.data.prompts import Ids, Prompter
from sdkit.language.errors import BadData

ANSWER, TEXT = "sdkitanswer", "sdkitobservation"
"""Texts of the dummy chat that no chat template contains."""
LARGEST_TOKEN = 64
"""Characters per token to which a text is cut before it is encoded; few tokens are longer."""


@frozen(kw_only=True)
class Observation:
    """What follows a turn: ids up to and including the next generation prompt, and where its own text stands."""

    ids: Ids
    body: tuple[int, int]
    cut_tokens: int  # of its text, which the limit cut off


class ObservationEncoder:
    """Encodes what the student is shown after one of its turns, as a message of the role `user`.

    `end` is the token that the template writes after an answer.  Raises BadData if the chat template cannot continue a
    chat this way.
    """

    def __init__(self, prompter: Prompter, end: int | None, limit: int) -> None:
        self.prompter = prompter
        self.limit = limit  # tokens of an observation's text
        if prompter.tokenizer.chat_template is None or end is None:
            raise BadData(
                "several turns need a chat template, which the tokenizer does not have",
                hint="use an instruction-tuned model",
            )
        before, after = self._around_text()
        ids = prompter.text_ids(before)
        if ids[:1] != (end,):
            raise BadData("the chat template writes something between an answer and its end token")
        if not prompter.tokenizer.decode(ids[1:]).strip():
            raise BadData(
                "the chat template ends an answer with the token that opens the next turn",
                hint="use a model whose answers have an end token of their own",
            )
        self._end, self._before, self._after = end, ids[1:], prompter.text_ids(after)

    def encode(self, text: str, *, closed: bool) -> Observation:
        """Returns the ids after a turn; `closed`: whether an end token was sampled at its end.

        The text is cut to `limit` tokens.  Characters that are no text are replaced.
        """
        body = self._encode_text(text)
        kept = body[: self.limit]
        before = self._before if closed else (self._end, *self._before)
        return Observation(
            ids=(*before, *kept, *self._after),
            body=(len(before), len(before) + len(kept)),
            cut_tokens=len(body) - len(kept),
        )

    def _encode_text(self, text: str) -> Ids:
        control = self.prompter.control
        text = text[: self.limit * LARGEST_TOKEN].encode("utf-8", "replace").decode()
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
        return control.encode(control.hide(text), add_special_tokens=False)

    def _around_text(self) -> tuple[str, str]:
        """What the template writes between an answer and an observation's text, and after that text."""
        chat = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": TEXT},
        ]
        dummy = Row(index=0, messages=tuple(chat), columns={}, raw={})
        rendered = self.prompter.chat(dummy, chat)
        if rendered.count(ANSWER) != 1 or rendered.count(TEXT) != 1:
            raise BadData("the chat template does not print earlier turns as they are")
        _, _, tail = rendered.partition(ANSWER)
        before, _, after = tail.partition(TEXT)
        return before, after
