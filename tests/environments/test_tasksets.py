"""Tasks of verifiers tasksets as rows, listed and played by an interpreter of their own.

The package itself is used where it is installed, or where SDKIT_TEST_VERIFIERS names an interpreter that has it.
"""

import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import pytest
from tinyruns import inline, lines, make_spec, rollout, train, training
from verifiers_stand_in import write_interpreter

from sdkit.batches import Row
from sdkit.data import tasksets
from sdkit.data.rows import fingerprint, load_rows
from sdkit.environments import open_environments
from sdkit.environments.interface import Turn
from sdkit.environments.rows import check_rows
from sdkit.environments.tasksets import TaskEpisodes
from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.specs import (
    ColumnTemplate,
    DataSpec,
    EnvironmentReward,
    EvaluationSpec,
    InlineSource,
    RoutedEnvironment,
    Suite,
    Table,
    VerifiersEnvironment,
    VerifiersSource,
)
from sdkit.language.tasksets import data_in_full
from sdkit.report.prompts import teacher_prompts

COLUMNS = Table({"prompt": "prompt", "task": "key", "demonstration": "secret"})


def tasks(limit=None, columns=COLUMNS, python=None, **config):
    source = VerifiersSource(id="guess_tasks", config=Table(config), python=python)
    return DataSpec(source=source, columns=columns, limit=limit)


def played(environment, rows, *turns):
    """Every text of trajectories of these rows whose turns are `turns`; then their own rewards."""
    opened = environment.open([(row, 7) for row in rows])
    shown = [[each.error or each.text] for each in opened]
    for texts in turns:
        handles = [(each.handle, Turn(text=text)) for each, text in zip(opened, texts, strict=True)]
        for own, reply in zip(shown, environment.reply(handles), strict=True):
            own.append(reply.error or (reply.messages[0].content if reply.messages else None))
    return shown, environment.end([each.handle for each in opened])


@pytest.fixture
def python(tmp_path):
    return write_interpreter(tmp_path)


def test_tasks_are_rows(python, tmp_path):
    rows = load_rows(tasks(python=python, size=3), tmp_path)
    assert [row.messages[0]["content"] for row in rows] == ["Guess 0.", "Guess 1.", "Guess 2."]
    assert rows[1].columns == {"prompt": "Guess 1.", "task": "train 1", "demonstration": "train1"}
    assert len(load_rows(tasks(2, python=python), tmp_path)) == 2
    assert fingerprint(rows) == fingerprint(load_rows(tasks(3, python=python, size=9), tmp_path))
    (row,) = load_rows(tasks(python=python, size=1, system="Be brief."), tmp_path)
    assert [message["role"] for message in row.messages] == ["system", "user"]


def test_taskset_that_gives_no_rows_is_named(python, tmp_path, monkeypatch):
    def refused(**config):
        with pytest.raises(BadData) as caught:
            load_rows(tasks(python=python, **config), tmp_path)
        return caught.value.message

    assert refused(fault="raise") == "verifiers' guess_tasks cannot be loaded: ValueError: no such split"
    assert refused(fault="exit") == "verifiers' guess_tasks cannot be loaded: its process ended with code 3"
    assert refused(size=0) == "verifiers' guess_tasks has no rows"
    (tmp_path / "empty").touch(mode=0o700)
    with pytest.raises(BadData, match=r"cannot run .*/empty: Exec format error"):
        load_rows(tasks(python="empty"), tmp_path)
    with pytest.raises(BadData, match=r"cannot run .*/empty: Exec format error"):
        TaskEpisodes(VerifiersEnvironment(id="guess_tasks", python="empty"), tmp_path, None, 1)
    monkeypatch.setattr(tasksets, "START_SECONDS", 0.5)
    assert refused(size=1, wait=60) == "verifiers' guess_tasks gave no tasks within 0.5 s"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadEnvironment, match="data of kind verifiers needs a package that is missing: verifiers"):
        load_rows(tasks(), tmp_path)
    with pytest.raises(BadData, match="names no taskset"):
        load_rows(DataSpec(source=VerifiersSource(), columns=COLUMNS), tmp_path)


