"""Control tokens that the text of a row spells, such as `<|im_end|>`: which there are, and how they stay text.

A hidden spelling is one character of a private plane in the place of a token's name, so that chat templates and cuts
take it for text.  To encode it, a copy of the tokenizer has other names for its control tokens: the template's own are
written by these names, and what was hidden is spelled again, which for the copy is text like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cached_property
from typing import Any

from sdkit.language.errors import BadData

HIDDEN, RENAMED, END = 0x100000, 0x108000, 0x10FFFE
"""Where the characters of hidden spellings and of other names begin, and the end of their plane."""
_PRIVATE = re.compile(f"[{chr(HIDDEN)}-{chr(END)}]")


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.ids = {token.content: i for i, token in added.items() if token.special}
        names = sorted(self.ids, key=len, reverse=True)
        self._number = {name: number for number, name in enumerate(names)}
        self._spelled = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def find(self, text: str) -> str | None:
        """The first control token that a text spells; None where it spells none."""
        match = self._spelled.search(text)
        return match[0] if match else None

    def hide(self, text: str) -> str:
        """The text with every control token that it spells hidden."""
        if _PRIVATE.search(text):
            raise BadData("text with a character of Unicode's last private plane")
        return self._spelled.sub(lambda match: chr(HIDDEN + self._number[match[0]]), text)

    def has_hidden(self, text: str) -> bool:
        """Whether a text has a hidden spelling in it."""
        return _PRIVATE.search(text) is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The ids of a text: what it spells are control tokens, what it hides is text."""
        renamed = self._spelled.sub(lambda match: chr(RENAMED + self._number[match[0]]), text)
        controls = len(self._spelled.findall(text))
        names = list(self._number)
        shown = _PRIVATE.sub(lambda match: _name(match[0], names), renamed)
        ids = self._copy.encode(shown, add_special_tokens=False).ids
        if sum(i in self._control_ids for i in ids) != controls:
            raise BadData("this tokenizer cannot keep the names of control tokens as text")
        return (*(self._start if add_special_tokens else ()), *ids)

    @cached_property
    def _start(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        marked = self.tokenizer("a")["input_ids"]
        return tuple(marked[: marked.index(plain[0])])

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.ids.values())

    @cached_property
    def _copy(self) -> Any:
        """The tokenizer with other names for its control tokens, under the ids that they have."""
        from tokenizers import Tokenizer

        if not self.tokenizer.is_fast:
            raise BadData(
                "this tokenizer cannot keep control tokens as text: it has no fast version"
            )
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        renamed = {name: chr(RENAMED + number) for name, number in self._number.items()}
        for token in state["added_tokens"]:
            if token["special"]:
                token["content"] = renamed[token["content"]]
        model = state["model"]
        model["vocab"] = _renamed_vocabulary(model["vocab"], renamed)
        if "merges" in model:
            model["merges"] = [m for m in model["merges"] if not _makes(m, renamed)]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        state |= {"truncation": None, "padding": None, "post_processor": None}
        copy = Tokenizer.from_str(json.dumps(state))
        if any(copy.token_to_id(renamed[name]) != i for name, i in self.ids.items()):
            raise BadData(
                "this tokenizer cannot keep control tokens as text: their ids would change"
            )
        return copy


def _name(character: str, names: list[str]) -> str:
    """What stands for a private character: the name that it hides, or itself where it is another name."""
    number = ord(character) - HIDDEN
    return names[number] if number < RENAMED - HIDDEN else character


def _makes(merge: Any, names: Collection[str]) -> bool:
    """Whether a merge of BPE makes one of these pieces, or takes one."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left + right in names or left in names or right in names


def _renamed_vocabulary(vocabulary: Any, renamed: dict[str, str]) -> Any:
    if isinstance(vocabulary, dict):
        return {renamed.get(piece, piece): i for piece, i in vocabulary.items()}
    return [[renamed.get(piece, piece), score] for piece, score in vocabulary]
