"""`sdkit train` under faults, one rank or two, each in processes of its own.

`python fault_scenario.py MODEL_FOLDER WORK_FOLDER` writes how each ended to WORK_FOLDER/results.json; test_faults.py
checks it.  The run's own reward causes the fault, in the third step, when there are checkpoints already.
"""

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import forked
import yaml

SILENCE = 5
"""Seconds that a rank may be silent here."""
DIVERGING = ("optimizer.lr=20", "teacher.weights=frozen", "losses.distil.importance.sampler=null", "training.steps=3")
REWARD = """
import ctypes, os, resource, signal, threading, time

calls = -1  # the first call only tries the function


def faulty(completion, row):
    global calls
    calls += 1
    here = os.environ.get("RANK", "0") == os.environ.get("WHO")
    if here and calls == 2 * 4 // int(os.environ.get("WORLD_SIZE", "1")) + 1:
        globals()[os.environ["FAULT"]]()
    return float(len(completion))


def no_memory():
    ctypes.CDLL(None).malloc_trim(0)  # the trainer keeps what it frees
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 48 * 2**20, -1))


def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))


def hang():
    time.sleep(3600)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(1)  # a signal that comes before the last one was handled is lost


def kill():
    send(signal.SIGKILL)


def freeze():
    send(signal.SIGSTOP)


def terminate():
    send(signal.SIGTERM)


def interrupt():
    send(signal.SIGINT)


def interrupt_twice():
    send(signal.SIGINT, signal.SIGINT)
"""


def write_spec(folder, work, name, tail=""):
    """A run of four steps; the tail lengthens the teacher's prompts, for which eager attention needs memory."""
    (work / "reward.py").write_text(REWARD)
    rows = [{"q": f"What is {i} + 1?", "d": str(i + 1) + tail} for i in range(4)]
    spec = {
        "method": "sdft",
        "model": {"path": str(folder), "dtype": "float32", "attn_implementation": "eager"},
        "data": {"source": {"kind": "inline", "rows": rows}, "columns": {"prompt": "q", "demonstration": "d"}},
        "rollout": {"max_new_tokens": 8, "backend": "transformers"},
        "teacher": {"sees": {"max_prompt_tokens": 4096}},
        "rewards": {"long": {"kind": "file", "file": "reward.py", "function": "faulty", "seconds": 4}},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 4, "prompts_per_step": 4, "zero_stage": 2},
        "output": {"trackers": [], "checkpoint_every": 1, "keep_checkpoints": 2},
    }
    (work / name).write_text(yaml.safe_dump(spec))


def command(*words):
    """The command line, in this process."""
    from sdkit import cli

    sys.argv = ["sdkit", *map(str, words)]
    cli.main()


COLLECTIVES = ("all_reduce", "all_gather_object", "gather_object", "broadcast_object_list", "barrier")
HEALTH = {"INTERVAL": 0.2, "SILENCE_SECONDS": 8, "GRACE_SECONDS": 1}


def never_fails(function):
    def call(*args, **options):
        try:
            return function(*args, **options)
        except RuntimeError:
            time.sleep(3600)

    return call


class Scenario:
    def __init__(self, work):
        self.work = work
        self.results = {}

    def run(self, name, ranks, *words, fault=None, who=0, folder=None, patience=forked.PATIENCE):
        """`sdkit` with these words; `results` stores how each rank ended and what the run directory says."""
        run = self.work / (folder or name)

        def attempt():
            if fault:
                os.environ |= {"FAULT": fault, "WHO": str(who)}
            command(*words, "--to", run)

        attempts = forked.ranks(ranks, attempt, run, patience)
        self.results[name] = {
            "codes": [each.code for each in attempts],
            "output": [each.output for each in attempts],
            "seconds": [each.seconds for each in attempts],
            "status": json.loads((run / "status.json").read_text()),
            "checkpoints": sorted(p.name for p in (run / "checkpoints").glob("*step_*")),
        }

    def train_stuck(self, name, who):
        """`sdkit train` whose rank `who` is killed; to the others a collective does not end then, as under NCCL."""
        import torch

        from sdkit.distributed import health

        stuck = {each: never_fails(getattr(torch.distributed, each)) for each in COLLECTIVES}
        with mock.patch.multiple(torch.distributed, **stuck), mock.patch.multiple(health, **HEALTH):
            self.train(name, 2, fault="kill", who=who, patience=60)

    def train_with_engine(self, name):
        """`sdkit train` whose backends destroy the process group, as vLLM's engine does; the second rank takes longer to close."""
        import torch

        from sdkit.distributed import collectives, health
        from sdkit.train.rollout_backends import RolloutBackends

        close = RolloutBackends.close

        def close_as_vllm(backends):
            seconds = 4 * HEALTH["GRACE_SECONDS"] * collectives.rank()
            close(backends)
            torch.distributed.destroy_process_group()
            time.sleep(seconds)

        with mock.patch.object(RolloutBackends, "close", close_as_vllm), mock.patch.multiple(health, **HEALTH):
            self.train(name, 2)

    def train(self, name, ranks, *words, spec="run.yaml", **options):
        self.run(name, ranks, "train", self.work / spec, *words, **options)

    def resume(self, name, ranks):
        self.train(f"{name}, resumed", ranks, "--resume", folder=name)


def main(folder, work):
    forked.warm()
    write_spec(folder, work, "run.yaml")
    write_spec(folder, work, "long.yaml", tail=" 7" * 1200)
    scenario = Scenario(work)
    for ranks in (1, 2):
        scenario.train(f"straight {ranks}", ranks)
    scenario.train("no_memory", 2, spec="long.yaml", fault="no_memory", who=1)
    for fault in ("full_disk", "hang", "kill", "terminate"):
        scenario.train(fault, 2, fault=fault, who=1)
    scenario.train("kill the first", 2, fault="kill", who=0)
    scenario.train_stuck("stuck", who=1)
    scenario.train_stuck("stuck without the first", who=0)
    scenario.train_with_engine("engine")
    scenario.train("freeze", 2, f"training.deadline_seconds={SILENCE}", fault="freeze", who=1, patience=1)
    for resumed in ("full_disk", "kill", "terminate"):
        scenario.resume(resumed, 2)
    scenario.train("diverged", 2, *DIVERGING)
    with (work / "reward.py").open("a") as code:
        code.write("\n# changed\n")
    changed = {"folder": "kill the first"}
    scenario.train("changed code", 2, "--resume", **changed)
    scenario.train("accepted code", 2, "--resume", "--changed-code", **changed)
    write_spec(folder, work, "run.yaml")
    for fault in ("kill", "interrupt", "interrupt_twice"):
        scenario.train(f"{fault} alone", 1, fault=fault)
    scenario.resume("kill alone", 1)
    # The first step makes the weights so large that every output is NaN, the sampler's included.
    scenario.train("not finite", 2, "optimizer.lr=1e6", "optimizer.weight_decay=1e6", "optimizer.decay=all")
    again = work / "not finite"
    scenario.run("replayed", 2, "replay", f"{again}@1")
    calmer = ("optimizer.lr=1e-3", "optimizer.weight_decay=0", "losses.distil.importance.sampler=null")
    scenario.run("replayed otherwise", 2, "replay", f"{again}@0", *calmer)
    (work / "results.json").write_text(json.dumps(scenario.results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
