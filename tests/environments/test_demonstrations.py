"""Trajectories that start with a demonstration's turns: exact tokens, no part in training, schedules, endings."""

import pytest
import torch
from attrs import evolve
from tinyruns import (
    assert_equal,
    collect,
    interrupted_before_step,
    lines,
    make_spec,
    metrics,
    prepare_rollouts,
    rollout,
    train,
    training,
    weights_of,
    with_evaluation,
)
from toolchats import HARMONY, LLAMA, QWEN, tokenizer_with

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.data.call_formats import choose_format
from sdkit.data.logged_chats import CompletionEncoder
from sdkit.data.observations import ObservationEncoder
from sdkit.data.prompts import Prompter
from sdkit.data.turn_ends import end_token
from sdkit.data.turn_outcomes import turn_outcomes
from sdkit.environments.continuous import sample_continuously
from sdkit.environments.file import UserEnvironment
from sdkit.environments.trajectories import TrajectorySampler
from sdkit.language.errors import BadData
from sdkit.language.row_text import Turns
from sdkit.language.schedules import at_step
from sdkit.language.specs import (
    ChatTurns,
    CrossEntropy,
    DataSpec,
    EnvironmentReward,
    FileEnvironment,
    GymnasiumEnvironment,
    InlineSource,
    OutputSpec,
    PerTurn,
    RegexReward,
    ReplayBackend,
    RetryEnvironment,
    Schedule,
    StartsWith,
    StudentSamples,
    Table,
    ToolCalls,
)
from sdkit.spans import Span, check_spans
from sdkit.train import loop
from sdkit.train.demonstrations import check_demonstrations, count_demonstrated
from sdkit.train.rollout_filters import filter_rollouts
from sdkit.train.sampling_requests import sampling_params
from sdkit.train.step import _collate
from sdkit.train.trajectories import trajectory_sampler

GAME = """
class Game:
    def reset(self, **columns):
        self.heard = []

    def reply(self, text):
        self.heard.append(text)
        if text == "raise":
            raise ValueError("no such move")
        return (None if text == "stop" else f"{len(self.heard)}: {text}"), float(len(self.heard))

    def get_reward(self):
        return len(self.heard)
"""
MOVES = ["go  <b>", "left ", "up", "take it"]


def chat(*moves):
    """A logged game, whose observations differ from what the environment says."""
    first, *rest = [{"role": "assistant", "content": move} for move in moves]
    return [first, *(m for turn in rest for m in ({"role": "user", "content": "as logged"}, turn))]


def data(*games):
    """Rows with these demonstrations, in turn."""
    rows = [
        Table({"prompt": f"Play {i}.", "game": chat(*games[i % len(games)]), "demonstration": "none", "answer": "1"})
        for i in range(4)
    ]
    columns = {
        "prompt": "prompt",
        "game": ChatTurns(turns="game"),
        "demonstration": "demonstration",
        "answer": "answer",
    }
    return DataSpec(source=InlineSource(rows=tuple(rows)), columns=Table(columns))


def start(turns_left):
    return StudentSamples(starts_with=StartsWith(column="game", turns_left=turns_left))


@pytest.fixture
def spec_of(tiny_folder, tmp_path):
    (tmp_path / "game.py").write_text(GAME)

    def build(turns_left, *games, environment=(), **changes):
        settings = {"max_turns": 5, "max_observation_tokens": 24} | dict(environment)
        parts = {
            "data": data(*(games or [MOVES])),
            "rollout": rollout(sampled_by=start(turns_left), stop=("e",), max_new_tokens=24),
            "rewards": Table({"game": EnvironmentReward()}),
            "environment": FileEnvironment(file=str(tmp_path / "game.py"), class_name="Game", **settings),
        }
        return make_spec(tiny_folder, **(parts | changes))

    return build


def roles(spans):
    return [span.role for span in spans]


