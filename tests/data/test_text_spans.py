"""Which tokens touch a match of a pattern: bytes of one character, spaces, special tokens, unclosed parts, slow patterns."""

import pytest

from sdkit.data import text_spans
from sdkit.data.text_spans import matched_tokens, token_offsets
from sdkit.language.errors import BadData
from sdkit.language.patterns import repeats_repeated

PIECES = [b"a", b"<", b"b>", b" c", b"\xf0\x9f", b"\x8c\x8d", b"", b"d</", b"b>x"]
"""Of each id; 4 and 5 are the two halves of one character, 6 is a special token."""


def decode(ids):
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")


def stripping(ids):
    """A tokenizer that drops the space at the start of a text."""
    return decode(ids).lstrip(" ")


@pytest.mark.parametrize("read", [decode, stripping])
def test_offsets_cover_the_text_and_halves_share_their_character(read):
    ids = [3, 0, 4, 5, 6, 3, 4, 5, 1]
    text, offsets = token_offsets(ids, read)
    assert text == read(ids)
    owned = [text[start:end] for start, end in offsets]
    assert owned == [read([3]), "a", "\N{EARTH GLOBE EUROPE-AFRICA}", "\N{EARTH GLOBE EUROPE-AFRICA}", "", " c", "\N{EARTH GLOBE EUROPE-AFRICA}", "\N{EARTH GLOBE EUROPE-AFRICA}", "<"]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("<b>(.+?)</b>", {3, 4, 5, 7}),  # the last touches with one letter; the special token between does not hide it
        ("<b>.+?</b>", {1, 2, 3, 4, 5, 6, 7, 8}),
        ("<b>(.+?)(?:</b>|$)|x", {3, 4, 5, 6, 7}),
        ("x(y?)", set()),
        ("nothing", set()),
        ("a|(c)", {3}),
    ],
)
def test_tokens_that_touch_a_match(pattern, expected):
    ids = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    found = matched_tokens(pattern, ids, decode)
    assert found - {6} == expected - {6}  # a token without text counts only between two others


def test_unclosed_part_ends_with_the_text():
    ids = [0, 1, 2, 3, 0, 6]
    assert matched_tokens("<b>(.+?)(?:</b>|$)", ids, decode) == {3, 4}
    assert matched_tokens("<b>(.+?)</b>", ids, decode) == set()


def test_half_a_character_at_the_end_is_a_token_of_its_own():
    assert token_offsets([0, 4], decode) == ("a\N{REPLACEMENT CHARACTER}", [(0, 1), (1, 2)])


def test_search_that_takes_too_long_is_an_error(monkeypatch):
    monkeypatch.setattr(text_spans, "SECONDS", 0.05)
    with pytest.raises(BadData, match=r"took over 0\.05 s in a text of 61 tokens"):
        matched_tokens(r"(\w|\w\w)+$", [0] * 60 + [1], decode)


@pytest.mark.parametrize(
    ("pattern", "slow"),
    [
        ("(a+)+", True),
        (r"x(?:\w+|-)*?y", True),
        ("((a+)b)*", True),
        ("(?:a+)*+", False),
        ("(?>(?:a+)*)", False),
        ("(?:a{1,9})+", False),
        ("a+b*", False),
        ("(", False),
    ],
)
def test_repeats_of_repeats(pattern, slow):
    assert repeats_repeated(pattern) == slow
