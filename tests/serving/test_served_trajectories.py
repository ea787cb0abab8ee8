"""Trajectories on rollout servers: the ids are those without servers, and a trajectory stays on one server."""

# ruff: noqa: F401, F811 (fixtures of other tests)

import threading

import pytest
from attrs import evolve
from os_processes import alive, wait_until
from ranks_scenario import SMOOTH
from tinyruns import (
    assert_equal,
    collect,
    interrupted_before_step,
    lines,
    make_spec,
    metrics,
    rollout,
    run_two_ranks,
    train,
    training,
    weights_of,
    with_evaluation,
)

pytest.importorskip("uvicorn", reason="the servers of these tests run on uvicorn")
from test_prefetch import CORRECTED, versions
from test_servers import serve, served_by, short_delays

from sdkit.language.specs import (
    ChatTurns,
    FileEnvironment,
    OutputSpec,
    RegexReward,
    RetryEnvironment,
    Schedule,
    StartsWith,
    StudentSamples,
    Table,
)
from sdkit.train import loop

PARTS = {
    "rollout": rollout(stop=("e",), max_new_tokens=24, completions_per_prompt=2),
    "rewards": Table({"right": RegexReward(pattern="a")}),
    "environment": RetryEnvironment(max_turns=3, max_observation_tokens=16, without_feedback="No."),
    "training": training(steps=1, prompts_per_step=6),
    "optimizer": SMOOTH,
}


SCHEDULING = ["lockstep", "continuous"]


def scheduled(scheduling):
    return PARTS | {"environment": evolve(PARTS["environment"], scheduling=scheduling)}


def turns(server):
    """The prompts and seeds of a server's requests."""
    return {(request["prompt"], request["seed"]) for request in server.requests}


def parts_of(batch):
    return [(r.completion_ids, r.spans, r.ending, r.turn_rewards) for r in batch]


def expected_prompts(batch):
    """What each trajectory's turns were sampled from."""
    return [{(*r.prompt_ids, *r.completion_ids[: span.start]) for span in r.spans if span.sampled} for r in batch]


@pytest.fixture
def alone(tiny_folder, open_tiny):
    batch = collect(open_tiny(make_spec(tiny_folder, **PARTS))).batch
    assert {len(r.turn_rewards) for r in batch} >= {1, 3}
    return batch


@pytest.mark.parametrize("scheduling", SCHEDULING)
def test_trajectory_stays_on_one_server(serve, tiny_folder, tmp_path, open_tiny, alone, scheduling):
    servers = serve(2)
    trainer = open_tiny(served_by(servers, tmp_path, tiny_folder, **scheduled(scheduling)))
    assert parts_of(collect(trainer).batch) == parts_of(alone)
    prompts = [{prompt for prompt, _ in turns(server)} for server in servers]
    for group in zip(*[iter(expected_prompts(alone))] * 2, strict=True):
        assert sum(bool(set.union(*group) & of_server) for of_server in prompts) == 1
    assert all(prompts)


@pytest.mark.parametrize("scheduling", SCHEDULING)
def test_other_server_takes_over_the_trajectories_of_a_lost_one(
    serve, tiny_folder, tmp_path, open_tiny, alone, scheduling
):
    first, second = serve(2)
    trainer = open_tiny(served_by([first, second], tmp_path, tiny_folder, **scheduled(scheduling)))

    def kill_in_a_later_turn(number):
        if len(first.requests) == 7:  # of 6 in the first turn
            first.fault = None
            first.kill(wait=False)

    first.fault = kill_in_a_later_turn
    assert parts_of(collect(trainer).batch) == parts_of(alone)
    began_there = {prompt for prompt, _ in turns(first)}
    taken_over = [
        p for of_one in expected_prompts(alone) if of_one & began_there for p in of_one if p not in began_there
    ]
    assert taken_over
    assert set(taken_over) <= {prompt for prompt, _ in turns(second)}


