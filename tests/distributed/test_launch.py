"""How several ranks are started and ended: by sdkit, `torchrun` and `deepspeed`, in good times and bad."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tinyruns import lines, metrics, train, weights_of

from sdkit.distributed import launch as launching
from sdkit.distributed.launch import launch
from sdkit.language.errors import ProcessDied, UnreadableInput
from sdkit.language.load import load_spec


def script(text):
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = os.environ['RANK']\n{text}"]


def test_every_rank_knows_its_place(tmp_path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_WAIT_POLICY"
    tell = f"print({{n: os.environ[n] for n in '{names}'.split()}}, file=open(r'{tmp_path}/' + rank, 'w'))"
    assert launch(3, script(tell)) == 0
    told = [yaml.safe_load((tmp_path / str(rank)).read_text()) for rank in range(3)]
    for rank, each in enumerate(told):
        assert each["RANK"] == each["LOCAL_RANK"] == str(rank)
        assert each["WORLD_SIZE"] == each["LOCAL_WORLD_SIZE"] == "3"
        assert each["MASTER_ADDR"] == "127.0.0.1"
        assert each["OMP_WAIT_POLICY"] == "PASSIVE"
    assert len({each["MASTER_PORT"] for each in told}) == 1


def test_cores_are_shared_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert launching._environment(0, 3, 1)["OMP_NUM_THREADS"] == "2"
    assert launching._environment(0, 9, 1)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launching._environment(0, 3, 1)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("code", [1, 3, 5, 8])
def test_the_first_cause_decides_and_is_told(capfd, code):
    """Rank 1 fails; rank 0 notices first and ends with the code of a rank that has lost another."""
    fail = f"time.sleep(0.2 * (rank == '1'))\nprint('of rank', rank, file=sys.stderr)\nsys.exit({code} if rank == '1' else 6)"
    assert launch(2, script(fail)) == code
    assert "of rank 1" in capfd.readouterr().err


def test_a_killed_rank_is_named_and_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    wait = f"print(os.getpid(), file=open(r'{tmp_path}/' + rank, 'w'))\n"
    die = "rank == '2' and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    started = time.monotonic()
    with pytest.raises(ProcessDied, match="rank 2 was killed by SIGKILL"):
        launch(3, script(wait + "time.sleep(0.3)\n" + die))
    assert time.monotonic() - started < 20
    for rank in range(3):
        assert not psutil.pid_exists(int((tmp_path / str(rank)).read_text()))


LAUNCHER = (
    "from sdkit.distributed import launch as l; import sys; l.GRACE_SECONDS = 1; sys.exit(l.launch(2, sys.argv[1:]))"
)


def launcher(tmp_path, text):
    """A launcher of two ranks in a process of its own, once both have begun."""
    ready = f"open(r'{tmp_path}/' + rank, 'w').write(str(os.getpid()))\n"
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *script(ready + text)])
    for rank in range(2):
        waited(lambda rank=rank: (tmp_path / str(rank)).is_file() and (tmp_path / str(rank)).read_text())
    return process, [int((tmp_path / str(rank)).read_text()) for rank in range(2)]


def waited(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_every_rank_once(tmp_path, number):
    note = "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)\n"
    stop = f"def stop(n, _):\n    open(r'{tmp_path}/got' + rank, 'a').write(str(n) + ' ')\n"
    process, _ = launcher(
        tmp_path,
        stop
        + note
        + "time.sleep(0.2)\nwhile not os.path.exists('"
        + str(tmp_path / "end")
        + "'): time.sleep(0.02)\nsys.exit(7)",
    )
    time.sleep(0.5)
    process.send_signal(number)
    waited(lambda: all((tmp_path / f"got{rank}").is_file() for rank in range(2)))
    (tmp_path / "end").touch()
    assert process.wait(timeout=60) == 7
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [f"{number:d} "] * 2


def test_a_second_interrupt_ends_ranks_that_do_not(tmp_path):
    process, pids = launcher(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)")
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(timeout=60) == ProcessDied.exit_code
    assert not any(alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the ranks")
def test_no_rank_outlives_its_launcher(tmp_path):
    process, pids = launcher(tmp_path, "time.sleep(600)")
    process.kill()
    process.wait(timeout=60)
    waited(lambda: not any(alive(pid) for pid in pids))


def alive(pid):
    """Whether the process runs; one that is dead and not yet waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_under_another_launcher_none_is_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [launching.must_launch(n) for n in (None, 1, 2)] == [False, False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [launching.must_launch(n) for n in (None, 2)] == [False, False]
    with pytest.raises(UnreadableInput, match="has started 2"):
        launching.must_launch(4)


@pytest.fixture(scope="module")
def spec_file(tiny_folder, tmp_path_factory):
    """A run file whose reward ends the process of rank 1 where KILL says so."""
    folder = tmp_path_factory.mktemp("spec")
    (folder / "reward.py").write_text(
        "import os, signal\n"
        "def score(completion, row):\n"
        "    if completion and os.environ.get('KILL', '-') == os.environ.get('RANK'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return float(len(completion))\n"
    )
    columns = {"prompt": "q", "demonstration": "d"}

    def rows(start):
        return {
            "source": {
                "kind": "inline",
                "rows": [{"q": f"What is {i} + 1?", "d": str(i + 1)} for i in range(start, start + 4)],
            },
            "columns": columns,
        }

    spec = {
        "method": "sdft",
        "model": {"path": str(tiny_folder), "dtype": "float32"},
        "data": rows(0),
        "rollout": {"max_new_tokens": 8, "backend": "transformers"},
        "teacher": {"sees": {"max_prompt_tokens": 4096}},
        "rewards": {"long": {"kind": "file", "file": str(folder / "reward.py"), "function": "score"}},
        "evaluation": {"suites": {"held": {"data": rows(100), "score": "long", "loss_prompts": 3}}},
        "optimizer": {"lr": 300, "eps": 1e4},
        "training": {"steps": 2, "prompts_per_step": 4, "zero_stage": 1},
        "output": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(spec))
    return folder / "run.yaml"


def run(*commands, code=0, env=None):
    """These processes side by side; what the first wrote on each stream."""
    running = [
        subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {}),
        )
        for command in commands
    ]
    try:
        told = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [code] * len(running), told[0][1][-3000:]
    return told[0]


