"""Starting and ending several ranks by sdkit, `torchrun` and `deepspeed`, with and without failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from os_processes import alive, free_port, wait_until
from tinyruns import ON_RANKS, lines, metrics, train, weights_of

from sdkit.distributed import launch as launching
from sdkit.distributed.launch import launch
from sdkit.language.errors import Diverged, ProcessDied, UnreadableInput
from sdkit.language.load import load_spec


def script(text):
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = os.environ['RANK']\n{text}"]


def test_every_rank_gets_its_environment(tmp_path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_WAIT_POLICY GOMP_SPINCOUNT"
    write_environment = (
        f"print({{n: os.environ[n] for n in '{names}'.split()}}, file=open(r'{tmp_path}/' + rank, 'w'))"
    )
    assert launch(3, script(write_environment)) == 0
    environments = [yaml.safe_load((tmp_path / str(rank)).read_text()) for rank in range(3)]
    for rank, each in enumerate(environments):
        assert each["RANK"] == each["LOCAL_RANK"] == str(rank)
        assert each["WORLD_SIZE"] == each["LOCAL_WORLD_SIZE"] == "3"
        assert each["MASTER_ADDR"] == "127.0.0.1"
        assert (each["OMP_WAIT_POLICY"], each["GOMP_SPINCOUNT"]) == ("PASSIVE", "0")
    assert len({each["MASTER_PORT"] for each in environments}) == 1


def test_cores_are_shared_unless_the_user_sets_them(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert launching._environment(0, 3, 1)["OMP_NUM_THREADS"] == "2"
    assert launching._environment(0, 9, 1)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launching._environment(0, 3, 1)["OMP_NUM_THREADS"] == "5"


def test_aborted_rank_is_not_the_cause(capfd):
    """NCCL aborts a rank that waits for too long: here for one that ran out of memory."""
    assert launch(2, script("os.abort() if rank == '0' else sys.exit(5)")) == 5
    assert launch(2, script("os.abort() if rank == '0' else sys.exit(6)")) == 6


def test_aborted_ranks_name_the_time_limit():
    with pytest.raises(ProcessDied, match="rank 0 was killed by SIGABRT") as caught:
        launch(2, script("os.abort()"))
    assert "training.deadline_seconds" in caught.value.hint


@pytest.mark.parametrize("code", [1, 3, 5, 8, 9])
def test_exit_code_is_that_of_the_rank_that_failed_first(capfd, code):
    """Rank 1 fails; rank 0 notices first and ends with the code of a rank that has lost another."""
    fail = f"time.sleep(0.2 * (rank == '1'))\nprint('of rank', rank, file=sys.stderr)\nsys.exit({code} if rank == '1' else 6)"
    assert launch(2, script(fail)) == code
    assert "of rank 1" in capfd.readouterr().err


def test_killed_rank_is_named_and_the_others_end(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    write_pid = f"print(os.getpid(), file=open(r'{tmp_path}/' + rank, 'w'))\n"
    die = "rank == '2' and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    started = time.monotonic()
    with pytest.raises(ProcessDied, match="rank 2 was killed by SIGKILL"):
        launch(3, script(write_pid + "time.sleep(0.3)\n" + die))
    assert time.monotonic() - started < 20
    for rank in range(3):
        assert not psutil.pid_exists(int((tmp_path / str(rank)).read_text()))


LAUNCHER = (
    "from sdkit.distributed import launch as l; import sys; l.GRACE_SECONDS = 1; sys.exit(l.launch(2, sys.argv[1:]))"
)


def start_launcher(tmp_path, text):
    """Starts a launcher of two ranks and waits for both; returns its process and the ranks' process ids."""
    ready = f"open(r'{tmp_path}/' + rank, 'w').write(str(os.getpid()))\n"
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *script(ready + text)])
    for rank in range(2):
        wait_until(lambda rank=rank: (tmp_path / str(rank)).is_file() and (tmp_path / str(rank)).read_text(), 60)
    return process, [int((tmp_path / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_reaches_every_rank_once(tmp_path, number):
    install = "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)\n"
    handler = f"def stop(n, _):\n    open(r'{tmp_path}/got' + rank, 'a').write(str(n) + ' ')\n"
    process, _ = start_launcher(
        tmp_path,
        handler
        + install
        + "time.sleep(0.2)\nwhile not os.path.exists('"
        + str(tmp_path / "end")
        + "'): time.sleep(0.02)\nsys.exit(7)",
    )
    time.sleep(0.5)
    process.send_signal(number)
    wait_until(lambda: all((tmp_path / f"got{rank}").is_file() for rank in range(2)), 60)
    (tmp_path / "end").touch()
    assert process.wait(timeout=60) == 7
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [f"{number:d} "] * 2


def test_second_interrupt_kills_ranks_that_ignore_it(tmp_path):
    process, pids = start_launcher(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)")
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(timeout=60) == ProcessDied.exit_code
    assert not any(alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the ranks")
def test_ranks_end_with_their_launcher(tmp_path):
    process, pids = start_launcher(tmp_path, "time.sleep(600)")
    process.kill()
    process.wait(timeout=60)
    wait_until(lambda: not any(alive(pid) for pid in pids), 60)


def test_another_launcher_prevents_a_second_launch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [launching.must_launch(n) for n in (None, 1, 2)] == [False, False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [launching.must_launch(n) for n in (None, 2)] == [False, False]
    with pytest.raises(UnreadableInput, match="has started 2"):
        launching.must_launch(4)


@pytest.fixture(scope="module")
def spec_file(tiny_folder, tmp_path_factory):
    """A run file whose reward kills the rank that the variable KILL names."""
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
        "evaluation": {"suites": {"held_out": {"data": rows(100), "score": "long", "loss_prompts": 3}}},
        "optimizer": {"lr": 300, "eps": 1e4},
        "training": {"steps": 2, "prompts_per_step": 4, "zero_stage": 1},
        "output": {"trackers": []},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(spec))
    return folder / "run.yaml"


def run(*commands, code=0, env=None):
    """Runs these processes at once; returns standard output and error of the first."""
    processes = [
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
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [code] * len(processes), outputs[0][1][-3000:]
    return outputs[0]


TRAIN = [sys.executable, "-m", "sdkit", "train"]


@pytest.fixture(scope="module")
def one_process_run(spec_file, _stop_process_group, tmp_path_factory):
    return train(load_spec(spec_file).spec, tmp_path_factory.mktemp("one") / "run")


def assert_same_run(folder, one):
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    for kind in ("rollouts", "evaluations"):
        names = sorted(p.name for p in (one / kind).iterdir())
        assert sorted(p.name for p in (folder / kind).iterdir()) == names
        for name in names:
            ours, theirs = lines(folder / kind / name), lines(one / kind / name)
            for a, b in zip(ours, theirs, strict=True):
                assert a.pop("sampler_logprobs", None) == pytest.approx(b.pop("sampler_logprobs", None), abs=1e-4)
                entropies = [each.get("measures", {}).pop("entropy", None) for each in (a, b)]
                assert entropies[0] == pytest.approx(entropies[1], abs=1e-4)
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


def test_processes_option_trains_like_one_process(spec_file, one_process_run, tmp_path):
    """Two processes under stage 3 equal one; one console."""
    command = [*TRAIN, spec_file, "training.zero_stage=3", "--processes", 2]
    out, err = run([*command, "--to", tmp_path / "run"])
    assert_same_run(tmp_path / "run", one_process_run)
    assert out.count("step 2/2") == 1
    assert err == ""


def test_torchrun_on_two_nodes_trains_like_one_process(spec_file, one_process_run, tmp_path):
    """Two groups of one process on loopback stand for two machines."""
    rendezvous = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", free_port()]
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    command = ["-m", "sdkit", "train", spec_file, "--to", tmp_path / "run"]
    out, _ = run(*([*launcher, "--node-rank", node, *command] for node in (0, 1)))
    assert_same_run(tmp_path / "run", one_process_run)
    assert out.count("step 2/2") == 1


@pytest.mark.full
def test_deepspeed_launcher_trains_like_one_process(spec_file, one_process_run, tmp_path):
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, "--master_port", free_port()]
    run([*launcher, "--module", "sdkit", "train", spec_file, "training.zero_stage=2", "--to", tmp_path / "run"])
    assert_same_run(tmp_path / "run", one_process_run)


def test_killed_rank_ends_the_run(spec_file, tmp_path):
    command = [*TRAIN, spec_file, "--to", tmp_path / "run", "--processes", 2]
    started = time.monotonic()
    _, err = run(command, code=ProcessDied.exit_code, env={"KILL": "1"})
    assert time.monotonic() - started < 120
    assert "error: rank 1 was killed by SIGKILL" in err
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert "lost rank 1" in status["reason"]


def test_run_that_diverged_ends_both_ranks(spec_file, tmp_path, warm):
    overrides = ["optimizer.lr=20", "optimizer.eps=1e-8", "training.steps=3"]
    words = ["train", spec_file, *overrides, "--to", tmp_path / "run"]
    done = warm.run(ON_RANKS, 2, tmp_path / "log", *words, timeout=300)
    assert done.returncode == Diverged.exit_code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "diverged"
    assert (tmp_path / "run/model").is_dir()


@pytest.mark.parametrize(
    ("written", "state"),
    [({"state": "running", "step": 3}, "failed"), ({"state": "stopped"}, "stopped"), (None, "running")],
)
def test_launcher_records_a_failure_that_no_rank_recorded(sdkit, spec_file, tmp_path, monkeypatch, written, state):
    """Without a new status the ranks did not get to their run: the one of an earlier attempt stays."""
    status = tmp_path / "run" / "status.json"
    status.parent.mkdir()
    status.write_text('{"state": "running"}')

    def fail(processes, command):
        if written:
            status.write_text(json.dumps(written))
        raise ProcessDied("rank 0 was killed by SIGKILL")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launching, "launch", fail)
    code, _, err = sdkit("train", spec_file, "--to", status.parent, "--processes", 2)
    assert code == ProcessDied.exit_code
    assert "rank 0 was killed" in err
    now = json.loads(status.read_text())
    assert now["state"] == state
    if state == "failed":
        assert now == {"state": "failed", "step": 3, "reason": "rank 0 was killed by SIGKILL"}


def test_indivisible_prompts_start_no_process(spec_file, tmp_path):
    command = [*TRAIN, spec_file, "--to", tmp_path / "run", "--processes", 3]
    _, err = run(command, code=UnreadableInput.exit_code)
    assert "prompts_per_step is 4, which 3 ranks cannot share equally" in err
    assert not (tmp_path / "run").exists()
