"""Checks sdkit on one GPU: `python -m tools.gpu_check first`, then `second`, each at most five minutes.

Needs sdkit's packages, but neither vLLM nor the hub.  Each check runs in its own process and prints one JSON line with its
name, `ok` (null: skipped) and its figures; a check that fails does not stop the others.  The last line counts them, and
the exit code is 1 if one failed.  `--dry-run` runs most checks in miniature on the CPU.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # `is_available` must not start CUDA before the fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sdkit import devices
from tools.gpu_check import figures, kernels, runs
from tools.gpu_check.setup import Check, Setup, Skipped

CHECKS: Mapping[str, Mapping[str, Check]] = {
    "first": {**kernels.BASICS, **runs.PAGES, **runs.FORMS},
    "second": {**runs.LIFE, **kernels.SPEED, **runs.LARGE},
}
CALL_SECONDS = 290.0
CHECK_SECONDS = 120.0
"""The longest that a call and one of its checks may take on a GPU."""


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=[*CHECKS, "both"], help="which half of the checks")
    parser.add_argument("--only", metavar="TEXT", default="", help="only checks whose name contains this")
    on_cpu = parser.add_mutually_exclusive_group()  # figures of a miniature are no figures for the GPU
    on_cpu.add_argument("--dry-run", action="store_true", help="in miniature, on the CPU")
    on_cpu.add_argument("--write-figures", action="store_true", help="store the CPU's figures, for the GPU to compare")
    return parser.parse_args()


def run_check(check: Check, setup: Setup, seconds: float | None) -> dict[str, Any]:
    """Return the figures of the check; it runs in a fork, which is killed after `seconds` (None: no limit)."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    started = time.monotonic()
    process = context.Process(target=_child, args=(check, setup, sending))
    process.start()
    sending.close()
    try:
        in_time = receiving.poll(seconds)
        result = receiving.recv() if in_time else {"ok": False, "error": f"not done in {seconds:.0f} s"}
    except EOFError:
        process.join()
        result = {"ok": False, "error": f"its process ended with code {process.exitcode}"}
    process.kill()
    process.join()
    return result | {"seconds": round(time.monotonic() - started, 1)}


def _child(check: Check, setup: Setup, sending: Connection) -> None:
    os.dup2(2, 1)  # standard output is for the JSON lines
    try:
        result: dict[str, Any] = {"ok": True, **check(setup)}
    except Skipped as reason:
        result = {"ok": None, "skipped": str(reason)}
    except (Exception, SystemExit) as error:
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    sending.send(result)
    sending.close()
    os._exit(0)  # some libraries wait at exit for what is not there


def selected(call: str, only: str) -> dict[str, Check]:
    """Return the checks of a call, or of both, whose names contain `only`."""
    parts = [part for name, part in CHECKS.items() if call in (name, "both")]
    return {name: check for part in parts for name, check in part.items() if only in name}


def main() -> None:
    """Run the checks that the command line selects; exits with code 1 if one failed."""
    options = parse()
    on_cpu = options.dry_run or options.write_figures
    if on_cpu:
        os.environ[devices.VARIABLE] = "cpu"
        devices.hide_gpus_if_requested()
    elif not torch.cuda.is_available():
        sys.exit("torch finds no GPU; --dry-run runs the checks in miniature on the CPU")
    ends = time.monotonic() + CALL_SECONDS
    counts = {True: 0, False: 0, None: 0}
    runs.import_heavy()
    with tempfile.TemporaryDirectory(prefix="sdkit-gpu-check-") as folder:
        for number, (name, check) in enumerate(selected(options.call, options.only).items()):
            own = Path(folder, str(number))
            own.mkdir()
            setup = Setup(folder=own, on_cpu=on_cpu, miniature=options.dry_run, name=name)
            seconds = None if on_cpu else min(max(ends - time.monotonic(), 0.0), CHECK_SECONDS)
            result = run_check(check, setup, seconds)
            counts[result["ok"]] += 1
            print(json.dumps({"check": name, **result}), flush=True)
            if options.write_figures and "norms" in result:
                figures.store(name, result["norms"])
    print(json.dumps({"passed": counts[True], "failed": counts[False], "skipped": counts[None]}))
    sys.exit(int(counts[False] > 0))


if __name__ == "__main__":
    main()
