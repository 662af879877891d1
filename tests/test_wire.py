"""Rewards over a wire: what is sent, what may come back, and what is left when the other side misbehaves."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.pipe import CHATTER, WireError
from rayft.reward import arity, build, check, identity
from rayft.wire import Command, Http

LOOP = """
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    number, samples = question["id"], question["samples"]
    answer = {"id": number, "scores": [len(s) for s in samples]}
    BODY
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Command]:
    """A Python program that scores a text by its length, with some lines of its own before it answers."""

    def made(body: str = "pass", **arguments: Any) -> Command:
        path = tmp_path / "score.py"
        path.write_text(LOOP.replace("BODY", body.replace("\n", "\n    ")))
        return Command([sys.executable, str(path)], **arguments)

    return made


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition: Callable[[], bool], seconds: float = 8) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


# -- commands


def test_a_program_is_told_samples_and_conditions_and_answers_scores_and_numbers_to_log(program):
    body = """answer["scores"] = [c.get("by", 1) * len(s) for s, c in zip(samples, question["conditions"])]
answer["info"] = {"vowels": [sum(map(s.count, "aeiou")) for s in samples]}"""
    score = program(body)
    assert score(["ab", "aei"], [{"by": 2}, {"by": np.float32(0.5)}]) == ([4, 1.5], {"vowels": [1, 3]})
    assert score(["ab"]) == ([2], {"vowels": [1]})
    assert score([]) == ([], {"vowels": []})


def test_one_program_answers_every_call(program):
    score = program("answer['scores'] = [os.getpid() for s in samples]")
    assert score(["a"])[0] == score(["b", "c"])[0][:1] == [score.program.process.pid]


def test_null_stays_a_failure_and_is_never_zero(program):
    score = program("answer['scores'] = [None if s == '' else float('nan') for s in samples]")
    failed, not_a_number = score(["", "a"])[0]
    assert failed is None
    assert math.isnan(not_a_number)


def test_arrays_travel_as_lists(program):
    score = program("answer['scores'] = [sum(map(sum, s)) for s in samples]")
    assert score([np.array([[1.0, 2.0], [3.0, 4.5]]), np.eye(2, dtype=np.int8)])[0] == [10.5, 2]


def test_a_sample_that_is_not_plain_data_needs_a_canonical_form(program):
    with pytest.raises(TypeError, match=r"type PosixPath has no canonical form.*`canonical: package\.module:function`"):
        program()([Path("abcd")])
    assert program(canonical="os:fspath")([Path("abcd")])[0] == [4]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_json_cannot_carry_is_an_error_and_the_program_runs_on(program, bad):
    score = program()
    pid = score.program.process.pid
    with pytest.raises(ValueError, match="not finite, which JSON cannot carry"):
        score([[1.0, bad]])
    assert score([[1.0, 2.0]])[0] == [2]
    assert score.program.process.pid == pid


def test_text_of_any_kind_stays_on_its_line(program):
    score = program("answer['scores'] = [[ord(c) for c in s][0] for s in samples]")
    assert score(["\n", "\u2028", "\x00", "é", "𝄞"])[0] == [10, 0x2028, 0, 233, 0x1D11E]


def test_a_question_and_an_answer_larger_than_any_pipe_pass(program):
    score = program(
        "print('x' * 300_000)\nanswer['scores'] = [len(s) for s in samples] * 1\nanswer['info'] = {'n': 'y' * 300_000}"
    )
    assert score(["ab" * 500_000, "c"])[0] == [1_000_000, 1]


def test_a_chatty_program_is_understood(program):
    body = """print('loading'); print('[1, 2]'); print(); print('0.5'); print(json.dumps({'level': 'info'}))
os.write(1, b'no utf-8: \\xe9\\n')"""
    assert program(body)(["abc"])[0] == [3]


def test_a_program_that_writes_a_megabyte_to_stderr_is_not_blocked(program):
    score = program("sys.stderr.write('e' * 2**20)")
    assert [score(["abc"])[0] for _ in range(3)] == [[3]] * 3


