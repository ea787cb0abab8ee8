"""Vocabularies as maps from token to id: reads them from a folder without a tokenizer library, and compares them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdkit.language.errors import shorten
from sdkit.language.files import MAX_TOKENIZER_BYTES, read_json_object


def first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """Describes the first token whose id differs between the student's and another model's vocabulary; None if none does."""
    if ours == theirs:
        return None
    differing = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    token = min(differing, key=lambda t: (ours.get(t, theirs.get(t, 0)), t))
    ids = ["no id" if i is None else f"the id {i}" for i in (ours.get(token), theirs.get(token))]
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return f"{shorten(token)} has {ids[0]} for the student, {ids[1]} for the other model{more}"


def of_folder(folder: Path) -> dict[str, int] | None:
    """Returns the vocabulary in a folder's tokenizer.json; None if there is no readable one."""
    data = read_json_object(folder / "tokenizer.json", MAX_TOKENIZER_BYTES) or {}
    try:
        return _token_ids(data["model"]["vocab"]) | {
            str(added["content"]): int(added["id"]) for added in data.get("added_tokens", ())
        }
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return None


def _token_ids(vocab: Any) -> dict[str, int]:
    """BPE and WordPiece store a map, Unigram a list of [token, score]."""
    if isinstance(vocab, list):
        return {str(piece[0]): i for i, piece in enumerate(vocab)}
    return {str(token): int(i) for token, i in vocab.items()}
