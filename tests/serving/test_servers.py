"""Runs with rollout servers: the tokens are those without servers, and a failing server is detected and named."""

import threading

import pytest
from attrs import evolve
from tinyruns import LORA, advance, collect, make_spec, metrics, model, rollout, train, with_evaluation

pytest.importorskip("uvicorn", reason="the servers of these tests run on uvicorn")
from tinyservers import TinySampler

from sdkit.language.errors import BadEnvironment, NumericsGuard, ProcessDied
from sdkit.language.specs import TransformersBackend, VllmServerBackend
from sdkit.serving import pool, protocol


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    """Short delays between attempts."""
    from sdkit.serving import client

    monkeypatch.setattr(client, "FIRST_RETRY_DELAY", 0.01)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.05)


@pytest.fixture
def serve(tiny_folder, tmp_path):
    """Starts servers of the tiny model; stops them at the end of the test."""
    started = []

    def start(count=1, **options):
        for _ in range(count):
            started.append(TinySampler(tiny_folder, tmp_path / "weights", **options))
        return started[-count:]

    yield start
    for server in started:
        server.close()


def served_by(servers, tmp_path, folder, **changes):
    settings = {"deadline_seconds": 20.0} | changes.pop("backend", {})
    backend = VllmServerBackend(
        urls=tuple(server.url for server in servers), folder=str(tmp_path / "weights"), **settings
    )
    spec = make_spec(folder, **changes)
    return evolve(spec, rollout=evolve(spec.rollout, backend=backend))


def tokens(collected):
    return [r.completion_ids for r in collected.batch]


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
def test_run_with_servers_matches_a_run_without(serve, tiny_folder, tmp_path, lora, open_tiny):
    servers = serve(2)
    changes = {
        "model": model(tiny_folder, lora=lora),
        "rollout": rollout(completions_per_prompt=2, temperature=0.7, stop=("5",)),
    }
    plain_spec = with_evaluation(make_spec(tiny_folder, **changes))
    spec = with_evaluation(served_by(servers, tmp_path, tiny_folder, **changes))
    runs = [train(s, tmp_path / name) for s, name in ((plain_spec, "own"), (spec, "served"))]
    ours, theirs = map(metrics, runs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    trained = [line for line in theirs if "grad_norm" in line]
    assert all(line["rollout/canary_mean"] < 1e-5 for line in trained if line["step"] > 1)
    assert all(server.loads for server in servers)
    assert all(server.requests for server in servers)
    assert list((tmp_path / "weights").iterdir()) == []


def test_complete_groups_are_sampled_by_the_newest_weights(serve, tiny_folder, tmp_path, open_tiny):
    servers = serve(2)
    changes = {"rollout": rollout(completions_per_prompt=3)}
    trainer = open_tiny(served_by(servers, tmp_path, tiny_folder, **changes))
    for step in range(2):
        collected = collect(trainer, step)
        assert collected.figures["servers"] == 2
        assert {r.policy_version for r in collected.batch} == {step}
        advance(trainer, 1)
    assert [len(server.requests) for server in servers] == [24, 24]  # `advance` samples too
    for server in servers:
        prompts = [request["prompt"] for request in server.requests]
        assert all(prompts.count(prompt) % 3 == 0 for prompt in prompts)
        assert {request["weights"]["version"] for request in server.requests} == {0, 1}
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) == 1


def test_restarted_server_gets_weights_and_the_batch_again(serve, tiny_folder, tmp_path, open_tiny, capsys):
    [server] = serve()
    trainer = open_tiny(served_by([server], tmp_path, tiny_folder))
    expected = tokens(collect(trainer))
    server.kill()
    server.start()
    assert tokens(collect(trainer)) == expected
    assert len(server.loads) == 2
    assert "has restarted; sending the weights again" in capsys.readouterr().err
    assert any("has restarted" in message for message in trainer.sampler.backends.server_messages())
    assert trainer.sampler.backends.server_messages() == []


def test_server_killed_during_a_batch_is_waited_for(serve, tiny_folder, tmp_path, open_tiny, capsys):
    [server] = serve()
    trainer = open_tiny(served_by([server], tmp_path, tiny_folder))
    expected = tokens(collect(trainer))
    already_served = len(server.requests)

    def fault(number):
        if number == already_served + 1:
            server.fault = None
            server.kill(wait=False)
            threading.Timer(0.5, server.start).start()

    server.fault = fault
    assert tokens(collect(trainer)) == expected
    messages = capsys.readouterr().err
    assert "a rollout server is unavailable" in messages
    assert "no rollout server answers; waiting up to 20 s" in messages
    assert "is back, with weights 0" in messages


def test_other_servers_take_over_until_a_failed_one_returns(
    serve, tiny_folder, tmp_path, open_tiny, capsys, monkeypatch
):
    servers = serve(2)
    trainer = open_tiny(served_by(servers, tmp_path, tiny_folder))
    expected = tokens(collect(trainer))
    servers[0].kill()
    alone = collect(trainer)
    assert tokens(alone) == expected
    assert servers[0].url in capsys.readouterr().err
    advance(trainer, 1)
    assert collect(trainer, 1).figures["servers"] == 1
    servers[0].start()
    monkeypatch.setattr(pool, "RECHECK_SECONDS", 0.0)
    for member in trainer.sampler.backends.pool._members:
        member.retry_at = 0.0
    before = len(servers[0].requests)
    collect(trainer, 1)
    assert len(servers[0].requests) > before
    assert "is back, with weights 1" in capsys.readouterr().err


