"""The supervisor's end of a zygote and its child (child.py): start, talk, notice any death, leave nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from rayft.rewards.channel import BLOCK, FORK, KILL, SOCKET_LOST, Channel, GarbledError
from rayft.rewards.worker import Limits

GRACE = 5.0  # seconds that a process has to end, once it is told to
PATIENCE = 2.0  # seconds between the end of a child's socket and word of its death, if it is dead
STALL = 60.0  # seconds for what is no reward's doing: to take in a Work, to begin with the first rows
TAIL = 2000  # bytes of stderr that are kept
THREADS = ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rayft.rewards.child import zygote; zygote()"
CLOSED = "crashed: it closed the socket that scores come through"


class Died(Exception):  # noqa: N818 - a child's, and no error of ours
    """The child has ended, by itself or because it was silent for too long."""

    def __init__(self, reason: str, late: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.late = reason, late


class Line:
    """This end of the zygote and of its child: sockets, and the stderr that both write to."""

    def __init__(self, told: bytes, limits: Limits) -> None:
        self.told, self.limits, self.preload = told, limits, True
        self.zygote: Any = None
        self.control: Any = None  # Channel from the zygote; commands to it are single bytes
        self.child: Any = None  # Channel to and from the child, of its own for each
        self.kinds: list[tuple[bool, bool]] = []  # of each part: groupwise, with a batch size
        self.holds: Any = None  # the job whose Work the child has
        self.said: dict[str, Any] = {}  # what the zygote said last, by kind
        self.ended = self.cut = self.mute = False  # the zygote's end, the child's socket's, stderr's
        self.stderr = bytearray()

    def alive(self) -> bool:
        """Whether there is a child to talk to."""
        if self.child is not None:
            self._take_in(0)
        return self.child is not None and not (self.cut or self.ended or "gone" in self.said)

    def open(self) -> None:
        """A new child with its rewards built; ``ValueError`` otherwise. Starts a zygote where there is none."""
        self.end()
        until = time.monotonic() + self.limits.startup
        try:
            if self.zygote is None or self.ended:
                self._spawn(until)
            self._fork()
            self._built(until)
        except ValueError:
            raise
        except OSError as error:
            self.close()
            raise ValueError(f"no process can be started for the rewards: {error}") from error
        except BaseException:  # Ctrl-C
            self.close()
            raise

    def _built(self, until: float) -> None:
        what = "the rewards"
        try:
            while (said := self.hear(until - time.monotonic()))[0] != "up":
                if said[0] == "unbuilt":
                    self.end()
                    raise ValueError(said[1])
                what = said[1]
        except Died as died:
            raise ValueError(f"{what} cannot be built: {self._late() if died.late else died.reason}") from None
        self.kinds = said[1]

    def say(self, *messages: bytes) -> None:
        """Sends; a child that dies meanwhile is noticed by ``hear``."""
        with suppress(ConnectionError):
            for message in messages:
                for part in (self.child.header(message), message):
                    self._send(memoryview(part))

    def hear(self, seconds: float) -> Any:
        """The child's next message; ``Died`` where there is none, and then the child and its whole group are ended."""
        until = time.monotonic() + seconds
        while True:
            try:
                message = self.child.next()
            except GarbledError:
                self.end()
                raise Died("crashed: it wrote into the socket that scores come through") from None
            if message is not None:
                return pickle.loads(message)  # noqa: S301 - from a child of ours, by token
            if self.cut or self.ended or "gone" in self.said:
                raise Died(self._why())
            left = until - time.monotonic()
            if left <= 0:
                self.end()
                raise Died(f"timed out: no answer for {seconds:g} s (scoring.timeout)", late=True)
            self._take_in(left)

    def end(self) -> None:
        """No child, and nothing that it has started, is there afterwards."""
        if self.child is None:
            return
        self.cut = True
        if not self.ended and "gone" not in self.said:
            with suppress(ConnectionError):
                self.control.sock.send(KILL)
            if self._await(GRACE, "gone", "unforked") is None:
                self.close()
        if self.child is not None:
            self.child.sock.close()
        self.child = None

    def close(self) -> None:
        """No zygote, no child. The zygote ends its child when its socket closes."""
        if self.zygote is None:
            return
        self.control.sock.close()
        try:
            self.zygote.wait(GRACE)
            left_over = self.ended
        except subprocess.TimeoutExpired:
            self.zygote.kill()
            self.zygote.wait()
            left_over = True
        if left_over and "forked" in self.said and "gone" not in self.said:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.said["forked"], signal.SIGKILL)
        self.zygote.stderr.close()
        if self.child is not None:
            self.child.sock.close()
        self.zygote = self.control = self.child = None
        self.said = {}

    def _fork(self) -> None:
        mine, its = socket.socketpair()
        mine.setblocking(False)
        self.child, self.cut, self.holds = Channel(mine, os.urandom(16)), False, None
        for kind in ("gone", "forked", "unforked"):
            self.said.pop(kind, None)
        self.stderr.clear()
        with its, suppress(ConnectionError):
            socket.send_fds(self.control.sock, [FORK], [its.fileno()])
            mine.sendall(self.child.token)

    def _spawn(self, until: float) -> None:
        self.close()
        env = {**os.environ, **{f"{name}_NUM_THREADS": str(self.limits.threads) for name in THREADS}}
        paths = json.dumps([path or os.getcwd() for path in sys.path])
        mine, its = socket.socketpair()
        with its:
            self.zygote = subprocess.Popen(  # not by PYTHONPATH, which programs that a reward runs would inherit
                [sys.executable, "-P", "-c", BOOT, paths],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=env,
                start_new_session=True,
            )
        os.set_blocking(self.zygote.stderr.fileno(), False)
        self.control, self.said = Channel(mine, bytes(16)), {}
        self.ended = self.mute = False
        told = pickle.dumps((self.told, self.limits.memory_gb, self.limits.startup if self.preload else None))
        with suppress(ConnectionError):
            mine.sendall(self.control.header(told) + told)
        mine.setblocking(False)
        if self._await(until - time.monotonic(), "ready") is None:
            why = self._why() if self.ended else self._late()
            self.zygote.kill()
            raise ValueError(f"{self.said.get('importing', 'the scoring process')} cannot be imported: {why}")
        if self.said["ready"] and self.preload:  # forks of a process with threads can hang
            self.preload = False
            self._spawn(until)

    def _late(self) -> str:
        return f"took longer than {self.limits.startup:g} s (scoring.startup_timeout)"

    def _await(self, seconds: float, *kinds: str) -> str | None:
        """What of this the zygote says first; None where it says nothing of it in time."""
        until = time.monotonic() + seconds
        while not (found := [kind for kind in kinds if kind in self.said]):
            left = until - time.monotonic()
            if self.ended or left <= 0:
                return None
            self._take_in(left)
        return found[0]

    def _send(self, data: memoryview) -> None:
        until = time.monotonic() + STALL
        while data and not (self.cut or self.ended or "gone" in self.said):
            try:
                data = data[self.child.sock.send(data[:BLOCK]) :]
                until = time.monotonic() + STALL
            except BlockingIOError:
                if time.monotonic() > until:
                    self.end()
                    raise Died(f"crashed: it read nothing for {STALL:g} s") from None
                self._take_in(1.0, sending=True)

    def _take_in(self, seconds: float, sending: bool = False) -> None:
        """Waits for anything to come, or for room to send, and reads what there is."""
        poll, streams = select.poll(), {}
        if not self.mute:
            streams[self.zygote.stderr.fileno()] = self._read_stderr
        if not self.ended:
            streams[self.control.sock.fileno()] = self._read_zygote
        if self.child is not None and not self.cut:
            streams[self.child.sock.fileno()] = self._read_child
        for stream in streams:
            wants_room = sending and streams[stream] == self._read_child
            poll.register(stream, select.POLLIN | select.POLLOUT if wants_room else select.POLLIN)
        for stream, event in poll.poll(max(0.0, seconds) * 1000):
            if event & ~select.POLLOUT:
                streams[stream]()
        if self.ended or "gone" in self.said:  # all that it still had to say is here by now
            while self.child is not None and not self.cut and self._read_child():
                pass
            self._read_stderr()

    def _read_child(self) -> bool:
        """Whether there may be more."""
        try:
            block = self.child.sock.recv(BLOCK)
        except BlockingIOError:
            return False
        except ConnectionError:
            block = b""
        self.child.buffer += block
        self.cut = not block
        return bool(block)

    def _read_zygote(self) -> None:
        try:
            block = self.control.sock.recv(BLOCK)
        except BlockingIOError:
            return
        except ConnectionError:
            block = b""
        self.control.buffer += block
        self.ended = not block
        while (message := self.control.next()) is not None:
            kind, told = pickle.loads(message)  # noqa: S301 - from our zygote
            self.said[kind] = told

    def _read_stderr(self) -> None:
        with suppress(BlockingIOError):
            block = os.read(self.zygote.stderr.fileno(), BLOCK)
            self.mute = not block
            self.stderr += block
            del self.stderr[:-TAIL]

    def _why(self) -> str:
        """What became of a child, or of a zygote, that is not there any more."""
        if self.cut and self._await(PATIENCE, "gone", "unforked") is None and not self.ended:
            self.end()
            return CLOSED
        if "unforked" in self.said:
            return f"crashed: no process can be forked: {self.said['unforked']}"
        if "gone" in self.said:
            return CLOSED if self.said["gone"] == SOCKET_LOST else f"crashed: {self._ending(self.said['gone'])}"
        try:
            return f"crashed: {self._ending(self.zygote.wait(GRACE))}"
        except subprocess.TimeoutExpired:
            return CLOSED

    def _ending(self, code: int) -> str:
        """How a process ended. Last words where they may help: what is killed by surprise has none of its own."""
        lines = self.stderr.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")[-160:]
        words = f"; its last words: {said!r}" if said and (code >= 0 or code == -signal.SIGABRT) else ""
        if code >= 0:
            return f"exit code {code}{words}"
        name = {number.value: number.name for number in signal.Signals}.get(-code, "unnamed")
        return f"signal {-code} ({name}){words}{': out of memory?' if code == -signal.SIGKILL else ''}"
