"""Tools: a class written for TRL and plain functions, their calls, faults and deadlines, and runs whose student calls them."""

import json
import random

import pytest
from attrs import evolve
from os_processes import alive, wait_until
from tinyruns import lines, make_spec, metrics, rollout, train, training
from toolchats import HARMONY, LLAMA, QWEN, tokenizer_with
from transformers import AutoTokenizer

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.data.call_formats import CallFormat, choose_format, names_of
from sdkit.data.observations import ObservationEncoder
from sdkit.data.prompts import Prompter
from sdkit.data.turn_ends import end_token
from sdkit.environments.file import UserEnvironment
from sdkit.environments.interface import Turn
from sdkit.environments.trajectories import TrajectorySampler
from sdkit.language.errors import BadData
from sdkit.language.specs import (
    EnvironmentReward,
    ExactReward,
    FileEnvironment,
    InlineSource,
    ReplayBackend,
    RetryEnvironment,
    RoutedEnvironment,
    Table,
    ToolCalls,
    ToolsEnvironment,
)
from sdkit.spans import Call, check_spans

SHOP = '''
import asyncio, os, random, time
from typing import Literal


class Base:
    def stock(self) -> int:
        """Tells how many there are."""
        return self.left


class Shop(Base):
    def __init__(self, left: int = 3):
        self.left = left
        self.calls = 0

    def reset(self, answer=None, seed=None, **columns) -> str | None:
        self.calls, self.seed = 0, seed
        return None if answer is None else f" The shop has {answer} {random.random():.3f}."

    def buy(self, count: int, kind: Literal["red", "blue"] = "red", note: str | None = None) -> str:
        """
        Buys apples.

        Args:
            count: how many
            kind: which ones
            note: a remark

        Returns:
            What was bought.
        """
        self.calls += 1
        if count > self.left:
            raise ValueError("sold out")
        self.left -= count
        return f"{count} {kind} {note} {self.seed}"

    async def wait(self, seconds: float) -> dict:
        """Waits.

        Args:
            seconds: how long
        """
        self.calls += 1
        await asyncio.sleep(seconds)
        return {"waited": seconds}

    def die(self) -> str:
        """Ends its process."""
        os._exit(3)

    def _private(self):
        raise AssertionError

    def get_reward(self) -> float:
        return self.calls / 4
'''
FUNCTIONS = '''
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def shout(text: str) -> str:
    """Writes in capitals.

    Args:
        text: what to write
    """
    return text.upper()


def _hidden():
    return None
'''


def row(**columns):
    return Row(index=0, messages=(), columns=columns, raw={})


@pytest.fixture(scope="module")
def open_shop(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("shop")
    (tmp_path / "shop.py").write_text(SHOP)
    opened = {}

    def open_environment(**changes):
        given = {"file": "shop.py", "class_name": "Shop", "call_seconds": 2.0} | changes
        spec = FileEnvironment(**given)
        if spec not in opened:
            opened[spec] = UserEnvironment(spec, tmp_path)
        return opened[spec]

    yield open_environment
    for environment in opened.values():
        environment.close()


def answers(environment, handle, *calls, **turn):
    calls = tuple(Call(name=name, arguments=arguments) for name, arguments in calls)
    (reply,) = environment.reply([(handle, Turn(text="", calls=calls, **turn))])
    return reply


def test_class_written_for_trl_is_an_environment(open_shop):
    environment = open_shop()
    names = [tool["function"]["name"] for tool in environment.tools]
    assert names == ["buy", "die", "stock", "wait"]
    buy = environment.tools[0]["function"]
    assert buy["description"] == "Buys apples."
    assert buy["parameters"]["properties"]["kind"] == {
        "type": "string",
        "enum": ["red", "blue"],
        "description": "which ones",
    }
    assert buy["parameters"]["required"] == ["count"]
    first, again, other = environment.open([(row(answer=1), 5), (row(answer=1), 5), (row(), 6)])
    assert first.text == again.text
    assert first.text.startswith(" The shop has 1 0.")
    assert other.text is None
    reply = answers(
        environment,
        first.handle,
        ("buy", {"count": 1}),
        ("buy", {"count": 2, "kind": "blue", "note": None}),
        ("stock", {}),
        ("wait", {"seconds": 0.0}),
    )
    shown = [(m.role, m.name, m.content) for m in reply.messages]
    assert shown == [
        ("tool", "buy", "1 red None 5"),
        ("tool", "buy", "2 blue None 5"),
        ("tool", "stock", "0"),
        ("tool", "wait", "{'waited': 0.0}"),
    ]
    assert environment.end([first.handle, again.handle, other.handle]) == [0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("sell", {}), "there is no tool 'sell'; the tools are 'buy', 'die', 'stock', 'wait'"),
        (("reset", {}), "there is no tool 'reset'"),
        (("_private", {}), "there is no tool '_private'"),
        (("buy", {}), "buy cannot be called without 'count'"),
        (("buy", {"count": 1, "size": 2}), "buy cannot be called with 'size'"),
        (("buy", {"count": "many"}), "count of buy is 'many', which is not integer"),
        (("buy", {"count": True}), "count of buy is true, which is not integer"),
        (("buy", {"count": 1, "kind": "green"}), "kind of buy is 'green', which is not one of 'red', 'blue'"),
    ],
)
def test_wrong_call_is_told_to_the_model_and_calls_nothing(open_shop, call, error):
    environment = open_shop()
    (opened,) = environment.open([(row(), 0)])
    wrong, right = answers(environment, opened.handle, call, ("stock", {})).messages
    assert json.loads(wrong.content)["error"].startswith(error)
    assert (wrong.name, right.content) == (call[0] if call[0] == "buy" else None, "3")
    assert environment.end([opened.handle]) == [0.0]


