"""The process that rewards run in, and the one it is forked from. No Ray and no torch: tens of MB for each.

    supervisor (line.py)  --spawn-->  zygote: rewards imported  --fork-->  child: rewards built, serves Works

The zygote has one thread and builds nothing, so that a new child costs milliseconds however often the old one dies. It
reaps, and it ends whatever a child leaves behind. Supervisor and child talk over a socket of their own.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import pickle
import resource
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rayft.reward import target
from rayft.rewards.channel import BLOCK, FORK, KILL, SOCKET_LOST, Channel
from rayft.score import Begin, Done, Part, Task, Told, Work, Workbench, words

GENERATIONS = 99  # of orphans that are looked for: the children of each come when it is dead
TICK = 2.0  # seconds between looks at whether the supervisor still lives
LINUX = sys.platform == "linux"


# -- the zygote


def zygote() -> None:
    """Imports what it is told to, then forks children until its stdin, a socket to the supervisor, closes."""
    control = Channel(socket.socket(fileno=_out_of_the_way(0)), bytes(16))
    os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # it becomes 0, stdin
    del sys.argv[1:]
    told, memory_gb, startup = pickle.loads(control.receive())  # noqa: S301 - from the supervisor
    parent, threads = os.getppid(), _num_threads()
    if startup:
        signal.alarm(int(startup) + 60)  # ends an import that hangs, if the supervisor is not there to do it
        _preload(told, control)
        signal.alarm(0)
    _Zygote(control, parent, told, memory_gb, strays=_num_threads() > threads).run()
    os._exit(0)


def _preload(packed: bytes, control: Channel) -> None:
    """Imports the rewards' modules. What cannot be imported is the child's to complain about, in better words."""
    with suppress(BaseException):
        told: Told = pickle.loads(packed)  # noqa: S301 - from the supervisor
        found: list[tuple[str, Any]] = [(f"reward {part.name!r}", part.path) for part in told.parts]
        for what, path in (*found, ("the decoder", told.decoder), ("the canonical form", told.canonical)):
            control.send(("importing", what))
            with suppress(BaseException):
                target(path, told.short_names)


class _Zygote:
    """One child at a time, and whatever it leaves behind."""

    def __init__(self, control: Channel, parent: int, told: bytes, memory_gb: float | None, strays: bool) -> None:
        self.control, self.parent, self.child = control, parent, 0
        self.told, self.memory_gb, self.strays = told, memory_gb, strays
        self.libc: Any = ctypes.CDLL(None) if LINUX else None
        self.own = _children()  # of an imported module
        self.woken, self.waker = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(self.waker, False)
        if LINUX:
            self.libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, also daemons

    def run(self) -> None:
        """Until the supervisor hangs up or is gone."""
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the supervisor's thread had blocked
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # only to be woken
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # pages stay shared with the children
        self.control.send(("ready", self.strays))
        poll = select.poll()
        poll.register(self.control.sock, select.POLLIN)
        poll.register(self.woken, select.POLLIN)
        while os.getppid() == self.parent:
            ready = dict(poll.poll(TICK * 1000))
            if self.woken in ready:
                with suppress(BlockingIOError):
                    os.read(self.woken, BLOCK)
            self._reap()
            if self.control.sock.fileno() in ready and not self._obey():
                break
        self._kill()
        if self.child:
            os.waitpid(self.child, 0)
        self._sweep()

    def _obey(self) -> bool:
        """One command; False when there is nobody to give any."""
        with suppress(ConnectionError):
            command, sockets, _, _ = socket.recv_fds(self.control.sock, 1, 1)
            if command == FORK:
                self._fork(sockets[0])
            elif command == KILL:
                self._kill()
            return bool(command)
        return False

    def _fork(self, sock: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            os.close(sock)
            self.control.send(("unforked", str(error)))
            return
        if pid == 0:
            code = 1
            try:
                code = self._become_child(sock)
            except BaseException:
                with suppress(BaseException):
                    traceback.print_exc()
            finally:
                os._exit(code)
        os.close(sock)
        self.child = pid
        self.control.send(("forked", pid))

    def _become_child(self, sock: int) -> int:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        zygote = os.getppid()
        os.setsid()
        if LINUX:
            self.libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
            if os.getppid() != zygote:
                return 0
            with suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("1000")  # sooner than what trains
        self.control.sock.close()
        os.close(self.woken)
        os.close(self.waker)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if "numpy.random" in sys.modules:
            np.random.seed()  # noqa: NPY002 - or all children draw the same
        return serve(socket.socket(fileno=_out_of_the_way(sock)), self.told, self.memory_gb)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.child:
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(self.child, signal.SIGKILL)
                    self.child = 0
                    self._sweep()
                    self.control.send(("gone", os.waitstatus_to_exitcode(ended[1])))

    def _kill(self) -> None:
        for kill in (os.kill, os.killpg) if self.child else ():  # it may not lead a group yet
            with suppress(ProcessLookupError, PermissionError):
                kill(self.child, signal.SIGKILL)

    def _sweep(self) -> None:
        """Ends orphans of the child, their children too, and theirs."""
        for _ in range(GENERATIONS):
            orphans = [pid for pid in _children() if pid not in self.own]
            if not orphans:
                return
            for pid in orphans:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def _children() -> list[int]:
    found = []
    for folder in os.scandir("/proc") if LINUX else ():
        if folder.name.isdigit():
            with suppress(OSError):
                status = Path(folder.path, "stat").read_bytes()
                if int(status.rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(folder.name))
    return found


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task")) if LINUX else len(sys._current_frames())


def _out_of_the_way(fd: int) -> int:
    """The same file under a number that ``os.closerange(3, 256)`` does not reach, where so many are allowed."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, (1024 if most < 0 else min(most, 1024)) - 16)
    os.close(fd)
    return moved


