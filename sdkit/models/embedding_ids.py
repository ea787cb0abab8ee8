"""The token ids that a run's models have embeddings for, read from their configurations before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.language.errors import BadData, blaming
from sdkit.language.specs import ExperimentSpec
from sdkit.models.loading import embedding_rows, resolve_model

HINT = "resize that model's embeddings, or take the token out of the tokenizer or the text"


@frozen
class KnownIds:
    """All ids smaller than `below`; `model` is the model with the fewest embeddings."""

    model: str
    below: int

    def fault(self, tokenizer: Any, what: str, ids: Sequence[int]) -> str | None:
        """Returns an error message for the first id without an embedding; None if all have one."""
        unknown = next((i for i in ids if i >= self.below), None)
        if unknown is None:
            return None
        name = tokenizer.convert_ids_to_tokens(unknown)
        return f"{what} has the token {name!r} with id {unknown}, but {self.model} has {self.below} embeddings"

    def check(self, tokenizer: Any, what: str, ids: Sequence[int]) -> None:
        """Raise BadData if the model has no embedding for one of the ids."""
        if fault := self.fault(tokenizer, what, ids):
            raise BadData(fault, hint=HINT)


def known_ids(spec: ExperimentSpec, base: Path, located: str) -> KnownIds | None:
    """Returns the ids that the student and every other local model have embeddings for.

    None if no configuration gives the number: it is then checked against the loaded embeddings.
    """
    with blaming("model", "path"):
        rows_by_model = [(spec.model.path, embedding_rows(spec.model, located))]
    for path, weights in spec.other_models():
        with blaming(*path, "path"):
            rows = embedding_rows(weights, resolve_model(weights.path, base))
        rows_by_model.append((weights.path, rows))
    known = [KnownIds(model, rows) for model, rows in rows_by_model if rows]
    return min(known, key=lambda ids: ids.below, default=None)