def test_turn_without_a_call_and_one_that_cannot_be_read(open_shop):
    environment = open_shop()
    (opened,) = environment.open([(row(), 0)])
    assert answers(environment, opened.handle).ending == "no_call"
    told = answers(environment, opened.handle, fault="it is cut")
    assert [(m.role, m.content) for m in told.messages] == [("user", "Error: it is cut")]
    strict = open_shop(calls=ToolCalls(unreadable="end"))
    (opened,) = strict.open([(row(), 0)])
    assert answers(strict, opened.handle, fault="it is cut").ending == "parse_error"


def test_error_of_a_tool_ends_its_trajectory_or_is_told_or_stops_the_run(open_shop):
    sold_out = ("buy", {"count": 9})
    environment = open_shop()
    (opened,) = environment.open([(row(), 0)])
    assert answers(environment, opened.handle, sold_out, ("stock", {})).error == "ValueError: sold out"
    wait_until(lambda: not alive(opened.handle.pid))

    told = open_shop(on_error="tell_model")
    (opened,) = told.open([(row(), 0)])
    first, second = answers(told, opened.handle, sold_out, ("stock", {})).messages
    assert (json.loads(first.content), second.content) == ({"error": "ValueError: sold out"}, "3")
    assert answers(told, opened.handle, ("die", {}), ("stock", {})).error == "its process has ended"

    strict = open_shop(on_error="stop_run")
    (opened,) = strict.open([(row(), 0)])
    with pytest.raises(BadData, match=r"Shop\.buy in shop\.py: ValueError: sold out") as caught:
        answers(strict, opened.handle, sold_out)
    assert caught.value.place.line == SHOP[: SHOP.index("raise ValueError")].count("\n") + 1


def test_deadlines_of_a_call_and_of_a_turn(open_shop):
    environment = open_shop(call_seconds=0.5, turn_seconds=0.8, on_error="tell_model")
    starts = [(row(), 0)] * 3
    late, slow, quick = (opened.handle for opened in environment.open(starts))
    turns = [
        (late, [("wait", {"seconds": 30.0})]),
        (slow, [("wait", {"seconds": 0.3})] * 5),
        (quick, [("stock", {})] * 8),
    ]
    calls = [(handle, tuple(Call(name=n, arguments=a) for n, a in own)) for handle, own in turns]
    replies = environment.reply([(handle, Turn(text="", calls=own)) for handle, own in calls])
    assert replies[0].error == "no answer within 0.5 s"
    assert replies[1].error == "no answer within 0.8 s of the turn"
    assert [m.content for m in replies[2].messages] == ["3"] * 8
    wait_until(lambda: not alive(late.pid) and not alive(slow.pid))


def test_functions_of_a_file_are_tools(tmp_path):
    (tmp_path / "tools.py").write_text(FUNCTIONS)
    environment = UserEnvironment(ToolsEnvironment(file="tools.py"), tmp_path)
    assert [tool["function"]["name"] for tool in environment.tools] == ["add", "shout"]
    (opened,) = environment.open([(row(), 0)])
    results = answers(environment, opened.handle, ("shout", {"text": "hm"}), ("add", {"a": 1, "b": 2})).messages
    assert [message.content for message in results] == ["HM", "3"]
    assert environment.end([opened.handle]) == [None]
    environment.close()


def test_reset_that_returns_no_text_is_an_error(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP.replace("self.calls, self.seed = 0, seed", "return 3"))
    environment = UserEnvironment(FileEnvironment(file="shop.py", class_name="Shop"), tmp_path)
    (opened,) = environment.open([(row(), 0)])
    assert opened.error == "returned 3; it must return text or None"
    assert answers(environment, opened.handle, ("stock", {})).error == opened.error
    environment.close()


