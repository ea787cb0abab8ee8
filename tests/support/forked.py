"""Ranks forked from one process that has imported all that is slow to import: real processes, and cheap ones.

The process must have one thread and have done nothing with torch yet but import it.
"""

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
import traceback

from attrs import frozen

DEADLINE = 120.0
PATIENCE = 20.0
"""Seconds for all to end, and for the others once one has failed."""
SLOW_TO_IMPORT = (
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
    "torch.utils.cpp_extension",
    "torch.utils.serialization",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_pt_utils",
)
"""What every attempt imports, partly in the middle of a run."""


@frozen
class Ended:
    """How a process ended (negative: by which signal), what it wrote, and after how many seconds."""

    code: int
    said: str
    seconds: float


def warm():
    """Import what every attempt needs."""
    from sdkit.distributed import zero

    zero.prepare()
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    zero._freeze_imported_objects()


def ranks(count, run, folder, patience=PATIENCE, deadline=DEADLINE):
    """`run` in `count` processes side by side, each a rank where there are several; in the order of ranks.

    What has not ended in time is killed.  What they write goes to files beside `folder`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    ends = started + deadline
    said = [folder.with_name(f"{folder.name} said {rank}") for rank in range(count)]
    running = {_fork(rank, count, port, run, said[rank]): rank for rank in range(count)}
    ended = {}
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                rank, code = running.pop(pid), os.waitstatus_to_exitcode(status)
                ended[rank] = Ended(code, said[rank].read_text(), time.monotonic() - started)
                if code:
                    ends = min(ends, time.monotonic() + patience)
        if time.monotonic() > ends:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [ended[rank] for rank in range(count)]


def _fork(rank, count, port, run, said):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if count > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = _code(run)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _code(run):
    try:
        run()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
