"""Control tokens that the text of a row spells out, such as `<|im_end|>`: finds them, and encodes them as plain text.

`hide` replaces each spelled-out control token with one private-use character, which chat templates and truncation treat
as text.  To encode such text, a copy of the tokenizer gives its control tokens other names.  The template's own control
tokens are written with the new names; hidden ones get their original spelling back, which the copy reads as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cached_property
from typing import Any

from sdkit.data.turn_ends import encode_prompt
from sdkit.language.errors import BadData

HIDDEN, RENAMED, END = 0x100000, 0x108000, 0x10FFFE
"""First characters for hidden spellings and for new names, and the end of their Unicode plane."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PRIVATE = re.compile(f"[{chr(HIDDEN)}-{chr(END)}]")


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.ids = {token.content: i for i, token in added.items() if token.special}
        self._control_ids = frozenset(self.ids.values())
        names = sorted(self.ids, key=len, reverse=True)
        self._number = {name: number for number, name in enumerate(names)}
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def find(self, text: str) -> str | None:
        """Returns the first control token that a text spells out, or None."""
        match = self._pattern.search(text)
        return match[0] if match else None

    def hide(self, text: str) -> str:
        """Returns the text with every spelled-out control token hidden.  Raises BadData if it has private characters."""
        if _PRIVATE.search(text):
            raise BadData("text with a character of Unicode's last private plane")
        return self._pattern.sub(lambda match: chr(HIDDEN + self._number[match[0]]), text)

    def hide_foreign(self, text: str) -> str:
        """Returns a text of unknown origin with its control tokens hidden, and with what is no text replaced."""
        text = text.encode("utf-8", "replace").decode().replace("\0", REPLACEMENT)
        return self.hide(_PRIVATE.sub(REPLACEMENT, text))

    def has_hidden(self, text: str) -> bool:
        """Whether a text contains a hidden control token."""
        return _PRIVATE.search(text) is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Encodes a text: spelled-out control tokens become control tokens, hidden ones plain text."""
        renamed = self._pattern.sub(lambda match: chr(RENAMED + self._number[match[0]]), text)
        controls = len(self._pattern.findall(text))
        names = list(self._number)
        revealed = _PRIVATE.sub(lambda match: _reveal(match[0], names), renamed)
        ids = self._copy.encode(revealed, add_special_tokens=False).ids
        if sum(i in self._control_ids for i in ids) != controls:
            raise BadData("this tokenizer cannot keep the names of control tokens as text")
        return (*(self._prefix if add_special_tokens else ()), *ids)

    @cached_property
    def _prefix(self) -> tuple[int, ...]:
        """The ids that the tokenizer adds before a text."""
        return encode_prompt(self.tokenizer, "")

    @cached_property
    def _copy(self) -> Any:
        """A copy of the tokenizer with other names for its control tokens, which keep their ids."""
        from tokenizers import Tokenizer

        if not self.tokenizer.is_fast:
            raise BadData("this tokenizer cannot keep control tokens as text: it has no fast version")
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        renamed = {name: chr(RENAMED + number) for name, number in self._number.items()}
        for token in state["added_tokens"]:
            if token["special"]:
                token["content"] = renamed[token["content"]]
        model = state["model"]
        model["vocab"] = _renamed_vocabulary(model["vocab"], renamed)
        if "merges" in model:
            model["merges"] = [m for m in model["merges"] if not _involves(m, renamed)]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        state |= {"truncation": None, "padding": None, "post_processor": None}
        copy = Tokenizer.from_str(json.dumps(state))
        if any(copy.token_to_id(renamed[name]) != i for name, i in self.ids.items()):
            raise BadData("this tokenizer cannot keep control tokens as text: their ids would change")
        return copy


def _reveal(character: str, names: list[str]) -> str:
    """The name that a private character hides, or the character itself if it is a new name."""
    number = ord(character) - HIDDEN
    return names[number] if number < RENAMED - HIDDEN else character


def _involves(merge: Any, names: Collection[str]) -> bool:
    """Whether a BPE merge produces or consumes one of these pieces."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left + right in names or left in names or right in names


def _renamed_vocabulary(vocabulary: Any, renamed: dict[str, str]) -> Any:
    if isinstance(vocabulary, dict):
        return {renamed.get(piece, piece): i for piece, i in vocabulary.items()}
    return [[renamed.get(piece, piece), score] for piece, score in vocabulary]
