"""`sdkit serve` before vLLM starts: address, command, environment and refusals.  test_serve_vllm.py starts it."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import yaml
from attrs import evolve
from os_processes import members, wait_until
from tinyruns import make_spec
from typer.testing import CliRunner

from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.language.specs import ModelSpec, Table, VllmBackend, VllmServerBackend
from sdkit.sampling import vllm_cpu
from sdkit.serving import serve
from sdkit.train import inputs


def spec_with_servers(folder, **changes):
    spec = make_spec(folder)
    backend = VllmServerBackend(**changes)
    return evolve(spec, rollout=evolve(spec.rollout, backend=backend))


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def address(spec, host="127.0.0.1", port=None, allow_remote=False):
    return serve.address_of(spec, host, port, allow_remote=allow_remote)


@pytest.mark.parametrize(
    ("urls", "port", "url"),
    [
        (("http://127.0.0.1:8000",), None, "http://127.0.0.1:8000"),
        (("http://localhost:8123/", "http://127.0.0.1:9"), None, "http://127.0.0.1:8123"),
        (("http://127.0.0.1:8000",), 8001, "http://127.0.0.1:8001"),
        (("http://gateway",), None, "http://127.0.0.1:80"),
    ],
)
def test_address_is_that_of_the_spec(tiny_folder, urls, port, url):
    assert address(spec_with_servers(tiny_folder, urls=urls), port=port).url == url


def test_ipv6_address_is_written_in_brackets(tiny_folder):
    assert address(spec_with_servers(tiny_folder), host="::1").url == "http://[::1]:8000"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.2", "trainer.example"])
def test_remote_connections_need_the_option_and_a_key(tiny_folder, host):
    without_key, keyed = spec_with_servers(tiny_folder), spec_with_servers(tiny_folder, key_from="ROLLOUT_KEY")
    for spec in (without_key, keyed):
        with pytest.raises(UnreadableInput, match="lets other machines connect"):
            address(spec, host=host)
    with pytest.raises(UnreadableInput, match="must require a key"):
        address(without_key, host=host, allow_remote=True)
    assert address(keyed, host=host, allow_remote=True).host == host


def test_spec_without_servers_is_refused(tiny_folder):
    with pytest.raises(UnreadableInput, match="backend is transformers") as caught:
        address(make_spec(tiny_folder))
    assert "vllm_server" in caught.value.hint


def test_command_starts_vllm_with_the_gateway_and_the_in_process_settings(tiny_folder):
    from sdkit.sampling.vllm_settings import engine_settings

    backend = VllmServerBackend(
        max_num_seqs=7, kv_cache_gib=0.5, engine_args=Table({"attention_backend": "--host", "enable_dbo": True})
    )
    where = serve.Address(host="127.0.0.1", port=8000)
    student = ModelSpec(path="org/model", dtype="float32", revision="abc")
    command = serve.server_command(backend, student, "org/model", 300, where)
    flags = command[3:]
    values = dict(flag.split("=") for flag in flags if "=" in flag)
    assert values["--middleware"] == "sdkit.serving.gateway.Gateway"
    assert values["--max-model-len"] == "300"
    assert values["--revision"] == "abc"
    assert values["--generation-config"] == "vllm"
    assert json.loads(values["--ir-op-priority"]) == vllm_cpu.PRIORITY
    assert values["--kv-cache-memory-bytes"] == str(1 << 29)
    assert values["--attention-backend"] == "--host"  # no flag of its own
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--enable-dbo"} <= set(flags)
    settings = engine_settings(VllmBackend(max_num_seqs=7, kv_cache_gib=0.5), "float32", 300)
    flag_names = {f.removeprefix("--").removeprefix("no-").split("=")[0] for f in flags}
    assert {name.replace("_", "-") for name in settings} <= flag_names
    assert not {f for f in flags if "key" in f}  # a list of processes must not show the key


def test_environment_has_no_development_mode_and_only_this_servers_key(tmp_path):
    outer = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_API_KEY": "another's",
        "OMP_WAIT_POLICY": "ACTIVE",
        "HOME": "/home/me",
    }
    environment = serve.server_environment(outer, tmp_path, None)
    assert environment == {
        "HOME": "/home/me",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "VLLM_NO_USAGE_STATS": "1",
        "SDKIT_WEIGHTS_FOLDER": str(tmp_path),
        "TORCHDYNAMO_DISABLE": "1",
    }
    assert serve.server_environment(outer, tmp_path, "mine")["VLLM_API_KEY"] == "mine"
    assert "TORCHDYNAMO_DISABLE" not in serve.server_environment(outer, tmp_path, None, compiles=True)


def test_occupied_port_is_reported_before_anything_starts(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(serve, "resolve_model", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = serve.Address(host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(BadEnvironment, match="cannot listen on 127") as caught:
            serve.serve(spec_with_servers(tiny_folder), tmp_path, where, None, lambda located: 64)
    assert "--port" in caught.value.hint


def test_missing_vllm_is_reported(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "vllm_version", lambda: None)
    where = serve.Address(host="127.0.0.1", port=1)
    with pytest.raises(BadEnvironment, match="vLLM is not installed"):
        serve.serve(spec_with_servers(tiny_folder), tmp_path, where, None, lambda located: 64)


def test_longest_sequence_is_that_of_the_run(tiny_folder, tmp_path, open_tiny):
    spec = spec_with_servers(tiny_folder)
    trainer = open_tiny(make_spec(tiny_folder))
    assert inputs.longest_sequence(spec, tmp_path, str(tiny_folder)) == trainer.setup.longest_sequence


def test_command_line_passes_everything_on(tiny_folder, tmp_path, monkeypatch):
    from sdkit.cli import app

    spec = {
        "model": {"path": str(tiny_folder)},
        "data": {
            "source": {"kind": "inline", "rows": [{"q": "one", "d": "two"}]},
            "columns": {"prompt": "q", "demonstration": "d"},
        },
        "rollout": {"sampled_by": {"kind": "dataset"}},
        "losses": {"imitate": {"kind": "cross_entropy"}},
        "optimizer": {"lr": 0.01},
        "training": {"steps": 2, "prompts_per_step": 1},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    calls = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: calls.append(arguments))
    command = ["serve", str(path), "rollout.backend=vllm_server", "--port", "8005"]
    done = CliRunner().invoke(app, [*command, "--max-tokens", "99"])
    assert done.exit_code == 0, done.output
    [(checked, base, where, _, longest)] = calls
    assert (where.port, longest(""), base) == (8005, 99, tmp_path)
    assert checked.rollout.backend == VllmServerBackend()


STAND_IN = """
import subprocess, sys, time
print("warming up", file=sys.stderr, flush=True)
subprocess.Popen([sys.executable, "-S", "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"])
time.sleep(300)
"""
"""Used instead of vLLM: a process with a child that ignores its parent's end and SIGTERM."""