def test_only_so_much_chatter_is_skipped(program):
    score = program(f"if samples: print('tick\\n' * {CHATTER + 1})")
    with pytest.raises(WireError, match=f"printed {CHATTER} lines that are no answer, the first: 'tick'"):
        score(["a"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit(3)", "ended with exit code 3; nothing on its stderr"),
        ("raise KeyError('no atom')", "ended with exit code 1; its stderr: .*KeyError: 'no atom'"),
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ('os.write(1, b\'{"id": 1, "sco\'); os._exit(0)', 'ended with exit code 0.*printed: \'{"id": 1, "sco\''),
        ("os.close(1); time.sleep(30)", "closed its pipe and ran on"),
        ("print('{\"id\": 1,, }')", "is not JSON: '{\"id\": 1,, }'"),
        ("print(answer)", "is not JSON: \"{'id': 2, 'scores'"),
        ("answer['id'] = 7", r"answered id 7 when asked 2: '\{\"id\": 7, \"scores\": \[1\]\}'"),
        ("del answer['id']", "answered id None when asked 2"),
        ("answer['scores'].append(1)", r"answered 2 scores for 1 samples: '.*\[1, 1\]"),
        ("answer['scores'] = 0.5", "answered without a list of scores: '.*0.5"),
        ("answer['scores'] = None", "answered without a list of scores"),
        ("answer['info'] = [1]", "an info that is no object"),
    ],
)
def test_what_is_no_answer_is_quoted_and_the_next_question_is_answered(program, body, said):
    score = program(f"if samples == ['a']:\n    {body}")
    with pytest.raises(WireError, match=said):
        score(["a"])
    assert score(["abc", "de"])[0] == [3, 2]


def test_an_answer_that_comes_twice_never_counts_for_the_next_question(program):
    score = program("if samples == ['a']: print(json.dumps(answer))")
    assert score(["a"])[0] == [1]
    with pytest.raises(WireError, match="answered id 2 when asked 3"):
        score(["abc"])
    assert score(["abc"])[0] == [3]


def test_the_sample_that_killed_the_program_pays_for_its_new_start(program):
    score = program("if not samples: time.sleep(1.0)\nif samples == ['a']: os._exit(1)")
    start = time.monotonic()
    with pytest.raises(WireError, match="exit code 1"):
        score(["a"])
    assert time.monotonic() - start >= 1.0
    start = time.monotonic()
    assert score(["abc"])[0] == [3]
    assert time.monotonic() - start < 0.9


def test_a_program_that_cannot_start_again_says_so_and_is_tried_once_more_later(program, tmp_path):
    score = program(f"if os.path.exists({str(tmp_path / 'off')!r}): os._exit(9)")
    (tmp_path / "off").touch()
    with pytest.raises(WireError, match=r"exit code 9.*and then it did not start again: .*asked about no samples"):
        score(["a"])
    with pytest.raises(WireError, match="asked about no samples"):
        score(["a"])
    (tmp_path / "off").unlink()
    assert score(["abc"])[0] == [3]


def test_an_interrupted_question_leaves_no_answer_for_the_next(program):
    score = program("if samples == ['a']: time.sleep(1.0)")
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        score(["a"])
    assert score(["abc"])[0] == [3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"run": "no-such-program --x"}, "run: the program 'no-such-program' is not there"),
        ({"run": ["./gone.sh"]}, r"run: the program '\./gone\.sh' is not there"),
        ({"run": ["FILE"]}, r"is not executable: chmod \+x it"),
        ({"run": []}, r"run is \[\]; it should be a program"),
        ({"run": 3}, "run is 3; it should be a program"),
        ({"run": "sh", "cwd": "/no/such"}, "cwd is '/no/such', which is no folder"),
        ({"run": "sh", "batch_size": 0}, "batch_size is 0; it should be a whole number, 1 or more"),
        ({"run": "sh", "batch_size": 1.5}, "batch_size is 1.5; it should be a whole number"),
        ({"run": "sh", "start_timeout": True}, "start_timeout is True; it should be a number"),
        ({"run": "sh", "undecodable": math.nan}, "undecodable is nan; it should be a number"),
        ({"run": "sh", "canonical": "math:pi"}, "canonical: math:pi is float, not a function"),
        ({"run": "sh -c 'echo hm >&2; exit 4'"}, r"exit code 4; its stderr: hm.* asked about no samples.*no scores"),
        ({"run": "sh -c 'echo 0.5; exec sleep 9'", "start_timeout": 0.3}, "within 0.3 s; does it flush.*: '0.5'"),
        ({"run": ["sh", "-c", 'read x; echo \'{"id": 1, "scores": [1]}\'']}, "answered 1 scores for 0 samples"),
    ],
)
def test_what_cannot_start_is_refused_when_the_reward_is_made(arguments, said, tmp_path):
    (tmp_path / "file").write_text("")
    if arguments["run"] == ["FILE"]:
        arguments = {"run": [str(tmp_path / "file")]}
    with pytest.raises(ValueError, match=said):
        Command(**arguments)


