"""Turns any error that ends a run early into one message, an exit code and a hint."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence

from sdkit.distributed import collectives
from sdkit.language.errors import BadEnvironment, OutOfMemory, ProcessDied, RunFailed, SdkitError, first_line, one_line
from sdkit.runs import directory

RANK_LOST_MESSAGES = ("connection closed by peer", "connection reset by peer", "timed out waiting", "broken pipe")
"""Parts of the messages of collectives when another rank is gone or has been silent for too long."""
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "cannot allocate memory", "out of memory")
"""Parts of the messages of PyTorch, CUDA and the kernel when memory runs out."""


def is_rank_lost(error: BaseException) -> bool:
    """Whether `error` comes from a collective that failed because another rank is gone."""
    return _message_contains(error, RANK_LOST_MESSAGES)


def reported_error(error: BaseException, run: directory.RunDirectory) -> BaseException:
    """The error that the command reports; the traceback of an unexpected one is written to a file of the run."""
    if isinstance(error, SdkitError) or not isinstance(error, Exception):
        return error
    if is_rank_lost(error):
        return rank_lost((), error)
    if isinstance(error, MemoryError) or _message_contains(error, OUT_OF_MEMORY_MESSAGES):
        return OutOfMemory(
            f"out of memory: {first_line(error)}",
            hint="lower training.micro_batch_tokens or training.chunk_tokens, or set model.activation_checkpointing: true: "
            "--resume takes these changes; or train LoRA adapters in another run",
        )
    traceback_file = run.path / (f"error_rank_{collectives.rank()}.txt" if collectives.rank() else "error.txt")
    with contextlib.suppress(BadEnvironment):
        directory.write_atomically(traceback_file, "".join(traceback.format_exception(error)))
    return RunFailed(f"{type(error).__name__}: {one_line(error)}", hint=f"the traceback is in {traceback_file}")


def rank_lost(missing: Sequence[int], error: BaseException) -> ProcessDied:
    """The error of a rank that ends because of others; `missing` is empty if they are not known."""
    who = ", ".join(f"rank {number}" for number in missing) or "another rank"
    return ProcessDied(
        f"lost {who}, which ended or was silent for too long: {first_line(error)}",
        hint="see that rank's own output; if it was killed by SIGKILL, probably by the kernel's out-of-memory killer: see "
        "`dmesg`",
    )


def _message_contains(error: BaseException, words: Sequence[str]) -> bool:
    text = str(error).lower()
    return isinstance(error, Exception) and any(word in text for word in words)
