"""Scoring processes: how they begin, what kills them, what is left of them, and what they are told and say."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from acts import Acts, Slow, clean, hang, throw
from hypothesis import given
from hypothesis import strategies as st
from pools import expected, isolated, num_marked, told, until, with_bad, work

from rayft.reward import Reward
from rayft.rewards.channel import Channel, GarbledError
from rayft.score import Part, Task, Told, Work


@pytest.fixture
def marked(monkeypatch):
    """Counts the processes that this test has started, and asks that none is left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("RAYFT_TEST_MARK", mark)
    yield lambda: num_marked(mark)
    assert until(lambda: num_marked(mark) == 0), "processes are left behind"


class BadStart(Reward):
    def __init__(self, how) -> None:
        acts = {"raise": lambda: throw(OSError("no licence")), "hang": hang, "exit": lambda: sys.exit("bye")}
        acts["segfault"] = lambda: os.kill(os.getpid(), signal.SIGSEGV)
        acts["say"] = lambda: (print("no such GPU", file=sys.stderr), os._exit(4))
        acts[how]()

    def __call__(self, samples):
        return [0.0] * len(samples)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("raise", "OSError: no licence"),
        ("hang", r"reward 'BadStart' cannot be built: took longer than 1.5 s \(scoring.startup_timeout\)"),
        ("exit", "SystemExit: bye"),
        ("segfault", r"reward 'BadStart' cannot be built: crashed: signal 11 \(SIGSEGV\)"),
        ("say", r"reward 'BadStart' cannot be built: crashed: exit code 4; its last words: 'no such GPU'"),
    ],
)
def test_a_constructor_that_fails_is_named(how, sentence, marked):
    with (
        isolated(told(BadStart, how=how), startup=1.5 if how == "hang" else 30.0) as worker,
        pytest.raises(ValueError, match=sentence),
    ):
        worker.start()