def test_unavailable_server_ends_the_run_and_is_named(serve, tiny_folder, tmp_path, open_tiny):
    [server] = serve()
    spec = served_by([server], tmp_path, tiny_folder, backend={"deadline_seconds": 0.5})
    trainer = open_tiny(spec)
    collect(trainer)
    server.kill()
    with pytest.raises(ProcessDied, match=r"no rollout server for 0\.5 s") as caught:
        collect(trainer)
    assert server.url in str(caught.value)
    assert "sdkit serve" in caught.value.hint
    assert "--resume" in caught.value.hint


def test_completion_beyond_the_deadline_ends_the_run(serve, tiny_folder, tmp_path, open_tiny):
    [server] = serve()
    spec = served_by([server], tmp_path, tiny_folder, backend={"deadline_seconds": 0.5})
    trainer = open_tiny(spec)
    collect(trainer)
    released = threading.Event()
    server.fault = lambda _: released.wait(30) and None
    try:
        with pytest.raises(ProcessDied, match=r"lost a batch|no rollout server"):
            collect(trainer)
    finally:
        released.set()


def test_server_that_loses_every_batch_ends_the_run(serve, tiny_folder, tmp_path, open_tiny):
    [server] = serve()
    trainer = open_tiny(served_by([server], tmp_path, tiny_folder))
    collect(trainer)

    def lose_weights(_):
        server.gateway.loaded = None
        return 503

    server.fault = lose_weights
    with pytest.raises(ProcessDied, match="lost a batch 8 times"):
        collect(trainer)


def test_refused_request_ends_the_run_at_once(serve, tiny_folder, tmp_path, open_tiny):
    [server] = serve()
    trainer = open_tiny(served_by([server], tmp_path, tiny_folder))
    server.fault = lambda _: 400
    with pytest.raises(BadEnvironment, match="answered 400: refused by the test"):
        collect(trainer)


def test_weights_that_differ_from_the_trainers_are_detected(serve, tiny_folder, tmp_path, open_tiny):
    [server] = serve()
    trainer = open_tiny(served_by([server], tmp_path, tiny_folder))
    collect(trainer)

    async def ignore_weights(method, timeout, args):
        return [1]

    server.collective_rpc = ignore_weights
    with pytest.raises(NumericsGuard, match="of the server http"):
        advance(trainer, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"hidden_size": 7}}, "its model has hidden_size 7, the student"),
        ({"config": {"vocab_size": 7}}, "its model has vocab_size 7, the student"),
        ({"max_tokens": 20}, "tokens, a rollout server accepts 20"),
        ({"folder": "elsewhere"}, "does not contain what this run writes to"),
    ],
    ids=["another model", "another vocabulary", "too short", "another folder"],
)
def test_unsuitable_server_is_refused_before_models_load(
    serve, tiny_folder, tmp_path, process_group, monkeypatch, change, message
):
    from sdkit.train import run

    [server] = serve()
    for name, value in change.items():
        if name == "folder":
            server.gateway.folder = tmp_path / value
        else:
            setattr(server, name, value)
    monkeypatch.setattr(run, "open_trainer", None)  # called only after loading models
    with pytest.raises(BadEnvironment, match=message) as caught:
        run.open_run(served_by([server], tmp_path, tiny_folder), tmp_path)
    assert "sdkit serve" in caught.value.hint
    assert list((tmp_path / "weights").iterdir()) == []


def test_other_precision_or_version_is_refused(serve, tiny_folder, tmp_path, process_group, monkeypatch):
    from sdkit.train import run

    [server] = serve()
    spec = served_by([server], tmp_path, tiny_folder, backend={"dtype": "bfloat16"})
    with pytest.raises(BadEnvironment, match="serves float32, the run needs bfloat16"):
        run.open_run(spec, tmp_path)
    monkeypatch.setattr(protocol, "__version__", "9.9")
    with pytest.raises(BadEnvironment, match=r"the trainer 9\.9"):
        run.open_run(served_by([server], tmp_path, tiny_folder), tmp_path)


def test_unreachable_server_is_refused(serve, tiny_folder, tmp_path, process_group):
    from sdkit.train import run

    [server] = serve()
    server.kill()
    with pytest.raises(BadEnvironment, match="cannot be reached") as caught:
        run.open_run(served_by([server], tmp_path, tiny_folder), tmp_path)
    assert "sdkit serve" in caught.value.hint
    assert caught.value.path == ("rollout", "backend")


def test_key_comes_from_the_environment(serve, tiny_folder, tmp_path, process_group, monkeypatch, open_tiny):
    from sdkit.train import run

    [server] = serve(key="open sesame")
    monkeypatch.delenv("ROLLOUT_KEY", raising=False)
    spec = served_by([server], tmp_path, tiny_folder, backend={"key_from": "ROLLOUT_KEY"})
    with pytest.raises(BadEnvironment, match="no ROLLOUT_KEY"):
        run.open_run(spec, tmp_path)
    monkeypatch.setenv("ROLLOUT_KEY", "wrong")
    with pytest.raises(BadEnvironment, match="the key is missing or wrong") as caught:
        run.open_run(spec, tmp_path)
    assert "key_from" in caught.value.hint
    monkeypatch.setenv("ROLLOUT_KEY", "open sesame")
    assert tokens(collect(open_tiny(spec)))


def test_teacher_can_sample_on_servers(serve, tiny_folder, tmp_path, open_tiny):
    from sdkit.language.specs import TeacherSamples

    [server] = serve()
    changes = {"rollout": rollout(sampled_by=TeacherSamples(prompt="student"))}
    trainer = open_tiny(served_by([server], tmp_path, tiny_folder, **changes))
    expected = open_tiny(make_spec(tiny_folder, **changes))
    assert isinstance(expected.setup.plan.backend, TransformersBackend)
    assert tokens(collect(trainer)) == tokens(collect(expected))
