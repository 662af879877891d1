"""Rewards that are a service behind a URL: what is sent, what may come back, and how it is named when it fails."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from rayft.pipe import WireError
from rayft.wire import Http


class Service(ThreadingHTTPServer):
    """A real server: what it does is a list of functions of (handler, question), the last one for ever."""

    daemon_threads = True

    def __init__(self, *acts: Callable[[Any, Any], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.acts, self.asked, self.headers, self.sockets = list(acts), [], [], set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/score"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(question)
        self.server.headers.append(dict(self.headers))
        self.server.sockets.add(self.client_address)
        acts = self.server.acts
        (acts.pop(0) if len(acts) > 1 else acts[0])(self, question)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def send(handler: Any, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def lengths(handler: Any, question: Any) -> None:
    scores = [None if s == "" else len(s) for s in question["samples"]]
    send(handler, json.dumps({"scores": scores, "info": {"one": [1] * len(scores)}}).encode())


def says(body: bytes, status: int = 200, **more: Any) -> Callable[[Any, Any], None]:
    return lambda handler, question: send(handler, body, status, **more)


def hangs_up(handler: Any, question: Any) -> None:
    handler.close_connection = True


def half(handler: Any, question: Any) -> None:
    send(handler, b'{"scores": [1', length=100)
    handler.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def started(*acts: Callable[[Any, Any], None]) -> Service:
        made.append(Service(*acts))
        return made[-1]

    yield started
    for service in made:
        service.shutdown()
        service.server_close()


def test_a_service_is_posted_samples_and_conditions_and_answers_scores_and_numbers_to_log(serve):
    service = serve(lengths)
    score = Http(service.url, headers={"X-Team": "chem"})
    assert score(["ab", ""], [{"t": np.int64(3)}, {}]) == ([2, None], {"one": [1, 1]})
    assert service.asked == [{"samples": ["ab", ""], "conditions": [{"t": 3}, {}]}]
    assert service.headers[0]["X-Team"] == "chem"
    assert service.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in service.headers[0]


def test_the_connection_is_kept(serve):
    service = serve(lengths)
    score = Http(service.url)
    assert [score([text])[0] for text in ("a", "bc", "def")] == [[1], [2], [3]]
    assert len(service.sockets) == 1


def test_a_kept_connection_that_the_service_closed_costs_no_attempt(serve):
    service = serve(lengths, hangs_up, lengths)
    score = Http(service.url, retries=0)
    assert score(["a"])[0] == [1]
    assert score(["bc"])[0] == [2]
    assert len(service.sockets) == 2


@pytest.mark.parametrize("first", [says(b"busy", 500), says(b"", 503), hangs_up], ids=["500", "503", "hang up"])
def test_a_service_out_of_order_is_asked_again(serve, first):
    service = serve(first, lengths)
    assert Http(service.url)(["abc"])[0] == [3]
    assert len(service.asked) == 2


@pytest.mark.parametrize(
    ("act", "said", "attempts"),
    [
        (says(b"out of order", 500), r"answered with status 500 .*\(2 attempts\): 'out of order'", 2),
        (hangs_up, r"gave no answer: RemoteDisconnected.*\(2 attempts\)", 2),
        (says(b'{"detail": "no such field"}', 422), "status 422 .*no such field", 1),
        (says(b"no", 404), "status 404 Not Found: 'no'", 1),
        (half, r"half an answer with status 200: '\{\"scores\": \[1'", 1),
        (says(b'{"scores": [1'), r"answered what is not JSON: '\{\"scores\": \[1'", 1),
        (says(b"<html>hello</html>"), "answered what is not JSON: '<html>hello", 1),
        (says(b""), r"answered what is not JSON: '\(nothing\)'", 1),
        (says(b"", 204), "answered what is not JSON", 1),
        (says(b"[0.5]"), r"answered what is no JSON object: '\[0.5\]'", 1),
        (says(b'{"score": [1]}'), "answered without a list of scores: .*score", 1),
        (says(b'{"scores": [1, 2]}'), "answered 2 scores for 1 samples", 1),
        (
            says(b"", 302, Location="http://elsewhere.example/"),
            "302 Found and redirects to http://elsewhere.example/",
            1,
        ),
        (says(b"", 307, Location="/score/"), "307 .* redirects to /score/, which is not followed: give that as url", 1),
    ],
)
def test_a_service_that_gives_no_answer_is_named_with_what_it_said(serve, act, said, attempts):
    service = serve(act)
    score = Http(service.url, retries=1, timeout=2)
    with pytest.raises(WireError, match=said) as error:
        score(["a"])
    assert str(error.value).startswith(service.url)
    assert len(service.asked) == attempts
    service.acts[:] = [lengths]
    assert score(["ab"])[0] == [2]


def test_half_an_answer_in_chunks_is_half_an_answer(serve):
    def chunk(handler: Any, question: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b'5\r\n{"sco\r\n')
        handler.close_connection = True

    with pytest.raises(WireError, match="half an answer with status 200"):
        Http(serve(chunk).url)(["a"])


@pytest.mark.parametrize("drips", [False, True])
def test_a_service_that_never_finishes_is_given_up_after_its_time(serve, drips):
    def slow(handler: Any, question: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" if drips else b"")
        for _ in range(40):
            time.sleep(0.05)
            handler.wfile.write(b"X-More: 1\r\n" if drips else b"")

    service = serve(slow)
    start = time.monotonic()
    with pytest.raises(WireError, match=r"score gave no whole answer within 0\.4 s"):
        Http(service.url, timeout=0.4)(["a"])
    assert time.monotonic() - start < 1.8
    assert len(service.asked) == 1


def test_a_service_that_does_not_listen_is_named():
    with pytest.raises(WireError, match=r"http://127\.0\.0\.1:9/ gave no answer: ConnectionRefused.*\(1 attempts\)"):
        Http("http://127.0.0.1:9", retries=0)(["a"])


@pytest.mark.parametrize(
    ("asked", "timeout", "least", "most"), [("1", 1.5, 1.0, 2.5), ("3600", 0.5, 0.5, 2.0), ("soon", 1.5, 0.15, 1.4)]
)
def test_too_many_requests_wait_as_long_as_asked_within_bounds(serve, asked, timeout, least, most):
    service = serve(says(b"slow down", 429, Retry_After=asked), lengths)
    start = time.monotonic()
    assert Http(service.url, timeout=timeout)(["abc"])[0] == [3]
    assert least <= time.monotonic() - start <= most


def test_the_token_is_sent_and_never_shown(serve, monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "s3cret-s3cret\n")

    def blabs(handler: Any, question: Any) -> None:
        send(handler, handler.headers["Authorization"].encode(), 401, Location="/?t=s3cret-s3cret")

    service = serve(blabs)
    score = Http(service.url + "?key=hidden", token_env="SCORER_TOKEN")
    with pytest.raises(WireError, match=r"/score answered with status 401 Unauthorized: 'Bearer \*\*\*'") as error:
        score(["a"])
    assert service.headers[0]["Authorization"] == "Bearer s3cret-s3cret"
    assert "hidden" not in str(error.value)
    assert b"s3cret" not in pickle.dumps(score)
    monkeypatch.setenv("SCORER_TOKEN", "two\nlines")
    with pytest.raises(ValueError, match="'Authorization' has characters") as error:
        Http(service.url, token_env="SCORER_TOKEN")
    assert "two" not in str(error.value)


def test_proxies_of_the_environment_are_not_used(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Http(serve(lengths).url)(["ab"])[0] == [2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"url": "ftp://host/"}, "url is 'ftp://host/'; it should start with http"),
        ({"url": "host:80/score"}, "should start with http:// or https://"),
        ({"url": "http://"}, "and a host"),
        ({"url": "http://host:port"}, "url is not an address"),
        ({"url": "http://me:hush@host"}, "url holds a user or password"),
        ({"url": "http://host", "timeout": 0}, "timeout is 0; it should be a number, 0.01 or more"),
        ({"url": "http://host", "retries": -1}, "retries is -1; it should be a whole number, 0 or more"),
        ({"url": "http://host", "token_env": "NO_SUCH_TOKEN"}, "the environment has no 'NO_SUCH_TOKEN'"),
        ({"url": "http://host", "headers": {"X": "a\r\nb"}}, "the header 'X' has characters"),
    ],
)
def test_what_is_no_service_is_refused_when_the_reward_is_made(arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        Http(**arguments)
    assert "hush" not in str(error.value)


def test_a_pickled_reward_makes_a_connection_of_its_own(serve):
    score = Http(serve(lengths).url)
    assert score(["a"])[0] == [1]
    assert pickle.loads(pickle.dumps(score))(["ab"])[0] == [2]


def test_the_wire_needs_neither_torch_nor_ray():
    code = "import sys, rayft.wire; print(*({'torch', 'ray', 'pydantic', 'requests'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