def test_environment_plays_the_task_of_the_row(python, tmp_path):
    environment = VerifiersEnvironment(id="guess_tasks", python=python)
    opening = Table({"prompt": ColumnTemplate(template="Play."), "task": "key"})
    asked = Table({"prompt": ColumnTemplate(template="Play. {prompt}"), "task": "key"})
    data = {
        None: tasks(size=3),
        "test": tasks(2, size=3, split="test"),
        "opening": tasks(1, opening, size=3),
        "asked": tasks(1, asked, size=3),
        "numbers": DataSpec(
            source=InlineSource(rows=(Table({"q": "Play.", "n": "2"}),)), columns=Table({"prompt": "q", "task": "n"})
        ),
    }
    spec = make_spec(tmp_path, environment=environment)
    data = {name: data_in_full(spec, each) for name, each in data.items()}
    rows = {name: load_rows(each, tmp_path) for name, each in data.items()}
    for name, each in data.items():
        check_rows(environment, rows[name], each)
    opened = open_environments(environment, {key: {} for key in data}, None, tmp_path, data)
    assert opened[None] is opened["asked"]
    try:
        assert played(opened[None], rows[None], ["train0"] * 3) == ([[None, None], *[[None, "Wrong."]] * 2], [1, 0, 0])
        assert played(opened["test"], rows["test"], ["test0"] * 2) == ([[None, None], [None, "Wrong."]], [1, 0])
        assert played(opened["opening"], rows["opening"])[0] == [["Guess 0."]]
        assert played(opened["asked"], rows["asked"])[0] == [[None]]
    finally:
        for each in set(opened.values()):
            each.close()
    wrong = data_in_full(spec, tasks(columns=Table({"prompt": "prompt", "task": "prompt"}), python=python, size=1))
    rows = load_rows(wrong, tmp_path)
    with pytest.raises(BadData, match=r"row 0: task is 'Guess 0\.', not the key of the task"):
        check_rows(environment, rows, wrong)


def test_source_takes_the_taskset_of_its_environment(tmp_path):
    one = VerifiersEnvironment(id="one", config=Table({"size": 5}), python="p")
    two = VerifiersEnvironment(id="two")
    routed = RoutedEnvironment(by="task", routes=Table({"a": one, "b": two}))

    def full(environment, **source):
        data = DataSpec(source=VerifiersSource(**source))
        return data_in_full(make_spec(tmp_path, environment=environment), data).source

    assert full(one) == VerifiersSource(id="one", config=Table({"size": 5}), python="p")
    assert full(one, config=Table({"split": "test"})).config == {"size": 5, "split": "test"}
    assert full(routed, id="two") == VerifiersSource(id="two")
    assert full(None, id="three") == VerifiersSource(id="three")


