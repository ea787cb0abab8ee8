"""Model shapes without loading the model: from the list of bundled models, or from a folder's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdkit.language.bundled import BUNDLED, PREFIX
from sdkit.language.files import MAX_CONFIG_BYTES, read_json_object
from sdkit.language.specs import ShapeSpec

PLAIN_MLP = frozenset({"gpt_neox", "nemotron", "phi", "starcoder2"})
"""Model types whose feed-forward part has no gate."""
QK_NORM = ("exaone4", "gemma3", "olmo2", "olmo3", "qwen3")
"""Beginnings of the model types that normalize queries and keys."""


def shape_at(path: str, base: Path) -> ShapeSpec | None:
    """Returns the shape of a bundled model or of a local folder (relative to `base`), or None if it is unknown."""
    if path.startswith(PREFIX):
        bundled = BUNDLED.get(path.removeprefix(PREFIX))
        return bundled and bundled.shape
    config = read_json_object(base / path / "config.json", MAX_CONFIG_BYTES)
    try:
        return shape_from_config(config) if config else None
    except (ValueError, LookupError, TypeError, ArithmeticError):
        return None


def shape_from_config(config: Mapping[str, Any]) -> ShapeSpec:
    """Returns the shape that a model's config.json describes.  Raises LookupError for a missing key."""
    sizes = {name: value for name, value in config.items() if type(value) is int}
    kind = str(config.get("model_type"))
    tied = config.get("tie_word_embeddings") is True
    return _shape_from_sizes(sizes, tied, gated=kind not in PLAIN_MLP, qk_norm=kind.startswith(QK_NORM))


def _shape_from_sizes(config: Mapping[str, int], tied: bool, *, gated: bool, qk_norm: bool) -> ShapeSpec:
    hidden, layers, vocabulary = (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"])
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    keys = width * (config.get("num_key_value_heads") or heads)
    attention = 2 * hidden * (heads * width + keys)
    feed_forward = (3 if gated else 2) * hidden * config["intermediate_size"]
    embeddings = vocabulary * hidden * (1 if tied else 2)
    return ShapeSpec(
        parameters=layers * (attention + feed_forward + 2 * hidden) + embeddings + hidden,
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=config["max_position_embeddings"],
        kv_width=keys,
        q_width=heads * width,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        gated_mlp=gated,
        qk_norm=qk_norm,
    )
