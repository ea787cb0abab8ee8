"""Environments that are played with scripted turns before training: `sdkit smoke` and `sdkit train --dry-run`."""

import io

import pytest
from attrs import evolve
from rich.console import Console
from toolchats import HARMONY, LLAMA, QWEN, tokenizer_with

from sdkit.data.prompts import Prompter
from sdkit.data.turn_ends import end_token
from sdkit.environments.tool_calls import call_fault, made_up_arguments
from sdkit.language.errors import BadData
from sdkit.language.load import load_spec
from sdkit.language.specs import CodeEnvironment, HubSource, InlineSource, Table
from sdkit.spans import Call
from sdkit.train.environment_trial import trial_of_spec

SHOP = '''
import random
from typing import Literal


class Shop:
    def __init__(self, left=9):
        self.left = left

    def reset(self, secret, **columns) -> str | None:
        return f" There are {self.left - int(secret)} apples."

    def buy(self, count: int, kind: Literal["red", "blue"], notes: list[str]) -> str:
        """Buys apples.

        Args:
            count: how many
            kind: which ones
            notes: remarks
        """
        self.left -= count
        return f"{count} {kind} {notes}, {self.left} left"

    def stock(self) -> int:
        """Tells how many there are."""
        return self.left

    def get_reward(self) -> float:
        return float(self.left)
'''
GUESS = """
class Guess:
    def reset(self, secret, **columns):
        self.secret = int(secret)

    def reply(self, text):
        return ("Higher." if len(text) < 5 else None), 0.5
"""
RUN = """
method: grpo
model: {path: model}
data:
  source: {kind: inline, rows: [{question: "Buy.", secret: "4"}, {question: "Sell.", secret: "5"}]}
  columns: {prompt: question, secret: secret}
rollout: {max_prompt_tokens: 1000, max_new_tokens: 64, completions_per_prompt: 2}
environment: {kind: file, file: code.py, class_name: CLASS, max_turns: 9}
rewards: {own: {kind: environment}, right: {kind: exact, answer: secret}}
reward: own
optimizer: {lr: 1.0e-5}
training: {steps: 1, prompts_per_step: 2}
"""


@pytest.fixture
def play(tmp_path):
    """Plays a class that stands in a file of the user; returns what was printed and what was played."""

    def play_class(code, name, *, changed=lambda spec: spec, template=None):
        (tmp_path / "code.py").write_text(code)
        (tmp_path / "run.yaml").write_text(RUN.replace("CLASS", name))
        checked = load_spec(tmp_path / "run.yaml")
        assert checked.ok, checked.problems
        trial = trial_of_spec(changed(checked.spec), tmp_path)
        if template:
            tokenizer = tokenizer_with(trial.prompter.tokenizer, template)
            trial = evolve(trial, prompter=Prompter(tokenizer, {}), end=end_token(tokenizer, {}))
        printed = io.StringIO()
        played = trial.play(Console(file=printed, width=200), CodeEnvironment)
        return printed.getvalue().splitlines(), played

    return play_class


@pytest.mark.parametrize("template", [None, QWEN, LLAMA, HARMONY])
def test_each_tool_is_called_as_the_chat_template_writes_it(play, template):
    lines, played = play(SHOP, "Shop", template=template)
    assert played == ["Shop in code.py, up to 9 turns"]
    assert lines[0] == f"environment {played[0]}, on rows 0, 1:"
    bought, stock, unknown, *texts, cut = lines[1:]
    assert "buy(count=1, kind='red', notes=['text']):" in bought
    assert "1 red ['text'], 8 left'; ended by no_call; reward 8" in bought
    assert "9'; ended by no_call; reward 9" in stock
    assert "there is no tool 'unknown_tool'" in unknown
    assert texts == [f"  row {row}, turn '{row + 4}': ended by no_call; reward 9" for row in (0, 1)]
    assert cut == "  a turn cut by a limit: ended by length; reward 9"


def test_turns_of_text_are_the_rows_own(play):
    lines, _ = play(GUESS, "Guess")
    assert lines[1].startswith(
        "  row 0, turn '4': 'Higher.'; 'Higher.'; 'Higher.'; ended by max_turns; rewards of turns 0.5,"
    )
    assert lines[-1] == "  a turn cut by a limit: 'Higher.'; ended by length; rewards of turns 0.5"


