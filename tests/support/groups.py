"""Which processes of a group are running."""

import contextlib
import os

import psutil


def members(group):
    """Process ids of the group, without zombies."""
    pids = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                pids.append(process.pid)
    return pids
