"""Everything that a sample can do to the process it is scored in. Imported by scoring processes: nothing heavy."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import numpy as np

from rayft.reward import Reward


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def fork_and_linger():
    if os.fork() == 0:
        os.setsid()
        time.sleep(3600)


def fork_a_daemon():
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            time.sleep(3600)
        os._exit(0)


def scribble():
    for fd in range(3, 1024):
        with contextlib.suppress(OSError):
            os.write(fd, b"0.5\n" * 9)


def die_late():
    """An alarm that raises when the reward is long done with its sample."""

    def ring(number, frame):
        raise RuntimeError("late")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def hang():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(3600)


def throw(error):
    raise error


ACTS = {
    "raise": (lambda: throw(RuntimeError("bad")), r"raised: RuntimeError: bad"),
    "raise the unprintable": (lambda: throw(UnprintableError()), r"raised: UnprintableError, which cannot be printed"),
    "exit politely": (lambda: sys.exit(3), r"raised: SystemExit: 3"),
    "interrupt": (lambda: throw(KeyboardInterrupt()), r"raised: KeyboardInterrupt: "),
    "segfault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"crashed: signal 11 \(SIGSEGV\)"),
    "kill itself": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"crashed: signal 9 \(SIGKILL\)"),
    "kill its group": (lambda: os.killpg(0, signal.SIGTERM), r"crashed: signal 15 \(SIGTERM\)"),
    "kill its parent": (
        lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(9)),
        r"crashed: signal 9 \(SIGKILL\)",
    ),
    "abort": (
        lambda: (os.write(2, b"terminate called: std::bad_alloc\n"), os.abort()),
        r"crashed: signal 6 \(SIGABRT\); its last words: 'terminate called: std::bad_alloc'",
    ),
    "exit": (lambda: os._exit(3), r"crashed: exit code 3"),
    "exit with 0": (lambda: os._exit(0), r"crashed: exit code 0"),
    "hang": (hang, r"timed out: no answer for 0\.5 s \(scoring\.timeout\)"),
    "leak": (lambda: HELD.append(bytearray(2 * 10**9)), r"out of memory: more than 0\.5 GB .*scoring\.memory_gb"),
    "raise MemoryError": (lambda: throw(MemoryError()), r"out of memory: "),
    "close every file": (lambda: os.closerange(0, 4096), r"crashed: it closed the socket"),
    "write into every file": (scribble, r"crashed: it wrote into the socket"),
    "close some files": (lambda: os.closerange(3, 256), None),
    "print a megabyte": (lambda: sys.stdout.write("x" * 10**6), None),
    "complain a megabyte": (lambda: sys.stderr.write("x" * 10**6), None),
    "fork": (lambda: os.fork(), None),
    "fork and linger": (fork_and_linger, None),
    "fork a daemon": (fork_a_daemon, None),
    "change the folder": (lambda: os.chdir("/"), None),
    "take all signals": (lambda: [signal.signal(n, signal.SIG_IGN) for n in (2, 15, 17)], None),
    "die late": (die_late, None),
}
ANSWERS = {
    "wrong length": ([1.0, 2.0, 3.0], r"returned: \d+ scores for 1 samples"),
    "a string": (["high"], r"returned: str 'high'"),
    "one string": ("x", r"returned: str 'x"),
    "infinity": ([float("inf")], r"returned: inf"),
    "nan": ([float("nan")], r"returned: nan"),
    "none": ([None], r"returned: None"),
    "a complex number": ([1j], r"returned: complex"),
    "nothing": (None, r"returned: NoneType"),
    "a set": ({1.0}, r"returned: set"),
    "a masked number": (np.ma.array([1.0], mask=[True]), r"returned: "),
}
KINDS = [*ACTS, *ANSWERS]
HELD: list[bytearray] = []


class Acts(Reward):
    """score = 3 number + 1, unless the sample's second number stands for one of ``KINDS``. sample = (number, kind)"""

    def __init__(self) -> None:
        self.acts = {KINDS.index(kind) + 1: act for kind, (act, _) in ACTS.items()}
        self.answers = {KINDS.index(kind) + 1: answer for kind, (answer, _) in ANSWERS.items()}

    def __call__(self, samples):
        for sample in samples:
            kind = int(sample[1])
            if kind in self.acts:
                self.acts[kind]()
            elif kind in self.answers and len(samples) > 1:
                return "no answer for so many"
            elif kind in self.answers:
                return self.answers[kind]
        return [3.0 * sample[0] + 1 for sample in samples]


def clean(samples):
    return np.array([-sample[0] for sample in samples])


class Slow(Reward):
    """As ``Acts``, in 0.15 s a sample, and built in ``building`` s."""

    def __init__(self, batch_size=None, building=0.0) -> None:
        self.batch_size = batch_size
        time.sleep(building)

    def __call__(self, samples):
        time.sleep(0.15 * len(samples))
        return [3.0 * sample[0] + 1 for sample in samples]
