"""The endpoint verifier against a real HTTP server that fails, stalls and answers garbage."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import sys
import threading
import time

import pytest

from p2r_jax.config import VerifierConfig
from p2r_jax.roles.answers import Answer, grade
from p2r_jax.roles.verifiers import (
    EndpointVerifier,
    judge_prompt,
    make_verifier,
)
from tests.roles.verifying import query, warnings


class Server:
    """A real server of /v1/chat/completions on this machine, which can misbehave.

    `plan` is called with the response that is to be judged and how often it was asked before; it
    returns how to behave: "yes" or any other text, a status, or one of the words in `do_POST`.
    """

    def __init__(self, plan):
        self.plan = plan
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.asked: list[str] = []
        self.connections = set()
        self.most = self.running = 0
        self.lock = threading.Lock()
        self.leave = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.serve(self)

            def log_message(self, *args):
                pass

        class Threads(http.server.ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, request, client_address):
                pass  # a client that has hung up

        self.http = Threads(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self):
        self.leave.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        response = prompt.split("<student>\n")[1].split("\n</student>")[0]
        with self.lock:
            before = self.asked.count(response)
            self.asked.append(response)
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self.behave(handler, self.plan(response, before))
        finally:
            with self.lock:
                self.running -= 1

    def behave(self, handler, how):
        if handler.path != "/v1/chat/completions":
            how = 404
        if how == "reset":
            # Closing with a linger of 0 sends RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.close_connection = True
            handler.connection.close()
        elif how == "hang up":
            handler.close_connection = True
        elif how == "stall":
            self.leave.wait(20)
            handler.close_connection = True
        elif how == "invalid JSON":
            self.reply(handler, 200, b'{"choices": [{"mess')
        elif how == "HTML":
            self.reply(handler, 200, b"<html>yes</html>", "text/html")
        elif how == "wrong schema":
            self.reply(handler, 200, json.dumps({"text": "yes"}).encode())
        elif how == "no choices":
            self.reply(handler, 200, self.completion("yes") | {"choices": []})
        elif how == "no content":
            self.reply(handler, 200, self.completion(None))
        elif isinstance(how, int):
            self.reply(handler, how, {"error": {"message": f"status {how}", "type": "x"}})
        elif isinstance(how, tuple):
            status, headers = how
            self.reply(handler, status, {"error": {"message": "later"}}, headers=headers)
        else:
            self.reply(handler, 200, self.completion(how))

    @staticmethod
    def completion(text):
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": "judge",
            "choices": [choice],
        }  # fmt: skip

    @staticmethod
    def reply(handler, status, body, kind="application/json", headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


KEY = "P2R_TEST_KEY"


@pytest.fixture
def serve(monkeypatch):
    """serve(plan) -> a running server; stopped afterwards."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    servers = []

    def start(plan):
        servers.append(Server(plan))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def endpoint(server, **options):
    defaults = {"api_key_variable": KEY, "timeout_seconds": 20.0, "wait_seconds": 0.0}
    url = server if isinstance(server, str) else server.url
    return EndpointVerifier(url, "judge", **defaults | options)


def honest(response, before):
    return "Yes." if response in ("right", "4") else "no"


def first_fails(times, how):
    return lambda response, before: how if before < times else honest(response, before)


def test_a_server_is_asked_for_one_greedy_word(serve):
    server = serve(honest)
    verifier = endpoint(server)
    assert verifier([query("right"), query("cup")]) == [True, False]
    body = next(b for b in server.bodies if "\nright\n" in b["messages"][0]["content"])
    assert body["messages"] == [{"role": "user", "content": judge_prompt(query("right"))}]
    assert (body["model"], body["temperature"]) == ("judge", 0)
    assert body["max_tokens"] <= 32
    assert not verifier.collective


def test_no_query_is_no_request(serve):
    server = serve(honest)
    assert endpoint(server)([]) == []
    assert server.asked == []


def patience(how):
    """Seconds that are short where the timeout is tested, else long enough for a busy machine."""
    return 0.5 if how == "stall" else 20.0


FLEETING = [
    500, 503, 429, 408, "reset", "hang up", "stall", "invalid JSON", "HTML", "wrong schema",
    "no choices", "no content", "maybe", "", "yes or no",
]  # fmt: skip


@pytest.mark.parametrize("how", FLEETING, ids=str)
def test_a_failure_is_asked_again_until_it_works(serve, how):
    server = serve(first_fails(2, how))
    verifier = endpoint(server, attempts=3, timeout_seconds=patience(how))
    assert verifier([query("right"), query("cup")]) == [True, False]
    assert sorted(server.asked) == ["cup"] * 3 + ["right"] * 3


@pytest.mark.parametrize("how", FLEETING, ids=str)
def test_a_lasting_failure_is_none_after_so_many_attempts(serve, how, caplog):
    """And costs nobody else's judgement: one answer of three goes wrong, in the middle."""
    server = serve(lambda r, before: how if r == "bad" else honest(r, before))
    verifier = endpoint(server, attempts=2, timeout_seconds=patience(how))
    queries = [query("right"), query("bad"), query("cup")]
    assert verifier(queries) == [True, None, False]
    assert sorted(server.asked) == ["bad", "bad", "cup", "right"]
    (warning,) = warnings(caplog)
    assert "'bad' after 2 attempt(s)" in warning