def test_restarted_server_gets_the_weights_once(serve, tiny_folder, tmp_path, open_tiny, alone, capsys):
    (server,) = serve()
    trainer = open_tiny(served_by([server], tmp_path, tiny_folder, **scheduled("continuous")))

    def restart_in_a_later_turn(number):
        if len(server.requests) == 13:  # of 12 in the first turn
            server.fault = None
            server.kill(wait=False)
            threading.Timer(0.3, server.start).start()

    server.fault = restart_in_a_later_turn
    assert parts_of(collect(trainer).batch) == parts_of(alone)
    assert len(server.loads) == 2
    assert capsys.readouterr().err.count("no rollout server answers") == 1


SLOW = """
import pathlib, time

class Slow:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)

    def reset(self, prompt, **columns):
        self.slow, self.turns = "0 + 0" in prompt, 0

    def reply(self, text):
        self.turns += 1
        while self.slow and not (self.folder / "ended").exists():
            time.sleep(0.01)
        if self.turns == 2:
            (self.folder / "ended").touch()
        return "No." if self.turns < 2 else None
"""


def test_servers_go_on_while_the_environment_is_slow(serve, tiny_folder, tmp_path, open_tiny):
    """The first reply of one prompt's trajectories waits until another trajectory has ended, which lockstep never reaches."""
    (tmp_path / "slow.py").write_text(SLOW)
    environment = FileEnvironment(
        file=str(tmp_path / "slow.py"),
        class_name="Slow",
        arguments=Table({"folder": str(tmp_path)}),
        max_observation_tokens=16,
        call_seconds=60.0,
        scheduling="continuous",
    )
    parts = PARTS | {"environment": environment, "rollout": rollout(stop=("e",), max_new_tokens=64)}
    batch = collect(open_tiny(served_by(serve(), tmp_path, tiny_folder, **parts))).batch
    assert (tmp_path / "ended").exists()
    assert {r.ending for r in batch} <= {"done", "length"}  # no call was late


@pytest.mark.parametrize("scheduling", SCHEDULING)
def test_two_ranks_with_servers_sample_the_same_trajectories(warm, serve, tiny_folder, tmp_path, scheduling):
    spec = served_by(serve(2), tmp_path, tiny_folder, **scheduled(scheduling))
    own = train(make_spec(tiny_folder, **PARTS), tmp_path / "own")
    done = run_two_ranks(warm, spec, tmp_path / "both")
    assert done.returncode == 0, done.stderr[-3000:]
    name = "rollouts/step_000000.jsonl"
    ours, theirs = lines(tmp_path / "both" / name), lines(own / name)
    for key in ("completion_ids", "spans", "ending", "turn_rewards"):
        assert [a[key] for a in ours] == [b[key] for b in theirs]


GAME = """
import os, random

class Game:
    def __init__(self, pids):
        with open(pids, "a") as file:
            file.write(f"{os.getpid()}\\n")

    def reset(self, **columns): ...

    def reply(self, text):
        return None if "a" in text else f"No, {random.random()}.", 0.5
"""
STEPS = 4


@pytest.fixture
def ahead(serve, tiny_folder, tmp_path):
    """A run in which a server samples trajectories one batch ahead, with a checkpoint after step 2."""
    (tmp_path / "game.py").write_text(GAME)
    arguments = Table({"pids": str(tmp_path / "pids")})
    environment = FileEnvironment(
        file=str(tmp_path / "game.py"), class_name="Game", arguments=arguments, max_observation_tokens=16
    )
    parts = {
        "environment": environment,
        "losses": CORRECTED,
        "training": training(steps=STEPS, prompts_per_step=2),
        "output": OutputSpec(trackers=(), checkpoint_every=2),
    }
    spec = served_by(serve(), tmp_path, tiny_folder, **(PARTS | parts))
    return evolve(spec, rollout=evolve(spec.rollout, max_staleness=1))


