"""The client of endpoints against a local server that misbehaves."""

import json
import socket
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from endpoint_server import Reply, says, serving

from fastsae.errors import FastsaeError, UsageError
from fastsae.interpret.judges.client import Client, EndpointOptions, Question

KEY = "sk-secret-1234"
QUESTION = Question("What?", {"word": "x"}, {"type": "object"}, 20)
GOOD = Reply(says('{"word": "yes"}'))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def client(server, **options):
    waited = []
    made = Client("small", server.url, EndpointOptions(**{"timeout": 5.0, **options}), pause=waited.append)
    made.waited = waited
    return made


def ask(asked, n=1):
    return asked.ask([Question(f"What? {i}", *QUESTION[1:]) for i in range(n)], "asking")


@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=429),
        Reply(status=500, body="oops"),
        Reply(status=503),
        Reply(drop=True),
        Reply(says("half an answer"), cut=20),
        Reply("{not json"),
        Reply("[1, 2]"),
        Reply('{"error": {"message": "overloaded"}}'),
        Reply("[" * 10**5),
        Reply(b"\xff\xfe"),
    ],
    ids="429 500 503 dropped half no_json list error_in_200 nested bytes".split(),
)
def test_what_may_work_another_time_is_tried_again(failure):
    with serving(lambda body: GOOD, first=[failure, failure]) as server:
        asked = client(server)
        assert ask(asked) == ['{"word": "yes"}']
    assert len(asked.waited) == 2
    assert 0.5 <= asked.waited[0] <= 1 <= asked.waited[1] <= 2
    assert asked.facts()["calls"] == 3
    assert asked.facts()["tokens"] == 7


@pytest.mark.parametrize("late", [Reply(says("too late"), delay=1.0), Reply(says("drop by drop"), drip=0.02)])
def test_an_answer_that_takes_too_long_is_asked_for_again(late):
    with serving(lambda body: GOOD, first=[late, late]) as server:
        asked = client(server, timeout=0.4, tries=50)  # a busy machine may take that long for a good one too
        assert ask(asked) == ['{"word": "yes"}']
    assert len(asked.waited) >= 2


def test_the_server_says_how_long_to_wait():
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=40), usegmt=True)
    first = [
        Reply(status=429, headers={"Retry-After": "7"}),
        Reply(status=503, headers={"Retry-After": date}),
        Reply(status=429, headers={"Retry-After": "soon"}),
    ]
    with serving(lambda body: GOOD, first) as server:
        asked = client(server)
        ask(asked)
    assert asked.waited[0] == 7
    assert 30 < asked.waited[1] <= 40
    assert asked.waited[2] <= 4


def test_it_gives_up_with_what_the_server_said_and_where_answers_are(tmp_path):
    with serving(lambda body: Reply(status=500, body=f"broken {KEY}")) as server:
        asked = client(server, tries=3, cache=tmp_path)
        with pytest.raises(FastsaeError) as caught:
            ask(asked)
    text = str(caught.value)
    assert all(part in text for part in (server.url, "3 times", "HTTP 500: broken ***", str(tmp_path)))
    assert KEY not in text
    assert len(asked.waited) == 2


def test_it_does_not_wait_for_a_quota_of_tomorrow():
    tomorrow = Reply(status=429, headers={"Retry-After": "86400"})
    with serving(lambda body: tomorrow) as server, pytest.raises(FastsaeError, match="asks to wait 86400 s"):
        ask(client(server))


def test_an_address_where_nothing_answers_is_named_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    waited = []
    with pytest.raises(FastsaeError, match=rf"{url}/chat/completions cannot be reached.*Check the URL"):
        ask(Client("small", url, EndpointOptions(), pause=waited.append))
    with pytest.raises(FastsaeError, match=r"https://nowhere.invalid/chat/completions cannot be reached"):
        ask(Client("small", "https://nowhere.invalid", EndpointOptions(), pause=waited.append))
    assert not waited


@pytest.mark.parametrize("refusal", ["response_format is not supported", "Unknown field: json_schema"])
def test_an_endpoint_without_schemas_is_asked_without(refusal):
    def answer(body):
        return Reply(refusal, status=400) if "response_format" in body else GOOD

    with serving(answer) as server:
        asked = client(server, concurrency=1)
        assert ask(asked, 3) == ['{"word": "yes"}'] * 3
    assert [("response_format" in body) for body in server.bodies] == [True, False, False, False]
    assert asked.facts()["without"] == ["response_format"]
    assert not asked.waited


def test_newer_models_get_the_names_and_fields_that_they_take():
    def answer(body):
        if "max_tokens" in body:
            return Reply("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", status=400)
        if "temperature" in body:
            return Reply("Unsupported value: 'temperature' does not support 0", status=400)
        return GOOD

    with serving(answer) as server:
        ask(client(server))
    assert server.bodies[-1]["max_completion_tokens"] == 20
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens", "response_format"}


@pytest.mark.parametrize(
    "reply",
    [Reply('{"choices": []}'), Reply(says(None)), Reply('{"choices": [{}]}'), Reply('{"choices": [3]}')],
    ids="empty null no_message number".split(),
)
def test_a_reply_without_words_is_no_answer_and_not_kept(reply, tmp_path):
    with serving(lambda body: reply) as server:
        asked = client(server, cache=tmp_path)
        assert ask(asked, 2) == [None, None]
        assert not list(tmp_path.rglob("*.json"))


def test_content_may_come_in_parts():
    parts = says([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}])
    with serving(lambda body: Reply(parts)) as server:
        assert ask(client(server)) == ["ab"]


