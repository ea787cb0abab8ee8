"""How a run ends before its end: any error as one message, an exit code and what to do."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence

from sdkit.distributed import collectives
from sdkit.language.errors import (
    BadEnvironment,
    OutOfMemory,
    ProcessDied,
    RunFailed,
    SdkitError,
    first_line,
    one_line,
)
from sdkit.runs import directory

RANK_LOST_MESSAGES = (
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "broken pipe",
)
"""What collectives say where another rank is gone, or silent for too long."""
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "cannot allocate memory", "out of memory")
"""What torch, CUDA and the kernel say where there is none left."""


def is_rank_lost(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return _says(error, RANK_LOST_MESSAGES)


def explain(error: BaseException, run: directory.RunDirectory) -> BaseException:
    """The error that the command reports; what nobody expected keeps its traceback in a file of the run."""
    if isinstance(error, SdkitError) or not isinstance(error, Exception):
        return error
    if is_rank_lost(error):
        return rank_lost((), error)
    if isinstance(error, MemoryError) or _says(error, OUT_OF_MEMORY_MESSAGES):
        return OutOfMemory(
            f"out of memory: {first_line(error)}",
            hint="lower training.micro_batch_tokens or training.chunk_tokens, or set model.activation_checkpointing: true: "
            "--resume takes these changes; or train LoRA adapters in another run",
        )
    told = run.path / (
        f"error_rank_{collectives.rank()}.txt" if collectives.rank() else "error.txt"
    )
    with contextlib.suppress(BadEnvironment):
        directory.write_whole(told, "".join(traceback.format_exception(error)))
    return RunFailed(
        f"{type(error).__name__}: {one_line(error)}", hint=f"the traceback stands in {told}"
    )


def rank_lost(missing: Sequence[int], error: BaseException) -> ProcessDied:
    """What a rank says that goes because of others; `missing` is empty where it cannot be told which."""
    who = ", ".join(f"rank {number}" for number in missing) or "another rank"
    return ProcessDied(
        f"lost {who}, which ended or was silent for too long: {first_line(error)}",
        hint="see that rank's own output; if it was killed by SIGKILL, probably by the kernel's out-of-memory killer: see "
        "`dmesg`",
    )


def _says(error: BaseException, words: Sequence[str]) -> bool:
    text = str(error).lower()
    return isinstance(error, Exception) and any(each in text for each in words)
