"""Checks that all ranks have one run directory: several nodes need a disk that they share."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path

from sdkit.distributed import collectives
from sdkit.language.errors import BadEnvironment
from sdkit.runs.directory import write_atomically

WAIT_SECONDS = 60.0
"""A client of a network disk may remember for so long that a file was not there."""


def check_shared(folder: Path) -> None:
    """Raise BadEnvironment on every rank if one of them does not see a file that the first one writes to the folder.

    Collective.  The first rank must have created the folder.
    """
    if collectives.world_size() == 1:
        return
    mark = folder / f".shared-{collectives.broadcast_object(secrets.token_hex(8))}"
    if collectives.rank() == 0:
        write_atomically(mark, "")
    collectives.barrier()
    blind = collectives.all_gather_object(None if _appears(mark) else socket.gethostname())
    if collectives.rank() == 0:
        mark.unlink(missing_ok=True)
    if nodes := sorted({node for node in blind if node}):
        raise BadEnvironment(
            f"{folder.absolute()} is another folder on {', '.join(nodes)} than on the first rank's node",
            hint="all nodes write to one run directory: choose a folder on a disk that they share, with --to or output.folder",
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