def test_demonstrated_turns_are_the_logged_tokens_and_the_environment_answers_them(spec_of, open_tiny):
    trainer = open_tiny(spec_of(2))
    data, decode = trainer.setup.data, trainer.setup.data.tokenizer.decode
    for each in collect(trainer).batch:
        logged = CompletionEncoder(data.prompter, data.turn_end).encode(each.row, "game")
        expected = [logged.ids[span.start : span.end] for span in logged.spans if span.sampled][:2]
        shown = [span for span in each.spans if span.role == "demonstration"]
        assert [each.completion_ids[span.start : span.end] for span in shown] == expected
        assert roles(each.spans[:5]) == ["demonstration", "user", "demonstration", "user", "assistant"]
        heard = [decode(each.completion_ids[slice(*span.body)]) for span in each.spans[1:4:2]]
        assert heard == ["1: go  <b>", "2: left "]
        assert [span.turn for span in each.spans[:5]] == [1, 1, 2, 2, 3]
        before = range(each.spans[4].start)
        assert not set(before) & set(each.sampled)
        assert {each.sampler_logprobs[position] for position in before} == {0.0}
        assert each.turn_rewards[:2] == (1.0, 2.0)
        assert each.environment_reward == len(each.turn_rewards)
        check_spans(each.spans, len(each.completion_ids))


