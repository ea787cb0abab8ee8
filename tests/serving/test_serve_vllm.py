"""Real servers: `sdkit serve` of the tiny model, weights after real steps, and a server killed during a run."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest
import torch
import yaml
from attrs import evolve
from os_processes import free_port
from test_prefetch import CORRECTED, versions
from test_servers import tokens
from tinyruns import advance, collect, lines, make_spec, metrics, rollout, train, training
from vllm_build import require_vllm

from sdkit.language.specs import OptimizerSpec, RegexReward, RetryEnvironment, Table, VllmServerBackend
from sdkit.train import loop
from sdkit.train.sampling_requests import sampling_params

require_vllm()
pytestmark = pytest.mark.timeout(900)

START_SECONDS = 600  # seconds; about 30 on a quiet machine


class Served:
    """`sdkit serve` as a process; after a kill it can be started again on the same port."""

    def __init__(self, model, work):
        self.backend = VllmServerBackend(
            urls=(f"http://127.0.0.1:{free_port()}",),
            folder=str(work / "weights"),
            max_num_seqs=16,
            kv_cache_gib=0.1,
            deadline_seconds=float(START_SECONDS),
        )
        self.url, self.log = self.backend.urls[0], work / "log.txt"
        spec = {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {
                "source": {"kind": "inline", "rows": [{"q": "What is 1 + 1?", "d": "1 + 1 = 2"}]},
                "columns": {"prompt": "q", "demonstration": "d"},
            },
            "rollout": {
                "backend": {
                    "kind": "vllm_server",
                    "urls": [self.url],
                    "folder": self.backend.folder,
                    "max_num_seqs": 16,
                    "kv_cache_gib": 0.1,
                }
            },
            "losses": {"imitate": {"kind": "cross_entropy"}},
            "optimizer": {"lr": 0.01},
            "training": {"steps": 1, "prompts_per_step": 1},
        }
        self.spec = work / "spec.yaml"
        self.spec.write_text(yaml.safe_dump(spec))
        self.process = None

    def start(self):
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sdkit", "serve", self.spec, "--max-tokens", "256"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def wait(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            if self.ask("GET", "/health")[0] == 200:
                return
            time.sleep(0.3)
        pytest.fail(f"no server within {START_SECONDS} s: {self.log.read_text()[-3000:]}")

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return None, str(error).encode()

    def descendants(self):
        """Process ids of the server, without `sdkit serve` itself."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                return self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)
        return None


