"""A set of runs: its manifest, the states of its members, and the runner, on members that are scripts."""

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import psutil
import pytest
from attrs import evolve
from os_processes import wait_until
from rich.console import Console

from sdkit.language.errors import BadData, ProcessDied, Stopped, UnreadableInput
from sdkit.runs.run_sets import Member, RunSet, check_same_set, open_set, read_set, state_of, write_set
from sdkit.sets import slots
from sdkit.sets.runner import Options, run_members, train_command

MEMBER = """
import json, os, pathlib, signal, sys, time
folder, end = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(exist_ok=True)
(folder.parent / "order").open("a").write(folder.name + "\\n")
def write(state): (folder / "status.json").write_text(json.dumps({"state": state}))
def stop(number, _):
    write("stopped")
    sys.exit(7)
signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
(folder / "environment").write_text(os.environ.get("SLOT", ""))
if end == "wait":
    (folder / "ready").touch()
    time.sleep(600)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
write({"0": "done", "9": "diverged"}.get(end, "failed"))
print("the end of", folder.name)
sys.exit(int(end))
"""


def make_set(folder, names=("a", "b", "c"), **changes):
    members = tuple(Member(name=name, spec="spec.yaml", settings={"training": {"steps": 3}}) for name in names)
    return RunSet(**({"path": folder, "kind": "seeds", "members": members} | changes))


def command(run_set, **ends):
    """The command of each member, which ends with the code of its name, or 0."""
    return lambda member: [
        sys.executable, "-S", "-c", MEMBER, str(run_set.folder(member)), str(ends.get(member.name, 0))
    ]  # fmt: skip


def run(run_set, options=None, **ends):
    console = Console(file=StringIO(), width=200)
    try:
        run_members(run_set, command(run_set, **ends), console, options or Options())
    finally:
        run.printed = console.file.getvalue()


@pytest.fixture
def begun(tmp_path):
    run_set = make_set(tmp_path / "set")
    open_set(run_set)
    return run_set


def order(run_set):
    return (run_set.path / "order").read_text().split()


def test_manifest_is_read_back(tmp_path):
    written = make_set(tmp_path / "set", facts={"grid": [["optimizer.lr", ["1e-5"]]]})
    write_set(written)
    assert read_set(written.path) == written
    (written.path / "set.json").write_text('{"kind": "seeds"}')
    with pytest.raises(UnreadableInput, match="not a set's"):
        read_set(written.path)
    with pytest.raises(UnreadableInput, match="not a set of runs"):
        read_set(tmp_path)
    with pytest.raises(ValueError, match="folder names of their own: a, a"):
        write_set(make_set(tmp_path / "twice", ("a", "a")))


def test_members_run_in_order_and_finished_ones_never_again(begun):
    assert begun.states() == dict.fromkeys("abc", "not started")
    run(begun, b=9)
    assert begun.states() == {"a": "done", "b": "diverged", "c": "done"}
    assert state_of(begun.path) == "done"
    run(begun)
    assert order(begun) == ["a", "b", "c"]
    assert "3 of 3 runs are finished already" in run.printed


def test_failed_member_does_not_stop_independent_ones(begun):
    with pytest.raises(BadData, match=r"1 run of 3 failed: b \(exit code 3\)"):
        run(begun, b=3)
    assert begun.states() == {"a": "done", "b": "failed", "c": "done"}
    assert state_of(begun.path) == "failed"
    run(begun)
    assert order(begun) == ["a", "b", "c", "b"]
    assert "resuming (failed) b, 2 of 3" in run.printed


def test_members_that_build_on_a_failed_one_do_not_start(begun):
    with pytest.raises(BadData, match="not started: b, c"):
        run(begun, Options(stop_at_failure=True), a=3)
    assert order(begun) == ["a"]


def test_killed_member_is_named(begun):
    with pytest.raises(ProcessDied, match="b"):
        run(begun, b="killed")


def test_members_at_the_same_time_have_slots_and_logs_of_their_own(begun):
    run(begun, Options(slots=({"SLOT": "0"}, {"SLOT": "1"})))
    used = [(begun.path / name / "environment").read_text() for name in "abc"]
    assert sorted(used[:2]) == ["0", "1"]
    assert (begun.path / "logs" / "c.log").read_text() == "the end of c\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_request_to_stop_reaches_the_member_and_the_set_resumes(begun, number):
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-c", WATCH, str(begun.path / "b" / "ready"), str(os.getpid()), str(int(number))]
    )
    with pytest.raises(Stopped, match=r"1 of 3 runs are finished; left: b \(stopped\), c \(not started\)"):
        run(begun, b="wait")
    watcher.wait()
    assert state_of(begun.path) == "stopped"
    assert order(begun) == ["a", "b"]
    run(begun)
    assert order(begun) == ["a", "b", "b", "c"]


