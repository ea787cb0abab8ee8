"""`sdkit runs` on run directories made by hand: states, scores, what comes next, and folders that are no runs."""

import json
import os
import platform

import pytest

from sdkit import processes
from sdkit.runs.listing import list_runs
from sdkit.runs.run_sets import Member, RunSet, write_set

SCORES = {"eval/sums/greedy/number": 0.9, "eval/sums/greedy/right": 0.4, "eval/score": 0.4}
ALIVE = {"state": "running", "pid": os.getpid(), "process": processes.own_start()}
DEAD = {"state": "running", "pid": 2**22 + 1, "process": 1.0}
OF_TRAIN = ["/usr/bin/sdkit", "train", "my spec.yaml", "training.steps=9", "--overwrite"]
RESUME = "sdkit train 'my spec.yaml' training.steps=9 --resume"


def evaluation(step, scores=SCORES):
    line = {"step": step}
    for name, value in scores.items():
        line |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1, f"{name}_n": 50}
    return line


@pytest.fixture
def make_run(tmp_path):
    """Writes a run directory with this status."""

    def make(name, status, *metrics, argv=OF_TRAIN, host=None, spec='{"training": {"steps": 9}}', age=0):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "resolved.yaml").write_text(spec)
        (folder / "status.json").write_text(json.dumps({"step": 3, **status}))
        attempt = {"argv": argv, "hardware": {"host": host or platform.node()}}
        (folder / "provenance.json").write_text(json.dumps({"attempts": [{"argv": ["x"]}, attempt]}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        os.utime(folder / "status.json", (1e9 - age, 1e9 - age))
        return folder

    return make


def listed(folder):
    (run,) = list_runs(folder)
    return run


def test_finished_run_has_its_headline_score_and_is_compared(make_run):
    run = listed(make_run("a", {"state": "done", "step": 9, "steps": 9}, evaluation(0), {"step": 9}, evaluation(9)))
    assert (run.state, run.step, run.steps, run.score_name) == ("done", 9, 9, "sums/greedy/right")
    assert (run.score.mean, run.score.low, run.score.n) == (0.4, pytest.approx(0.3), 50)
    assert run.command == f"sdkit compare {run.path}"


@pytest.mark.parametrize("state", ["stopped", "interrupted", "failed"])
def test_run_that_ended_early_is_resumed_by_its_own_command(make_run, state):
    run = listed(make_run("a", {"state": state, "reason": "no disk\nat all"}))
    assert (run.state, run.step, run.steps, run.note, run.command) == (state, 3, 9, "no disk", RESUME)


def test_running_run_is_left_alone(make_run):
    run = listed(make_run("a", ALIVE))
    assert (run.state, run.note, run.command) == ("running", f"process {os.getpid()}", None)


def test_run_whose_process_died_was_killed(make_run):
    run = listed(make_run("a", DEAD))
    assert (run.state, run.command) == ("killed", RESUME)
    assert "without a word" in run.note


def test_process_on_another_machine_cannot_be_looked_up(make_run):
    run = listed(make_run("a", DEAD, host="node7"))
    assert (run.state, run.note, run.command) == ("running", "it runs, or was killed, on node7", None)


def test_command_is_not_guessed(make_run):
    assert listed(make_run("a", {"state": "stopped"}, argv=["pytest", "-x"])).command is None


@pytest.mark.parametrize(
    ("spec", "command"), [("{evaluation: {every: 1}}", "sdkit eval {}"), ("{}", "sdkit export {} --to a-model")]
)
def test_finished_run_without_a_score_is_evaluated_or_exported(make_run, spec, command):
    run = listed(make_run("a", {"state": "done"}, spec=spec))
    assert (run.score, run.steps, run.command) == (None, None, command.format(run.path))


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("status.json", "[1", "status.json is damaged"),
        ("metrics.jsonl", '{"eval/score": \n', "metrics.jsonl is damaged"),
        ("metrics.jsonl", '{"eval/score": 1}\n', "metrics.jsonl is damaged"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl is damaged"),
    ],
)
def test_damaged_run_is_listed_as_unreadable(make_run, file, content, note):
    folder = make_run("a", {"state": "done"})
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    run = listed(folder)
    assert run.state == "unreadable"
    assert run.note.startswith(note)


def test_damaged_provenance_and_spec_only_cost_the_command(make_run):
    folder = make_run("a", {"state": "failed", "reason": "x"})
    for name in ("provenance.json", "resolved.yaml"):
        (folder / name).write_text("{[")
    run = listed(folder)
    assert (run.state, run.steps, run.command) == ("failed", None, None)


def test_runs_are_found_at_any_depth_newest_first(make_run, tmp_path):
    make_run("deep/er/old", {"state": "done"}, age=100)
    make_run("new", {"state": "done"})
    make_run("new/model/inside", {"state": "done"})
    make_run(".hidden/run", {"state": "done"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no run")
    assert [run.path.relative_to(tmp_path).as_posix() for run in list_runs(tmp_path)] == ["new", "deep/er/old"]


@pytest.fixture
def make_set(make_run, tmp_path):
    """Writes a set of runs whose members have these states."""

    def make(kind, states, overrides, status="stopped", **facts):
        members = tuple(
            Member(name=name, spec="my spec.yaml", overrides=("optimizer.lr=1", *own), settings={})
            for name, own in zip(states, overrides, strict=True)
        )
        write_set(RunSet(path=tmp_path / "set", kind=kind, members=members, facts=facts))
        (tmp_path / "set" / "status.json").write_text(json.dumps({"state": status}))
        for name, state in states.items():
            if state:
                make_run(f"set/{name}", {"state": state})
        return tmp_path / "set"

    return make


def test_set_of_seeds_is_one_entry_with_its_members(make_set, tmp_path):
    seeds = [("training.seed=0",), ("training.seed=1",), ("training.seed=2",)]
    states = {"seed-0": "done", "seed-1": "stopped", "seed-2": None}
    folder = make_set("seeds", states, seeds, seeds=[0, 1, 2])
    run = listed(tmp_path)
    assert (run.kind, run.state) == ("seeds", "stopped")
    assert run.members == {"seed-0": "done", "seed-1": "stopped", "seed-2": "not started"}
    assert run.command == f"sdkit train 'my spec.yaml' optimizer.lr=1 --seeds 0,1,2 --to {folder} --resume"


def test_sweep_is_continued_or_compared(make_set, tmp_path):
    points = [("optimizer.eps=1",), ("optimizer.eps=2",)]
    folder = make_set("sweep", {"a": "done", "b": "failed"}, points, grid=[["optimizer.eps", ["1", "2"]]])
    assert (
        listed(tmp_path).command
        == f"sdkit sweep 'my spec.yaml' optimizer.lr=1 --over optimizer.eps=1,2 --to {folder} --resume"
    )
    (folder / "b" / "status.json").write_text('{"state": "done"}')
    assert listed(tmp_path).command == f"sdkit compare {folder / 'a'} {folder / 'b'}"


def test_damaged_set_is_unreadable(tmp_path):
    (tmp_path / "set.json").write_text("{}")
    assert listed(tmp_path).state == "unreadable"


def test_command_prints_a_table_and_what_comes_next(make_run, tmp_path, sdkit, monkeypatch):
    for name in ("a", "b"):
        make_run(name, {"state": "done", "steps": 9}, evaluation(9))
    make_run("c", DEAD)
    monkeypatch.chdir(tmp_path)
    code, out, err = sdkit("runs", ".")
    assert (code, err) == (0, "")
    assert out.count("0.400 [0.300, 0.500] sums/greedy/right") == 2
    assert "killed  3/9" in out
    assert out.endswith(f"next\n  {RESUME}\n  sdkit compare a b\n") or f"  {RESUME}\n" in out
    assert "  sdkit compare a b\n" in out


def test_command_prints_json(make_run, tmp_path, sdkit):
    make_run("a", {"state": "done", "steps": 9}, evaluation(9))
    code, out, _ = sdkit("runs", tmp_path, "--format", "json")
    (run,) = json.loads(out)
    assert code == 0
    assert run["score"]["name"] == "sums/greedy/right"
    assert run["updated"] == "2001-09-09T01:46:40+00:00"
    assert run["next"] == f"sdkit compare {tmp_path / 'a'}"


def test_missing_or_empty_folder(tmp_path, sdkit):
    assert sdkit("runs", tmp_path)[:2] == (0, f"no run directory below {tmp_path}\n")
    code, _, err = sdkit("runs", tmp_path / "nowhere")
    assert code == 2
    assert "is not a folder" in err
