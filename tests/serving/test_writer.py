"""The client of a writer: what it asks, what it makes of answers, and how it fails about one rollout alone."""

import time

import pytest

from sdkit.language.errors import BadEnvironment
from sdkit.language.specs import Writer
from sdkit.serving import client
from sdkit.serving.tiny_server import ScriptedWriter
from sdkit.serving.writer import Answer, WriterClient


@pytest.fixture
def ask(monkeypatch):
    """Returns a client's answers to questions whose answers `script` gives, and the server."""
    monkeypatch.setattr(client, "FIRST_RETRY_DELAY", 0.01)
    opened = []

    def run(script, questions, fault=lambda text: None, **settings):
        server = ScriptedWriter("m", script)
        writer = WriterClient(Writer(url=server.url, model="m", prompt="{trajectory}", **settings), {})
        opened.extend((writer, server))
        return writer.ask(questions, fault), server

    yield run
    for each in opened:
        each.close()


def last(messages):
    return messages[-1]["content"]


def test_answers_keep_the_order_of_the_questions(ask):
    def slowly(messages):
        time.sleep(0.1 * (last(messages) == "a"))
        return last(messages).upper()

    answers, _ = ask(slowly, [("a", 1), ("b", 2), ("c", 3)], requests_at_once=2)
    assert answers == [Answer(text="A"), Answer(text="B"), Answer(text="C")]


def test_request_is_a_chat_with_a_seed(ask):
    requests = []
    server = ScriptedWriter("m", lambda messages: "x")

    def reply(*request):
        requests.append(request)
        return server.answer(*request)

    server.reply = reply
    writer = WriterClient(
        Writer(url=server.url, model="m", prompt="{trajectory}", temperature=0.0, max_new_tokens=9), {}
    )
    assert writer.ask([("Q", 7)], lambda text: None) == [Answer(text="x")]
    writer.close()
    server.close()
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Q"}],
        "temperature": 0.0,
        "max_completion_tokens": 9,
        "seed": 7,
    }
    assert requests == [("/v1/chat/completions", body)]


def test_unusable_answer_is_asked_for_again_in_the_same_chat(ask):
    def second_time(messages):
        return "good" if len(messages) == 3 else "bad"

    def fault(text):
        return None if text == "good" else "it is bad"

    answers, server = ask(second_time, [("Q", 0)], fault)
    assert answers == [Answer(text="good")]
    assert [message["content"] for message in server.chats[1]] == [
        "Q",
        "bad",
        "This answer cannot be used: it is bad. Answer again, with nothing else.",
    ]
    answers, server = ask(second_time, [("Q", 0)], fault, attempts=1)
    assert answers == [Answer(text="", fault="it is bad")]
    assert len(server.chats) == 1


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        ((400, {"error": {"message": "too long"}}), "/v1/chat/completions answered 400: too long"),
        ((503, {"error": {"message": "busy"}}), "/v1/chat/completions answered 503: busy (2 attempts in 0 s)"),
        ((200, {"choices": []}), "the server answered without a message"),
        ((200, {"choices": [{"message": {"content": [1]}}]}), "the server answered without a message"),
    ],
)
def test_failure_about_one_question_leaves_the_others(ask, response, fault):
    server = ScriptedWriter("m", lambda messages: "fine")
    server.reply = lambda path, body: response if last(body["messages"]) == "b" else server.answer(path, body)
    writer = WriterClient(Writer(url=server.url, model="m", prompt="{trajectory}", retries=1), {})
    answers = writer.ask([("a", 0), ("b", 1), ("c", 2)], lambda text: None)
    writer.close()
    server.close()
    assert [answer.text for answer in answers] == ["fine", "", "fine"]
    assert answers[1].fault.removeprefix(server.url) == fault


def test_refusal_without_a_text_and_half_characters(ask):
    assert ask(lambda messages: None, [("Q", 0)])[0] == [Answer(text="")]
    assert ask(lambda messages: "\ud800!", [("Q", 0)])[0] == [Answer(text="?!")]


def test_late_answers_have_failed(ask):
    def never(messages):
        time.sleep(0.5 * (last(messages) != "quick"))
        return "x"

    started = time.monotonic()
    answers, _ = ask(never, [("quick", 0), ("a", 1), ("b", 2), ("c", 3)], requests_at_once=1, deadline_seconds=0.3)
    assert time.monotonic() - started < 1.5
    assert [answer.text for answer in answers] == ["x", "", "", ""]
    assert answers[1].fault.partition("did not answer within")[2]
    assert answers[2].fault == answers[3].fault == "late: 0.3 s were over"


def test_server_is_checked_before_training():
    server = ScriptedWriter("other", lambda messages: "x")
    writer = WriterClient(Writer(url=server.url, model="m", prompt="{trajectory}"), {})
    with pytest.raises(BadEnvironment, match="serves 'other', not 'm'"):
        writer.check()
    server.reply = lambda path, body: (200, [])
    with pytest.raises(BadEnvironment, match="lists no models"):
        writer.check()
    server.close()
    with pytest.raises(BadEnvironment, match="cannot be reached"):
        writer.check()
    writer.close()
    with pytest.raises(BadEnvironment, match="the environment has no WRITER_KEY"):
        WriterClient(Writer(url=server.url, model="m", prompt="{trajectory}", key_from="WRITER_KEY"), {})