class RandomTurns:
    """A backend whose turns are random ids, which the tokenizer would not write, and an end token."""

    def __init__(self, tokenizer, end):
        self.asked, self.draw, self.end = [], random.Random(0), end
        special = set(tokenizer.added_tokens_decoder)
        self.ids = [i for i in range(len(tokenizer)) if i not in special]

    def sample(self, requests, sampling):
        turns = [(*self.draw.choices(self.ids, k=12), self.end) for _ in requests]
        self.asked += zip(requests, turns, strict=True)
        return [Completion(ids=ids, logprobs=tuple(-0.5 for _ in ids), finished=True) for ids in turns]


@pytest.mark.parametrize("template", [QWEN, LLAMA, HARMONY, None])
def test_tokens_of_a_trajectory_are_exact(open_shop, tiny_tokenizer, make_row, process_group, monkeypatch, template):
    environment = open_shop()
    tokenizer = tokenizer_with(tiny_tokenizer, template)
    plain = Prompter(tokenizer, {})
    prompter = plain.with_tools(choose_format(plain, environment.tools, ToolCalls()))
    wanted = tuple(Call(name="stock", arguments={}) for _ in range(min(2, prompter.calls.most)))
    calling(monkeypatch, lambda _: wanted)
    end = end_token(tokenizer, {})
    backend, encoder = RandomTurns(tokenizer, end), ObservationEncoder(prompter, end)
    sampler = TrajectorySampler(
        environment=environment,
        spec=FileEnvironment(
            file="shop.py",
            class_name="Shop",
            max_turns=environment.max_turns,
            max_observation_tokens=64,
            max_error_share=0.0,
        ),
        observations=lambda row: encoder,
        end_ids=(end,),
        decode=tokenizer.decode,
        opened_prompt=lambda request, row, text: prompter.student_ids(row.with_opening(text)),
    )
    row = make_row("How many?", answer=3)
    request = SamplingRequest(prompt_ids=prompter.student_ids(row), seed=1, environment_seed=2)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=16)
    (made,) = sampler.sample(backend, [request], [row], sampling)
    first = prompter.student_ids(row.with_opening(made.opening))
    assert made.ending == "max_turns"
    check_spans(made.spans, len(made.ids))
    sampled = [span for span in made.spans if span.sampled]
    assert [(request.prompt_ids, ids) for request, ids in backend.asked] == [
        ((*first, *made.ids[: span.start]), made.ids[span.start : span.end]) for span in sampled
    ]
    assert any(tuple(tokenizer(tokenizer.decode(ids))["input_ids"]) != ids for _, ids in backend.asked)
    results = [span for span in made.spans if not span.sampled]
    assert {span.role for span in results} == {"tool"}
    assert len(results) == (len(sampled) - 1) * len(wanted)
    assert all(tokenizer.decode(made.ids[slice(*span.body)]).endswith("3") for span in results)
    generation = prompter.generation_prompt(row, row.messages)
    assert all(made.ids[: span.start][-len(generation) :] == generation for span in sampled[1:])


def spec_of(folder, home, **changes):
    (home / "shop.py").write_text(SHOP)
    environment = {"file": "shop.py", "class_name": "Shop", "max_observation_tokens": 64, "max_turns": 3}
    return make_spec(
        folder,
        rollout=rollout(stop=("e",), max_new_tokens=24, max_prompt_tokens=900),
        rewards=Table({"shop": EnvironmentReward()}),
        environment=FileEnvironment(**(environment | changes)),
        training=training(steps=1, prompts_per_step=4),
    )


def calling(monkeypatch, turns):
    """Puts calls in the place of what is read from each turn; a turn in which nothing is scripted calls nothing."""
    read = CallFormat.read

    def scripted(self, tokenizer, prompt, ids):
        read(self, tokenizer, prompt, ids)
        return turns(len(ids)), None

    monkeypatch.setattr(CallFormat, "read", scripted)


