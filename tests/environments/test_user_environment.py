"""A user's class as an environment: its trajectories, its faults, its processes."""

import pytest
from attrs import evolve
from os_processes import alive, wait_until
from tinyruns import lines, make_spec, metrics, rollout, train, training

from sdkit.batches import Row
from sdkit.environments import open_environments
from sdkit.environments.file import UserEnvironment
from sdkit.environments.interface import Turn
from sdkit.language.errors import BadData
from sdkit.language.specs import EnvironmentReward, FileEnvironment, Table

CODE = """
import os, random, signal, sys, time

class Guess:
    def __init__(self, low=1, high=9):
        self.low, self.high, self.turns = low, high, 0

    def reset(self, answer, **columns):
        self.answer, self.dice = answer, random.random()

    def reply(self, text):
        self.turns += 1
        return getattr(self, text, self.say)()

    def say(self):
        return f"{self.dice} {self.answer} {self.low} {self.turns}"

    def done(self):
        return None

    def fails(self):
        raise KeyError("oh")

    def sleeps(self):
        time.sleep(60)

    def exits(self):
        sys.exit(3)

    def dies(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def number(self):
        return 3

    def prints(self):
        print("hello", flush=True)
        return "printed"

    def forks(self):
        if os.fork() == 0:
            time.sleep(60)
        return "forked"

    def surrogate(self):
        return chr(0xD800) + chr(0)

    def megabytes(self):
        return "x" * 2**22

    def reseeds(self):
        random.seed(0)
        os.chdir("/")
        return "moved"

    def get_reward(self):
        return self.turns / 2
"""


def handles(environment, *starts):
    return [opened.handle for opened in environment.open(starts)]


def replies(environment, *turns):
    return environment.reply([(handle, Turn(text=text)) for handle, text in turns])


def texts_of(reply):
    return [message.content for message in reply.messages]


def row(index=0):
    return Row(index=index, messages=(), columns={"answer": index, "other": 1}, raw={})


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "guess.py").write_text(CODE)
    opened = UserEnvironment(FileEnvironment(file="guess.py", class_name="Guess", call_seconds=1.0), tmp_path)
    yield opened
    opened.close()


def test_each_trajectory_has_an_instance_and_random_numbers_of_its_own(environment):
    starts = [(row(1), 7), (row(2), 7), (row(3), 8)]
    first, second = ([], [])
    for texts in (first, second):
        opened = handles(environment, *starts)
        for _ in range(2):
            texts += [
                text for reply in replies(environment, *((each, "x") for each in opened)) for text in texts_of(reply)
            ]
        assert environment.end(opened) == [1.0, 1.0, 1.0]
    assert first == second
    dice = [text.split()[0] for text in first]
    assert dice[0] == dice[1] != dice[2]
    assert [text.split()[1:] for text in first] == [[str(i), "1", str(n)] for n in (1, 2) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fails", "KeyError: 'oh'"),
        ("sleeps", "no answer within 1 s"),
        ("exits", "SystemExit: 3"),
        ("dies", "its process has ended"),
        ("number", "returned 3; it must return text or None, or such a value and a finite number"),
        ("megabytes", "an answer of more than 1048576 bytes"),
    ],
)
def test_fault_ends_only_its_own_trajectory(environment, text, message):
    faulty, other = handles(environment, (row(1), 0), (row(2), 0))
    failed, fine = replies(environment, (faulty, text), (other, "say"))
    assert (failed.messages, failed.error) == ((), message)
    assert texts_of(fine)[0].split()[1] == "2"
    again, fine = replies(environment, (faulty, "say"), (other, "done"))
    assert again.error or text == "number"
    assert (fine.messages, fine.error) == ((), None)
    assert environment.end([faulty, other])[1] == 1.0
    wait_until(lambda: not alive(faulty.pid))


@pytest.mark.parametrize(("text", "reply"), [("prints", "printed"), ("reseeds", "moved"), ("surrogate", "\ud800\0")])
def test_odd_behaviour_is_no_fault(environment, text, reply):
    (opened,) = handles(environment, (row(), 0))
    assert texts_of(*replies(environment, (opened, text))) == [reply]
    environment.end([opened])