def test_run_trains_on_tasks(python, tiny_folder, process_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = VerifiersEnvironment(id="guess_tasks", python=python, max_observation_tokens=16)
    held_out = DataSpec(source=VerifiersSource(config=Table({"size": 6})), limit=2)
    elsewhere = DataSpec(source=VerifiersSource(config=Table({"size": 2, "split": "test"})))
    spec = make_spec(
        tiny_folder,
        data=tasks(size=6),
        environment=environment,
        rewards=Table({"game": EnvironmentReward()}),
        rollout=rollout(stop=("e",), max_prompt_tokens=200),
        training=training(steps=1, prompts_per_step=4),
        evaluation=EvaluationSpec(
            suites=Table({name: Suite(data=each, score="game") for name, each in (("a", held_out), ("b", elsewhere))}),
            teacher_lift=0,
        ),
    )
    run = train(spec, tmp_path / "run")
    (recorded,) = (run / "rollouts").iterdir()
    assert {record["row"] for record in lines(recorded)} == {2, 3, 4, 5}  # tasks 0 and 1 are held out
    assert any(len(record["spans"]) > 1 for record in lines(recorded))
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["data"].keys() >= {"train", "suite a", "suite b"}
    evaluated = lines(run / "evaluations" / "step_000000.jsonl")
    assert {(each["suite"], each["row"]) for each in evaluated} == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert {each["prompt"] for each in evaluated} == {"Guess 0.", "Guess 1."}  # shown once


def test_report_starts_no_interpreter_that_a_run_names(python, tmp_path, tiny_tokenizer):
    suites = {
        "tasks": Suite(data=tasks(python=python, size=2), score="right"),
        "sums": Suite(data=inline(), score="right"),
    }
    spec = make_spec(tmp_path, evaluation=EvaluationSpec(suites=Table(suites)))
    record = SimpleNamespace(spec=spec, base=tmp_path, provenance={})
    assert teacher_prompts(record, tiny_tokenizer).keys() == {"sums"}


TASKSET = """
import verifiers.v1 as vf

__all__ = ["GuessTaskset", "GuessEnv"]
print("loaded")


class Data(vf.TaskData):
    secret: int


class GuessTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        answers = [node.message.content for node in trace.nodes if node.message.role == "assistant"]
        return float(answers[-1] == str(self.data.secret))


class Config(vf.TasksetConfig):
    size: int = 5
    system: str | None = None


class GuessTaskset(vf.Taskset[GuessTask, Config]):
    def load(self):
        for i in range(self.config.size):
            data = Data(prompt=f"Guess {i}.", secret=i, system_prompt=self.config.system)
            yield GuessTask(data, self.config.task)


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated and segment.last_reply != str(task.data.secret):
                segment = await talk.turn("Wrong.")
"""


@pytest.fixture
def verifiers(tmp_path, monkeypatch):
    """An interpreter that has verifiers and the taskset above."""
    python = os.environ.get("SDKIT_TEST_VERIFIERS") or (importlib.util.find_spec("verifiers") and sys.executable)
    if not python:
        pytest.skip("needs the package verifiers")
    (tmp_path / "guess_tasks.py").write_text(TASKSET)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return python


def test_verifiers_environment_plays_numbered_tasks(verifiers, tmp_path):
    spec = VerifiersEnvironment(id="guess_tasks", config=Table({"size": 3}), call_seconds=60, python=verifiers)
    environment = open_environments(spec, {None: {}}, None, tmp_path)[None]
    rows = [Row(index=i, messages=(), columns={"task": str(i + 1)}, raw={}) for i in range(3)]
    shown, rewards = played(environment, rows, ["0", "0", "0"], ["1", "1", "1"])
    assert shown[:2] == [["Guess 1.", "Wrong.", None], ["Guess 2.", "Wrong.", "Wrong."]]
    assert shown[2][0] == "verifiers guess_tasks: LookupError: task 3 of 3"
    assert rewards == [1.0, 0.0, None]
    environment.close()


def test_verifiers_environment_plays_its_own_tasks(verifiers, tmp_path):
    data = tasks(python=verifiers, size=3, system="Be brief.")
    rows = load_rows(data, tmp_path)
    assert [message["content"] for message in rows[1].messages] == ["Be brief.", "Guess 1."]
    assert [row.columns["demonstration"] for row in rows] == [0, 1, 2]
    spec = VerifiersEnvironment(id="guess_tasks", call_seconds=60, python=verifiers)
    environment = open_environments(spec, {None: {}}, None, tmp_path, {None: data})[None]
    lost = Row(index=3, messages=(), columns={"task": "gone"}, raw={})
    shown, rewards = played(environment, [*rows[:2], lost], ["1", "1", "1"])
    assert shown[:2] == [[None, "Wrong."], [None, None]]
    assert "no longer has the task of the row" in shown[2][0]
    assert rewards == [0.0, 1.0, None]
    environment.close()
    with pytest.raises(BadData, match="guess_taks cannot be loaded: ModuleNotFoundError"):
        load_rows(DataSpec(source=VerifiersSource(id="guess_taks", python=verifiers), columns=COLUMNS), tmp_path)