def test_loss_does_not_count_demonstrated_tokens(spec_of, open_tiny):
    """Cross entropy over the rollouts, computed from the model's logits by hand."""
    terms = Table({"imitate": CrossEntropy(), "turns": CrossEntropy(average=PerTurn())})
    trainer = open_tiny(spec_of(2, losses=terms, teacher=None))
    batch = prepare_rollouts(trainer, collect(trainer).batch)
    collated = _collate(trainer.learner, batch, trainer.specs.losses)
    sampled = sum(len(r.sampled) for r in batch)
    turns = [[span for span in r.spans if span.sampled] for r in batch]
    assert collated.counts["imitate"].tokens == sampled
    assert collated.counts["turns"].turns == sum(map(len, turns))
    assert all(set(each.loss_masks["imitate"].positions) == set(each.sampled) for each in batch)

    model = trainer.models.student.model
    by_token = by_turn = 0.0
    for each, own in zip(batch, turns, strict=True):
        ids = torch.tensor([[*each.prompt_ids, *each.completion_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        prompt = len(each.prompt_ids)
        values = [-float(logprobs[prompt + i - 1, token]) for i, token in enumerate(each.completion_ids)]
        by_token += sum(values[i] for i in each.sampled) / sampled
        by_turn += sum(sum(values[s.start : s.end]) / (s.end - s.start) for s in own) / sum(map(len, turns))
    losses = 0.0
    for micro_batch in collated.micro_batches:
        loss, _ = trainer.learner.zero.forward(trainer.learner.student, micro_batch, None, None, trainer.specs.losses)
        losses += loss.item()
    assert losses == pytest.approx(by_token + by_turn, rel=1e-4)


def test_teacher_of_single_turns_scores_the_sampled_ones():
    """Its feedback and hindsight are those of the same turn, and the demonstration stands in its history."""
    spans = (
        Span(role="demonstration", turn=1, start=0, end=2),
        Span(role="user", turn=1, start=2, end=5, body=(3, 4)),
        Span(role="assistant", turn=2, start=5, end=6),
        Span(role="user", turn=2, start=6, end=9, body=(7, 8)),
        Span(role="assistant", turn=3, start=9, end=10),
    )
    made = Completion(
        ids=tuple(range(10)), logprobs=None, finished=True, spans=spans, turn_feedback=("one", "two", "three")
    )
    outcomes = turn_outcomes(made, lambda ids: str(list(ids)))
    assert [span for span, _ in outcomes] == [spans[2], spans[4]]
    assert [turn.feedback for _, turn in outcomes] == ["two", "three"]
    assert [turn.history for _, turn in outcomes] == [tuple(range(5)), tuple(range(9))]
    assert [turn.last_user for _, turn in outcomes] == [(3, 4), (7, 8)]
    assert outcomes[0][1].later == [[("user", "[7]")], []]


def test_metrics_count_what_was_sampled(spec_of, process_group, tmp_path):
    run = train(spec_of(2, training=training(steps=1)), tmp_path / "run")
    records = lines(run / "rollouts" / "step_000000.jsonl")
    (line,) = [line for line in metrics(run) if "loss" in line]
    spans = [record["spans"] for record in records]
    length = {
        role: sum(s["end"] - s["start"] for own in spans for s in own if s["role"] == role) / len(spans)
        for role in ("assistant", "user")
    }
    assert line["rollout/completion_tokens"] == pytest.approx(length["assistant"])
    assert line["trajectory/observation_tokens"] == pytest.approx(length["user"])
    assert line["trajectory/demonstrated_turns"] == 2.0
    assert line["trajectory/turns"] == sum(s["role"] == "assistant" for own in spans for s in own) / len(spans)
    sampled = [
        record["sampler_logprobs"][i]
        for record in records
        for s in record["spans"]
        if s["role"] == "assistant"
        for i in range(s["start"], s["end"])
    ]
    assert line["rollout/entropy"] == pytest.approx(-sum(sampled) / len(sampled))
    (text,) = (run / "samples").glob("*.jsonl")
    shown = lines(text)[0]["turns"]
    assert [(part["role"], part.get("reward")) for part in shown[:3]] == [
        ("demonstration", 1.0),
        ("user", None),
        ("demonstration", 2.0),
    ]
    assert shown[0]["text"] == MOVES[0]


def demonstrated(run, step):
    records = lines(run / "rollouts" / f"step_{step:06d}.jsonl")
    (count,) = {sum(s["role"] == "demonstration" for s in record["spans"]) for record in records}
    return count


def test_schedule_counts_optimizer_steps_and_survives_a_kill(spec_of, process_group, tmp_path):
    output = OutputSpec(trackers=(), checkpoint_every=1)
    spec = spec_of(Schedule(start=1.0, to=4.0, steps=3), training=training(steps=4), output=output)
    run = train(spec, tmp_path / "run")
    assert [demonstrated(run, step) for step in range(4)] == [3, 2, 1, 0]

    cut = tmp_path / "cut"
    with interrupted_before_step(2):
        train(spec, cut)
    train(spec, cut, resume=True)
    again = evolve(spec, rollout=evolve(spec.rollout, backend=ReplayBackend(run=str(run))))
    for other in (cut, train(again, tmp_path / "again")):
        assert metrics(other) == metrics(run)
        for name, value in weights_of(run).items():
            assert_equal(weights_of(other)[name], value)


def test_schedule_is_rounded_down():
    spec = StartsWith(turns_left=Schedule(start=1.0, to=30.0, steps=145))
    counts = [[count_demonstrated(8, at_step(spec, n)) for n in (0, 4, 5, 12, 34, 35, 40)]]
    assert counts == [[7, 7, 6, 5, 1, 0, 0]]  # max(0, L − 1 − ⌊n / 5⌋)
    assert all(count_demonstrated(30, at_step(spec, n)) == max(0, 29 - n // 5) for n in range(200))


def test_without_demonstrated_turns_the_run_is_the_one_without_the_key(spec_of, process_group, tmp_path):
    spec = spec_of(4)
    plain = evolve(spec, rollout=evolve(spec.rollout, sampled_by=StudentSamples()))
    played, alone = train(spec, tmp_path / "played"), train(plain, tmp_path / "alone")
    own = [{k: v for k, v in line.items() if "demonstrat" not in k} for line in metrics(played)]
    assert own == metrics(alone)
    for name, value in weights_of(alone).items():
        assert_equal(weights_of(played)[name], value)


def test_trajectory_that_ends_in_its_demonstration_is_not_trained_on(spec_of, process_group, tmp_path, monkeypatch):
    games = [["up", "stop", "up"], MOVES]
    spec = spec_of(1, *games, training=training(steps=1), data=evolve(data(*games), shuffle=False))
    seen = []
    monkeypatch.setattr(
        loop, "filter_rollouts", lambda *given: seen.append(filter_rollouts(*given)) or filter_rollouts(*given)
    )
    run = train(spec, tmp_path / "run")
    records = lines(run / "rollouts" / "step_000000.jsonl")
    ended, others = records[::2], records[1::2]
    assert all(r["ending"] == "done" and not any(s["role"] == "assistant" for s in r["spans"]) for r in ended)
    assert all(len(r["turn_rewards"]) == 2 and r["environment_reward"] == 2 for r in ended)
    ((kept, _),) = seen
    assert [list(r.completion_ids) for r in kept] == [r["completion_ids"] for r in others]
    (line,) = [line for line in metrics(run) if "loss" in line]
    assert line["trajectory/ended_in_demonstration"] == 0.5
    assert line["trajectory/ending_done"] >= 0.5
    assert line["trajectory/demonstrated_turns"] == 2.5
    assert line["reward/game"] == pytest.approx(sum(r["environment_reward"] for r in others) / 2)
    assert line["rollout/kept"] == 0.5
    again = evolve(spec, rollout=evolve(spec.rollout, backend=ReplayBackend(run=str(run))))
    assert metrics(train(again, tmp_path / "again")) == metrics(run)


def test_batch_without_a_turn_of_the_student_trains_nothing(spec_of, process_group, tmp_path):
    run = train(spec_of(1, ["stop", "up"], training=training(steps=1)), tmp_path / "run")
    line = metrics(run)[-1]
    assert (line["trajectory/ended_in_demonstration"], line["policy_version"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("games", "environment", "ending", "spans"),
    [
        (["raise", "up"], {"max_error_share": 1.0}, "environment_error", ["demonstration"]),
        (MOVES, {"max_turns": 2}, "max_turns", ["demonstration", "user", "demonstration"]),
        (MOVES, {"max_trajectory_tokens": 26}, "max_tokens", ["demonstration"]),
    ],
)
def test_endings_within_a_demonstration(spec_of, open_tiny, games, environment, ending, spans):
    batch = collect(open_tiny(spec_of(1, games, environment=environment))).batch
    for each in batch:
        assert (each.ending, roles(each.spans)) == (ending, spans)
        assert not each.is_by_student
    assert not len(filter_rollouts((), batch, str)[0])


def test_turn_is_cut_by_the_limit_of_its_trajectory(spec_of, open_tiny):
    long = "one two three four"
    trainer = open_tiny(spec_of(1, ["up", long, "up"], environment={"max_trajectory_tokens": 36}))
    for each in collect(trainer).batch:
        *_, cut = each.spans
        assert (each.ending, each.finished, cut.end) == ("max_tokens", False, 36)
        assert (
            each.completion_ids[cut.start :] == trainer.setup.data.prompter.completion_ids(long, 0)[: 36 - cut.start]
        )


def test_evaluation_starts_without_the_demonstration(spec_of, process_group, tmp_path):
    spec = with_evaluation(spec_of(1, training=training(steps=1)), teacher_lift=0)
    suites = Table({"more": spec.evaluation.suites["more"]})
    rewards = Table({**spec.rewards, "game": EnvironmentReward()})
    spec = evolve(spec, rewards=rewards, reward="game", evaluation=evolve(spec.evaluation, suites=suites))
    run = train(spec, tmp_path / "run")
    for record in lines(run / "evaluations" / "step_000001.jsonl"):
        assert record["completion"].startswith("[assistant] ")
        assert "[demonstration]" not in record["completion"]


class AllAtOnce:
    """A backend that takes single requests, over one that takes batches."""

    def __init__(self, backend, sampling):
        self.backend, self.sampling, self.waiting = backend, sampling, {}

    def start(self, request, sampling):
        name = str(request.seed)
        self.waiting[name] = request
        return name

    def step(self):
        started, self.waiting = self.waiting, {}
        return list(zip(started, self.backend.sample(list(started.values()), self.sampling), strict=True))


def test_trajectories_at_their_own_pace_are_those_in_lockstep(spec_of, open_tiny):
    trainer = open_tiny(spec_of(1, MOVES, ["stop", "up"], ["up"], rollout=rollout(sampled_by=start(1), stop=("e",))))
    collected = collect(trainer)
    rollout_spec = trainer.setup.spec.rollout
    sampling = sampling_params(rollout_spec, trainer.models.ids_below)
    sampler = trajectory_sampler(trainer.setup, trainer.models, sampling, None, starts_with=rollout_spec.starts_with)
    backend = AllAtOnce(trainer.sampler.backends.open(trainer.setup.plan.backend), sampling)
    rows = trainer.setup.data.batch_rows(0)
    advanced = []
    made = sample_continuously(
        sampler, backend, collected.requests, rows, sampling, threads=2, advance=advanced.append
    )
    assert [(c.ids, c.spans, c.ending) for c in made] == [
        (r.completion_ids, r.spans, r.ending) for r in collected.batch
    ]
    assert sum(advanced) == len(rows)
    assert {r.is_by_student for r in collected.batch} == {True, False}


def test_retry_judges_demonstrated_turns(spec_of, open_tiny):
    judge = {"rewards": Table({"right": RegexReward(pattern="up")})}
    environment = RetryEnvironment(max_turns=4, max_observation_tokens=16, without_feedback="No.")
    trainer = open_tiny(evolve(spec_of(1, MOVES, ["go", "left", "x"], **judge), environment=environment))
    for each in collect(trainer).batch:
        if len(each.row.columns["game"]) == 7:
            assert (each.ending, each.turn_rewards, each.is_by_student) == ("done", (0.0, 0.0, 1.0), False)
        else:
            assert roles(each.spans[:5]) == ["demonstration", "user", "demonstration", "user", "assistant"]


SHOP = '''
class Shop:
    def reset(self, **columns): ...

    def buy(self, count: int, kind: str = "red") -> str:
        """Buys apples.

        Args:
            count: how many
            kind: which ones
        """
        return f"bought {count + 1} {kind}"
'''


def call(**arguments):
    return {"type": "function", "id": "call1", "function": {"name": "buy", "arguments": arguments}}


class OneTurn:
    """A backend whose turns are one fixed text."""

    def __init__(self, ids):
        self.ids, self.asked = ids, []

    def sample(self, requests, sampling):
        self.asked += requests
        return [Completion(ids=self.ids, logprobs=(-1.0,) * len(self.ids), finished=True) for _ in requests]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(SHOP)
    environment = UserEnvironment(FileEnvironment(file="shop.py", class_name="Shop", call_seconds=5.0), folder)
    yield environment
    environment.close()


def with_tools(tiny_tokenizer, shop, template):
    plain = Prompter(tokenizer_with(tiny_tokenizer, template), {})
    return plain.with_tools(choose_format(plain, shop.tools, ToolCalls()))


@pytest.mark.parametrize("template", [QWEN, LLAMA, HARMONY, None])
def test_logged_tool_calls_call_the_tools(shop, tiny_tokenizer, make_row, process_group, template):
    prompter = with_tools(tiny_tokenizer, shop, template)
    tokenizer, end = prompter.tokenizer, end_token(prompter.tokenizer, {})
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call(count=1, kind="a  b")]},
        {"role": "tool", "content": "as logged", "name": "buy", "tool_call_id": "call1"},
        {"role": "assistant", "content": "", "tool_calls": [call(count=5)]},
        {"role": "tool", "content": "as logged", "name": "buy", "tool_call_id": "call1"},
        {"role": "assistant", "content": "Done."},
    ]
    row = make_row("Buy.", game=Turns(turns))
    demonstrated = CompletionEncoder(prompter, end).turns(row, "game")[:2]
    backend, encoder = OneTurn((*prompter.text_ids("Done."), end)), ObservationEncoder(prompter, end)
    sampler = TrajectorySampler(
        environment=shop,
        spec=FileEnvironment(file="shop.py", class_name="Shop", max_turns=4, max_observation_tokens=64),
        observations=lambda _: encoder,
        end_ids=(end,),
        decode=tokenizer.decode,
        opened_prompt=lambda request, row, text: (),
        demonstrated=lambda _: demonstrated,
    )
    request = SamplingRequest(prompt_ids=prompter.student_ids(row), seed=1)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=80)
    (made,) = sampler.sample(backend, [request], [row], sampling)
    assert made.ending == "no_call"
    shown = [span for span in made.spans if span.body]
    said = [tokenizer.decode(made.ids[slice(*span.body)]) for span in shown]
    assert [text.endswith(expected) for text, expected in zip(said, ["bought 2 a  b", "bought 6 red"], strict=True)]
    assert [made.ids[s.start : s.end] for s in made.spans if s.role == "demonstration"] == demonstrated
    (asked,) = backend.asked
    assert asked.prompt_ids == (*request.prompt_ids, *made.ids[: made.spans[-1].start])
    if template:  # the tokens are those that the chat template writes
        whole = CompletionEncoder(prompter, end).encode(row, "game")
        assert [whole.ids[s.start : s.end] for s in whole.spans if s.sampled][:2] == demonstrated
        written = [message for message in turns[:3] if message["role"] == "assistant"]
        chats = [prompter.chat(row, [*row.messages, message], generation_prompt=False) for message in written]
        before = prompter.chat(row, row.messages)
        assert all(
            chat.startswith(before + tokenizer.decode(ids)) for chat, ids in zip(chats, demonstrated, strict=True)
        )


def test_faulty_demonstrations_are_named(spec_of, open_tiny, shop, tiny_tokenizer, make_row):
    with pytest.raises(BadData, match=r"row 1: turn 2 of 'game' has 2\d tokens, more than rollout.max_new_tokens, 24"):
        open_tiny(spec_of(1, MOVES, ["up", "a b c d e f g h i j k l m", "up"]))
    prompter = with_tools(tiny_tokenizer, shop, None)
    encoder = CompletionEncoder(prompter, end_token(prompter.tokenizer, {}))
    for turn, fault in [
        ({"content": "CALL buy {count"}, "row 0: turn 1 of 'game' has a tool call that cannot be read"),
        ({"content": "", "tool_calls": [call(), call()]}, "row 0: a turn has 2 tool calls; the format text takes 1"),
    ]:
        row = make_row("Buy.", game=Turns([{"role": "assistant", **turn}]))
        with pytest.raises(BadData, match=fault):
            check_demonstrations(encoder, "game", [row], 99)
    with pytest.raises(BadData, match="row 0: 'game' has no turns of a chat"):
        check_demonstrations(encoder, "game", [make_row("Buy.", game="one text")], 99)


def test_gymnasium_steps_by_demonstrated_actions(spec_of, open_tiny):
    pytest.importorskip("gymnasium")
    environment = GymnasiumEnvironment(
        id="FrozenLake-v1",
        arguments=Table({"is_slippery": False}),
        choices=("left", "down", "right", "up"),
        observation="Square {observation}.",
        max_turns=6,
        max_observation_tokens=16,
        call_seconds=20.0,
    )
    limits = rollout(sampled_by=start(1), max_prompt_tokens=200, max_new_tokens=16)
    spec = evolve(spec_of(1, ["down", "I go down.", "right"], rollout=limits), environment=environment)
    trainer = open_tiny(spec)
    decode = trainer.setup.data.tokenizer.decode
    for each in collect(trainer).batch:
        said = [decode(each.completion_ids[slice(*span.body)]) for span in each.spans[1:4:2]]
        assert said == ["Square 4.", "Square 8."]
