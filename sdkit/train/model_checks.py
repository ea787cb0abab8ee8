"""Checks of a run's loaded models against its spec and data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdkit.language.errors import BadData, blaming
from sdkit.language.rules.losses import oversized_supports
from sdkit.language.specs import ExperimentSpec
from sdkit.models import activation_checkpointing, lora
from sdkit.models.embedding_ids import KnownIds
from sdkit.models.probes import check_deterministic
from sdkit.models.weights import Weights
from sdkit.train.inputs import RunData
from sdkit.train.setup import RunSetup

NamedModels = Sequence[tuple[str, Weights]]
"""The student first, then every other model, each with the name that errors use."""


def compared_vocabulary(models: NamedModels, data: RunData, any_served: bool) -> tuple[int, int | None]:
    """Return the number of ids whose logits are compared, and the bound of the ids that may be sampled, if one is needed.

    An output projection may have more rows than the tokenizer has ids, and models may differ in the number of rows.
    If they do, rows beyond the tokenizer's ids are no token for any model.  The number of rows of a served model is not
    known, so `any_served` counts as a difference.  Raises BadData if a model has fewer rows than the tokenizer has ids.
    """
    student_rows = models[0][1].head_shape[0]
    token_ids = max(data.tokenizer.get_vocab().values()) + 1
    same = all(weights.head_shape[0] == student_rows for _, weights in models)
    if same and (not any_served or student_rows == token_ids):
        return student_rows, None
    for name, weights in models:
        if weights.head_shape[0] < token_ids:
            raise BadData(
                f"the {name} has {weights.head_shape[0]} output rows for {token_ids} token ids",
                path=_model_path(weights),
            )
    return token_ids, token_ids


def check_models(setup: RunSetup, models: NamedModels, end_ids: tuple[int, ...], compared_ids: int) -> None:
    """Check vocabulary sizes and context lengths, which only the loaded models tell.

    Raises BadData naming the key to change.
    """
    for path, message, hint in oversized_supports(setup.spec, compared_ids):
        raise BadData(message, hint=hint, path=path)
    for name, weights in models:
        _check_ids(name, weights, setup.data, end_ids)
        context = getattr(weights.causal.config, "max_position_embeddings", None)
        if context and setup.longest_sequence > context:
            raise BadData(
                f"the longest prompt and completion have {setup.longest_sequence} tokens, the {name} takes {context}",
                hint="lower rollout.max_new_tokens or teacher.sees.max_prompt_tokens, or drop long rows",
                path=("rollout", "max_new_tokens"),
            )


def probe_models(spec: ExperimentSpec, models: NamedModels, device: torch.device, zero_stage: int) -> None:
    """Run the checks that need a forward pass.  Raises BadData naming the key to change."""
    student = models[0][1]
    for _, weights in models:
        with blaming(*_model_path(weights)):
            _ = weights.transform  # measured here under stage 3
    if spec.model.lora:
        lora.check(student, device, zero_stage)
    for name, weights in models:
        check_deterministic(weights, name, device)
    if spec.model.activation_checkpointing:
        activation_checkpointing.check(student, spec.model.path, device)


def _check_ids(name: str, weights: Weights, data: RunData, end_ids: tuple[int, ...]) -> None:
    """Raise BadData if the model has no embedding for an id of the data or for an end token."""
    known = KnownIds(f"the {name}", weights.embedding_rows)
    with blaming(*_model_path(weights)):
        known.check(data.tokenizer, "the text", (data.largest_id,))
        known.check(data.tokenizer, "the list of end tokens", end_ids)


def _model_path(weights: Weights) -> tuple[str, str]:
    """Return the path of the key that names the model."""
    return ("teacher", "weights") if weights.foreign else ("model", "path")
