"""Saves and restores the global random generators of a process: Python's, NumPy's and PyTorch's.

sdkit itself draws from derived seeds.  User functions and models with dropout draw from the global generators.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from sdkit.models.device import rank_device
from sdkit.seeds import derive


def seed_all(seed: int, rank: int, *step: int) -> None:
    """Seed every generator, differently for each rank; a rank added at a later `step` passes it to get yet another seed."""
    random.seed(derive(seed, "python", rank, *step))
    np.random.seed(derive(seed, "numpy", rank, *step) % 2**32)
    torch.manual_seed(derive(seed, "torch", rank, *step))


def state() -> dict[str, Any]:
    """The generators' states as JSON values."""
    version, words, left_over = random.getstate()
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), left_over],
        "numpy": [name, np.asarray(keys).tolist(), place, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(rank_device())) if torch.cuda.is_available() else None,
    }


def restore(saved: dict[str, Any]) -> None:
    """Restore the generators to the states that `state` returned."""
    version, words, left_over = saved["python"]
    random.setstate((version, tuple(words), left_over))
    name, keys, place, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(_bytes(saved["torch"]))
    if saved["cuda"]:
        torch.cuda.set_rng_state(_bytes(saved["cuda"]), rank_device())


def _text(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