def test_a_request_refused_for_its_words_does_not_end_the_others():
    def answer(body):
        return Reply("content policy", status=400) if "1" in body["messages"][0]["content"] else GOOD

    with serving(answer) as server:
        assert ask(client(server), 3) == ['{"word": "yes"}', None, '{"word": "yes"}']
        with pytest.raises(FastsaeError, match="refuses every request, the last one with HTTP 400: content policy"):
            client(server).ask([Question("1", *QUESTION[1:])] * 2, "asking")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not take the key in OPENAI_API_KEY"),
        (403, "the key in"),
        (404, "the model 'small'"),
        (402, "account"),
    ],
)
def test_refusals_of_the_key_or_the_model_end_the_run(status, message):
    refusal = Reply(f"no {KEY}", status=status)
    with serving(lambda body: refusal) as server, pytest.raises(FastsaeError, match=message) as caught:
        ask(client(server))
    assert KEY not in str(caught.value)
    assert len(server.bodies) == 1


def test_the_key_does_not_follow_a_redirect():
    with serving() as elsewhere:
        there = Reply(status=302, headers={"Location": elsewhere.url + "/chat/completions"})
        with serving(lambda body: there) as server, pytest.raises(FastsaeError, match=r"HTTP 302.*give the final URL"):
            ask(client(server))
        assert not elsewhere.bodies
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_answers_are_kept_and_the_key_is_not(tmp_path):
    with serving(lambda body: GOOD) as server:
        assert ask(client(server, cache=tmp_path), 4) == ask(again := client(server, cache=tmp_path), 4)
        assert len(server.bodies) == 4
        assert again.facts()["cached"] == 4
        assert again.facts()["calls"] == again.facts()["tokens"] == 0
        files = list(tmp_path.rglob("*.json"))
        assert len(files) == 4
        assert all(KEY not in file.read_text() for file in files)
        files[0].write_text('{"answer": "ye')  # a disk that was full
        assert ask(client(server, cache=tmp_path), 4) == ['{"word": "yes"}'] * 4
        assert len(server.bodies) == 5
        other = Client("large", server.url, EndpointOptions(cache=tmp_path))
        ask(other)
        assert len(server.bodies) == 6


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    def answer(body):
        return Reply(status=500) if "3" in body["messages"][0]["content"] else GOOD

    with serving(answer) as server, pytest.raises(FastsaeError, match="goes on from there"):
        ask(client(server, cache=tmp_path, tries=1, concurrency=1), 6)
    assert len(list(tmp_path.rglob("*.json"))) >= 3


def test_the_budget_ends_the_run_before_it_is_overdrawn(tmp_path):
    with serving(lambda body: Reply(says("yes", tokens=22))) as server:
        asked = client(server, budget=100, cache=tmp_path, concurrency=2)
        with pytest.raises(FastsaeError, match=r"budget of 100 tokens is spent.*goes on from there"):
            ask(asked, 10)
        assert 3 <= len(server.bodies) <= 4
        assert asked.facts()["tokens"] == 22 * len(server.bodies) <= 100
        assert len(list(tmp_path.rglob("*.json"))) == len(server.bodies)


def test_a_dry_run_asks_nothing_and_counts(tmp_path, monkeypatch):
    with serving(lambda body: GOOD) as server:
        ask(client(server, cache=tmp_path), 2)
        monkeypatch.delenv("OPENAI_API_KEY")
        dry = client(server, cache=tmp_path, dry_run=True)
        assert ask(dry, 5) == ['{"word": "yes"}'] * 2 + ['{"word": "x"}'] * 3
        assert len(server.bodies) == 2
    assert dry.facts()["calls"] == 3
    assert dry.facts()["cached"] == 2
    assert dry.facts()["tokens"] == 3 * (20 + len("What? 0") // 3)


def test_no_more_requests_run_side_by_side_than_allowed():
    with serving(lambda body: Reply(says("yes"), delay=0.03)) as server:
        ask(client(server, concurrency=3), 12)
    assert server.most_running == 3


def test_a_failure_ends_requests_that_wait():
    def answer(body):
        return Reply(status=401) if "0" in body["messages"][0]["content"] else Reply(status=500)

    with serving(answer) as server:
        started = time.monotonic()
        with pytest.raises(FastsaeError, match="does not take the key"):
            ask(Client("small", server.url, EndpointOptions(tries=50)), 4)
        assert time.monotonic() - started < 5  # and not the minutes of 50 tries


def test_a_key_is_asked_for_but_on_this_machine(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(FastsaeError, match=r"https://api.example.com/v1/chat/completions needs a key.*OPENAI_API_KEY"):
        Client("small", "https://api.example.com/v1", EndpointOptions())
    with pytest.raises(FastsaeError, match="variable THEIRS is not set"):
        Client("small", "https://api.example.com/v1", EndpointOptions(key_variable="THEIRS"))
    with serving(lambda body: GOOD) as server:
        assert ask(client(server)) == ['{"word": "yes"}']
    assert "Authorization" not in server.headers[0]


def test_a_key_that_cannot_be_one_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk\nsecret")
    with pytest.raises(FastsaeError, match="OPENAI_API_KEY holds characters") as caught:
        Client("small", "https://api.example.com/v1", EndpointOptions())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["ftp://x/v1", "http://", "http://[::1", "http://x:port/v1", "https://u:secret@x/v1", "https://x/v1?k=secret"],
)
def test_a_url_that_is_none_or_tells_secrets_is_refused(url):
    with pytest.raises(UsageError, match="judge: expected a URL"):
        Client("small", url, EndpointOptions())


def test_what_is_sent_is_an_openai_request():
    with serving(lambda body: GOOD) as server:
        ask(client(server))
    (body,) = server.bodies
    assert json.loads(json.dumps(body)) == {
        "model": "small",
        "messages": [{"role": "user", "content": "What? 0"}],
        "temperature": 0,
        "max_tokens": 20,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object"}},
        },
    }
