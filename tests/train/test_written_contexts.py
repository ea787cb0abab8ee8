"""Slots that a model writes: its texts reach the right rows, its failures are counted, and a replay needs no server."""

import json
import re
from functools import partial

import pytest
from attrs import evolve
from tinyruns import (
    assert_equal,
    collect,
    distil,
    held_out_loss,
    lines,
    make_spec,
    metrics,
    rollout,
    run_two_ranks,
    teacher,
    train,
    training,
    weights_of,
    with_evaluation,
)

from sdkit.language.errors import BadEnvironment, ProcessDied, UnreadableInput
from sdkit.language.specs import (
    AdvantageAdd,
    ColumnSlot,
    OutputSpec,
    PolicyGradient,
    RegexReward,
    RetryEnvironment,
    StudentWeights,
    Table,
    UserTurn,
    Verdict,
    Writer,
    Written,
)
from sdkit.serving.tiny_server import ScriptedWriter
from sdkit.train.replay import open_recording

QUESTION = "{prompt}\n{trajectory}\n{outcome}"
OUTCOME = Table({"outcome": Verdict(success="good", failure="bad", threshold=0.5)})
SKILLS = Table(
    {
        "episode": Written(key="episode", unless="step", wrap=" (all: {value})"),
        "step": Written(key="steps", of="turn", wrap=" (now: {value})"),
    }
)
RETRY = RetryEnvironment(max_turns=3, max_observation_tokens=24, without_feedback="No.")


def skills(messages):
    """A skill that names the sum, the number of turns and the outcome, and one for the second turn."""
    question = messages[0]["content"]
    turns = len(re.findall(r"^\[turn \d+, assistant\]", question, re.MULTILINE))
    about = f"{question.partition('?')[0]} in {turns}, {question.rpartition(chr(10))[2]}"
    return json.dumps({"episode": about, "steps": {"2": f"step of {about}"}})


@pytest.fixture
def writer():
    server = ScriptedWriter("w", skills)
    yield server
    server.close()


@pytest.fixture
def spec_of(tiny_folder, writer):
    def make(sees=None, **changes):
        """Trajectories of up to three turns, which end at an `e`; a turn with an `a` is right."""
        asked = Writer(url=writer.url, model="w", prompt=QUESTION, slots=OUTCOME, retries=0)
        sees = sees or UserTurn(template="{prompt}{episode}{step}", slots=SKILLS, writer=asked, requires="any")
        parts = {
            "rollout": rollout(stop=("e",), max_new_tokens=24, completions_per_prompt=2),
            "rewards": Table({"right": RegexReward(pattern="a")}),
            "environment": RETRY,
            "teacher": teacher(StudentWeights(), sees),
            "losses": Table({"policy": PolicyGradient(advantage=AdvantageAdd(log_ratio_weight=0.1))}),
            "training": training(prompts_per_step=2),
        }
        return make_spec(tiny_folder, **(parts | changes))

    return make


def with_writer(spec, **changes):
    sees = spec.teacher.sees
    return evolve(spec, teacher=evolve(spec.teacher, sees=evolve(sees, writer=evolve(sees.writer, **changes))))


def records(run):
    return [lines(path) for path in sorted((run / "rollouts").iterdir())]


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    assert records(one) == records(other)
    for name, value in weights_of(one).items():
        assert_equal(weights_of(other)[name], value)


def test_each_turn_reads_what_was_written_about_its_trajectory(open_tiny, spec_of):
    trainer = open_tiny(spec_of())
    decode = trainer.setup.data.tokenizer.decode
    batch = collect(trainer).batch
    assert {span.turn for r in batch for span in r.spans if span.sampled} == {1, 2, 3}
    for r in batch:
        turns = [span for span in r.spans if span.sampled and span.end > span.start]
        about = f"{r.row.prompt_text[:-1]} in {sum(s.sampled for s in r.spans) or 1}, {'good' if r.reward else 'bad'}"
        shown = {True: f"(now: step of {about})", False: f"(all: {about})"}
        assert json.loads(r.written)["episode"] == about
        for view, turn in zip(r.views, turns, strict=True):
            prompt = decode(view.prompt_ids)
            assert shown[turn.turn == 2] in prompt
            assert shown[turn.turn != 2] not in prompt


def test_written_text_trains_as_the_same_text_of_a_column(spec_of, writer, tmp_path):
    """Without rewards and turns, which a writer does not need."""
    sums = {f"What is {i} + {i}?": f"{i} + {i} = {2 * i}" for i in range(6)}
    writer.script = lambda messages: sums[messages[0]["content"].partition("\n")[0]]
    slots = {"written": Written(), "column": ColumnSlot(name="demonstration")}
    runs = {}
    for name, slot in slots.items():
        asked = Writer(url=writer.url, model="w", prompt="{prompt}\n{trajectory}") if name == "written" else None
        sees = UserTurn(template="{prompt}\n{hint}", slots=Table({"hint": slot}), writer=asked)
        runs[name] = train(spec_of(sees, environment=None, rewards=Table(), losses=distil()), tmp_path / name)
    for name, value in weights_of(runs["column"]).items():
        assert_equal(weights_of(runs["written"])[name], value)
    prompts = [[r["teacher_prompt_ids"] for r in batch] for batch in records(runs["column"])]
    assert [[r["teacher_prompt_ids"] for r in batch] for batch in records(runs["written"])] == prompts


