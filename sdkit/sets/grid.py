"""The grid of a sweep: every combination of the values of some keys.  Knows text; knows no spec."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from attrs import frozen

from sdkit.language.errors import UnreadableInput

MAX_POINTS = 1000
MAX_NAME = 100  # characters of a point's folder


@frozen
class GridKey:
    """One key of the language and its values, as YAML."""

    key: str
    values: tuple[str, ...]


@frozen
class Point:
    """One combination of values; `name` is that of its folder."""

    name: str
    overrides: tuple[str, ...]


def parse_key(text: str) -> GridKey:
    """The key and values in `KEY=V1,V2`; commas inside brackets, braces and quotes do not separate.

    Raises UnreadableInput.
    """
    key, equals, values = text.partition("=")
    words = split_values(values)
    if not key or not equals or not all(words):
        raise UnreadableInput(
            f"--over {text} is not of the form KEY=VALUE,VALUE", hint="example: --over optimizer.lr=1e-5,3e-5"
        )
    if twice := [word for word in words if words.count(word) > 1]:
        raise UnreadableInput(f"--over {text}: {twice[0]} is named twice")
    return GridKey(key, tuple(words))


def split_values(text: str) -> list[str]:
    """The values between top-level commas."""
    words, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            words.append("")
            continue
        words[-1] += character
    return [word.strip() for word in words]


def make_points(keys: Sequence[GridKey]) -> list[Point]:
    """All combinations, the last key changing fastest.  Raises UnreadableInput for a key given twice, or too many points."""
    names = [key.key for key in keys]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UnreadableInput(f"--over {twice[0]} is given twice", hint="name all its values once: KEY=V1,V2")
    combinations = list(itertools.islice(itertools.product(*(key.values for key in keys)), MAX_POINTS + 1))
    if len(combinations) > MAX_POINTS:
        raise UnreadableInput(f"the grid has more than {MAX_POINTS} points")
    short = _short_keys(names)
    points: list[Point] = []
    for values in combinations:
        name = _folder_name([f"{key}={value}" for key, value in zip(short, values, strict=True)])
        same = sum(point.name == name or point.name.startswith(f"{name}-") for point in points)
        overrides = tuple(f"{key}={value}" for key, value in zip(names, values, strict=True))
        points.append(Point(f"{name}-{same + 1}" if same else name, overrides))
    return points


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where that would be ambiguous."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]


def _folder_name(words: Sequence[str]) -> str:
    """`lr=1e-5,divergence=jsd`; of other characters than letters, digits and a few signs, one `_` is left."""
    name = ",".join(re.sub(r"[^A-Za-z0-9.+=-]+", "_", word).strip("_") for word in words)
    return name[:MAX_NAME].lstrip(".+=-") or "point"
