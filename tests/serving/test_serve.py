"""`sdkit serve` before vLLM starts: where it listens, with what, and what it refuses.  test_serve_vllm.py starts it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from attrs import evolve
from groups import members
from tinyruns import make_spec
from typer.testing import CliRunner

from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.language.specs import ModelSpec, VllmBackend, VllmServerBackend
from sdkit.serving import serve
from sdkit.train import inputs


def served(folder, **changes):
    spec = make_spec(folder)
    backend = VllmServerBackend(**changes)
    return evolve(spec, rollout=evolve(spec.rollout, backend=backend))


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def listen(spec, host="127.0.0.1", port=None, allow_remote=False):
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
def test_it_listens_where_the_spec_looks_for_it(tiny_folder, urls, port, url):
    assert listen(served(tiny_folder, urls=urls), port=port).url == url


def test_an_address_of_six_parts_is_written_in_brackets(tiny_folder):
    assert listen(served(tiny_folder), host="::1").url == "http://[::1]:8000"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.2", "trainer.example"])
def test_other_machines_come_in_with_the_word_and_a_key_alone(tiny_folder, host):
    open_to_all, keyed = served(tiny_folder), served(tiny_folder, key_from="ROLLOUT_KEY")
    for spec in (open_to_all, keyed):
        with pytest.raises(UnreadableInput, match="lets other machines connect"):
            listen(spec, host=host)
    with pytest.raises(UnreadableInput, match="must require a key"):
        listen(open_to_all, host=host, allow_remote=True)
    assert listen(keyed, host=host, allow_remote=True).host == host


def test_a_spec_without_servers_is_told_so(tiny_folder):
    with pytest.raises(UnreadableInput, match="backend is transformers") as caught:
        listen(make_spec(tiny_folder))
    assert "vllm_server" in caught.value.hint


def test_the_command_is_vllms_with_the_door_and_the_settings_of_the_engine_in_process(tiny_folder):
    from sdkit.sampling.vllm import engine_settings

    backend = VllmServerBackend(max_num_seqs=7, kv_cache_gib=0.5)
    where = serve.Address(host="127.0.0.1", port=8000)
    student = ModelSpec(path="org/model", dtype="float32", revision="abc")
    command = serve.server_command(backend, student, "org/model", 300, where)
    flags = command[3:]
    assert flags[flags.index("--middleware") + 1] == "sdkit.serving.gateway.Gateway"
    assert flags[flags.index("--max-model-len") + 1] == "300"
    assert flags[flags.index("--revision") + 1] == "abc"
    assert flags[flags.index("--generation-config") + 1] == "vllm"
    assert flags[flags.index("--kv-cache-memory-bytes") + 1] == str(1 << 29)
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(flags)
    own = engine_settings(VllmBackend(max_num_seqs=7, kv_cache_gib=0.5), "float32", 300)
    spoken = {f.removeprefix("--").removeprefix("no-") for f in flags if f.startswith("--")}
    assert {name.replace("_", "-") for name in own} <= spoken
    assert not {f for f in flags if "key" in f}  # who looks at processes sees no key


def test_the_environment_has_no_development_mode_and_only_this_servers_key(tmp_path):
    outer = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_API_KEY": "another's",
        "OMP_WAIT_POLICY": "ACTIVE",
        "HOME": "/home/me",
    }
    found = serve.server_environment(outer, tmp_path, None)
    assert found == {
        "HOME": "/home/me",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "VLLM_NO_USAGE_STATS": "1",
        "SDKIT_WEIGHTS_FOLDER": str(tmp_path),
        "TORCHDYNAMO_DISABLE": "1",
    }
    assert serve.server_environment(outer, tmp_path, "mine")["VLLM_API_KEY"] == "mine"


def test_a_port_that_is_taken_is_said_before_anything_starts(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(serve, "resolve_model", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = serve.Address(host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(BadEnvironment, match="cannot listen on 127") as caught:
            serve.serve(served(tiny_folder), tmp_path, where, None, lambda located: 64)
    assert "--port" in caught.value.hint


def test_without_vllm_it_says_what_to_install(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "vllm_version", lambda: None)
    where = serve.Address(host="127.0.0.1", port=1)
    with pytest.raises(BadEnvironment, match="vLLM is not installed"):
        serve.serve(served(tiny_folder), tmp_path, where, None, lambda located: 64)


def test_the_longest_sequence_is_that_of_the_run(tiny_folder, tmp_path, open_tiny):
    spec = served(tiny_folder)
    world = open_tiny(make_spec(tiny_folder))
    assert inputs.longest_sequence(spec, tmp_path, str(tiny_folder)) == world.setup.longest_sequence


def test_the_command_line_hands_everything_on(tiny_folder, tmp_path, monkeypatch):
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
    seen = []
    monkeypatch.setattr(serve, "serve", lambda *given: seen.append(given))
    command = ["serve", str(path), "rollout.backend=vllm_server", "--port", "8005"]
    done = CliRunner().invoke(app, [*command, "--max-tokens", "99"])
    assert done.exit_code == 0, done.output
    [(checked, base, where, _, longest)] = seen
    assert (where.port, longest(""), base) == (8005, 99, tmp_path)
    assert checked.rollout.backend == VllmServerBackend()


STAND_IN = """
import subprocess, sys, time
print("it is warm here", file=sys.stderr, flush=True)
subprocess.Popen([sys.executable, "-S", "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"])
time.sleep(300)
"""
"""Instead of vLLM: a process with a child that neither notices its end nor heeds a request."""

SERVING = """
import os, sys
os.environ.pop("SDKIT_DEBUG", None)
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
def running():
    """A process that serves the stand-in, the group of what it serves, and whether the group is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, STAND_IN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    group = int(process.stdout.readline())
    _until(lambda: len(members(group)) == 2)
    yield process, group
    process.kill()
    process.wait()
    for pid in members(group):
        os.kill(pid, signal.SIGKILL)


def _until(true, seconds=20):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_asked_to_end_it_ends_well_and_leaves_nothing(running):
    process, group = running
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert members(group) == []


def test_where_the_server_is_killed_it_says_so_and_leaves_nothing(running):
    process, group = running
    os.kill(group, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert said.startswith("it is warm here\n")
    assert said.strip().endswith("6: the vLLM server ended by SIGKILL")
    assert process.returncode == 1
    assert members(group) == []


def test_where_it_is_killed_itself_the_server_goes_with_it(running):
    process, group = running
    process.kill()
    _until(lambda: not members(group))
