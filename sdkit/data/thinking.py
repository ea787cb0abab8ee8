"""Thinking in completions: finds its tags, removes it from the answer.  Knows nothing of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

TAGS: Sequence[tuple[str, str]] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"),
)
"""Opening and closing tags of known models, for chat templates that do not show them."""
_LAST_TAG = re.compile(r"(?:<([A-Za-z][\w:-]*)>|\[([A-Z][A-Z_]*)\])\s*\Z")


def without_thinking(text: str, opening: str = "", tags: Iterable[tuple[str, str]] = TAGS) -> str:
    """Returns a completion without its thinking; "" if the thinking never ends.

    `opening` is the tag with which the prompt opens the thinking.  Even without it, a closing tag is taken to end
    thinking that the prompt opened: everything up to the last closing tag is removed.
    """
    text = opening + text
    for start, end in [*tags, *_additional_tags(opening)]:
        text = re.sub(f"{re.escape(start)}.*?{re.escape(end)}", "", text, flags=re.DOTALL)
        text = text.rpartition(end)[2].partition(start)[0]
    return text.strip()


def opening_tag(generation_prompt: str) -> str:
    """Returns the thinking tag that a generation prompt leaves open, or "".

    A tag that is not in TAGS counts if it ends the prompt.  It may also be one that names the assistant, so the caller
    must check what follows it in a finished chat.
    """
    for start, end in TAGS:
        if start in generation_prompt.rpartition(end)[2]:
            return start
    match = _LAST_TAG.search(generation_prompt)
    return match[0].rstrip() if match else ""


def answer_text(tokenizer: Any, ids: Sequence[int], opening: str) -> str:
    """Returns a completion's text without thinking and special tokens; the thinking tags may be special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    tags = "\n".join(tag for pair in (*TAGS, *_additional_tags(opening)) for tag in pair)
    if not any(token in tags for token in special):
        return without_thinking(text, opening)
    with_special = tokenizer.decode(ids, skip_special_tokens=False)
    if not opening and without_thinking(with_special) == with_special.strip():
        return text.strip()
    answer = without_thinking(with_special, opening)
    return re.sub("|".join(map(re.escape, special)), "", answer).strip()


def _additional_tags(opening: str) -> list[tuple[str, str]]:
    """The tags of an opening that is not in TAGS."""
    if not opening or opening in {start for start, _ in TAGS}:
        return []
    return [(opening, f"{opening[0]}/{opening[1:]}")]
