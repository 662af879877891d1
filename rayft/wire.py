"""Rewards over a wire: any language behind a pipe, any service behind a URL. JSON both ways, never pickle.

    {"id": n, "samples": [...], "conditions": [{...}, ...]}
    -> {"id": n, "scores": [0.1, null, ...], "info": {"name": [...]}}

One score per sample, in order; null = the call failed for that sample; ``info`` is logged, and may be left out. A pipe
carries each on one line; HTTP carries no id. Numbers that are not finite are never sent; coming back they are failures.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import math
import os
import random
import shlex
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayft import imports
from rayft.pipe import LONGEST, Program, WireError, argv
from rayft.reward import Reward, as_json, itself


class Command(Reward):
    """A program that reads questions from its stdin and writes answers to its stdout, one line each, flushed.

    It is started once, and first asked about no samples: what it prepares before it answers that is start-up. Lines of
    its stdout that are no JSON objects are skipped. When it dies it is started again before the error is raised, so
    that the sample that killed it pays for that and not the next. ``run`` goes through no shell; written as a list,
    files that start with ./ are found beside the YAML. Raise ``version`` when the program's scores change.
    """

    version = "1"

    def __init__(
        self,
        run: str | list[str],
        batch_size: int = 64,
        cwd: str | None = None,
        env: Mapping[str, Any] | None = None,
        undecodable: float = 0.0,
        version: str = "1",
        start_timeout: float = 60,
        canonical: str | None = None,
        groupwise: bool = False,
    ) -> None:
        _common(self, batch_size, undecodable, version, canonical, groupwise)
        self.start_timeout = _number("start_timeout", start_timeout, least=0.01)
        if cwd is not None and not Path(cwd).is_dir():
            raise ValueError(f"cwd is {cwd!r}, which is no folder")
        self.cwd, self.env = cwd, {key: str(value) for key, value in (env or {}).items()}
        self.argv = argv(run, cwd, self.env.get("PATH", os.environ.get("PATH", "")))
        self.asked = 0
        self.program: Program | None = self._started()

    def __call__(
        self, samples: Sequence[Any], conditions: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[Any], dict[str, Any]]:
        if self.program is None:
            self.program = self._started()
        question = self._question(samples, conditions)
        answer = None
        try:
            answer = self._answer(self.program, question)
            return _scores(answer, len(samples))
        except BaseException as error:
            if answer is None:  # out of step; an interrupt too leaves an answer on its way
                self.program.end()
                self.program = None
            if not isinstance(error, WireError):
                raise
            again = "" if self.program else self._again()
            raise WireError(f"{self._label()} {error.text}{again}", error.came) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "program": None}

    def _label(self) -> str:
        return f"command {shlex.join([Path(self.argv[0]).name, *self.argv[1:]])[-80:]!r}"

    def _question(self, samples: Sequence[Any], conditions: Sequence[Mapping[str, Any]]) -> bytes:
        self.asked += 1
        return _question(self, samples, conditions, id=self.asked) + b"\n"

    def _started(self) -> Program:
        env = {"PYTHONUNBUFFERED": "1", **os.environ, **self.env}  # Python's prints would stay in a buffer for ever
        try:
            program = Program(self.argv, self.cwd, env)
        except OSError as error:  # no interpreter line, say
            raise WireError(f"{self._label()} cannot be started: {error}") from error
        try:
            _scores(self._answer(program, self._question([], []), self.start_timeout), 0)
        except BaseException as error:
            program.end()
            if not isinstance(error, WireError):
                raise
            told = "when asked about no samples, which is how it is started (answer with no scores)"
            raise WireError(f"{self._label()} {error.text}, {told}", error.came) from None
        return program

    def _again(self) -> str:
        try:
            self.program = self._started()
        except WireError as error:
            return f"; and then it did not start again: {error}"
        return ""

    def _answer(self, program: Program, question: bytes, seconds: float | None = None) -> dict[str, Any]:
        for line in program.lines(question, seconds):
            answer = _object(line) if line.lstrip().startswith(b"{") else None
            if answer is None or not {"id", "scores"} & answer.keys():
                program.skipped(line)
            elif answer.get("id") == self.asked:
                return answer
            else:
                raise WireError(f"answered id {answer.get('id')!r} when asked {self.asked}", line)
        raise AssertionError("lines() ends by raising only")


class Http(Reward):
    """A service that is posted the question and answers with the scores; the connection is kept.

    Status 429, 5xx and lost connections are tried again, ``retries`` times, after 0.25 s, 0.5 s, ... or what
    Retry-After asks for, ``timeout`` at most. Other statuses, a redirect, and no whole answer within ``timeout``
    seconds are errors at once. Always a direct connection: proxies of the environment are not used. The token in the
    environment variable ``token_env`` is sent as Bearer, and never shown. Raise ``version`` when its scores change.
    """

    version = "1"

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        timeout: float = 30,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
        token_env: str | None = None,
        undecodable: float = 0.0,
        version: str = "1",
        canonical: str | None = None,
        groupwise: bool = False,
    ) -> None:
        _common(self, batch_size, undecodable, version, canonical, groupwise)
        self.timeout, self.retries = _number("timeout", timeout, least=0.01), int(_number("retries", retries, 0, True))
        self.secure, self.host, self.port, self.target, self.label = _address(url)
        self.given, self.token_env = {str(key): str(value) for key, value in (headers or {}).items()}, token_env
        self._headers()
        self.connection: http.client.HTTPConnection | None = None

    def __call__(
        self, samples: Sequence[Any], conditions: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[Any], dict[str, Any]]:
        body = _question(self, samples, conditions)
        try:
            return _scores(_object(self._delivered(body)), len(samples))
        except WireError as error:
            token = self._token() or "\0"  # a service may send it back
            text, came = error.text.replace(token, "***"), error.came.replace(token.encode(), b"***")
            raise WireError(f"{self.label} {text}", came) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "connection": None}

    def _token(self) -> str:
        return "" if self.token_env is None else os.environ.get(self.token_env, "").strip()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.given}
        if self.token_env is not None:
            if not self._token():
                raise ValueError(f"token_env: the environment has no {self.token_env!r}; export it where rewards run")
            headers["Authorization"] = f"Bearer {self._token()}"
        for name, value in headers.items():
            if not (name.isascii() and value.isascii() and f"{name}{value}".isprintable()):
                raise ValueError(f"the header {name!r} has characters that no header can carry")
        return headers

    def _delivered(self, body: bytes) -> bytes:
        """The body of an answer that is a success, after as many attempts as are allowed."""
        failed = WireError("was not asked")
        for attempt in range(self.retries + 1):
            wait = 0.25 * 2**attempt * random.SystemRandom().uniform(0.75, 1.25)  # many actors ask the same service
            try:
                answer, said = self._posted(body)
            except TimeoutError:
                raise WireError(f"gave no whole answer within {self.timeout:g} s") from None
            except ssl.SSLCertVerificationError as error:
                raise WireError(f"cannot be trusted: {error}") from None
            except (OSError, http.client.HTTPException) as error:
                failed = WireError(f"gave no answer: {imports.reason(error)}")
            else:
                if 200 <= answer.status < 300:
                    return said
                failed = self._refused(answer, said)
                if answer.status != 429 and answer.status < 500:
                    raise failed
                wait = max(wait, min(_retry_after(answer), self.timeout))
            if attempt < self.retries:
                time.sleep(wait)
        raise WireError(f"{failed.text} ({self.retries + 1} attempts)", failed.came)

    def _refused(self, answer: http.client.HTTPResponse, said: bytes) -> WireError:
        to = ""
        if 300 <= answer.status < 400:
            to = f" and redirects to {answer.getheader('Location')}, which is not followed: give that as url"
        return WireError(f"answered with status {answer.status} {answer.reason}{to}", said)

    def _posted(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        kept = self.connection is not None and self.connection.sock is not None
        try:
            return self._exchanged(body)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            if not kept:
                raise
            return self._exchanged(body)  # it had closed the idle connection

    def _exchanged(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """One request and its answer, on the kept connection; a timer cuts the connection when time is up."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = self.connection = self.connection or kind(self.host, self.port, timeout=self.timeout)
        late, timer = threading.Event(), None
        try:
            if connection.sock is None:
                connection.connect()
            sock = connection.sock
            timer = threading.Timer(self.timeout, _cut, (sock, late))
            timer.daemon = True
            timer.start()
            connection.request("POST", self.target, body, self._headers())
            if sock is not None and hasattr(socket, "TCP_QUICKACK"):
                # a service that sends its headers on their own waits 40 ms for this otherwise
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            answer = connection.getresponse()
            said = _body(answer)
            if late.is_set():  # headers that were cut look as if they had ended
                raise TimeoutError
            return answer, said
        except BaseException as error:
            self.connection = None
            connection.close()
            if late.is_set() and isinstance(error, Exception):
                raise TimeoutError from None
            raise
        finally:
            if timer is not None:
                timer.cancel()