@pytest.fixture(scope="module")
def served(tiny_folder, tmp_path_factory):
    server = Served(tiny_folder, tmp_path_factory.mktemp("served"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def spec_of(served, folder, **changes):
    parts = {
        "rollout": rollout(temperature=0.7, completions_per_prompt=2, backend=served.backend),
        "losses": CORRECTED,
        "optimizer": OptimizerSpec(lr=1e-2),
    }
    return make_spec(folder, **(parts | changes))


def test_trajectories_at_their_own_pace_are_those_of_lockstep(served, tiny_folder, open_tiny):
    parts = {
        "rollout": rollout(stop=("e",), max_new_tokens=24, completions_per_prompt=2, backend=served.backend),
        "rewards": Table({"right": RegexReward(pattern="a")}),
    }
    retry = RetryEnvironment(max_turns=3, max_observation_tokens=16, without_feedback="No.")
    played = {}
    for scheduling in ("lockstep", "continuous"):
        environment = evolve(retry, scheduling=scheduling)
        batch = collect(open_tiny(spec_of(served, tiny_folder, **parts, environment=environment))).batch
        played[scheduling] = [(r.completion_ids, r.spans, r.ending) for r in batch]
    assert played["continuous"] == played["lockstep"]
    assert {len(spans) for _, spans, _ in played["lockstep"]} > {1}


def test_logprobs_agree_after_every_update(served, tiny_folder, open_tiny):
    trainer = open_tiny(spec_of(served, tiny_folder))
    before = []
    for step in range(3):
        collected = collect(trainer, step)
        assert collected.figures["canary_mean"] < 1e-4
        assert collected.figures["canary_max"] < 1e-3
        state = json.loads(served.ask("GET", "/sdkit/state")[1])
        assert state["weights"]["version"] == trainer.progress.optimizer_steps
        before.append(tokens(collected))
        _assert_logprobs_match_the_trainer(trainer, collected)
        advance(trainer, 1)
    backend, _ = trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)
    requests = collected.requests
    repeated = [
        backend.sample(requests, sampling_params(trainer.setup.spec.rollout, trainer.models.ids_below))
        for _ in range(2)
    ]
    assert [c.ids for c in repeated[0]] == [c.ids for c in repeated[1]]
    few = backend.sample(requests[3:1:-1], sampling_params(trainer.setup.spec.rollout, trainer.models.ids_below))
    assert [c.ids for c in few[::-1]] == [c.ids for c in repeated[0][2:4]]
    limit = 200  # of the 404 ids
    settings = sampling_params(trainer.setup.spec.rollout, limit)
    limited = backend.sample(requests, evolve(settings, temperature=2.0))
    assert max(i for c in limited for i in c.ids) < limit


def _assert_logprobs_match_the_trainer(trainer, collected):
    for rollout_ in list(collected.batch)[:3]:
        ids = torch.tensor([[*rollout_.prompt_ids, *rollout_.completion_ids]])
        with torch.no_grad(), trainer.models.student.active() as causal:
            logits = causal(ids).logits[0, len(rollout_.prompt_ids) - 1 : -1]
        all_logprobs = (logits / 0.7).log_softmax(-1)
        logprobs = all_logprobs.gather(-1, torch.tensor(rollout_.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, torch.tensor(rollout_.sampler_logprobs), atol=1e-3, rtol=0)


def test_stop_texts_cut_as_without_vllm(served, tiny_folder, open_tiny):
    plain = open_tiny(make_spec(tiny_folder, rollout=rollout(max_new_tokens=16)))
    texts = [plain.setup.data.tokenizer.decode(ids) for ids in tokens(collect(plain))]
    stop = tuple(sorted({c for text in texts for c in text[3:] if c.isalnum() and c.isascii()})[:2])
    assert stop
    changes = {"max_new_tokens": 16, "stop": stop}
    trainers = [
        open_tiny(make_spec(tiny_folder, rollout=rollout(**changes))),
        open_tiny(spec_of(served, tiny_folder, rollout=rollout(**changes, backend=served.backend))),
    ]
    sampling = [
        evolve(sampling_params(trainer.setup.spec.rollout, trainer.models.ids_below), temperature=0.0)
        for trainer in trainers
    ]
    done = []
    for trainer, params in zip(trainers, sampling, strict=True):
        requests = collect(trainer).requests
        done.append(
            trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)[0].sample(
                requests, params
            )
        )
    assert [(c.ids, c.finished) for c in done[0]] == [(c.ids, c.finished) for c in done[1]]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/collective_rpc"),
        ("POST", "/pause"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/invocations"),
        ("POST", "/scale_elastic_ep"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
def test_other_routes_of_vllm_are_closed(served, method, path):
    assert served.ask(method, path, {} if method == "POST" else None)[0] == 404


def test_file_outside_the_folder_is_not_loaded(served, tiny_folder):
    for name in ("../model.safetensors", str(tiny_folder / "model.safetensors")):
        update = {"version": 1, "file": name, "sha256": "0" * 64}
        assert served.ask("POST", "/sdkit/weights", update)[0] == 400


@pytest.mark.full
def test_server_killed_during_a_run_changes_nothing(served, tiny_folder, tmp_path, monkeypatch, capsys):
    """One batch is prefetched; the server is killed while step 2 trains, and started again."""
    spec = spec_of(served, tiny_folder, training=training(steps=4))
    spec = evolve(spec, rollout=evolve(spec.rollout, max_staleness=1))
    expected = train(spec, tmp_path / "uninterrupted")
    assert versions(expected) == [{0}, {0}, {1}, {2}]
    update, killed = loop._update, []

    def kill_during_step_2(trainer, *args):
        if trainer.progress.step == 2:
            killed.extend(served.descendants())
            os.kill(killed[0], signal.SIGKILL)
            assert served.process.wait(60) == 6
            assert "ended by SIGKILL" in served.log.read_text()
            served.start()
        return update(trainer, *args)

    monkeypatch.setattr(loop, "_update", kill_during_step_2)
    restarted = train(spec, tmp_path / "again")
    assert versions(restarted) == versions(expected)
    for step in range(4):
        name = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = lines(restarted / name), lines(expected / name)
        assert [a["completion_ids"] for a in ours] == [b["completion_ids"] for b in theirs]
    for a, b in zip(metrics(restarted), metrics(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["rollout/canary_mean"] < 1e-4
    assert "is back, with weights" in capsys.readouterr().err
    assert not [pid for pid in killed if psutil.pid_exists(pid)]


def test_server_stops_on_request(served):
    """The last test of the module: no process of the server remains."""
    started = served.descendants()
    assert started
    assert served.stop() == 0
    assert "leaked" not in served.log.read_text()
    assert not [pid for pid in started if psutil.pid_exists(pid)]
