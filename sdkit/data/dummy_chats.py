"""Dummy chats: rendered to learn what a chat template writes around texts, and cut at markers that no template contains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sdkit.batches import Message, Row
from sdkit.language.errors import BadData

USER: Message = {"role": "user", "content": "a"}
ROW = Row(index=0, messages=(), columns={}, raw={})
"""The row of a chat that is not in the data."""


def in_json(text: str) -> str:
    """Returns a text as it is written within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def cut_at(text: str, markers: Sequence[str]) -> tuple[list[str], tuple[bool, ...]] | None:
    """Returns the pieces of a text around the markers, and whether each marker is written as within a JSON string.

    A marker contains a quotation mark, so that the two ways differ.  None unless each stands once, in this order.
    """
    pieces: list[str] = []
    escaped: list[bool] = []
    for marker in markers:
        quoted = in_json(marker)
        escaped.append(quoted in text)
        piece, cut, text = text.partition(quoted if escaped[-1] else marker)
        if not cut or any(each in part for part in (piece, text) for each in (marker, quoted)):
            return None
        pieces.append(piece)
    return [*pieces, text], tuple(escaped)


def end_of_turns(tokenizer: Any, end: int | None) -> int:
    """Returns the token that the chat template writes after an answer, `end`.  Raises BadData without one."""
    if tokenizer.chat_template is None or end is None:
        raise BadData(
            "several turns need a chat template, which the tokenizer does not have",
            hint="use an instruction-tuned model",
        )
    return end


def text_before_end(at: str = "") -> BadData:
    """Returns the error of a template that writes something after an answer; `at` begins the message."""
    return BadData(f"{at}the chat template writes something between an answer and its end token")


def check_opens_turn(tokenizer: Any, after_end: Sequence[int], at: str = "") -> None:
    """Raises BadData unless ids after the end of an answer open the next turn; `at` begins the message."""
    if not tokenizer.decode(after_end).strip():
        raise BadData(
            f"{at}the chat template ends an answer with the token that opens the next turn",
            hint="use a model whose answers have an end token of their own",
        )