def _body(answer: http.client.HTTPResponse) -> bytes:
    try:
        said, missing = answer.read(LONGEST + 1), bool(answer.length)
    except http.client.IncompleteRead as error:
        said, missing = error.partial, True
    if len(said) > LONGEST:
        raise WireError(f"answered more than {LONGEST >> 20} MB with status {answer.status}", said)
    if missing:
        raise WireError(f"gave half an answer with status {answer.status}", said)
    return said


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # past TLS, which another thread is reading


def _retry_after(answer: http.client.HTTPResponse) -> float:
    """Seconds that an answer asks to wait; 0 where it does not say."""
    said = answer.getheader("Retry-After", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


# -- what the constructors are given


def _address(url: Any) -> tuple[bool, str, int | None, str, str]:
    """(is it https, host, port, path with query, what errors call it: the address without its query)."""
    try:
        parts = urllib.parse.urlsplit(str(url))
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"url is not an address: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("url holds a user or password; put it into an environment variable and name that in token_env")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"url is {url!r}; it should start with http:// or https:// and a host")
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=?~-._") for part in (parts.path or "/", parts.query))
    target = f"{path}?{query}" if query else path
    return parts.scheme == "https", host, port, target, f"{parts.scheme}://{parts.netloc}{path}"


def _common(reward: Reward, batch_size: Any, undecodable: Any, version: Any, canonical: Any, groupwise: bool) -> None:
    reward.batch_size = int(_number("batch_size", batch_size, 1, True))
    reward.undecodable, reward.version = _number("undecodable", undecodable), str(version)
    reward.canonical, reward.groupwise = None if canonical is None else imports.load(canonical), bool(groupwise)
    if canonical is not None and not callable(reward.canonical):
        raise ValueError(f"canonical: {canonical} is {type(reward.canonical).__name__}, not a function of one sample")


def _number(name: str, given: Any, least: float = -math.inf, whole: bool = False) -> float:
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < least or (whole and number % 1):
        bound = "" if least == -math.inf else f", {least:g} or more"
        raise ValueError(f"{name} is {given!r}; it should be a {'whole ' if whole else ''}number{bound}")
    return number


# -- what both ways have in common


def _question(reward: Reward, samples: Sequence[Any], conditions: Sequence[Mapping[str, Any]], **more: int) -> bytes:
    form = reward.canonical or itself
    try:
        told = {**more, "samples": [as_json(form(sample)) for sample in samples]}
    except TypeError as error:
        raise TypeError(f"{error}, or this reward: `canonical: package.module:function`, sample -> JSON") from None
    told["conditions"] = [as_json(condition) for condition in conditions] or [{} for _ in samples]
    try:
        return json.dumps(told, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        raise ValueError("a sample or its condition has numbers that are not finite, which JSON cannot carry") from None


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError("answered what is not JSON", text or b"(nothing)") from None
    if not isinstance(found, dict):
        raise WireError("answered what is no JSON object", text)
    return found


def _scores(answer: Mapping[str, Any], expected: int) -> tuple[list[Any], dict[str, Any]]:
    scores, info, came = answer.get("scores"), answer.get("info") or {}, json.dumps(answer).encode()
    if not isinstance(scores, list):
        raise WireError("answered without a list of scores", came)
    if len(scores) != expected:
        raise WireError(f"answered {len(scores)} scores for {expected} samples", came)
    if not isinstance(info, dict):
        raise WireError("answered with an info that is no object", came)
    return scores, info
