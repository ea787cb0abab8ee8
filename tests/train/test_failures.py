"""The texts with which libraries report a lost rank or too little memory end a run with the code and advice for it."""

import pytest
import torch
from tinyruns import make_spec, train

from sdkit.distributed import health
from sdkit.language.errors import OutOfMemory, ProcessDied
from sdkit.train import failures, run

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, "
LOST = [
    "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711",
    NCCL + "remote process exited or there was a network error, NCCL version 2.27.5",
    NCCL + "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "NCCL communicator was aborted on rank 3.",
    "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000 milliseconds",
    "Some NCCL operations have failed or timed out. Due to the asynchronous nature of CUDA kernels, …",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "wait timeout after 600000ms, keys: /default_pg/0//cuda//default_pg/0//timeout_dump",
]
MEMORY = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA out of memory. Tried to allocate 20.00 GiB.",
    NCCL + "unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
]
ENGINE = [
    "Free memory on device cuda:0 (9.51/79.11 GiB) on startup is less than desired GPU memory utilization (0.4, 31.64 GiB).",
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine.",
    "To serve at least one request with the models's max seq len (32768), (4.0 GiB KV cache is needed, which is larger than "
    "the available KV cache memory (2.0 GiB).",
]


@pytest.mark.parametrize("text", LOST)
def test_texts_of_a_lost_rank(text):
    assert failures.is_rank_lost(RuntimeError(text))
    assert isinstance(failures.known_cause(RuntimeError(text)), ProcessDied)


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        *((text, "training.micro_batch_tokens") for text in MEMORY),
        *((text, "gpu_memory_utilization") for text in ENGINE),
    ],
)
def test_texts_of_too_little_memory(text, setting):
    for error in (RuntimeError(text), ValueError(text)):
        assert not failures.is_rank_lost(error)
        known = failures.known_cause(error)
        assert isinstance(known, OutOfMemory)
        assert setting in known.hint


def test_unknown_text_is_a_lost_rank_if_one_is_lost(monkeypatch):
    error = RuntimeError("NCCL error: internal error - please report this issue to the NCCL developers")
    assert failures.known_cause(error) is None
    monkeypatch.setattr(health, "lost_rank", lambda: 0)  # this rank itself
    assert failures.known_cause(error) is None
    monkeypatch.setattr(health, "lost_rank", lambda: 1)
    assert isinstance(failures.known_cause(error), ProcessDied)


def test_a_run_that_does_not_open_says_why(tiny_folder, tmp_path, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError(MEMORY[1])

    monkeypatch.setattr(run, "open_trainer", fail)
    with pytest.raises(OutOfMemory, match="Tried to allocate"):
        train(make_spec(tiny_folder), tmp_path / "run")
