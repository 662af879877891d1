"""Isolated scoring: whatever a sample does to its process, it alone is blamed, and every other number is exact."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft import imports
from rayft.reward import Reward
from rayft.rewards.channel import Channel, GarbledError
from rayft.rewards.isolate import Isolated
from rayft.rewards.worker import Inline, Limits
from rayft.score import DECODE, Part, Task, Told, Work

# -- rewards; sample = (number, what to do). They reach the child packed, for no process can import a test


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
    "hang": (hang, r"timed out: no answer for 1 s \(scoring\.timeout\)"),
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
    """score = 3 number + 1, unless the sample's second number stands for one of ``KINDS``."""

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


def told(*rewards, decoder=None, **arguments):
    parts = [Part(getattr(r, "__name__", str(i)), imports.portable(r), arguments) for i, r in enumerate(rewards)]
    return Told(tuple(parts), decoder)


def work(kinds, parts=1, call=0, **more):
    """One event for each of ``kinds``: None for a good one."""
    codes = [0 if kind is None else KINDS.index(kind) + 1 for kind in kinds]
    rows = np.arange(len(codes))
    events = np.stack([rows + 1.0, np.array(codes, dtype=float)], axis=-1)
    return Work(call, rows + 100, events, {}, tuple(Task(part, rows) for part in range(parts)), **more)


def with_bad(kind, bad=(7, 23), num=40):
    return [kind if row in bad else None for row in range(num)]


def expected(num, bad=()):
    values = 3.0 * np.arange(1, num + 1) + 1
    values[list(bad)] = np.nan
    return values


def num_marked(mark):
    """How many processes have ``mark`` in their environment."""
    found = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            alive = folder.name.isdigit() and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            found += alive and mark.encode() in (folder / "environ").read_bytes()
    return found


@pytest.fixture
def marked(monkeypatch):
    """Counts the processes that this test has started, and asks that none is left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("RAYFT_TEST_MARK", mark)
    yield lambda: num_marked(mark)
    assert until(lambda: num_marked(mark) == 0), "processes are left behind"


@pytest.fixture(scope="module")
def long_lived():
    """One worker that lives through every bad behaviour, and the mark of its processes."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_TEST_MODULE_MARK", mark)
        with isolated(told(Acts, clean), timeout=1.0, memory_gb=0.5) as worker:
            yield worker, mark


