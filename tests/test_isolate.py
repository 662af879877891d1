"""Isolated scoring: whatever a sample does to its process, it alone is blamed, and every other number is exact."""

from __future__ import annotations

import itertools
import os
import re
import signal
import textwrap
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from acts import ACTS, ANSWERS, HELD, KINDS, Acts, Slow, clean, hang, throw
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import expected, isolated, num_marked, told, with_bad, work

from rayft.reward import Reward
from rayft.rewards.worker import Inline, Limits
from rayft.score import DECODE, Part, Task, Told, Work


@pytest.fixture(scope="module")
def long_lived():
    """One worker that lives through every bad behaviour, and the mark of its processes."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_TEST_MODULE_MARK", mark)
        with isolated(told(Acts, clean), timeout=0.5, memory_gb=0.5) as worker:
            yield worker, mark


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
    with isolated(told(Acts), timeout=0.5) as worker:
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


@pytest.mark.parametrize(
    ("how", "times", "retries"),
    [
        ("raise", 2, 0),
        ("raise", 2, 2),
        ("exit", 4, 0),
        ("exit", 4, 2),
        pytest.param("hang", 2, 0, marks=pytest.mark.slow),
        ("hang", 2, 2),
    ],
)
def test_what_failed_is_tried_again_as_often_as_allowed(tmp_path, how, times, retries):
    log = tmp_path / "log"
    reward = told(Flaky, log=str(log), times=times, how=how)
    with isolated(reward, retries=retries, timeout=0.4) as worker:
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


@pytest.mark.parametrize("batch_size", [None, 4])
def test_slow_is_not_stuck(batch_size):
    with isolated(told(Slow, batch_size=batch_size), timeout=0.5) as worker:
        found = worker.work(work([None] * 5))
    assert not found.errors and found.restarts == 0
    np.testing.assert_array_equal(found.values[0], expected(5))
    np.testing.assert_allclose(found.seconds[0], 0.15, atol=0.1)


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
    start = time.monotonic()
    with isolated(told(Mute), timeout=0.1) as worker:
        first, second = (worker.work(work_of([float("nan")] * 200)) for _ in range(2))
        answered = worker.work(work_of([1.0] * 20))
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
