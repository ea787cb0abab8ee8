"""The HTTP client against a scripted server: order, concurrency, retries, deadlines, one-line errors."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler

import pytest

from sdkit.serving import client as vllm_http
from sdkit.serving.client import RequestFailed, Server, all_or_none
from sdkit.serving.tiny_server import LoopbackServer


class Scripted:
    """A server that answers with `script(request number, body)`: (status, body), or None to drop the connection."""

    def __init__(self, script):
        self.requests, self.headers = [], []
        self.in_flight = self.most_in_flight = self.connections = 0
        self.gone = False
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                with outer.lock:
                    outer.connections += 1

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "0")
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                answer = None if outer.gone else script(number, body)
                with outer.lock:
                    outer.in_flight -= 1
                if answer is None:
                    self.close_connection = True
                    return
                status, answer_body = answer
                data = answer_body if isinstance(answer_body, bytes) else json.dumps(answer_body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = LoopbackServer(Handler)
        self.url = self.http.url
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.gone = True  # drops the open connections
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch):
    """Starts a scripted server and a client of it."""
    monkeypatch.setattr(vllm_http, "FIRST_RETRY_DELAY", 0.01)
    opened = []

    def start(script, **settings):
        scripted = Scripted(script)
        limits = {"max_concurrent": 4, "request_seconds": 5.0, "deadline_seconds": 10.0, "retries": 3}
        client = Server(scripted.url + "/", **(limits | settings))
        opened.extend((client, scripted))
        return scripted, client

    yield start
    for each in opened:
        each.close()


def echo(number, body):
    time.sleep(0.02 * (body % 3))  # later requests are answered first
    return 200, {"echo": body}


def test_answers_keep_their_order_within_the_concurrency_limit(serve):
    scripted, client = serve(echo)
    for _ in range(2):
        assert [a["echo"] for a in client.post("/x", range(20))] == list(range(20))
    assert 1 < scripted.most_in_flight <= 4
    assert scripted.connections <= 4  # reused by the second call


def test_calls_at_the_same_time_share_the_limit(serve):
    scripted, client = serve(echo)

    async def call_often():
        return await all_or_none(client.request_all("/x", [i, i]) for i in range(8))

    answers = client._runner.run(call_often())
    assert [[a["echo"] for a in pair] for pair in answers] == [[i, i] for i in range(8)]
    assert 1 < scripted.most_in_flight <= 4


def test_each_answer_is_progress_but_no_retry(serve):
    _, client = serve(lambda n, _: (503, {}) if n < 2 else (200, {}))
    done = []
    client._runner.run(client.request_all("/x", range(3), advance=done.append))
    assert done == [1, 1, 1]


def test_no_requests_give_no_answers(serve):
    assert serve(echo)[1].post("/x", []) == []


@pytest.mark.parametrize("bad", [(503, {}), (429, {}), (500, {}), None], ids=str)
def test_temporary_failure_is_retried(serve, bad):
    scripted, client = serve(lambda n, _: bad if n < 3 else (200, {"n": n}))
    assert client.get("/x") == {"n": 3}
    assert len(scripted.requests) == 4


def test_number_of_retries_is_limited(serve):
    scripted, client = serve(lambda *_: (503, {"error": {"message": "still\nloading"}}))
    with pytest.raises(RequestFailed) as caught:
        client.get("/x")
    assert len(scripted.requests) == 4
    start = f"{client.url}/x answered 503: still loading (4 attempts in "
    assert str(caught.value).startswith(start)
    with pytest.raises(RequestFailed, match=r"answered 503: still loading$"):
        client.get("/x", retries=0)
    assert len(scripted.requests) == 5


def test_refusal_is_final_and_cancels_the_other_requests(serve):
    def refuse(number, body):
        if body == 0:
            return 400, {"error": {"message": "too long"}}
        time.sleep(0.2)
        return 200, {}

    scripted, client = serve(refuse)
    started = time.monotonic()
    with pytest.raises(RequestFailed, match="answered 400: too long") as caught:
        client.post("/x", range(40))
    assert caught.value.status == 400
    assert time.monotonic() - started < 2  # all 40 would take 2 s
    assert len(scripted.requests) <= 8


def test_requests_and_all_their_attempts_have_deadlines(serve):
    released = threading.Event()
    scripted, client = serve(
        lambda *_: (released.wait(20), (200, {}))[1], request_seconds=0.2, deadline_seconds=0.5, retries=50
    )
    started = time.monotonic()
    with pytest.raises(RequestFailed, match=r"did not answer within 0\.\d+ s \(\d attempts"):
        client.get("/x")
    assert 0.3 < time.monotonic() - started < 3
    assert 2 <= len(scripted.requests) <= 4
    released.set()


def test_unreachable_server_is_reported(serve):
    scripted, client = serve(echo)
    assert client.post("/x", [3]) == [{"echo": 3}]
    scripted.close()
    with pytest.raises(RequestFailed, match=r"cannot be reached: .*\(4 attempts") as caught:
        client.post("/x", [3, 4])
    assert caught.value.hint == "start the server, or correct its url"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"<html>"), "answered no JSON: is it a vLLM server?"),
        ((404, {"detail": "Not Found"}), "answered 404: Not Found"),
        ((302, b""), "answered 302"),  # redirects are not followed
        ((400, b"[1]"), r"answered 400: \[1\]"),
        ((403, {"error": "no"}), "answered 403: no"),
    ],
    ids=str,
)
def test_server_errors_are_reported_in_one_line(serve, answer, message):
    scripted, client = serve(lambda *_: answer)
    with pytest.raises(RequestFailed, match=message) as caught:
        client.get("/x")
    assert "\n" not in str(caught.value)
    assert len(scripted.requests) == 1
    assert ("key_from" in (caught.value.hint or "")) == (answer[0] == 403)


def test_key_is_sent_and_proxies_are_ignored_for_loopback(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    scripted, client = serve(lambda *_: (200, {}), key="open sesame")
    client.get("/x")
    assert scripted.headers[0]["authorization"] == "Bearer open sesame"


@pytest.mark.parametrize(
    ("error", "is_printed"), [(BrokenPipeError(), False), (KeyError("a mistake"), True)], ids=repr
)
def test_test_server_prints_only_its_own_errors(capfd, error, is_printed):
    class Handler(BaseHTTPRequestHandler):
        def handle(self):
            raise error

    server = LoopbackServer(Handler)
    server.daemon_threads = False  # so that closing waits for them
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    socket.create_connection(server.server_address).close()
    thread.join(10)
    server.server_close()
    assert ("a mistake" in capfd.readouterr().err) == is_printed