def test_trajectories_are_sampled_ahead_by_one_version(ahead, tmp_path):
    alone = train(ahead, tmp_path / "alone")
    assert versions(alone) == [{0}, {0}, {1}, {2}]
    records = [record for path in sorted((alone / "rollouts").iterdir()) for record in lines(path)]
    assert {len(record["turn_rewards"]) for record in records} >= {1, 3}
    # The same at their own pace, while an evaluation asks the same environment.
    own_pace = evolve(ahead, environment=evolve(ahead.environment, scheduling="continuous"))
    measured = with_evaluation(own_pace, every=2, teacher_lift=2)
    assert versions(train(measured, tmp_path / "measured")) == versions(alone)
    for step in range(STEPS):
        name = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = lines(tmp_path / "measured" / name), lines(alone / name)
        assert [a["completion_ids"] for a in ours] == [b["completion_ids"] for b in theirs]

    cut = tmp_path / "cut"
    with interrupted_before_step(3):
        train(ahead, cut)
    (kept,) = lines(cut / "checkpoints" / "step_000002" / "ahead.jsonl")
    assert all(record["spans"] and record["ending"] for record in kept["completions"])
    train(ahead, cut, resume=True)
    assert metrics(cut) == metrics(alone)
    for name, value in weights_of(alone).items():
        assert_equal(weights_of(cut)[name], value)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: not any(map(alive, pids)))


def demonstrating(spec, turns_left):
    """The run with demonstrations of four turns, of which so many are left to the student."""
    chat = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "No."}] * 4
    rows = tuple(Table({**row, "game": chat}) for row in spec.data.source.rows)
    columns = Table({**spec.data.columns, "game": ChatTurns(turns="game")})
    data = evolve(spec.data, source=evolve(spec.data.source, rows=rows), columns=columns)
    sampler = StudentSamples(starts_with=StartsWith(column="game", turns_left=turns_left))
    return evolve(spec, data=data, rollout=evolve(spec.rollout, sampled_by=sampler))


def test_trajectory_stays_on_the_server_of_its_first_sampled_turn(serve, tiny_folder, tmp_path, open_tiny):
    servers = serve(2)
    trainer = open_tiny(demonstrating(served_by(servers, tmp_path, tiny_folder, **PARTS), 3.0))
    for step in range(2):
        for server in servers:
            server.requests.clear()
        batch = collect(trainer, step).batch
        assert {r.spans[0].role for r in batch} == {"demonstration"}
        prompts = [{prompt for prompt, _ in turns(server)} for server in servers]
        for group in zip(*[iter(expected_prompts(batch))] * 2, strict=True):
            assert sum(bool(set.union(*group) & of_server) for of_server in prompts) == 1
        assert any(len(own) > 1 for own in expected_prompts(batch))
        assert len(trainer.sampler.backends.pool._sampled_by) == len(batch)


def test_trajectories_ahead_start_with_the_demonstration_of_their_weights(ahead, tmp_path):
    spec = demonstrating(ahead, Schedule(start=1.0, to=5.0, steps=4))
    run = train(evolve(spec, environment=evolve(spec.environment, max_turns=6)), tmp_path / "run")
    assert versions(run) == [{0}, {0}, {1}, {2}]
    demonstrated = []
    for step in range(STEPS):
        records = lines(run / f"rollouts/step_{step:06d}.jsonl")
        demonstrated.append({sum(span["role"] == "demonstration" for span in r["spans"]) for r in records})
    assert demonstrated == [{3}, {3}, {2}, {1}]


@pytest.mark.full
def test_two_ranks_sample_the_same_trajectories_ahead(warm, ahead, tmp_path):
    alone = train(ahead, tmp_path / "alone")
    done = run_two_ranks(warm, ahead, tmp_path / "both")
    assert done.returncode == 0, done.stderr[-3000:]
    assert versions(tmp_path / "both") == versions(alone)
    for step in range(STEPS):
        name = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = lines(tmp_path / "both" / name), lines(alone / name)
        assert [a["completion_ids"] for a in ours] == [b["completion_ids"] for b in theirs]