def test_processes_end_with_the_trajectory_and_with_the_environment(environment):
    ended, running = handles(environment, (row(), 0), (row(), 0))
    replies(environment, (ended, "forks"))
    environment.end([ended])
    server = environment._host._server.pid
    environment.close()
    wait_until(lambda: not any(map(alive, (ended.pid, running.pid, server))))


@pytest.mark.parametrize(
    ("code", "message"),
    [("class Guess:\n    x = 1 / 0\n", "ZeroDivisionError"), ("import nothing_of_that_name\n", "ModuleNotFoundError")],
)
def test_file_that_cannot_be_loaded_is_named_before_a_model_is(tmp_path, code, message):
    (tmp_path / "guess.py").write_text(code)
    with pytest.raises(BadData, match=f"guess.py cannot be loaded: {message}") as caught:
        UserEnvironment(FileEnvironment(file="guess.py", class_name="Guess"), tmp_path)
    assert caught.value.place.file == "guess.py"


def test_error_stops_the_run_if_it_should(tmp_path):
    (tmp_path / "guess.py").write_text(CODE)
    spec = FileEnvironment(file="guess.py", class_name="Guess", on_error="stop_run")
    environment = UserEnvironment(spec, tmp_path)
    (opened,) = handles(environment, (row(), 0))
    with pytest.raises(BadData, match=r"Guess\.reply in guess\.py: KeyError: 'oh'") as caught:
        replies(environment, (opened, "fails"))
    assert caught.value.place.line == CODE[: CODE.index("raise KeyError")].count("\n") + 1
    environment.close()


PLAY = """
class Game:
    def reset(self, prompt, answer, demonstration):
        self.turns, self.answer = 0, answer

    def reply(self, text):
        self.turns += 1
        if self.answer == "{failing}":
            raise ValueError("broken")
        return None if self.turns == 2 else "Again."

    def get_reward(self):
        return float(self.turns)
"""


def spec_of(folder, home, failing="none", **changes):
    (home / "game.py").write_text(PLAY.replace("{failing}", failing))
    return make_spec(
        folder,
        rollout=rollout(stop=("e",), max_new_tokens=24),
        rewards=Table({"game": EnvironmentReward()}),
        environment=FileEnvironment(file="game.py", class_name="Game", **changes),
        training=training(steps=1, prompts_per_step=6),
    )


def test_run_is_rewarded_by_its_environment(tiny_folder, process_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(spec_of(tiny_folder, tmp_path), tmp_path / "run")
    (recorded,) = (run / "rollouts").iterdir()
    records = lines(recorded)
    for record in records:
        assert (
            record["reward"] == record["environment_reward"] == sum(s["role"] == "assistant" for s in record["spans"])
        )
    assert {record["ending"] for record in records} <= {"done", "length"}
    (line,) = [line for line in metrics(run) if "trajectory/turns" in line]
    assert line["trajectory/ending_environment_error"] == 0


def test_trajectories_that_end_by_an_error_are_counted_and_not_trained_on(
    tiny_folder, process_group, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spec = spec_of(tiny_folder, tmp_path, failing="4")
    run = train(spec, tmp_path / "run")
    (line,) = [line for line in metrics(run) if "trajectory/turns" in line]
    assert line["trajectory/ending_environment_error"] == pytest.approx(1 / 6)
    assert line["rollout/kept"] == pytest.approx(5 / 6)
    strict = evolve(spec, environment=evolve(spec.environment, max_error_share=0.1))
    with pytest.raises(
        BadData, match="1 of 6 trajectories ended by an error of the environment: row 2: ValueError: broken"
    ):
        train(strict, tmp_path / "strict")


def test_server_that_has_ended_is_an_error(environment):
    environment._host._server.kill()
    environment._host._server.wait()
    with pytest.raises(BadData, match=r"the process that loaded guess\.py: no answer"):
        environment.open([(row(), 0)])


def test_one_server_hosts_the_class_for_every_data_set(tmp_path):
    (tmp_path / "guess.py").write_text(CODE)
    spec = FileEnvironment(file="guess.py", class_name="Guess")
    opened = open_environments(spec, {None: {}, "held out": {}}, None, tmp_path)
    assert opened[None] is opened["held out"]
    opened[None].close()
