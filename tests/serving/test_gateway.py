"""The gateway of a rollout server: which requests pass, and that no completion mixes two sets of weights."""

import asyncio
import hashlib
import json
from types import SimpleNamespace

import pytest

from sdkit import __version__
from sdkit.serving.gateway import FOLDER, KEY, WEIGHTS_HEADER, Gateway


class Engine:
    """The parts of vLLM's engine that the gateway calls; records the calls."""

    def __init__(self):
        self.calls = []
        self.repacked = [1]
        self.emptied = True
        self.fails = False
        config = {"model_type": "llama", "vocab_size": 404, "hidden_size": 8, "secret": "x"}
        self.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: config), dtype="torch.float32", max_model_len=99
        )

    async def pause_generation(self):
        self.calls.append("pause")

    async def resume_generation(self):
        self.calls.append("resume")

    async def collective_rpc(self, method, timeout, args):
        self.calls.append((method, *args))
        if self.fails:
            raise RuntimeError("no such tensor\nand more")
        return self.repacked

    async def reset_prefix_cache(self):
        self.calls.append("reset")
        return self.emptied


class FakeApp:
    """vLLM's application; records the paths that reach it and can delay completions."""

    def __init__(self):
        self.paths = []
        self.release = None

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        if self.release and scope["path"] == "/v1/completions":
            await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"through": true}'})


class Served:
    """A gateway with an engine and an application, called without a network."""

    def __init__(self, folder, key=None):
        self.folder, self.engine, self.app = folder, Engine(), FakeApp()
        self.gateway = Gateway(self.app, {FOLDER: str(folder)} | ({KEY: key} if key else {}))

    async def ask(self, method, path, body=None, headers=(), kind="http"):
        path, _, query = path.partition("?")
        parts = [json.dumps(body).encode() if not isinstance(body, bytes) else body]
        sent = []

        async def receive():
            return {"type": "http.request", "body": parts.pop(), "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {
            "type": kind,
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in dict(headers).items()],
            "app": SimpleNamespace(state=SimpleNamespace(engine_client=self.engine)),
        }
        await self.gateway(scope, receive, send)
        if kind != "http":
            return sent
        return sent[0]["status"], json.loads(sent[1]["body"])

    def file(self, name="a.safetensors", content=b"tensors"):
        (self.folder / name).write_bytes(content)
        return {"version": 3, "file": name, "sha256": hashlib.sha256(content).hexdigest()}


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path)


def ask(served, *args, **options):
    return asyncio.run(served.ask(*args, **options))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/collective_rpc"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/update_weights"),
        ("POST", "/pause"),
        ("POST", "/invocations"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/v1/completions"),
        ("DELETE", "/sdkit/weights"),
        ("GET", "/sdkit/weights"),
        ("POST", "//v1/completions"),
        ("POST", "/v1/completions/"),
    ],
)
def test_only_known_routes_pass(served, method, path):
    assert ask(served, method, path, {})[0] == 404
    assert served.app.paths == []
    assert served.engine.calls == []


def test_websocket_is_closed(served):
    assert [m["type"] for m in ask(served, "GET", "/v1/realtime", kind="websocket")] == ["websocket.close"]
    assert served.app.paths == []


def test_every_route_but_the_health_check_needs_the_key(tmp_path):
    served = Served(tmp_path, key="open sesame")
    routes = [
        ("GET", "/v1/models"),
        ("GET", "/sdkit/state"),
        ("POST", "/sdkit/weights"),
        ("POST", "/v1/completions"),
        ("POST", "/collective_rpc"),
    ]
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "open sesame"}):
        for method, path in routes:
            assert ask(served, method, path, {}, headers)[0] == 401, (path, headers)
    assert ask(served, "GET", "/health")[0] == 200
    right = {"authorization": "Bearer open sesame"}
    assert ask(served, "GET", "/sdkit/state", headers=right)[0] == 200
    assert served.app.paths == ["/health"]


def test_requests_from_web_pages_are_refused(served):
    update = served.file()
    status, answer = ask(served, "POST", "/sdkit/weights", update, {"origin": "http://evil.example"})
    assert (status, served.engine.calls) == (403, [])
    assert "web pages" in answer["error"]["message"]


def test_weights_load_while_generation_is_paused_and_are_stamped(served, tmp_path):
    assert ask(served, "GET", "/sdkit/state")[1]["weights"] is None
    update = served.file()
    status, answer = ask(served, "POST", "/sdkit/weights", update)
    assert status == 200
    assert (answer["version"], answer["sha256"]) == (3, update["sha256"])
    path = str(tmp_path / "a.safetensors")
    assert served.engine.calls == ["pause", ("sync_file", path), "reset", "resume"]
    (tmp_path / "mine.probe").touch()
    state = ask(served, "GET", "/sdkit/state?probe=mine.probe")[1]
    assert state["weights"] == {"version": 3, "sha256": update["sha256"]}
    assert state["sees_probe"]
    assert (state["sdkit"], state["dtype"], state["max_tokens"]) == (__version__, "float32", 99)
    assert state["model"]["vocab_size"] == 404
    assert "secret" not in state["model"]