WATCH = """
import os, pathlib, sys, time
ready, pid, number = sys.argv[1:]
while not pathlib.Path(ready).exists():
    time.sleep(0.01)
os.kill(int(pid), int(number))
"""


def test_killing_the_runner_ends_the_member(begun):
    """The kernel does it: nothing of the runner is left to do it."""
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; import test_runner as t; t.run(t.read_set(Path(sys.argv[1])), a='wait')"
    )
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    runner = subprocess.Popen([sys.executable, "-c", script, str(begun.path), *here])
    try:
        wait_until((begun.path / "a" / "ready").exists, seconds=120)
        with pytest.raises(UnreadableInput, match=f"still being run by process {runner.pid}"):
            open_set(begun, resume=True)
        child = psutil.Process(runner.pid).children()[0]
    finally:
        runner.kill()
        runner.wait()
    wait_until(lambda: not child.is_running() or child.status() == "zombie", seconds=60)
    assert state_of(begun.path) == "stopped"
    open_set(begun, resume=True)


def test_folder_in_use_is_refused(begun, tmp_path):
    with pytest.raises(UnreadableInput, match="exists"):
        open_set(begun)
    (begun.path / "left").touch()
    open_set(begun, overwrite=True)
    assert not (begun.path / "left").exists()
    other = make_set(tmp_path / "other")
    other.path.mkdir()
    (other.path / "mine.txt").touch()
    with pytest.raises(UnreadableInput, match="not a set of runs, so --overwrite leaves it alone"):
        open_set(other, overwrite=True)
    with pytest.raises(UnreadableInput, match=r"no set\.json"):
        open_set(other, resume=True)


def changed(run_set, **settings):
    members = tuple(evolve(m, settings={"training": {"steps": 3, **settings}}) for m in run_set.members)
    return evolve(run_set, members=members)


def test_changed_set_is_refused_by_name(begun):
    with pytest.raises(UnreadableInput, match=r"training\.steps: 3 then, 4 now"):
        check_same_set(begun, changed(begun, steps=4))
    one = evolve(begun, members=(*begun.members[:2], changed(begun, seed=1).members[2]))
    with pytest.raises(UnreadableInput, match=r"c: training\.seed: null then, 1 now"):
        check_same_set(begun, one)
    with pytest.raises(UnreadableInput, match="begun with the members a, b, c, not a, b"):
        check_same_set(begun, evolve(begun, members=begun.members[:2]))
    with pytest.raises(UnreadableInput, match="kind seeds, not sweep"):
        check_same_set(begun, evolve(begun, kind="sweep"))
    check_same_set(begun, changed(begun, deadline_seconds=60.0))


def test_command_resumes_what_was_begun(begun):
    member = begun.members[0]
    options = Options(processes=2, arguments=("--changed-code",))
    first = train_command(begun, evolve(member, overrides=("training.seed=1",)), options)
    folder = begun.folder(member)
    assert first[3:] == ["train", "spec.yaml", "training.seed=1", "--to", str(folder), "--processes", "2"]
    folder.mkdir()
    (folder / "resolved.yaml").touch()
    assert train_command(begun, member, options)[-2:] == ["--resume", "--changed-code"]


def test_run_killed_while_it_created_its_folder_begins_again(begun):
    folder = begun.folder(begun.members[0])
    folder.mkdir()
    (folder / "spec.yaml").touch()
    run(begun)
    assert not (folder / "spec.yaml").exists()


def test_state_of_a_killed_process_is_stopped(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "pid": os.getpid(), "process": -1.0}))
    assert state_of(tmp_path) == "stopped"


def test_slots_divide_cores_or_devices(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert (
        slots.make_slots(2, 2) == [{"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}] * 2
    )
    assert slots.make_slots(1, 2) == [{}]
    monkeypatch.setattr(slots, "has_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7")
    assert slots.make_slots(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    with pytest.raises(
        UnreadableInput, match="3 runs at the same time with 2 ranks each need 6 GPUs, but there are 4"
    ):
        slots.make_slots(3, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnreadableInput, match="a launcher"):
        slots.make_slots(1, 1)
