"""The other learners of a pretraining: processes of this machine that add their slice to every gradient.

This process is learner 0 and alone keeps what is worth saving. Each peer is told step by step to go on, and ends when
its line to this process closes, for whatever reason: no stop, crash or kill leaves one behind. They are neither Ray
actors, which take seconds more and bring nothing on one machine, nor torch.multiprocessing's, which run the user's
script a second time; in a process group of their own, Ctrl-C does not reach them.
"""

from __future__ import annotations

import io
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from rayft import imports
from rayft.denoise import Learner, PretrainSettings

BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rayft.peers import serve; serve(int(sys.argv[2]))"
GRACE = 20.0  # seconds that a peer has to end, or to be seen to have ended
LOOK = 0.001  # seconds between two looks at a GPU that is busy


@dataclass(frozen=True)
class Hello:
    """All that a peer is made from."""

    domain: bytes
    settings: PretrainSettings
    seed: int
    rank: int
    device: str
    threads: int
    state: bytes
    meeting: str  # the file through which the learners find each other


class LostLearner(ValueError):  # noqa: N818
    """A peer has ended before its time; says which and why."""


class Peers:
    """Learners 1 .. n - 1, seen from learner 0. With one learner there are none, and every method does nothing."""

    def __init__(self, settings: PretrainSettings, device: torch.device) -> None:
        self.settings, self.device, self.threads = settings, device, torch.get_num_threads()
        self.processes: list[subprocess.Popen[Any]] = []
        self.lines: list[Any] = []  # Connections
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.joined = False

    def open(self, domain: bytes, seed: int, learner: Learner) -> None:
        """Starts them as copies of ``learner``; returns when all are connected."""
        of = self.settings.num_learners
        if of == 1:
            return
        self.folder = tempfile.TemporaryDirectory(prefix="rayft-")
        meeting = str(Path(self.folder.name) / "meeting")
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, self.threads // of))
        for _ in range(1, of):
            self._start()
        state = io.BytesIO()
        torch.save(learner.state(), state)
        for rank, line in enumerate(self.lines, 1):
            device = f"cuda:{rank}" if self.device.type == "cuda" else "cpu"
            told = (domain, self.settings, seed, rank, device, torch.get_num_threads(), state.getvalue(), meeting)
            with suppress(ConnectionError):  # heard below
                line.send(Hello(*told))
        for line in self.lines:
            try:
                if (why := line.recv()) is not None:
                    line.close()
                    raise LostLearner(f"learner {self.lines.index(line) + 1} of {of} could not start: {why[1]}")
            except (EOFError, ConnectionError):
                raise LostLearner(self.lost() or "a learner could not start") from None
        meet(meeting, 0, of, self.device)
        self.joined = True

    def _start(self) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", BOOT, json.dumps(sys.path), str(theirs.fileno())]
        options: dict[str, Any] = {"pass_fds": [theirs.fileno()], "stdin": subprocess.DEVNULL, "process_group": 0}
        self.processes.append(subprocess.Popen(command, **options))
        self.lines.append(ours)
        theirs.close()

    def go(self, step: int) -> None:
        """Step ``step`` may begin."""
        for line in self.lines:
            with suppress(ConnectionError):  # a dead one is noticed when gradients are added up
                line.send(step)

    def wait(self) -> None:
        """Until a GPU has done what it was given; NCCL would wait for a dead peer, so they are looked at meanwhile."""
        if self.device.type == "cpu":
            return
        done = torch.cuda.Event()
        done.record()
        while not done.query():
            if any(process.poll() is not None for process in self.processes):
                raise LostLearner(self.lost() or "a learner was lost")
            time.sleep(LOOK)

    def lost(self) -> str | None:
        """Who has ended before its time and why, the first of them; ``None`` if nobody has within a while."""
        until = time.monotonic() + GRACE
        while all(process.poll() is None for process in self.processes):
            if time.monotonic() > until or not self.processes:
                return None
            time.sleep(0.05)
        time.sleep(0.2)  # the others notice at once, and may be seen to have ended before the first of them
        ended = {rank: p.returncode for rank, p in enumerate(self.processes, 1) if p.poll() is not None}
        for rank, code in ended.items():
            if code < 0:
                how = f"was killed ({signal.Signals(-code).name}), as the kernel does where memory runs out"
                return f"learner {rank} of {self.settings.num_learners} {how}"
        told = {rank: self._last_words(rank) for rank in ended}
        first = min(told, key=lambda rank: told[rank][0])
        return f"learner {first} of {self.settings.num_learners} failed: {told[first][1]}"

    def _last_words(self, rank: int) -> tuple[float, str]:
        """(when, why) as the peer said it."""
        try:
            return self.lines[rank - 1].recv()
        except (EOFError, OSError):
            return float("inf"), f"exit code {self.processes[rank - 1].returncode}"

    def close(self, whole: bool) -> None:
        """Ends them. ``whole``: all have done the same steps, so that they can part in order."""
        for line in self.lines:
            with suppress(OSError):
                if whole:
                    line.send(None)
        try:
            if self.joined and (whole or self.device.type == "cpu"):  # NCCL would wait for the others
                distributed.destroy_process_group()
        finally:
            for process, line in zip(self.processes, self.lines, strict=True):
                if whole:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
                process.kill()
                process.wait()
                line.close()
            if self.folder is not None:
                self.folder.cleanup()
            torch.set_num_threads(self.threads)
            self.processes, self.lines, self.folder, self.joined = [], [], None, False


def meet(meeting: str, rank: int, of: int, device: torch.device) -> None:
    """Connects this learner to the others: NCCL between GPUs, gloo elsewhere."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    told: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    store = distributed.FileStore(meeting, of)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=of, **told)


def serve(number: int) -> None:
    """A peer's life: built from its Hello, then one step for each number that it is told."""
    line = Connection(number)
    try:
        hello: Hello = line.recv()
        device = torch.device(hello.device)
        torch.set_num_threads(hello.threads)
        learner = Learner(imports.unpack(hello.domain), hello.settings, hello.seed, device, hello.rank)
        state = torch.load(io.BytesIO(hello.state), map_location="cpu", weights_only=True)
        learner.load(state, "learner 0")
        line.send(None)
        meet(hello.meeting, hello.rank, hello.settings.num_learners, device)
        for step in _told(line):
            learner.step(step)
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # there is nothing to tidy up, which takes a second
    except BaseException as error:
        with suppress(OSError):
            line.send((time.monotonic(), imports.reason(error)))
        os._exit(1)


def _told(line: Connection) -> Iterator[int]:
    """The steps, as they come. At the end of the line the process ends, even in the midst of a collective call."""
    told: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while (step := line.recv()) is not None:
                told.put(step)
            told.put(None)
            line.recv()
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return iter(told.get, None)
