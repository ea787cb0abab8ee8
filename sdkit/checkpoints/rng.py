"""The random streams that a process has for all: Python's, numpy's and torch's.

sdkit draws from seeds of its own; what does not are a user's functions and a model with dropout.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from sdkit.seeds import derive


def seed_all(seed: int, rank: int, *step: int) -> None:
    """Start every stream anew, each rank's elsewhere; a rank that joins at a later `step` starts elsewhere again."""
    random.seed(derive(seed, "python", rank, *step))
    np.random.seed(derive(seed, "numpy", rank, *step) % 2**32)
    torch.manual_seed(derive(seed, "torch", rank, *step))


def state() -> dict[str, Any]:
    """Where the streams stand, as JSON can hold it."""
    version, words, left_over = random.getstate()
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), left_over],
        "numpy": [name, np.asarray(keys).tolist(), place, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore(held: dict[str, Any]) -> None:
    """Put the streams back to where `state` found them."""
    version, words, left_over = held["python"]
    random.setstate((version, tuple(words), left_over))
    name, keys, place, has_gauss, gauss = held["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(_bytes(held["torch"]))
    if held["cuda"]:
        torch.cuda.set_rng_state(_bytes(held["cuda"]))


def _text(stream: torch.Tensor) -> str:
    return bytes(stream.tolist()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
