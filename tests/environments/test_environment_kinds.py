"""Environments of gymnasium and OpenEnv servers, and environments by row."""

import json

import pytest
from attrs import evolve
from openenv_server import MOVE, OpenEnvServer
from tinyruns import lines, make_spec, metrics, rollout, train, training, with_evaluation

from sdkit.batches import Row
from sdkit.environments import open_environments
from sdkit.environments.interface import Turn
from sdkit.environments.rows import check_routes, check_rows
from sdkit.language.errors import BadData
from sdkit.language.specs import (
    DataSpec,
    GymnasiumEnvironment,
    InlineSource,
    LastMatch,
    OpenEnvEnvironment,
    ReplayBackend,
    RetryEnvironment,
    RoutedEnvironment,
    Table,
)

COUNTER = """
import gymnasium
from gymnasium import spaces


class Counter(gymnasium.Env):
    observation_space = spaces.Dict(count=spaces.Discrete(99), share=spaces.Box(0, 1))

    action_space = spaces.Text(8)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = int(self.np_random.integers(50)) + (options or {}).get("more", 0)
        return self._observation(), {}

    def step(self, action):
        if isinstance(action, str) and action == "fail":
            raise ZeroDivisionError("oh")
        self.count += 1
        return self._observation(), 0.5, False, str(action) == "end", {}

    def render(self):
        return f"\\x1b[41mcount\\x1b[0m {self.count}"

    def _observation(self):
        return {"count": self.count, "share": 1 / 3}


gymnasium.register("Counter-v0", Counter, disable_env_checker=True)
"""


def row(index=0, **columns):
    return Row(index=index, messages=(), columns=columns, raw={})


def play(environment, rows, *turns, seed=7):
    """Every text and reward of trajectories of these rows whose turns are `turns`; then their own rewards."""
    opened = environment.open([(each, seed) for each in rows])
    shown = [[(each.text, each.error)] for each in opened]
    for texts in turns:
        handles = [(each.handle, Turn(text=text)) for each, text in zip(opened, texts, strict=True)]
        for own, reply in zip(shown, environment.reply(handles), strict=True):
            text = reply.error or (reply.messages[0].content if reply.messages else None)
            own.append((text, reply.reward))
    return shown, environment.end([each.handle for each in opened])


@pytest.fixture
def counter(tmp_path):
    pytest.importorskip("gymnasium")
    (tmp_path / "counter.py").write_text(COUNTER)
    opened = []

    def open_counter(**changes):
        spec = GymnasiumEnvironment(id="Counter-v0", file="counter.py", **changes)
        opened.append(open_environments(spec, {None: {}}, None, tmp_path)[None])
        return opened[-1]

    yield open_counter
    for each in opened:
        each.close()


def test_gymnasium_episode_is_written_as_text(counter):
    environment = counter(
        arguments=Table({"render_mode": "ansi"}),
        extract=LastMatch(pattern=r"\w+(?: too .*)?$"),
        observation="{observation.count}, {observation.share}, {render}",
        columns=("more",),
        seed_column="s",
    )
    rows = [row(0, s="3", more=0), row(1, s="3", more=10), row(2, s="4", more=0)]
    shown, rewards = play(environment, rows, ["I go", "much too long for it", "fail"], ["end", "go", "go"])
    count = int(shown[0][0][0].split(",")[0])
    assert shown[0] == [
        (f"{count}, 0.3333, count {count}", None),
        (f"{count + 1}, 0.3333, count {count + 1}", 0.5),
        (None, 0.5),
    ]
    assert shown[1][0][0].startswith(f"{count + 10},")
    assert shown[1][1] == ("That is not an action. Answer with a text of 1 to 8 of its characters.", 0.0)
    assert shown[1][2][0].startswith(f"{count + 11},")
    assert shown[2][1][0] == "gymnasium Counter-v0: ZeroDivisionError: oh"
    assert rewards == [1.0, 0.5, None]


