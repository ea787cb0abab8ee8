"""What ends an assistant's turn, and a data set's own completions as token ids.  Knows nothing of rows or weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkit.language.errors import BadData

Ids = tuple[int, ...]
PROBE = "sdkitprobe"
"""An answer that no chat template has text of its own for."""


def end_token(tokenizer: Any, options: Mapping[str, Any]) -> int | None:
    """The token that ends an assistant's turn: the chat template's, else the tokenizer's end token; None without either.

    The two differ where a model was trained further: `<|im_end|>` or `<|end|>` in the template, `<|endoftext|>` as the
    tokenizer's.  `options` are those of the chat template.
    """
    named = _of_template(tokenizer, options)
    return tokenizer.eos_token_id if named is None else named


def _of_template(tokenizer: Any, options: Mapping[str, Any]) -> int | None:
    """The first marker that the template writes behind an answer."""
    if tokenizer.chat_template is None:
        return None
    from jinja2 import TemplateError

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, **{**options, "add_generation_prompt": False}
        )
    except (TemplateError, TypeError):  # a template for other conversations: rows will tell
        return None
    _, probe, behind = text.rpartition(PROBE)
    if not probe:
        return None
    added = {token.content: (i, token.special) for i, token in _added(tokenizer)}
    behind = behind.lstrip()
    # A marker at once, special or not; further on a special one, such as behind "</answer>".
    places = {word: behind.find(word) for word in added if word}
    ends = [w for w, place in places.items() if place == 0 or (place > 0 and added[w][1])]
    first = min(ends, key=lambda word: (places[word], -len(word)), default=None)
    return None if first is None else added[first][0]


def _added(tokenizer: Any) -> list[tuple[int, Any]]:
    return list(getattr(tokenizer, "added_tokens_decoder", {}).items())


def encode_prompt(tokenizer: Any, text: str) -> Ids:
    """A text as token ids for a completion to follow: with what the tokenizer puts before a text, not with what it
    appends (an end token, a separator).

    Raises BadData where the tokenizer writes the text itself in other tokens once it adds special ones.
    """
    before = _added_before(tokenizer)
    given, bare = _with_and_without(tokenizer, text)
    if before is not None and given[before : before + len(bare)] == bare:
        return given[: before + len(bare)]
    raise BadData(
        "the tokenizer has no chat template, and writes a prompt in other tokens where it adds special ones",
        hint="give the tokenizer a chat template",
    )


def _added_before(tokenizer: Any) -> int | None:
    """How many tokens the tokenizer puts before a text; None where it changes the text's own."""
    given, bare = _with_and_without(tokenizer, PROBE)
    places = range(len(given) - len(bare) + 1)
    return next((i for i in places if given[i : i + len(bare)] == bare), None)


def _with_and_without(tokenizer: Any, text: str) -> tuple[Ids, Ids]:
    """A text with the tokens that the tokenizer adds, and without."""
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple(tokenizer(text)["input_ids"]), tuple(bare)


def append_end_token(ids: Ids, end: int, eos: int | None) -> Ids:
    """A completion's token ids, ended by `end`; a completion that ends with `end` or `eos` gets no second one."""
    return ids if ids and ids[-1] in (end, eos) else (*ids, end)
