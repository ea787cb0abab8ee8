"""Turns any error that ends a run early into one message, an exit code and a hint."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence

from sdkit.distributed import collectives, health
from sdkit.language.errors import BadEnvironment, OutOfMemory, ProcessDied, RunFailed, SdkitError, first_line, one_line
from sdkit.runs import directory

RANK_LOST_MESSAGES = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "wait timeout after",
    "connection was likely closed",
    "remote process exited",
    "remote process exiting",
    "communicator was aborted",
    "watchdog caught collective operation timeout",
    "nccl operations have failed or timed out",
)
"""Parts of the messages of gloo, the store and NCCL when another rank is gone or has been silent for too long."""
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "cannot allocate memory", "out of memory", "_alloc_failed")
"""Parts of the messages of PyTorch, CUDA and its libraries, and the kernel when memory runs out."""
ENGINE_MEMORY_MESSAGES = (
    "free memory on device",
    "no available memory for the cache blocks",
    "larger than the available kv cache memory",
)
"""Parts of vLLM's messages when the memory that it may take is gone, or too small."""


def is_rank_lost(error: BaseException) -> bool:
    """Whether `error` is that of a collective which failed because another rank is gone."""
    if isinstance(error, SdkitError) or not isinstance(error, Exception) or is_out_of_memory(error):
        return False
    return _message_contains(error, RANK_LOST_MESSAGES) or health.lost_rank() not in (None, collectives.rank())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or the device."""
    texts = OUT_OF_MEMORY_MESSAGES + ENGINE_MEMORY_MESSAGES
    return isinstance(error, MemoryError) or _message_contains(error, texts)


def reported_error(error: BaseException, run: directory.RunDirectory) -> BaseException:
    """The error that the command reports; the traceback of an unexpected one is written to a file of the run."""
    if (known := known_cause(error)) is not None:
        return known
    traceback_file = run.path / (f"error_rank_{collectives.rank()}.txt" if collectives.rank() else "error.txt")
    with contextlib.suppress(BadEnvironment):
        directory.write_atomically(traceback_file, "".join(traceback.format_exception(error)))
    return RunFailed(f"{type(error).__name__}: {one_line(error)}", hint=f"the traceback is in {traceback_file}")


def known_cause(error: BaseException) -> BaseException | None:
    """The error that says what to do about `error`: itself, a lost rank or too little memory; None if it is unexpected."""
    if isinstance(error, SdkitError) or not isinstance(error, Exception):
        return error
    if is_rank_lost(error):
        return rank_lost((), error)
    if _message_contains(error, ENGINE_MEMORY_MESSAGES):
        return OutOfMemory(
            f"out of memory: {first_line(error)}",
            hint="rollout.backend.gpu_memory_utilization must hold vLLM's weights and cache, and leave the rest to the trainer",
        )
    if is_out_of_memory(error):
        return OutOfMemory(
            f"out of memory: {first_line(error)}",
            hint="lower training.micro_batch_tokens or training.chunk_tokens, or set model.activation_checkpointing: true: "
            "--resume takes these changes; or train LoRA adapters in another run",
        )
    return None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise, for an error inside the block, its `known_cause` if it has one."""
    try:
        yield
    except Exception as error:
        if (cause := known_cause(error)) in (None, error):
            raise
        raise cause from error


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