def fails_about(sums, messages):
    """No JSON about these sums, a skill about others."""
    return "Sorry." if any(f"{i} + {i}" in messages[0]["content"] for i in sums) else skills(messages)


def test_rollout_without_an_answer_has_no_teacher(open_tiny, spec_of, writer):
    trainer = open_tiny(spec_of())
    rows = [row.prompt_text for row in trainer.setup.data.batch_rows(0)]
    writer.script = partial(fails_about, re.findall(r"(\d+) \+", rows[0]))
    batch = collect(trainer).batch
    assert [r.written == "" for r in batch] == [True, True, False, False]
    assert [bool(r.views) for r in batch] == [False, False, True, True]
    assert len(writer.chats) == 6  # twice about the two without an answer


def test_share_of_failures_is_a_metric(spec_of, writer, tmp_path):
    writer.script = partial(fails_about, [0, 1, 2])
    run = train(with_writer(spec_of(), max_failed_share=1.0), tmp_path / "run")
    shares = [line["teacher/writer_failed"] for line in metrics(run) if "teacher/writer_failed" in line]
    written = [[r["written"] for r in batch] for batch in records(run)]
    assert shares == [batch.count("") / len(batch) for batch in written]
    assert 0 < sum(shares) < len(shares)
    assert all(line["time/writer"] > 0 for line in lines(run / "metrics.jsonl") if "time/judge" in line)


def test_run_ends_if_the_writer_fails_too_often(spec_of, writer, tmp_path):
    writer.script = lambda messages: "Sorry."
    with pytest.raises(ProcessDied, match="the writer w failed about 4 of 4 rollouts: it has no JSON object") as error:
        train(spec_of(), tmp_path / "run")
    assert error.value.path == ("teacher", "sees", "writer")
    assert error.value.hint == "mend it, or raise max_failed_share, which is 0.5"


def test_server_is_checked_before_models_are_loaded(spec_of, writer, tmp_path):
    with pytest.raises(BadEnvironment, match="serves 'w', not 'x'") as error:
        train(with_writer(spec_of(), model="x"), tmp_path / "run")
    assert error.value.path == ("teacher", "sees", "writer")


def test_replay_needs_no_writer(spec_of, writer, tmp_path):
    writer.script = partial(fails_about, [1])
    run = train(with_writer(spec_of(), max_failed_share=1.0), tmp_path / "run")
    writer.close()
    assert any(r["written"] == "" for batch in records(run) for r in batch)
    elsewhere = with_writer(spec_of(), max_failed_share=1.0, url="http://127.0.0.1:9")
    assert_same_run(train(elsewhere, tmp_path / "again", recording=open_recording(f"{run}@0", None)), run)
    other = with_writer(elsewhere, prompt="{trajectory}", slots=Table())
    with pytest.raises(UnreadableInput, match="the recording has the writer's answers"):
        train(other, tmp_path / "other", recording=open_recording(f"{run}@0", None))


def test_run_that_failed_within_a_batch_resumes_to_the_same_result(spec_of, writer, tmp_path):
    spec = spec_of(output=OutputSpec(checkpoint_every=1, trackers=()))
    straight = train(spec, tmp_path / "straight")
    asked = len(writer.chats) // 3
    writer.script = lambda messages: skills(messages) if len(writer.chats) <= 4 * asked + 2 else None
    with pytest.raises(ProcessDied):
        train(with_writer(spec, max_failed_share=0.0), tmp_path / "run")
    writer.script = skills
    resumed = train(spec, tmp_path / "run", resume=True)
    assert_same_run(resumed, straight)


def test_two_ranks_ask_about_their_own_rollouts(warm, spec_of, writer, tmp_path):
    alone = train(spec_of(), tmp_path / "alone")
    asked = len(writer.chats)
    done = run_two_ranks(warm, spec_of(), tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(writer.chats) == 2 * asked
    first = [[(r["completion_ids"], r["written"]) for r in records(run)[0]] for run in (alone, tmp_path / "two")]
    assert first[0] == first[1]


def test_held_out_rollouts_are_asked_about_and_may_all_fail(open_tiny, spec_of, writer):
    trainer = open_tiny(evolve(with_evaluation(spec_of()), reward="right"))
    writer.script = lambda messages: "Sorry."
    assert "eval/loss" in held_out_loss(trainer)
    assert {chat[0]["content"].partition("?")[0] for chat in writer.chats} == {
        f"What is {i} + {i}" for i in (100, 101, 102, 200, 201, 202)
    }