RAISES = "raise ValueError('sold out')"
BROKEN = {
    "import": (SHOP.replace("import random", "import nothing_here"), r"code.py cannot be loaded: ModuleNotFoundError"),
    "constructor": (SHOP.replace("left=9", "left"), r"TypeError: .*missing 1 required positional argument: 'left'"),
    "reset": (SHOP.replace("int(secret)", "int(secret + '?')"), r"row 0: Shop.reset in code.py: ValueError: .*'4\?'"),
    "column of reset": (SHOP.replace("**columns", "*, a=1"), r"Shop.reset .*unexpected keyword argument"),
    "text of reset": (SHOP.replace('return f" There', 'return 3 if 1 else f" There'), r"Shop.reset .*returned 3"),
    "openings": (SHOP.replace("int(secret)", "__import__('os').getpid()"), r"row 0: reset returned different texts"),
    "reward": (SHOP.replace("float(self.left)", "'many'"), r"Shop.get_reward .*returned str"),
    "failing reward": (SHOP.replace("return float(self.left)", RAISES), r"Shop.get_reward .*sold out"),
    "reply without a text": (
        GUESS.replace("self, text", "self").replace("len(text)", "3"),
        r"Guess.reply .*TypeError",
    ),
    "value of reply": (GUESS.replace(", 0.5", ", 'much'"), r"Guess.reply .*returned \['Higher.', 'much'\]"),
    "value that is no JSON": (GUESS.replace(", 0.5", ", {1}"), r"Guess.reply .*set is not JSON serializable"),
}


@pytest.mark.parametrize(("code", "message"), BROKEN.values(), ids=BROKEN)
def test_class_that_cannot_work_is_an_error(play, code, message):
    with pytest.raises(BadData, match=message):
        play(code, "Guess" if "Guess" in code else "Shop")


def test_failure_on_what_was_made_up_is_a_warning(play):
    lines, _ = play(SHOP.replace("self.left -= count", RAISES), "Shop")
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert warning.endswith("Shop.buy in code.py: ValueError: sold out (code.py:21:1)")
    assert any("9'; ended by no_call" in line for line in lines)  # the other tool
    lines, _ = play(GUESS.replace("len(text)", "int(text + '?')"), "Guess")
    assert any("Guess.reply in code.py: ValueError" in line for line in lines)


def test_failure_of_an_inherited_tool_is_a_warning(play, tmp_path):
    (tmp_path / "base.py").write_text(SHOP.replace("self.left -= count", RAISES).replace("Shop", "Base"))
    lines, _ = play("from base import Base\n\n\nclass Shop(Base):\n    pass\n", "Shop")
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: buy(count=1, kind='red', notes=['text']): Shop.buy in code.py: ValueError: sold out"
    ]


def test_reset_may_fail_on_a_row_that_is_a_stand_in(play):
    def from_hub(spec):
        return evolve(spec, data=evolve(spec.data, source=HubSource(path="some/where", split="train")))

    lines, _ = play(SHOP, "Shop", changed=from_hub)
    assert "on stand-in rows 0, 1, 2, 3:" in lines[0]
    assert len(lines) == 2
    assert "Shop.reset in code.py: ValueError: invalid literal for int()" in lines[1]
    with pytest.raises(BadData, match="unexpected keyword"):
        play(SHOP.replace("**columns", "*, a=1"), "Shop", changed=from_hub)
    lines, _ = play(SHOP.replace("**columns", "prompt").replace("int(secret)", "1"), "Shop", changed=from_hub)
    assert "warning" not in "".join(lines)


def test_tools_and_calls_of_the_data_are_left_out(play):
    """The tokenizer of a smoke run prints none."""
    schema = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {}}}
    calling = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Nothing."},
    ]
    rows = ({"question": calling, "secret": "3"}, {"question": "Buy.", "secret": "4"})

    def with_tools(spec):
        tools = [{"type": "function", "function": schema}]
        source = InlineSource(rows=tuple(Table({**row, "tools": tools}) for row in rows))
        columns = Table({**spec.data.columns, "tools": "tools"})
        return evolve(spec, data=evolve(spec.data, source=source, columns=columns))

    lines, _ = play(GUESS, "Guess", changed=with_tools)
    assert lines[0].endswith("on row 1:")


def test_made_up_arguments_fit_their_schemas():
    properties = {
        "a": {"type": "integer"},
        "b": {"type": ["number", "null"]},
        "c": {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
        "d": {"enum": ["x", "y"]},
        "e": {"type": "array", "items": {"type": "object"}},
        "f": {},
        "g": {"type": "string"},
    }
    parameters = {"properties": properties, "required": list("abcdef")}
    tool = {"function": {"name": "tool", "parameters": parameters}}
    made = made_up_arguments(tool)
    assert list(made) == list("abcdef")
    assert call_fault([tool], Call(name="tool", arguments=made)) is None