def test_what_failed_is_not_scored_0(serve):
    server = serve(lambda r, before: 500 if r == "bad" else honest(r, before))
    answers = [Answer(r, "red mug", "free_form") for r in ("right", "bad", "cup")]
    assert grade(answers, endpoint(server, attempts=2)) == [1.0, None, 0.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_is_refused_for_good_is_not_asked_again(serve, status, caplog):
    server = serve(lambda response, before: status)
    assert endpoint(server, attempts=3)([query("right"), query("cup")]) == [None, None]
    assert sorted(server.asked) == ["cup", "right"]
    assert len(warnings(caplog)) == 2


def test_nobody_there_is_none(unused_port, caplog):
    verifier = endpoint(f"http://127.0.0.1:{unused_port}/v1", attempts=2)
    assert verifier([query("right"), query("cup")]) == [None, None]
    assert len(warnings(caplog)) == 2


@pytest.fixture
def unused_port(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_stalled_server_costs_the_timeout_not_more(serve):
    server = serve(lambda response, before: "stall")
    begin = time.monotonic()
    assert endpoint(server, attempts=2, timeout_seconds=0.3)([query("right")]) == [None]
    assert 0.5 < time.monotonic() - begin < 5


def test_requests_overlap_up_to_the_limit_and_order_is_kept(serve):
    barrier = threading.Barrier(5, timeout=10)

    def plan(response, before):
        barrier.wait()  # only five at once can pass
        time.sleep(0.02 * (5 - int(response) % 5))
        return "yes" if int(response) % 3 == 0 else "no"

    server = serve(plan)
    verdicts = endpoint(server, concurrency=5)([query(str(i)) for i in range(20)])
    assert verdicts == [i % 3 == 0 for i in range(20)]
    assert server.most == 5


@pytest.mark.parametrize(
    ("header", "waits"),
    [("7", [7.0, 7.0]), ("0", [1.0, 2.0]), ("100000", [60.0, 60.0]), ("soon", [1.0, 2.0])],
)
def test_a_server_may_ask_for_a_longer_pause(serve, monkeypatch, header, waits):
    waited: list[float] = []
    monkeypatch.setattr("p2r_jax.roles.verifiers.time", Clock(waited))
    server = serve(first_fails(2, (429, {"Retry-After": header})))
    assert endpoint(server, wait_seconds=1.0)([query("right")]) == [True]
    assert waited == waits


class Clock:
    def __init__(self, waited):
        self.sleep = waited.append


def test_the_key_is_sent_if_there_is_one(serve, monkeypatch):
    server = serve(honest)
    assert endpoint(server)([query("right")]) == [True]
    monkeypatch.setenv(KEY, "secret")
    assert endpoint(server)([query("right")]) == [True]
    assert server.keys[1] == "Bearer secret"
    assert "secret" not in (server.keys[0] or "")


def test_check_is_content_with_a_server_that_judges(serve):
    server = serve(first_fails(1, 503))
    endpoint(server).check()
    assert server.asked == ["4", "4"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (401, f"refuses the key.*{KEY}.*is not set.*status 401"),
        (403, f"refuses the key.*{KEY}"),
        (404, "does not know verifier.model 'judge'.*status 404"),
        (400, "judged nothing.*status 400"),
        (500, "judged nothing.*status 500"),
        ("stall", r"no reply within verifier\.timeout_seconds = 0\.5"),
        ("reset", "cannot be reached"),
        ("maybe so", "neither yes nor no but 'maybe so'"),
        ("<think>Let me see", "neither yes nor no"),
        ("no content", "neither yes nor no but None"),
        ("invalid JSON", "judged nothing"),
        ("HTML", "no chat completion but '<html>yes</html>'"),
        ("wrong schema", "no chat completion"),
        ("no", "says that '4' is not 'four'"),
    ],
    ids=str,
)
def test_check_names_the_setting_and_the_reason(serve, how, reason):
    server = serve(lambda response, before: how)
    with pytest.raises(ValueError, match=rf"verifier\.base_url {server.url}.*{reason}"):
        endpoint(server, attempts=2, timeout_seconds=patience(how)).check()


def test_check_tells_a_wrong_key_from_none(serve, monkeypatch):
    monkeypatch.setenv(KEY, "wrong")
    with pytest.raises(ValueError, match=f"{KEY}.*is refused"):
        endpoint(serve(lambda response, before: 401)).check()


def test_check_finds_no_server(unused_port):
    with pytest.raises(ValueError, match=r"verifier\.base_url .*cannot be reached.*refused"):
        endpoint(f"http://127.0.0.1:{unused_port}/v1").check()


@pytest.mark.parametrize("url", ["127.0.0.1:80/v1", "nonsense", "http://127.0.0.1:notaport/v1"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(ValueError, match=r"verifier\.base_url"):
        endpoint(url).check()


def test_a_wrong_path_is_named(serve):
    server = serve(honest)
    with pytest.raises(ValueError, match=r"verifier\.base_url .*no /v1 address"):
        endpoint(server.url.removesuffix("/v1")).check()


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'p2r_jax\[verifier\]'"):
        endpoint("http://127.0.0.1:1/v1")


def test_settings_reach_the_endpoint(serve, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    server = serve(honest)
    config = VerifierConfig(
        "endpoint",
        base_url=server.url,
        model="other",
        api_key_variable=KEY,
        timeout_seconds=7.0,
        attempts=5,
        concurrency=2,
    )
    verifier = make_verifier(config)
    assert isinstance(verifier, EndpointVerifier)
    assert verifier([query("right")]) == [True]
    assert (server.keys, server.bodies[0]["model"]) == (["Bearer secret"], "other")
    assert (verifier.attempts, verifier.concurrency) == (5, 2)
    assert (verifier.client.timeout, verifier.client.max_retries) == (7.0, 0)
