"""Which tokens of a text a regular expression matches.

Offsets come from decoding token by token, never from encoding the text again, which may give other tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import regex

from sdkit.language.errors import BadData, shorten

Decode = Callable[[Sequence[int]], str]
"""The text of token ids, without special tokens."""
SECONDS = 5.0
"""Time limit of a search in one text.  Nothing that the rule `span_pattern` accepts comes near it on usual texts."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The end of a text whose last character has further bytes in the next token."""


def matched_tokens(pattern: str, ids: Sequence[int], decode: Decode) -> set[int]:
    """Returns the indices of the tokens that touch a match: its groups, or all of it if the pattern has none.

    Raises BadData if the search takes too long.
    """
    searched = _compiled(pattern)
    try:
        if not searched.search(decode(ids), timeout=SECONDS):
            return set()
        text, offsets = token_offsets(ids, decode)
        matches = list(searched.finditer(text, timeout=SECONDS))
    except TimeoutError:
        message = f"the search for {shorten(pattern)} took over {SECONDS:g} s in a text of {len(ids)} tokens"
        raise BadData(message, hint="write a pattern that cannot match the same text in many ways") from None
    groups = range(1, searched.groups + 1) if searched.groups else (0,)
    parts = [part for match in matches for group in groups for part in match.spans(group)]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    ranges = [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in parts if start < end]
    return {i for ends in ranges for i in range(*ends)}


def token_offsets(ids: Sequence[int], decode: Decode) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of the ids, and where each token's characters start and end in it.

    Tokens that share a character all have it.  A token without text, such as a special token, has an empty range.
    """
    text = decode(ids)
    pieces = {i: decode([i]) for i in set(ids)}
    if "".join(pieces[i] for i in ids) != text:
        return _incremental_offsets(ids, decode)
    ends = list(accumulate((len(pieces[i]) for i in ids), initial=0))
    return text, list(pairwise(ends))


def _incremental_offsets(ids: Sequence[int], decode: Decode) -> tuple[str, list[tuple[int, int]]]:
    """`token_offsets` where tokens depend on their neighbours: bytes of one character, spaces at the start."""
    text, offsets = "", []
    context, first = 0, 0  # tokens context..first are decoded before those that are new
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[context:first]), decode(ids[context:end])
        if after.endswith(UNFINISHED) and end < len(ids):
            continue
        new = after[len(before) :]
        offsets += [(len(text), len(text) + len(new))] * (end - first)
        text += new
        # Text before a token tells a tokenizer that it does not begin the text.
        context, first = (first if new.strip() else context), end
    return text, offsets


def _compiled(pattern: str) -> regex.Pattern[str]:
    """Raises BadData if the pattern is invalid."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise BadData(f"the pattern {shorten(pattern)} cannot be read: {error}") from error