# -- the child


def serve(sock: socket.socket, packed: bytes, memory_gb: float | None) -> int:
    """Builds the rewards and says so, then carries out Works; returns the exit code."""
    channel = Channel(sock, sock.recv(16, socket.MSG_WAITALL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def announce(part: Part) -> None:
        channel.send(("building", f"reward {part.name!r}"))

    try:
        told: Told = pickle.loads(packed)  # noqa: S301 - from the supervisor
        bench = Workbench(told, fatal=(MemoryError,), announce=announce)
    except BaseException as error:
        channel.send(("unbuilt", words(error)))
        return 0
    most = resource.getrlimit(resource.RLIMIT_AS)
    if memory_gb is not None and LINUX:
        allowed = _virtual_bytes() + int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (allowed if most[1] < 0 else min(allowed, most[1]), most[1]))
    channel.send(("up", [(reward.groupwise, reward.batch_size is not None) for reward in bench.rewards]))
    try:
        _obey(channel, bench)
    except EOFError:
        return 0
    except MemoryError as error:
        resource.setrlimit(resource.RLIMIT_AS, most)  # room for the last words
        channel.send(("memory", words(error)))
    except OSError:
        return SOCKET_LOST
    return 0


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _obey(channel: Channel, bench: Workbench) -> None:
    """A Work without tasks is kept; tasks are of the Work that came last."""
    work: Work | None = None
    while True:
        message = channel.receive()
        try:
            said: Work | tuple[Task, ...] = pickle.loads(message)  # noqa: S301 - from the supervisor
        except MemoryError:
            raise
        except BaseException as error:
            work = None
            channel.send(("unreadable", words(error)))
            continue
        if isinstance(said, Work):
            work = said
            continue
        if work is not None:
            held: list[Begin | Done | None] = []
            for told in bench.run(replace(work, tasks=said)):
                held.append(told)
                if isinstance(told, Begin):  # what was done goes with what begins: half the messages
                    channel.send(("heard", held))
                    held = []
            channel.send(("heard", [*held, None]))