def test_a_reply_states_the_seconds_of_its_trajectory(counter):
    environment = counter()
    (opened,) = environment.open([(row(), 7)])
    first, second = (environment.reply([(opened.handle, Turn(text="go"))])[0].seconds for _ in range(2))
    assert 0 < first < second


@pytest.mark.parametrize(
    ("space", "choices", "text", "action"),
    [
        ("number", (), "3", 3),
        ("number", (), "0", None),
        ("number", (), "true", None),
        ("number", (), "1" * 400, None),
        ("number", ("low", "mid", "high"), "Not low: HIGH.", 3),
        ("number", ("low", "mid", "high"), "higher", None),
        ("box", (), "[0.5, -1]", [0.5, -1]),
        ("box", (), "[0.5, -7]", None),
        ("box", (), "[0.5, {}]", None),
        ("both", (), '{"a": 1, "b": [2, 0]}', {"a": 1, "b": (2, 0)}),
        ("both", (), '{"a": 1, "b": [2]}', None),
        ("both", (), "[" * 10_000, None),
    ],
)
def test_actions_are_read_from_text(space, choices, text, action):
    spaces = pytest.importorskip("gymnasium.spaces")
    from sdkit.environments.gymnasium_episode import plain, read_action

    number, two = spaces.Discrete(3, start=1), spaces.Discrete(3)
    known = {"number": number, "box": spaces.Box(-1, 1, (2,)), "both": spaces.Dict(a=two, b=spaces.Tuple((two, two)))}
    found = read_action(known[space], text, choices)
    assert plain(found) == plain(action)


def test_environment_that_cannot_be_made_is_named(counter):
    with pytest.raises(
        BadData, match="gymnasium Counter-v0 cannot be loaded: ValueError: choices name the actions of"
    ):
        counter(choices=("a", "b"))
    with pytest.raises(BadData, match="gymnasium Counter-v0 cannot be loaded: TypeError"):
        counter(arguments=Table({"speed": 3}))


@pytest.fixture
def served(tmp_path):
    parts = []

    def open_served(action=None, sessions=64, **changes):
        server = OpenEnvServer(**({"action": action} if action else {}), sessions=sessions)
        spec = OpenEnvEnvironment(url=server.url, **changes)
        environment = open_environments(spec, {None: {}}, None, tmp_path)[None]
        parts.extend([environment, server])
        return environment, server

    yield open_served
    for part in parts:
        part.close()


def test_openenv_sessions_are_played_side_by_side(served):
    environment, server = served(columns=("secret",), observation="{observation.said}")
    rows = [row(0, secret="4"), row(1, secret="6")]
    shown, rewards = play(environment, rows, ["4", "4"], ["4", "6"])
    assert shown == [[("Guess.", None), (None, 1.0), (None, 0.0)], [("Guess.", None), ("Wrong.", 0.0), (None, 1.0)]]
    assert rewards == [1.0, 1.0]
    assert sorted(data["secret"] for data in server.resets) == ["4", "6"]
    assert {data["seed"] for data in server.resets} == {7}


def test_openenv_actions_with_other_fields_are_json(served):
    environment, _ = served(action=MOVE, unparsable="No: {actions}{error}")
    (shown,), _ = play(environment, [row()], ["4"], ['{"fast": true}'], ["left"], ['{"number": 5, "fast": true}'])
    described = "No: JSON with number (integer), fast (boolean)"
    assert shown == [
        ('{"said": "Guess."}', None),
        ('{"said": "Wrong."}', 0.0),
        (f"{described}number: Field required", 0.0),
        (described, 0.0),
        (None, 1.0),
    ]