@pytest.mark.parametrize("probe", ["", "other.probe", "../mine.probe", "a.safetensors", "%2e%2e/x"])
def test_probe_must_be_a_plain_name_in_the_folder(served, tmp_path, probe):
    (tmp_path.parent / "mine.probe").touch()
    served.file()
    assert not ask(served, "GET", f"/sdkit/state?probe={probe}")[1]["sees_probe"]


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        "",
        "a.bin",
        "a.safetensors\n",
        ".hidden.safetensors",
        "a.safetensors/../b.safetensors",
        "absent.safetensors",
        "link.safetensors",
        "folder.safetensors",
        7,
        None,
    ],
)
def test_weight_file_must_be_a_regular_file_in_the_folder(served, tmp_path, name):
    update = served.file()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.safetensors").write_bytes(b"tensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    status, answer = ask(served, "POST", "/sdkit/weights", update | {"file": name})
    assert status == 400, answer
    assert served.engine.calls == []
    assert served.gateway.loaded is None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[", 400),
        (b"7", 400),
        ({"version": 1}, 400),
        ({"version": "1", "file": "a.safetensors", "sha256": "x"}, 400),
        ({"version": 1, "file": "a.safetensors", "sha256": 5}, 400),
        ({"version": 1, "file": "a.safetensors", "sha256": "0" * 64}, 422),
        (b"x" * 5000, 413),
    ],
)
def test_invalid_update_changes_nothing(served, body, status):
    served.file()
    assert ask(served, "POST", "/sdkit/weights", body)[0] == status
    assert served.engine.calls == []


@pytest.mark.parametrize("fault", ["fails", "repacked", "emptied"])
def test_failed_transfer_leaves_no_stamp(served, fault):
    update = served.file()
    assert ask(served, "POST", "/sdkit/weights", update)[0] == 200
    setattr(served.engine, fault, {"fails": True, "repacked": [1, 0], "emptied": False}[fault])
    second_update = served.file("b.safetensors", b"other")
    status, answer = ask(served, "POST", "/sdkit/weights", second_update)
    assert status == 500
    assert "\n" not in answer["error"]["message"]
    assert served.engine.calls[-1] == "resume"
    headers = {WEIGHTS_HEADER: update["sha256"]}
    assert ask(served, "POST", "/v1/completions", {}, headers)[0] == 409


def test_completion_uses_the_weights_that_it_names(served):
    update = served.file()
    headers = {WEIGHTS_HEADER: update["sha256"]}
    status, answer = ask(served, "POST", "/v1/completions", {}, headers)
    assert (status, served.app.paths) == (409, [])
    assert "no weights of a run" in answer["error"]["message"]
    ask(served, "POST", "/sdkit/weights", update)
    assert ask(served, "POST", "/v1/completions", {}, headers)[0] == 200
    for other in ({}, {WEIGHTS_HEADER: ""}, {WEIGHTS_HEADER: "0" * 64}):
        status, answer = ask(served, "POST", "/v1/completions", {}, other)
        assert status == 409
        assert "has weights 3" in answer["error"]["message"]
    assert served.app.paths == ["/v1/completions"]


def test_update_waits_for_running_completions_and_admits_no_new_ones(served):
    async def scene():
        first, second = served.file(), served.file("b.safetensors", b"other")
        await served.ask("POST", "/sdkit/weights", first)
        served.app.release = asyncio.Event()
        old = {WEIGHTS_HEADER: first["sha256"]}
        running = asyncio.create_task(served.ask("POST", "/v1/completions", {}, old))
        await asyncio.sleep(0.01)
        before = len(served.engine.calls)
        update = asyncio.create_task(served.ask("POST", "/sdkit/weights", second))
        while served.gateway.loaded:
            await asyncio.sleep(0.001)
        refused = await served.ask("POST", "/v1/completions", {}, old)
        waited = len(served.engine.calls) == before
        served.app.release.set()
        return (await running)[0], refused[0], waited, (await update)[0]

    assert asyncio.run(asyncio.wait_for(scene(), 10)) == (200, 409, True, 200)


def test_update_waits_only_for_a_limited_time(served, monkeypatch):
    from sdkit.serving import gateway

    monkeypatch.setattr(gateway, "DRAIN_SECONDS", 0.05)

    async def scene():
        first, second = served.file(), served.file("b.safetensors", b"other")
        await served.ask("POST", "/sdkit/weights", first)
        served.app.release = asyncio.Event()
        headers = {WEIGHTS_HEADER: first["sha256"]}
        running = asyncio.create_task(served.ask("POST", "/v1/completions", {}, headers))
        await asyncio.sleep(0.01)
        status, _ = await served.ask("POST", "/sdkit/weights", second)
        served.app.release.set()
        await running
        return (status, served.gateway.loaded, (await served.ask("POST", "/sdkit/weights", second))[0])

    assert asyncio.run(asyncio.wait_for(scene(), 10)) == (503, None, 200)
