"""The host memory that loading takes on each of two ranks under ZeRO stage 3: `python -m tools.load_memory`, on Linux.

Student and external teacher are random models of 38 million parameters in float32.  Prints the peak between the start of
loading and the last shard, above what a rank had before and without mapped files.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "SDKIT_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import multiprocessing
import re
import socket
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from tools.gpu_check.runs import import_heavy

RANKS = 2
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vocab_size": 8192,
}
SPEC = """
method: sdft
model: {path: model, dtype: float32}
data:
  source: {kind: inline, rows: [{q: What is 1 + 1?, a: "2"}, {q: What is 2 + 2?, a: "4"}]}
  columns: {prompt: q, demonstration: a}
teacher: {sees: {max_prompt_tokens: 256}, weights: {kind: external, path: model, dtype: float32}}
rollout: {max_prompt_tokens: 64, max_new_tokens: 8, backend: transformers}
losses: {distil: {importance: {sampler: null}}}
optimizer: {lr: 1.0e-5}
training: {steps: 1, prompts_per_step: 2, zero_stage: 3}
"""


def anonymous_mib() -> float:
    """Returns this process's resident memory without mapped files, in MiB."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "/proc/self/status has no RssAnon"
    return int(found[1]) / 1024


class Peak:
    """Samples the memory of this process every five milliseconds, in a thread."""

    def __init__(self) -> None:
        self._before = anonymous_mib()
        self._samples = [self._before]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not threading.Event().wait(0.005):
            self._samples.append(anonymous_mib())

    def mib(self) -> float:
        """Returns the largest sample, above the first."""
        return max(self._samples) - self._before


def build(folder: Path) -> None:
    """Write the model and the run file to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from sdkit.models import tiny

    tiny.build(folder / "model")
    config = AutoConfig.from_pretrained(folder / "model")
    config.update(SIZES | {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    (folder / "spec.yaml").write_text(SPEC)


def run_rank(rank: int, folder: Path, port: int) -> None:
    """Load the models as a run does; the first rank prints the figures of both."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    import sdkit
    from sdkit.distributed import collectives, zero_loading
    from sdkit.language.specs import ExperimentSpec
    from sdkit.train.run import open_run

    def report(models: Any, *_: Any) -> NoReturn:
        """In place of the checks of the sharded models, which need a device's memory."""
        peaks = collectives.all_gather_object(peak.mib())
        if rank == 0:
            shapes = [models[0].sharding.full_shape(p) for p in models[0].model.parameters()]
            model = sum(shape.numel() for shape in shapes) * 4 / 2**20
            print(f"student and teacher: {model:.0f} MiB each")
            for number, mib in enumerate(peaks):
                print(f"rank {number}: {mib:.0f} MiB at its peak, {mib / model:.2f} models", flush=True)
        collectives.barrier()
        os._exit(0)

    spec = sdkit.load_spec(folder / "spec.yaml")
    assert isinstance(spec, ExperimentSpec)
    with mock.patch.object(zero_loading, "forward_passes", report):
        peak = Peak()
        open_run(spec, folder)


def main() -> None:
    """Build the model and run the ranks, in forks of this process, which has imported what they need."""
    warnings.filterwarnings("ignore")
    import_heavy()
    fork = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="sdkit-load-memory-") as name:
        folder = Path(name)
        codes = []
        for group in ([(build, (folder,))], [(run_rank, (rank, folder, port)) for rank in range(RANKS)]):
            processes = [fork.Process(target=function, args=arguments) for function, arguments in group]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
                codes.append(process.exitcode)
    sys.exit(int(any(codes)))


if __name__ == "__main__":
    main()