def test_openenv_errors_end_only_their_own_trajectory(served):
    environment, server = served(sessions=2, observation="{observation.said}")
    shown, _ = play(environment, [row(0), row(1), row(2)], ["boom", "1", "2"])
    errors = sorted(text for text, _ in (each[1] for each in shown))
    assert errors[0] == "Wrong."
    assert "Server at capacity (its max_concurrent_envs is smaller than a batch)" in "".join(errors)
    server.close()
    shown, _ = play(environment, [row(0)], ["1"])
    assert shown[0][1][0].startswith(f"openenv {server.url}: ConnectionRefusedError")


def test_openenv_error_stops_the_run_if_it_should(served):
    environment, server = served(on_error="stop_run")
    with pytest.raises(BadData, match=rf"openenv {server.url}: reply: .* EXECUTION_ERROR: exploded"):
        play(environment, [row()], ["boom"])


ROUTED = RoutedEnvironment(
    by="task",
    routes=Table(
        {
            "again": RetryEnvironment(max_turns=2, reward="right", threshold=2.0, without_feedback="Again."),
            "count": GymnasiumEnvironment(
                id="Counter-v0", file="counter.py", max_turns=3, max_observation_tokens=4, threshold=0.5
            ),
        }
    ),
)


def test_rows_must_have_a_route_and_routes_rows():
    rows = [row(0, task="again"), row(3, task="count")]
    check_rows(ROUTED, rows)
    check_routes(ROUTED, rows)
    with pytest.raises(BadData, match="row 7: task is 'cuont', which is not one of 'again', 'count'"):
        check_rows(ROUTED, [*rows, row(7, task="cuont")])
    with pytest.raises(BadData, match="no row's task is 'count'") as caught:
        check_routes(ROUTED, rows[:1])
    assert caught.value.path == ("environment", "routes", "count")
    seeded = GymnasiumEnvironment(id="Counter-v0", seed_column="s")
    with pytest.raises(BadData, match="row 2: s is '-1', not a whole number"):
        check_rows(seeded, [row(1, s="0"), row(2, s="-1")])


def test_each_row_is_played_in_its_own_environment(tiny_folder, process_group, tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counter.py").write_text(COUNTER)
    spec = with_evaluation(
        make_spec(tiny_folder, rollout=rollout(stop=("e",), max_new_tokens=24, max_prompt_tokens=200)), teacher_lift=0
    )

    def with_tasks(data):
        tasks = ("again", "count")
        rows = tuple(Table({**each, "task": tasks[i % 2]}) for i, each in enumerate(data.source.rows))
        return DataSpec(source=InlineSource(rows=rows), columns=Table({**data.columns, "task": "task"}))

    suites = {name: evolve(suite, data=with_tasks(suite.data)) for name, suite in spec.suites.items()}
    spec = evolve(
        spec,
        data=with_tasks(spec.data),
        evaluation=evolve(spec.evaluation, suites=Table(suites)),
        reward="right",
        environment=ROUTED,
        training=training(steps=1, prompts_per_step=6),
    )
    run = train(spec, tmp_path / "run")
    (recorded,) = (run / "rollouts").iterdir()
    records = lines(recorded)
    for record in records:
        turns = [span for span in record["spans"] if span["role"] == "assistant"]
        limit = ROUTED.routes[("again", "count")[record["row"] % 2]].max_turns
        assert len(turns) <= limit
        assert (record["ending"] == "max_turns") <= (len(turns) == limit)
        for span in record["spans"]:
            assert span["role"] == "assistant" or limit == 2 or span["body"][1] - span["body"][0] <= 4
    assert {record["ending"] for record in records} <= {"max_turns", "length", "done"}
    assert any(len(record["spans"]) > 1 for record in records)
    for record in lines(run / "evaluations" / "step_000000.jsonl"):
        assert {"within_1", "within_2", "within_3"} <= record["scores"].keys()
    replayed = train(
        evolve(spec, rollout=evolve(spec.rollout, backend=ReplayBackend(run=str(run)))), tmp_path / "again"
    )
    assert json.dumps(metrics(replayed)) == json.dumps(metrics(run))
