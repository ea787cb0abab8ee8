"""Which token ids the models of a run have embeddings for, known from their configurations before weights load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.language.errors import BadData, blaming
from sdkit.language.specs import ExperimentSpec, other_models
from sdkit.models.loading import embedding_rows, resolve_model

HINT = "resize that model's embeddings, or take the token out of the tokenizer or the text"


@frozen
class KnownIds:
    """The ids below a bound; `model` is the one with the fewest embeddings."""

    model: str
    below: int

    def fault(self, tokenizer: Any, what: str, ids: Sequence[int]) -> str | None:
        """What is wrong with the first id that the model has no embedding for; None where there is none."""
        bad = next((i for i in ids if i >= self.below), None)
        return None if bad is None else f"{what} has {beyond(tokenizer, bad, self)}"

    def check(self, tokenizer: Any, what: str, ids: Sequence[int]) -> None:
        """Raise BadData where the model has no embedding for one of the ids."""
        if fault := self.fault(tokenizer, what, ids):
            raise BadData(fault, hint=HINT)


def beyond(tokenizer: Any, token: int, known: KnownIds) -> str:
    """The token and the number of embeddings, for an error."""
    name = tokenizer.convert_ids_to_tokens(token)
    return f"the token {name!r} with id {token}, but {known.model} has {known.below} embeddings"


def known_ids(spec: ExperimentSpec, base: Path, located: str) -> KnownIds | None:
    """The ids that the student and every other local model have embeddings for.

    None where no configuration gives their number: `World` then compares with the loaded embeddings.
    """
    with blaming("model", "path"):
        found = [(spec.model.path, embedding_rows(spec.model, located))]
    for path, weights in other_models(spec):
        with blaming(*path, "path"):
            rows = embedding_rows(weights, resolve_model(weights.path, base))
        found.append((weights.path, rows))
    known = [KnownIds(model, rows) for model, rows in found if rows]
    return min(known, key=lambda each: each.below, default=None)