@pytest.mark.parametrize(
    ("path", "code", "sentence"),
    [
        ("no_such_module:Reward", "", "no module 'no_such_module'"),
        ("rayft.reward:Rewrad", "", "rayft.reward has no 'Rewrad' .did you mean 'Reward'"),
        ("misspelt", "", "no reward 'misspelt'"),
        ("./missing.py:f", "", "no file"),
        ("{file}:f", "raise RuntimeError('at import')", "RuntimeError: at import"),
        ("{file}:f", "import sys; sys.exit(1)", "SystemExit: 1"),
        ("{file}:f", "import os; os.kill(os.getpid(), 11)", r"reward 'it' cannot be imported: crashed: signal 11"),
        ("{file}:f", "import time; time.sleep(99)", r"reward 'it' cannot be imported: took longer than 1.5 s"),
        ("{file}:f", "f = 3", "is int, not a Reward"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_named(path, code, sentence, tmp_path, marked):
    (tmp_path / "own.py").write_text(code)
    part = Part("it", path.format(file=tmp_path / "own.py"))
    with (
        isolated(Told((part,)), startup=1.5 if "sleep" in code else 30.0) as worker,
        pytest.raises(ValueError, match=sentence),
    ):
        worker.start()


class BuiltOnce(Acts):
    """Can be built ``times`` times."""

    def __init__(self, log, times) -> None:
        super().__init__()
        with Path(log).open("a") as told:
            told.write("built\n")
        if len(Path(log).read_text().splitlines()) > times:
            raise RuntimeError("the licence is used up")


def test_rewards_that_cannot_be_built_again_fail_the_rest_with_the_reason(tmp_path):
    reward = told(BuiltOnce, log=str(tmp_path / "log"), times=2)
    kinds = with_bad("segfault", (30,))
    with isolated(reward) as worker:
        found = worker.work(work(kinds))
        again = worker.work(work([None] * 3))
    given_up = set(np.flatnonzero(np.isnan(found.values[0])).tolist())
    assert 30 in given_up and set(found.errors) == {(0, row) for row in given_up}
    assert all("the licence is used up" in reason for reason in found.errors.values())
    kept = sorted(set(range(40)) - given_up)
    assert len(kept) >= 15
    np.testing.assert_array_equal(found.values[0][kept], expected(40)[kept])
    assert len(again.errors) == 3


def test_killing_the_zygote_or_the_child_between_works_loses_nothing(marked):
    with isolated(told(Acts)) as worker:
        for call, victim in enumerate(("zygote", "child", "both")):
            worker.work(work([None] * 5, call=call))
            if victim != "zygote":
                os.kill(worker.line.said["forked"], signal.SIGKILL)
            if victim != "child":
                worker.line.zygote.kill()
            found = worker.work(work([None] * 5, call=call))
            assert not found.errors
            np.testing.assert_array_equal(found.values[0], expected(5))
            assert until(lambda: marked() <= 2)


@pytest.mark.parametrize("copied", [False, True])
def test_nothing_is_left_when_the_process_that_scores_is_killed(copied, marked, tmp_path):
    """Also when a fork of it, a data loader say, still holds the other end of the sockets."""
    (tmp_path / "lasting.py").write_text("import os, time\ndef f(samples):\n    os.fork()\n    time.sleep(3600)\n")
    script = """
        import os, sys, time, numpy as np
        from rayft.rewards.isolate import Isolated
        from rayft.score import Part, Task, Told, Work
        worker = Isolated(Told((Part("f", sys.argv[1]),)))
        worker.start()
        if sys.argv[2] == "True" and os.fork() == 0:
            time.sleep(3600)
        worker.work(Work(0, np.arange(1), np.zeros((1, 2)), {}, (Task(0, np.arange(1)),)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), f"{tmp_path / 'lasting.py'}:f", str(copied)]
    parent = subprocess.Popen(command, start_new_session=True)
    assert until(lambda: marked() == 4 + copied), "parent, zygote, child and the fork of the reward"
    parent.kill()
    parent.wait()
    assert until(lambda: marked() == copied)
    if copied:
        os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("building", [0.0, 0.6])
def test_an_interrupt_of_the_supervisor_ends_the_child_and_later_work_starts_anew(building, marked):
    with isolated(told(Slow, building=building)) as worker:
        if not building:
            worker.start()
        threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            worker.work(work([None] * 20))
        assert until(lambda: marked() == 0)
        np.testing.assert_array_equal(worker.work(work([None] * 2)).values[0], expected(2))


class Looks(Reward):
    """Four numbers about the process it is in."""

    groupwise = True

    def __call__(self, samples):
        heavy = [name for name in ("torch", "ray", "pandas", "scipy") if name in sys.modules]
        megabytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        threads = len(os.listdir("/proc/self/task"))
        tidy = "PYTHONPATH" not in os.environ and os.read(0, 1) == b"" and os.environ["OMP_NUM_THREADS"] == "1"
        return [float(len(heavy)), megabytes, float(threads), float(tidy)]


def test_a_child_is_small_and_alone_and_its_environment_is_the_users(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with isolated(told(Looks)) as worker:
        heavy, megabytes, threads, tidy = worker.work(work([None] * 4)).values[0]
    assert (heavy, threads, tidy) == (0, 1, 1) and megabytes < 60


def test_rewards_run_from_a_thread_and_threads_of_an_imported_module_do_no_harm(tmp_path, marked):
    module = "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    (tmp_path / "busy.py").write_text(module + "def f(samples):\n    return [3 * s[0] + 1 for s in samples]\n")
    found = []

    def run():
        with isolated(Told((Part("f", f"{tmp_path / 'busy.py'}:f"),))) as worker:
            found.append(worker.work(work([None] * 9)))
            assert not worker.line.preload

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0].values[0], expected(9))


@pytest.mark.parametrize(("num", "as_list"), [(20_000, True), (100_000, False)])
def test_more_rows_than_any_socket_takes_at_once_neither_block_nor_get_lost(num, as_list):
    one, rows = work([None] * num, keys=as_list), np.arange(num)
    events = list(one.events) if as_list else one.events
    with isolated(told(Acts, clean), timeout=20.0) as worker:
        found = worker.work(replace(one, events=events, tasks=(Task(0, rows), Task(1, rows[::-1]))))
    np.testing.assert_array_equal(found.values[0], expected(len(rows)))
    np.testing.assert_array_equal(found.values[1], -(rows + 1.0))
    assert len(found.labels) == len(found.digests) == (len(rows) if as_list else 0)


class Unreadable:
    def __reduce__(self):
        return throw, (RuntimeError("from nowhere"),)


@pytest.mark.parametrize(
    ("sample", "reason"), [(threading.Lock(), "cannot be pickled"), (Unreadable(), "from nowhere")]
)
def test_samples_that_cannot_be_sent_fail_with_the_reason(sample, reason):
    rows = np.arange(2)
    with isolated(told(clean), retries=1) as worker:
        found = worker.work(Work(0, rows, [sample, 1], {}, (Task(0, rows),)))
        assert set(found.errors) == {(0, 0), (0, 1)} and reason in found.errors[0, 0]
        np.testing.assert_array_equal(worker.work(work([None] * 2)).values[0], [-1.0, -2.0])


def test_a_work_beyond_the_memory_limit_fails_and_the_next_does_not():
    with isolated(told(clean), memory_gb=0.01) as worker:
        found = worker.work(work([None] * 500_000))
        assert len(found.errors) == 500_000 and "out of memory: more than 0.01 GB" in found.errors[0, 0]
        assert not worker.work(work([None] * 20, call=1)).errors


# -- messages


@given(st.binary(min_size=1, max_size=200), st.integers(0), st.integers(1, 255))
def test_a_damaged_message_is_never_taken_for_another(message, place, flip):
    sender, receiver = Channel(None, bytes(16)), Channel(None, bytes(16))  # pyright: ignore
    sent = bytearray(sender.header(message) + message)
    sent[place % len(sent)] ^= flip
    receiver.buffer += sent
    with contextlib.suppress(GarbledError):
        assert receiver.next() is None
