"""Thinking in completions: the tags around it, and the answer that is left without it.  Knows nothing of rows."""

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
"""What models write where thinking begins and ends, for those whose chat template does not show it."""
_LAST_TAG = re.compile(r"(?:<([A-Za-z][\w:-]*)>|\[([A-Z][A-Z_]*)\])\s*\Z")


def without_thinking(text: str, opening: str = "", tags: Iterable[tuple[str, str]] = TAGS) -> str:
    """A completion without its thinking; "" where the thinking never ends.

    `opening` is the tag with which the prompt has begun the thinking.  Without it too a closing tag ends thinking that
    the prompt has opened: everything up to the last one is left out.
    """
    text = opening + text
    for start, end in [*tags, *_own_tags(opening)]:
        text = re.sub(f"{re.escape(start)}.*?{re.escape(end)}", "", text, flags=re.DOTALL)
        text = text.rpartition(end)[2].partition(start)[0]
    return text.strip()


def opening_tag(generation_prompt: str) -> str:
    """The tag of thinking that a generation prompt opens and leaves open; "" where there is none.

    A tag that is not in TAGS counts where it ends the prompt.  Such a tag may as well name the assistant: the caller
    must know what follows it in a finished chat.
    """
    for start, end in TAGS:
        if start in generation_prompt.rpartition(end)[2]:
            return start
    last = _LAST_TAG.search(generation_prompt)
    return last[0].rstrip() if last else ""


def answer_text(tokenizer: Any, ids: Sequence[int], opening: str) -> str:
    """The text of a completion without its thinking and without special tokens, some of which may be the tags."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    marks = "\n".join(tag for pair in (*TAGS, *_own_tags(opening)) for tag in pair)
    if not any(token in marks for token in special):
        return without_thinking(text, opening)
    spelled = tokenizer.decode(ids, skip_special_tokens=False)
    if not opening and without_thinking(spelled) == spelled.strip():
        return text.strip()
    left = without_thinking(spelled, opening)
    return re.sub("|".join(map(re.escape, special)), "", left).strip()


def _own_tags(opening: str) -> list[tuple[str, str]]:
    """The tags of an opening that the table does not have."""
    if not opening or opening in {start for start, _ in TAGS}:
        return []
    return [(opening, f"{opening[0]}/{opening[1:]}")]
