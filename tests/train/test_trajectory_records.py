"""Trajectories as people read them, turn by turn: samples, held-out completions, `sdkit rollouts`, and the report."""

from io import StringIO

import pytest
from attrs import evolve
from rich.console import Console
from tinyruns import lines, make_spec, rollout, train, training, with_evaluation

from sdkit.language.specs import RegexReward, RetryEnvironment, Table
from sdkit.report import completions
from sdkit.report.completions import Texts
from sdkit.report.records import read_contents
from sdkit.spans import rewards_by_turn
from sdkit.train.show_rollouts import select, show

RETRY = RetryEnvironment(reward="number", threshold=2.0, max_turns=2, max_observation_tokens=8)


@pytest.fixture(scope="module")
def spec(tiny_folder):
    """Turns end at the first `e`, and none succeeds."""
    base = make_spec(tiny_folder, rollout=rollout(stop=("e",), max_new_tokens=24), training=training(steps=1))
    spec = with_evaluation(base, teacher_lift=0, every=None)

    rewards = Table({**spec.rewards, "number": RegexReward(pattern=r"\d")})
    return evolve(spec, rewards=rewards, reward="number", environment=RETRY)


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory):
    return train(spec, tmp_path_factory.mktemp("turns") / "run")


@pytest.fixture(scope="module")
def record(run):
    """A recorded trajectory of two turns."""
    return next(r for r in lines(run / "rollouts/step_000000.jsonl") if len(r["spans"]) == 3)


def test_samples_are_read_turn_by_turn(run):
    sample = next(s for s in lines(run / "samples/step_000001.jsonl") if len(s["turns"]) == 3)
    assert [(part["turn"], part["role"]) for part in sample["turns"]] == [
        (1, "assistant"),
        (1, "user"),
        (2, "assistant"),
    ]
    assert sample["turns"][0]["reward"] in (0.0, 1.0)
    page = (run / "samples/step_000001.md").read_text()
    assert f"turn 1, assistant, reward {sample['turns'][0]['reward']:g}:" in page
    assert f"turn 1, user:\n\n```text\n{sample['turns'][1]['text']}\n```" in page
    assert "ending " in page


def test_held_out_completions_have_their_turns(run):
    held_out = next(r for r in lines(run / "evaluations/step_000000.jsonl") if len(r["turns"]) == 3)
    assert held_out["completion"] == "\n".join(f"[{p['role']}] {p['text']}" for p in held_out["turns"])
    assert [p.get("reward") for p in held_out["turns"]][::2] == held_out["turn_rewards"]


def test_rollouts_are_printed_turn_by_turn(spec, run, record):
    console = Console(file=StringIO(), width=200, color_system="standard", force_terminal=True)
    show(spec, run, [record], console, prompts=False)
    text = console.file.getvalue()
    assert f"ending {record['ending']}" in text
    for heading in ("turn 1, assistant, reward", "turn 1, user", "turn 2, assistant, reward"):
        assert heading in text
    assert "\x1b[36m<|im_start|>user" in text
    assert select(str(run), None, 1)[1]


def test_report_has_turns_with_their_pieces(run, tiny_tokenizer):
    (contents,) = read_contents([run]).records
    texts = Texts()
    step = completions.rollouts(contents, tiny_tokenizer, texts, 10**6)["steps"][0]
    recorded = lines(run / "rollouts/step_000000.jsonl")
    for rollout_, entry in zip(step["rollouts"], recorded, strict=True):
        start = 0
        for part, span in zip(rollout_["turns"], entry["spans"], strict=True):
            pieces = rollout_["pieces"][start : (start := start + part["pieces"])]
            assert "".join(pieces) == tiny_tokenizer.decode(entry["completion_ids"][span["start"] : span["end"]])
        assert start == len(rollout_["pieces"])
    held_out = completions.held_out(contents, tiny_tokenizer, texts, 10**6)
    sample = held_out[0]["prompts"][0]["samples"][0][0]
    assert sample["turns"][0]["role"] == "assistant"
    assert texts.texts[sample["turns"][0]["text"]] in texts.texts[sample["text"]]


def test_long_trajectory_leaves_out_its_middle_once(record, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(completions, "MAX_TOKENS", 10)
    shown = completions._rollout(record, lambda ids: tiny_tokenizer.decode(list(ids)))
    assert sum("left out" in piece for piece in shown["pieces"]) == 1
    assert sum(part["pieces"] for part in shown["turns"]) == len(shown["pieces"]) <= 11


@pytest.mark.parametrize(
    ("turns", "rewards", "ending", "by_turn"),
    [(2, (0.0, 1.0), "done", {1: 0.0, 2: 1.0}), (2, (1.0,), "done", {}), (2, (1.0,), "environment_error", {1: 1.0})],
)
def test_rewards_belong_to_turns_only_if_every_turn_has_one(turns, rewards, ending, by_turn):
    assert rewards_by_turn(turns, rewards, ending) == by_turn