SERVING = """
import os, sys
os.environ.pop("SDKIT_DEBUG", None)
from sdkit.sampling import vllm_cpu
from sdkit.serving import serve
from sdkit.language.errors import ProcessDied
serve.POLL_SECONDS = 0.05
try:
    with serve._running_server([sys.executable, "-S", "-c", sys.argv[1]], os.environ) as process:
        print(process.pid, flush=True)
        serve._wait_for_exit(process)
except ProcessDied as error:
    sys.exit(f"{error.exit_code}: {error}")
"""


@pytest.fixture
def running_server():
    """A process that serves `STAND_IN`, and the process group of `STAND_IN`."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, STAND_IN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    group = int(process.stdout.readline())
    wait_until(lambda: len(members(group)) == 2, 20)
    yield process, group
    process.kill()
    process.wait()
    for pid in members(group):
        os.kill(pid, signal.SIGKILL)


def test_sigterm_stops_server_and_children(running_server):
    process, group = running_server
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert members(group) == []


def test_killed_server_is_reported_and_leaves_no_process(running_server):
    process, group = running_server
    os.kill(group, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert errors.startswith("warming up\n")
    assert errors.strip().endswith("6: the vLLM server ended by SIGKILL")
    assert process.returncode == 1
    assert members(group) == []


def test_server_dies_with_a_killed_serve_process(running_server):
    process, group = running_server
    process.kill()
    wait_until(lambda: not members(group), 20)
