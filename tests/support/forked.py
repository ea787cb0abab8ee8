"""Ranks forked from one process that has already imported the slow modules: real processes that start fast.

That process must have a single thread and must not have used torch yet.
"""

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback

from attrs import frozen
from os_processes import free_port

DEADLINE = 120.0
PATIENCE = 20.0
"""Seconds until all must have ended, and until the others must have ended once one has failed."""
SLOW_IMPORTS = (
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_repack",
    "deepspeed.ops.op_builder.cpu",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.zero.muon.original_muon",
    "matplotlib.pyplot",
    "peft",
    "scipy.stats",
    "sdkit.cli.runs",
    "sdkit.cli.saved",
    "sdkit.cli.specs",
    "sdkit.runs.plot",
    "sdkit.train.replay",
    "sdkit.train.smoke",
    "setuptools",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_pt_utils",
)
"""What every attempt imports, some of it only in the middle of a run."""


@frozen
class ProcessResult:
    """Exit code of a process (negative: the signal that ended it), what it wrote, and its seconds."""

    code: int
    output: str
    seconds: float


def warm():
    """Import what every attempt needs."""
    from sdkit.distributed import zero

    zero.prepare()
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    zero._freeze_imported_objects()


def ranks(count, run, folder, patience=PATIENCE, deadline=DEADLINE):
    """Runs `run` in `count` processes at once, as ranks if there are several; returns results in rank order.

    A process that has not ended in time is killed.  Output goes to files beside `folder`.
    """
    port = free_port()
    started = time.monotonic()
    ends = started + deadline
    output = [folder.with_name(f"{folder.name} output {rank}") for rank in range(count)]
    running = {_fork(rank, count, port, run, output[rank]): rank for rank in range(count)}
    ended = {}
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                rank, code = running.pop(pid), os.waitstatus_to_exitcode(status)
                ended[rank] = ProcessResult(code, output[rank].read_text(), time.monotonic() - started)
                if code:
                    ends = min(ends, time.monotonic() + patience)
        if time.monotonic() > ends:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [ended[rank] for rank in range(count)]


def _fork(rank, count, port, run, output):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if count > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = exit_code(run)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def exit_code(run):
    """Runs `run`; returns the code with which a script that did so would end, and prints why it fails."""
    try:
        run()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
