"""Random seeds derived from names, so that no random draw depends on the order of others."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """Returns a seed in [0, 2**63) for the random stream `names` of a run with this seed."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