def test_a_script_without_an_interpreter_line_is_refused_when_the_reward_is_made(tmp_path):
    (tmp_path / "score").write_text("print(1)")
    (tmp_path / "score").chmod(0o755)
    with pytest.raises(ValueError, match=r"cannot be started.*Exec format error"):
        Command([str(tmp_path / "score")])


def test_the_program_gets_its_folder_its_environment_and_spaces_in_its_path(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    text = LOOP.replace("BODY", "answer['info'] = {'at': os.getcwd(), 'is': os.environ['IS']}")
    (folder / "score.py").write_text(f"#!{sys.executable}\n{text}")
    (folder / "score.py").chmod(0o755)
    for run in (str(folder / "score.py"), "./score.py", [str(folder / "score.py")], ["python", "score.py"]):
        score = Command(run, cwd=str(folder), env={"IS": 1})
        assert score(["ab"]) == ([2], {"at": str(folder), "is": "1"})


def test_a_dropped_reward_ends_its_program_and_what_that_started(program):
    body = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nanswer['scores'] = [child.pid for s in samples]"
    )
    score = program(body)
    children, pid = [score.program.process.pid, *score(["a"])[0]], score.program.process.pid
    assert all(map(lives, children))
    del score
    gc.collect()
    assert not lives(pid)
    assert soon(lambda: not any(map(lives, children)))


def test_a_program_in_an_endless_loop_does_not_outlive_a_killed_process(program, tmp_path):
    path = program("while samples: pass").argv[1]
    code = f"from rayft.wire import Command; c = Command({[sys.executable, path]!r})\n"
    code += "print(c.program.process.pid, flush=True); c(['a'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert lives(pid)
        owner.kill()
    assert soon(lambda: not lives(pid))


def test_an_ordinary_end_of_the_process_ends_the_program(program):
    path = program().argv[1]
    code = f"from rayft.wire import Command; c = Command({[sys.executable, path]!r}); print(c.program.process.pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert not lives(pid)


def test_a_fork_of_the_process_leaves_the_program_alone(program):
    score = program()
    if (child := os.fork()) == 0:
        score.program.end()
        os._exit(0)
    os.waitpid(child, 0)
    assert score(["abc"])[0] == [3]


def test_a_pickled_reward_starts_a_program_of_its_own(program):
    score = program()
    again = pickle.loads(pickle.dumps(score))
    assert again(["abc"])[0] == score(["abc"])[0] == [3]
    assert again.program.process.pid != score.program.process.pid


def test_it_is_a_reward_of_two_arguments_with_the_version_in_its_cache_key(program):
    score = program(batch_size=8, undecodable=-1, version="2", groupwise=True)
    assert (score.batch_size, score.undecodable, score.version, score.groupwise) == (8, -1.0, "2", True)
    assert arity(score) == arity(Http("http://localhost")) == 2
    check("command", {"run": "x"})
    check("http", {"url": "x"})
    keys = {identity("command", {"run": "x", **more}) for more in ({}, {"version": "1"}, {"version": "2"})}
    assert len(keys) == 3
    with pytest.raises(ValueError, match=r"takes no 'ulr' \(did you mean 'url'\?\)"):
        build("http", {"ulr": "x"})


# -- services


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


@pytest.mark.parametrize(("asked", "least", "most"), [("1", 1.0, 2.5), ("3600", 1.5, 3.0), ("soon", 0.15, 1.4)])
def test_too_many_requests_wait_as_long_as_asked_within_bounds(serve, asked, least, most):
    service = serve(says(b"slow down", 429, Retry_After=asked), lengths)
    start = time.monotonic()
    assert Http(service.url, timeout=1.5)(["abc"])[0] == [3]
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