def until(condition, seconds=8.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@contextlib.contextmanager
def isolated(told, **limits):
    worker = Isolated(told, Limits(**{"timeout": 5.0, "startup": 30.0} | limits))
    try:
        yield worker
    finally:
        worker.stop()


# -- blame


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_is_blamed_alone_and_every_other_score_is_exact(kind, long_lived):
    worker, mark = long_lived
    reason = {**ACTS, **ANSWERS}[kind][1]
    found = worker.work(work(with_bad(kind), parts=2, call=KINDS.index(kind)))
    assert set(found.errors) == (set() if reason is None else {(0, 7), (0, 23)})
    assert all(re.match(reason, text) for text in found.errors.values()), found.errors
    np.testing.assert_array_equal(found.values[0], expected(40, (7, 23) if reason else ()))
    np.testing.assert_array_equal(found.values[1], -np.arange(1.0, 41.0))
    np.testing.assert_array_equal(found.found, np.ones(40))
    assert found.calls[0] == found.calls[1] == 40
    worker.line.end()
    assert num_marked(mark) == 1, "the zygote remains, and nothing that a child has started"


def test_poison_among_five_thousand_is_found_exactly():
    kinds = ("segfault", "exit", "hang", "raise", "a string")
    bad = {row: kinds[i % 5] for i, row in enumerate([17, 18, 700, 1234, 1999, 2500, 2501, 3333, 4100, 4999])}
    with isolated(told(Acts), timeout=1.0) as worker:
        worker.work(work([None] * 5000, call=0))
        start = time.perf_counter()
        worker.work(work([None] * 5000, call=1))
        middle = time.perf_counter()
        found = worker.work(work([bad.get(row) for row in range(5000)], call=2))
        extra = time.perf_counter() - middle - (middle - start)
    assert set(found.errors) == {(0, row) for row in bad}
    for row, kind in bad.items():
        assert re.match({**ACTS, **ANSWERS}[kind][1], found.errors[0, row])
    np.testing.assert_array_equal(found.values[0], expected(5000, bad))
    print(f"poison: {extra:.2f} s more than the clean run, {found.restarts} restarts")
    assert extra < 6.0


def test_order_survives_random_failures(decoder_path):
    kinds = ("segfault", "exit", "raise", "nan", "fork", "wrong length", "raise MemoryError", "close every file")
    calls = itertools.count()

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def check(data):
        num = data.draw(st.integers(1, 60))
        rows = st.integers(0, num - 1)
        bad = data.draw(st.dictionaries(rows, st.sampled_from(kinds), max_size=6))
        unreadable = data.draw(st.sets(rows, max_size=2))
        mixed = np.array(data.draw(st.permutations(range(num))))
        one = work([bad.get(row) for row in range(num)], parts=2, call=next(calls))
        context = {"crash": np.isin(np.arange(num), list(unreadable))}
        found = worker.work(replace(one, context=context, tasks=(Task(0, mixed), one.tasks[1])))
        guilty = {row for row, kind in bad.items() if kind != "fork"} - unreadable
        assert set(found.errors) == {(0, row) for row in guilty} | {(DECODE, row) for row in unreadable}
        nothing = np.full(num, np.nan)
        np.testing.assert_array_equal(found.values.get(0, nothing), expected(num, guilty | unreadable))
        other = [np.nan if row in unreadable else -(row + 1.0) for row in range(num)]
        np.testing.assert_array_equal(found.values.get(1, nothing), other)

    with isolated(told(Acts, clean, decoder=decoder_path)) as worker:
        check()


DECODER = """
    import os

    def decode(x_0, context):
        for crash in context["crash"]:
            if crash:
                os.kill(os.getpid(), 11)
        return [None if x[1] < 0 else x for x in x_0]
"""


@pytest.fixture
def decoder_path(tmp_path):
    (tmp_path / "decoder.py").write_text(textwrap.dedent(DECODER))
    return f"{tmp_path / 'decoder.py'}:decode"


def test_a_decoder_that_crashes_costs_its_row_in_every_part_and_no_other(decoder_path):
    one = work([None] * 30, parts=2, keys=True)
    one.events[4, 1] = -1  # decodes to nothing
    with isolated(told(Acts, clean, decoder=decoder_path), retries=1) as worker:
        found = worker.work(replace(one, context={"crash": np.isin(np.arange(30), [3, 20])}))
    assert found.errors == {(DECODE, row): "decoder crashed: signal 11 (SIGSEGV)" for row in (3, 20)}
    answer = expected(30, (3, 20))
    answer[4] = 0.0  # what the reward declares for it
    np.testing.assert_array_equal(found.values[0], answer)
    assert found.found[4] == 0 and np.isnan(found.found[[3, 20]]).all() and np.nansum(found.found) == 27
    assert set(range(30)) - set(found.labels) <= {3, 20}


CROWDED = """
    import os

    def decode(x_0, context):
        if len(x_0) > 4:
            os._exit(1)
        return list(x_0)
"""


def test_a_decoder_or_reward_that_crashes_on_more_than_four_is_fed_by_the_spoon(tmp_path):
    (tmp_path / "crowded.py").write_text(textwrap.dedent(CROWDED))
    one = work(with_bad("segfault", (7, 23)), parts=3)
    with isolated(told(Acts, Crowded, Centred, decoder=f"{tmp_path / 'crowded.py'}:decode")) as worker:
        found = worker.work(one)
    assert found.errors == {(0, row): "crashed: signal 11 (SIGSEGV)" for row in (7, 23)}
    np.testing.assert_array_equal(found.values[0], expected(40, (7, 23)))
    np.testing.assert_array_equal(found.values[1], expected(40))
    np.testing.assert_array_equal(found.values[2], np.arange(40) - 19.5)


class Crowded(Reward):
    def __call__(self, samples):
        return os._exit(1) if len(samples) > 4 else [3.0 * sample[0] + 1 for sample in samples]


class Centred(Reward):
    groupwise = True

    def __call__(self, samples):
        numbers = np.array([sample[0] for sample in samples])
        return numbers - numbers.mean()


class LeaksFor(Reward):
    """Sample 5 keeps 60 MB for ever; every other one needs 60 MB for a moment."""

    def __call__(self, samples):
        for sample in samples:
            taken = bytearray(60 * 10**6)
            if sample[0] == 5:
                HELD.append(taken)
        return [3.0 * sample[0] + 1 for sample in samples]


class Spoils(Reward):
    """Sample 5 spoils the process for whoever comes next."""

    def __call__(self, samples):
        for sample in samples:
            if HELD:
                os.kill(os.getpid(), signal.SIGSEGV)
            if sample[0] == 5:
                HELD.append(bytearray(1))
        return [3.0 * sample[0] + 1 for sample in samples]


@pytest.mark.parametrize("reward", [LeaksFor, Spoils])
def test_an_innocent_sample_does_not_pay_for_its_predecessor(reward):
    with isolated(told(reward), memory_gb=0.1) as worker:
        found = worker.work(work([None] * 20))
    assert not found.errors and found.restarts > 0
    np.testing.assert_array_equal(found.values[0], expected(20))


class Flaky(Reward):
    """Sample 3 fails ``times`` times; sample 6 has no answer. Every call leaves a line in ``log``."""

    def __init__(self, log, times, how) -> None:
        self.log, self.times, self.how = Path(log), times, how

    def __call__(self, samples):
        for sample in samples:
            with self.log.open("a") as log:
                log.write(f"{int(sample[0])}\n")
            if sample[0] == 3 and self.log.read_text().splitlines().count("3") <= self.times:
                {"raise": lambda: throw(RuntimeError("flaky")), "exit": lambda: os._exit(1), "hang": hang}[self.how]()
        return [None if sample[0] == 6 else 3.0 * sample[0] + 1 for sample in samples]


@pytest.mark.parametrize(("how", "times"), [("raise", 2), ("exit", 4), ("hang", 2)])
@pytest.mark.parametrize("retries", [0, 2])
def test_what_failed_is_tried_again_as_often_as_allowed(tmp_path, how, times, retries):
    log = tmp_path / "log"
    reward = told(Flaky, log=str(log), times=times, how=how)
    with isolated(reward, retries=retries, timeout=0.7) as worker:
        found = worker.work(work([None] * 8))
    assert set(found.errors) == ({(0, 5)} if retries else {(0, 2), (0, 5)})
    np.testing.assert_array_equal(found.values[0], expected(8, (5,) if retries else (2, 5)))
    assert retries == 0 or log.read_text().splitlines().count("6") <= 3, "None is an answer, not to be asked for again"


class Spread(Reward):
    """Distance of each sample from the mean of its group."""

    groupwise = True

    def __call__(self, samples):
        numbers = np.array([sample[0] for sample in samples])
        if any(sample[1] for sample in samples):
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(0.5 if len(samples) == 12 else 0)
        return numbers - numbers.mean()


def test_a_group_is_scored_whole_and_fails_whole():
    with isolated(told(Spread, clean), timeout=0.1) as worker:
        good = worker.work(work([None] * 12, parts=2))
        bad = worker.work(work(with_bad("raise", (4,), 9), parts=2, call=1))
    assert not good.errors and good.restarts == 0, "a group has the time of all its samples"
    np.testing.assert_array_equal(good.values[0], np.arange(1, 13) - 6.5)
    assert bad.errors == {(0, row): "crashed: signal 11 (SIGSEGV)" for row in range(9)}
    np.testing.assert_array_equal(bad.values[1], -np.arange(1.0, 10.0))


class Slow(Reward):
    def __init__(self, batch_size=None, building=0.0) -> None:
        self.batch_size = batch_size
        time.sleep(building)

    def __call__(self, samples):
        time.sleep(0.3 * len(samples))
        return [3.0 * sample[0] + 1 for sample in samples]


@pytest.mark.parametrize("batch_size", [None, 4])
def test_slow_is_not_stuck(batch_size):
    with isolated(told(Slow, batch_size=batch_size), timeout=0.9) as worker:
        found = worker.work(work([None] * 5))
    assert not found.errors and found.restarts == 0
    np.testing.assert_array_equal(found.values[0], expected(5))
    np.testing.assert_allclose(found.seconds[0], 0.3, atol=0.2)


# -- processes


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
        ("hang", r"reward 'BadStart' cannot be built: took longer than 2 s \(scoring.startup_timeout\)"),
        ("exit", "SystemExit: bye"),
        ("segfault", r"reward 'BadStart' cannot be built: crashed: signal 11 \(SIGSEGV\)"),
        ("say", r"reward 'BadStart' cannot be built: crashed: exit code 4; its last words: 'no such GPU'"),
    ],
)
def test_a_constructor_that_fails_is_named(how, sentence, marked):
    with isolated(told(BadStart, how=how), startup=2.0) as worker, pytest.raises(ValueError, match=sentence):
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
        ("{file}:f", "import time; time.sleep(99)", r"reward 'it' cannot be imported: took longer than 3 s"),
        ("{file}:f", "f = 3", "is int, not a Reward"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_named(path, code, sentence, tmp_path, marked):
    (tmp_path / "own.py").write_text(code)
    part = Part("it", path.format(file=tmp_path / "own.py"))
    with isolated(Told((part,)), startup=3.0) as worker, pytest.raises(ValueError, match=sentence):
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


@pytest.mark.parametrize("building", [0.0, 1.0])
def test_an_interrupt_of_the_supervisor_ends_the_child_and_later_work_starts_anew(building, marked):
    with isolated(told(Slow, building=building)) as worker:
        if not building:
            worker.start()
        threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
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


@pytest.mark.parametrize("as_list", [True, False])
def test_a_hundred_thousand_rows_neither_block_nor_get_lost(as_list):
    one, rows = work([None] * 100_000, keys=as_list), np.arange(100_000)
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
    with isolated(told(clean), memory_gb=0.02) as worker:
        found = worker.work(work([None] * 2_000_000))
        assert len(found.errors) == 2_000_000 and "out of memory: more than 0.02 GB" in found.errors[0, 0]
        assert not worker.work(work([None] * 20, call=1)).errors


# -- messages, and rewards in this process


@given(st.binary(min_size=1, max_size=200), st.integers(0), st.integers(1, 255))
def test_a_damaged_message_is_never_taken_for_another(message, place, flip):
    sender, receiver = Channel(None, bytes(16)), Channel(None, bytes(16))  # pyright: ignore
    sent = bytearray(sender.header(message) + message)
    sent[place % len(sent)] ^= flip
    receiver.buffer += sent
    with contextlib.suppress(GarbledError):
        assert receiver.next() is None


def test_rewards_in_this_process_survive_every_exception_but_an_interrupt():
    worker = Inline(Told((Part("acts", Acts),)), Limits(retries=1))
    for call, kind in enumerate(("raise", "raise the unprintable", "exit politely", "raise MemoryError", *ANSWERS)):
        found = worker.work(work(with_bad(kind), call=call))
        assert set(found.errors) == {(0, 7), (0, 23)}
        assert re.match({**ACTS, **ANSWERS}[kind][1], found.errors[0, 7])
        np.testing.assert_array_equal(found.values[0], expected(40, (7, 23)))
    with pytest.raises(KeyboardInterrupt):
        worker.work(work(with_bad("interrupt"), call=99))


def test_a_reward_that_has_stopped_answering_is_given_up_on_after_ten_samples_and_tried_again_with_the_next_work():
    worker = Isolated(Told((Part("mute", imports.portable(Mute)),)), Limits(timeout=0.1))
    start = time.monotonic()
    first, second = (worker.work(work_of([float("nan")] * 200)) for _ in range(2))
    answered = worker.work(work_of([1.0] * 20))
    worker.stop()
    assert time.monotonic() - start < 6
    assert len(first.errors) == len(second.errors) == 200
    assert sum("in a row" in reason for reason in first.errors.values()) == 190
    assert sum("in a row" in reason for reason in second.errors.values()) == 199
    assert answered.values[0].tolist() == [1.0] * 20


class Mute:
    """Answers numbers; is silent where there is none."""

    def __call__(self, samples: list[float]) -> list[float]:
        if any(sample != sample for sample in samples):
            time.sleep(60)
        return samples


def work_of(samples: list[float]) -> Work:
    rows = np.arange(len(samples))
    return Work(0, rows, samples, {}, (Task(0, rows),))