TRAIN = [sys.executable, "-m", "sdkit", "train"]


@pytest.fixture(scope="module")
def one_process(spec_file, _leave_at_the_end, tmp_path_factory):
    return train(load_spec(spec_file).spec, tmp_path_factory.mktemp("one") / "run")


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def assert_same_run(folder, one):
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    for kind in ("rollouts", "evaluations"):
        names = sorted(p.name for p in (one / kind).iterdir())
        assert sorted(p.name for p in (folder / kind).iterdir()) == names
        for name in names:
            ours, theirs = lines(folder / kind / name), lines(one / kind / name)
            for a, b in zip(ours, theirs, strict=True):
                assert a.pop("sampler_logprobs", None) == pytest.approx(b.pop("sampler_logprobs", None), abs=1e-4)
                assert a == b
    compared = []
    for a, b in zip(metrics(folder), metrics(one), strict=True):
        names = {"loss", "grad_norm", "eval/score", "eval/loss", "teacher_distance"} & b.keys()
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-4)
        compared += names
    assert {"loss", "grad_norm", "eval/score", "teacher_distance"} <= set(compared)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(weights_of(folder)[name], value, atol=1e-5, rtol=1e-4)


def test_processes(spec_file, one_process, tmp_path):
    """Under stage 3, with one console."""
    command = [*TRAIN, spec_file, "training.zero_stage=3", "--processes", 2]
    out, err = run([*command, "--to", tmp_path / "run"])
    assert_same_run(tmp_path / "run", one_process)
    assert out.count("step 2/2") == 1
    assert err == ""


def test_torchrun_on_two_nodes(spec_file, one_process, tmp_path):
    """Two groups of one process on loopback, as two machines would have."""
    meet = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port()]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meet]
    command = ["-m", "sdkit", "train", spec_file, "--to", tmp_path / "run"]
    out, _ = run(*([*launcher, "--node-rank", node, *command] for node in (0, 1)))
    assert_same_run(tmp_path / "run", one_process)
    assert out.count("step 2/2") == 1


def test_the_deepspeed_launcher(spec_file, one_process, tmp_path):
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, "--master_port", port()]
    run([*launcher, "--module", "sdkit", "train", spec_file, "training.zero_stage=2", "--to", tmp_path / "run"])
    assert_same_run(tmp_path / "run", one_process)


def test_a_rank_that_dies_ends_the_run(spec_file, tmp_path):
    command = [*TRAIN, spec_file, "--to", tmp_path / "run", "--processes", 2]
    started = time.monotonic()
    _, err = run(command, code=ProcessDied.exit_code, env={"KILL": "1"})
    assert time.monotonic() - started < 120
    assert "error: rank 1 was killed by SIGKILL" in err
    kept = json.loads((tmp_path / "run/status.json").read_text())
    assert kept["state"] == "failed"
    assert "lost rank 1" in kept["reason"]


def test_prompts_that_cannot_be_dealt_start_nothing(spec_file, tmp_path):
    command = [*TRAIN, spec_file, "--to", tmp_path / "run", "--processes", 3]
    _, err = run(command, code=UnreadableInput.exit_code)
    assert "prompts_per_step is 4, which 3 ranks cannot share equally" in err
    assert not (tmp_path / "run").exists()
