"""A program behind three pipes: lines in, lines out, and never a program left behind.

Both ways are served at once, so neither side can block the other; stderr is read too, and its end kept for errors.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LONGEST = 2**26  # bytes that are read for one answer
CHATTER = 10_000  # lines that are no answer, skipped while waiting for one
SHOWN, TAIL = 80, 160  # characters of an answer, and of stderr, that an error quotes
POLL, GRACE = 0.5, 1.0  # seconds between looks at a silent program; seconds it has to end by itself
GUARD = f'read _; sleep {GRACE:g}; kill -s KILL -- "-$0"'  # outlives whoever started it, and ends the program's group


class WireError(ValueError):
    """The other side did not answer as agreed: how, and the beginning of what came instead."""

    kind = "wire"  # of a failure that may be another one, or none, when asked again: not for a cache

    def __init__(self, text: str, came: bytes | bytearray = b"") -> None:
        said = bytes(came[: 4 * SHOWN]).decode(errors="replace").strip()[:SHOWN]
        super().__init__(f"{text}: {said!r}" if said else text)
        self.text, self.came = text, bytes(came)


class Program:
    """A running program. Its whole group ends with this object, or with this process, however that ends."""

    def __init__(self, argv: list[str], cwd: str | None, env: Mapping[str, str]) -> None:
        pipe, null, own = subprocess.PIPE, subprocess.DEVNULL, {"bufsize": 0, "start_new_session": True}
        self.process: Any = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, env=env, **own)
        guarded = ["/bin/sh", "-c", GUARD, str(self.process.pid)]
        guard = subprocess.Popen(guarded, stdin=pipe, stdout=null, stderr=null, **own)
        self.end = weakref.finalize(self, _end, self.process, guard, os.getpid())
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            os.set_blocking(stream.fileno(), False)
        self.whole: deque[bytes] = deque()  # lines that nobody has asked for yet
        self.part, self.errors = bytearray(), bytearray()
        self.chatter, self.first, self.taken = 0, b"", 0  # lines skipped, the first of them, bytes read

    def lines(self, question: bytes, seconds: float | None) -> Iterator[bytes]:
        """Writes the question and yields the lines that come; ends by raising only: the caller stops at its answer."""
        unsent, self.chatter, self.first, self.taken = memoryview(question), 0, b"", 0
        until = math.inf if seconds is None else time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdin, selectors.EVENT_WRITE)
            ready.register(self.process.stdout, selectors.EVENT_READ)
            ready.register(self.process.stderr, selectors.EVENT_READ)
            while True:
                while self.whole:
                    yield self.whole.popleft()
                if self.taken > LONGEST:
                    raise WireError(f"printed {self.taken >> 20} MB and no answer", self.first or self.part)
                left = until - time.monotonic()
                if left < 0:
                    raise WireError(f"did not answer within {seconds:g} s; does it flush? {self._words()}", self.first)
                events = ready.select(min(POLL, left))
                if not events and self.process.poll() is not None:  # another process may hold its pipes open
                    raise self._ended()
                for stream in (key.fileobj for key, _ in events):
                    if stream is not self.process.stdin:
                        self._drain(stream, ready)
                    elif not (unsent := self._write(unsent)):
                        ready.unregister(stream)

    def skipped(self, line: bytes) -> None:
        """Counts a line that was no answer; too many are an error."""
        self.first, self.chatter = self.first or line.strip(), self.chatter + 1
        if self.chatter > CHATTER:
            raise WireError(f"printed {CHATTER} lines that are no answer, the first", self.first)

    def _write(self, unsent: memoryview) -> memoryview:
        try:
            return unsent[os.write(self.process.stdin.fileno(), unsent[:65536]) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError:
            raise self._ended() from None

    def _drain(self, stream: Any, ready: selectors.BaseSelector) -> None:
        chunk = _read(stream)
        if chunk == b"":
            ready.unregister(stream)
            if stream is self.process.stdout:
                raise self._ended()
        elif chunk and stream is self.process.stdout:
            self.taken += len(chunk)
            *ends, rest = chunk.split(b"\n")
            if ends:
                self.whole.extend([bytes(self.part) + ends[0], *ends[1:]])
                self.part.clear()
            self.part += rest
        elif chunk:
            self.errors += chunk
            del self.errors[: -4 * TAIL]

    def _ended(self) -> WireError:
        """How it ended, and its last words on both pipes."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            ending = "closed its pipe and ran on"
            self.process.kill()
        else:
            ending = f"was killed by {_signal(-code)}" if code < 0 else f"ended with exit code {code}"
        while chunk := _read(self.process.stderr):
            self.errors += chunk
        came = bytes(self.part) or self.first or (_read(self.process.stdout) or b"")
        return WireError(f"{ending}; {self._words()}{'; it printed' if came.strip() else ''}", came)

    def _words(self) -> str:
        lines = (line.strip() for line in self.errors.decode(errors="replace").splitlines())
        said = [line for line in lines if line.strip("~^ ")][-3:]  # without the marks under a Python traceback
        return f"its stderr: {' / '.join(said)[-TAIL:]}" if said else "nothing on its stderr"


def argv(run: Any, cwd: str | None, path: str) -> list[str]:
    """The program and its arguments; the program is looked for on PATH, then beside this Python."""
    if isinstance(run, str):
        run = [run] if Path(cwd or ".", run).is_file() else shlex.split(run)
    if not isinstance(run, list | tuple) or not run or not str(run[0]):
        raise ValueError(f"run is {run!r}; it should be a program with its arguments, such as ['node', './score.js']")
    name, *rest = (str(word) for word in run)
    where = str(Path(cwd or ".", name).resolve()) if os.sep in name else name
    found = shutil.which(where, path=os.pathsep.join([path, str(Path(sys.executable).parent)]))
    if found is None:
        there = "is not executable: chmod +x it" if Path(where).is_file() else "is not there: check the path"
        raise ValueError(f"run: the program {name!r} {there}, or put an interpreter in front of it")
    return [found, *rest]


def _end(process: Any, guard: Any, owner: int) -> None:
    """End of stdin first; what is left of the group after ``GRACE`` is killed. A fork of the owner leaves it alone."""
    if os.getpid() != owner:
        return
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    guard.kill()
    for ended in (process, guard):
        ended.wait()
        for stream in (ended.stdin, ended.stdout, ended.stderr):
            if stream is not None:
                stream.close()


def _read(stream: Any) -> bytes | None:
    """What is there: b"" at the end, None where nothing is there yet."""
    try:
        return os.read(stream.fileno(), 65536)
    except BlockingIOError:
        return None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