def test_run_with_tools_shows_them_to_student_and_teacher(tiny_folder, process_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calling(monkeypatch, lambda _: (Call(name="buy", arguments={"count": 1}), Call(name="stock", arguments={})))
    run = train(spec_of(tiny_folder, tmp_path), tmp_path / "run")
    (recorded,) = (run / "rollouts").iterdir()
    records = lines(recorded)
    decode = AutoTokenizer.from_pretrained(tiny_folder).decode
    assert {record["ending"] for record in records} <= {"max_turns", "length"}
    assert any(record["ending"] == "max_turns" for record in records)
    for record in records:
        for ids in (record["prompt_ids"], record["teacher_prompt_ids"]):
            text = decode(ids)
            assert text.startswith("<|im_start|>system\nYou can call tools.")
            assert "- buy: Buys apples." in text
            assert record["opening"] in text
        assert record["opening"] not in decode(record["sampled_from_ids"])
        results = [decode(record["completion_ids"][slice(*s["body"])]) for s in record["spans"] if s["role"] == "tool"]
        assert len(results) == len(record["spans"]) // 2
        assert all(text.startswith("RESULT buy: 1 red None") and "\nRESULT stock: " in text for text in results)
        assert (
            record["reward"] == record["environment_reward"] == (len(results) + (record["ending"] == "max_turns")) / 4
        )

    monkeypatch.setattr(UserEnvironment, "open", None)
    spec = spec_of(tiny_folder, tmp_path)
    replayed = evolve(spec, rollout=evolve(spec.rollout, backend=ReplayBackend(run=str(run))))
    assert metrics(train(replayed, tmp_path / "again")) == metrics(run)


def test_each_route_shows_and_calls_its_own_tools(tiny_folder, process_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.py").write_text(FUNCTIONS)
    calls = {"buy": Call(name="buy", arguments={"count": 1}), "add": Call(name="add", arguments={"a": 2, "b": 3})}
    read = CallFormat.read

    def scripted(self, tokenizer, prompt, ids):
        read(self, tokenizer, prompt, ids)
        return tuple(call for name, call in calls.items() if name in names_of(self.tools)), None

    monkeypatch.setattr(CallFormat, "read", scripted)
    spec = spec_of(tiny_folder, tmp_path)
    short = {"max_observation_tokens": 64, "max_turns": 2}
    names = ("shop", "sums", "again")
    rows = tuple(Table({**row, "task": names[i % 3]}) for i, row in enumerate(spec.data.source.rows))
    routes = {
        "shop": spec.environment,
        "sums": ToolsEnvironment(file="sums.py", functions=("add",), **short),
        "again": RetryEnvironment(threshold=2.0, **short),
    }
    spec = evolve(
        spec,
        data=evolve(spec.data, source=InlineSource(rows=rows), columns=Table({**spec.data.columns, "task": "task"})),
        rewards=Table({"right": ExactReward(answer="answer")}),
        environment=RoutedEnvironment(by="task", routes=Table(routes)),
        training=training(steps=1, prompts_per_step=6),
    )
    run = train(spec, tmp_path / "run")
    (recorded,) = (run / "rollouts").iterdir()
    decode = AutoTokenizer.from_pretrained(tiny_folder).decode
    records = lines(recorded)
    for record in records:
        route = names[record["row"] % 3]
        for ids in (record["prompt_ids"], record["teacher_prompt_ids"]):
            shown = {name for name in (*calls, "shout") if f"- {name}: " in decode(ids)}
            assert shown == {"shop": {"buy"}, "sums": {"add"}, "again": set()}[route]
        shown = [
            (s["role"], decode(record["completion_ids"][slice(*s["body"])])) for s in record["spans"] if s["body"]
        ]
        begins = {
            "shop": ("tool", "RESULT buy: 1 red"),
            "sums": ("tool", "RESULT add: 5"),
            "again": ("user", "That is"),
        }
        assert all((role, text[: len(begins[route][1])]) == begins[route] for role, text in shown)
    assert {names[r["row"] % 3] for r in records if len(r["spans"]) > 1} == set(names)


def test_turn_that_was_cut_calls_no_tool(tiny_folder, process_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calling(monkeypatch, lambda _: (Call(name="buy", arguments={"count": 1}),))
    spec = spec_of(tiny_folder, tmp_path)
    run = train(evolve(spec, rollout=rollout(stop=(), max_new_tokens=4, max_prompt_tokens=900)), tmp_path / "run")
    (recorded,) = (run / "rollouts").iterdir()
    for record in lines(recorded):
        cut = record["ending"] == "length"
        assert record["environment_reward"] == (sum(s["role"] == "assistant" for s in record["spans"]) - cut) / 4
    assert any(record["ending"] == "length" for record in lines(recorded))


def test_prompt_that_reset_makes_too_long_is_an_error_of_the_environment(
    tiny_folder, process_group, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spec = spec_of(tiny_folder, tmp_path)
    (tmp_path / "shop.py").write_text(SHOP.replace('f" The shop has', '"long " * 500 + f" The shop has'))
    with pytest.raises(
        BadData, match=r"4 of 4 trajectories .* with reset's text the prompt has \d+ tokens, more than 900"
    ):
        train(spec, tmp_path / "run")


def test_reset_must_open_the_trajectories_of_a_prompt_alike(tiny_folder, process_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = spec_of(tiny_folder, tmp_path)
    (tmp_path / "shop.py").write_text(SHOP.replace("random.random():.3f", "os.getpid()"))
    several = evolve(spec, rollout=evolve(spec.rollout, completions_per_prompt=2))
    with pytest.raises(BadData, match="reset returned different texts for completions of the same prompt"):
        train(several, tmp_path / "run")
