"""The device of a rank.  Knows the launcher's environment; knows no models."""

from __future__ import annotations

import os

import torch

from sdkit.language.errors import BadEnvironment


def rank_device() -> torch.device:
    """Returns the GPU whose index is the rank's LOCAL_RANK, or the CPU if torch finds no GPU.

    The index is explicit: `cuda` alone is the current device of the process, which any library may change.  Raises
    BadEnvironment if the machine has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise BadEnvironment(
            f"rank {index} of this machine needs a GPU of its own, but torch finds {count}",
            hint=f"start at most {count} processes on this machine",
        )
    return torch.device("cuda", index)
