"""End tokens of assistant turns, and texts encoded without a chat template.  Knows nothing of rows or weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkit.language.errors import BadData

Ids = tuple[int, ...]
PROBE = "sdkitprobe"
"""An answer that no chat template contains."""


def end_token(tokenizer: Any, options: Mapping[str, Any]) -> int | None:
    """Returns the token that ends an assistant's turn: the chat template's, else the tokenizer's EOS token, or None.

    The two differ for some fine-tuned models: `<|im_end|>` or `<|end|>` in the template, `<|endoftext|>` in the
    tokenizer.  `options` are those of the chat template.
    """
    end = _template_end(tokenizer, options)
    return tokenizer.eos_token_id if end is None else end


def _template_end(tokenizer: Any, options: Mapping[str, Any]) -> int | None:
    """The first marker that the template writes after an answer."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **{**options, "add_generation_prompt": False})
    except Exception:  # the template needs another kind of chat: checked with the rows
        return None
    _, probe, suffix = text.rpartition(PROBE)
    if not probe:
        return None
    tokens = getattr(tokenizer, "added_tokens_decoder", {})
    added = {token.content: (i, token.special) for i, token in tokens.items()}
    suffix = suffix.lstrip()
    # Any added token directly after the answer; further on only special ones, such as after "</answer>".
    places = {word: suffix.find(word) for word in added if word}
    ends = [w for w, place in places.items() if place == 0 or (place > 0 and added[w][1])]
    first = min(ends, key=lambda word: (places[word], -len(word)), default=None)
    return None if first is None else added[first][0]


def encode_prompt(tokenizer: Any, text: str) -> Ids:
    """Encodes a text that a completion will follow: with the tokens that the tokenizer prepends, without those that it
    appends (an end token, a separator).

    Raises BadData if the tokenizer encodes the text itself differently when it adds special tokens.
    """
    prefix = _count_prepended(tokenizer)
    given, bare = _with_and_without(tokenizer, text)
    if prefix is not None and given[prefix : prefix + len(bare)] == bare:
        return given[: prefix + len(bare)]
    raise BadData(
        "the tokenizer has no chat template, and writes a prompt in other tokens where it adds special ones",
        hint="give the tokenizer a chat template",
    )


def _count_prepended(tokenizer: Any) -> int | None:
    """How many tokens the tokenizer prepends; None if it changes the text's own tokens."""
    given, bare = _with_and_without(tokenizer, PROBE)
    places = range(len(given) - len(bare) + 1)
    return next((i for i in places if given[i : i + len(bare)] == bare), None)


def _with_and_without(tokenizer: Any, text: str) -> tuple[Ids, Ids]:
    """Encodes a text with and without the tokens that the tokenizer adds."""
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple(tokenizer(text)["input_ids"]), tuple(bare)


def append_end_token(ids: Ids, end: int, eos: int | None) -> Ids:
    """Appends `end` to a completion's token ids, unless they already end with `end` or `eos`."""
    return ids if ids and ids[-1] in (end, eos) else (*ids, end)
