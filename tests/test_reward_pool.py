"""The reward pool on a real Ray: every score in its place, whatever the slicing, and who comes up, grows and ends."""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import ray
from pools import ascending, opened, pool_of, until

from rayft.rewards import pool as pools
from rayft.rewards import roster as rosters
from rayft.score import DECODE

pytestmark = pytest.mark.usefixtures("ray_session")

FINITE = "rayft.reward:as_arrays"  # an event with a NaN decodes to nothing


def value(samples):  # here, for no scoring process can import what a test imports
    return [float(sample[0]) for sample in samples]


def square(samples):
    return np.array([float(sample[0]) ** 2 for sample in samples]), {"length": [len(sample) for sample in samples]}


def fussy(samples):
    if any(sample[0] % 10 == 3 for sample in samples):
        raise RuntimeError("a three")
    return [1.0 for _ in samples]


def slow(samples):
    time.sleep(0.02 * len(samples))
    return value(samples)


def whose(samples):
    time.sleep(0.002 * len(samples))
    return [float(os.getpid())] * len(samples)


def loaded(samples):
    return [float(any(name in sys.modules for name in ("torch", "ray.rllib", "pandas")))] * len(samples)


class Centred:
    """A score that depends on who else is there."""

    groupwise = True

    def __call__(self, samples):
        numbers = np.array(value(samples))
        return numbers - numbers.mean()


class Unlicensed:
    """A reward that cannot be built."""

    def __init__(self, key="none"):
        raise ValueError(f"no licence for key {key}")

    def __call__(self, samples):
        return value(samples)


class Deadly(Unlicensed):
    """A reward whose constructor takes the process with it."""

    def __init__(self):
        os._exit(3)


class Graphic:
    """A reward that wants a GPU."""

    num_gpus = 0.5

    def __call__(self, samples):
        return value(samples)


VALUE, SQUARE, FUSSY, CENTRED, LOADED = range(5)
REWARDS = (value, square, fussy, Centred, loaded)


@pytest.fixture(scope="module")
def three(ray_session):
    """A pool of three actors that no test harms."""
    with opened(*REWARDS, decoder=FINITE, actors=3) as pool:
        yield pool
        assert (pool.num_actors, pool.lost) == (3, 0)


@pytest.fixture
def call():
    """A number that no call before has had."""
    return time.monotonic_ns()


def rows_of(num):
    return np.arange(num)


def processes(pool):
    """Actors and all that they have begun."""
    pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in pool.actors])
    found = [psutil.Process(pid) for pid in pids]
    return found + [child for process in found for child in process.children(recursive=True)]


def plain(outcome):
    """All that an outcome says of a first pass, times apart; as text, where NaN is NaN."""
    columns = outcome.values | outcome.extras | ({"found": outcome.found} if outcome.digests else {})
    told = [outcome.errors, outcome.labels, outcome.digests, outcome.calls]
    return str(
        [sorted(each.items()) for each in told]
        + [(str(key), columns[key].tolist()) for key in sorted(columns, key=str)]
    )


# -- every score in its place


def test_every_score_is_in_its_place_whatever_the_slicing(three, call):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        num = int(rng.integers(1, 3000))
        events = rng.permutation(num).astype(float).reshape(-1, 1)
        events[rng.random(num) < 0.1] = np.nan
        parts = (VALUE, SQUARE, FUSSY)
        wanted = {part: np.flatnonzero(rng.random(num) < rng.random()) for part in parts if rng.random() < 0.7}
        outcome = three.run(events, {}, wanted, call=call + seed)
        asked = np.zeros((3, num), dtype=bool)
        for part, rows in wanted.items():
            asked[part, rows] = True
        numbers = events[:, 0]
        blank = np.where(np.isnan(numbers), 0.0, np.nan)
        threes = numbers % 10 == 3
        expected = [numbers, numbers**2, np.where(threes, np.nan, 1.0)]
        for part in wanted:
            due = np.where(asked[part], np.where(np.isnan(numbers), blank, expected[part]), np.nan)
            np.testing.assert_array_equal(outcome.values.get(part, np.full(num, np.nan)), due)
        assert set(outcome.errors) == {(FUSSY, row) for row in np.flatnonzero(asked[FUSSY] & threes).tolist()}
        np.testing.assert_array_equal(outcome.found, np.where(asked.any(0), 1.0 - np.isnan(numbers), np.nan))


def test_a_pool_without_actors_says_exactly_the_same(three, call):
    events = ascending(500)
    events[::7] = np.nan
    scored = {VALUE: rows_of(500), SQUARE: rows_of(250), FUSSY: rows_of(500)[::3]}
    with opened(*REWARDS, decoder=FINITE, actors=0) as local:
        decoded, other = (pool.run(events, {}, {DECODE: rows_of(500)}, call=call, keys=True) for pool in (three, local))
        assert plain(decoded) == plain(other)
        assert len({digests[VALUE] for digests in decoded.digests.values()}) == 1 + 500 - len(events[::7])
        assert plain(three.run(events, {}, scored, call=call)) == plain(local.run(events, {}, scored, call=call))


def test_two_parts_are_asked_for_different_rows(three, call):
    outcome = three.run(ascending(300), {}, {VALUE: rows_of(300)[:200], SQUARE: rows_of(300)[100:]}, call=call)
    assert np.flatnonzero(~np.isnan(outcome.values[VALUE])).tolist() == list(range(200))
    assert np.flatnonzero(~np.isnan(outcome.values[SQUARE])).tolist() == list(range(100, 300))
    assert outcome.calls == {VALUE: 200, SQUARE: 200}


def test_a_groupwise_reward_sees_all_its_samples_at_once(three, call):
    outcome = three.run(ascending(101), {}, {CENTRED: rows_of(101), VALUE: rows_of(101)}, call=call)
    np.testing.assert_allclose(outcome.values[CENTRED], np.arange(101) - 50.0)
    np.testing.assert_array_equal(outcome.values[VALUE], np.arange(101))


def test_a_child_loads_no_torch(three, call):
    assert three.run(ascending(8), {}, {LOADED: rows_of(8)}, call=call).values[LOADED].tolist() == [0.0] * 8


SLOW_DECODER = """
import time

def decode(x_0, context):
    time.sleep(0.002 * len(x_0))
    return list(x_0)
"""


def test_samples_are_scored_where_they_were_decoded_by_actors_that_load_no_torch(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_DECODER)
    events = ascending(600)
    with opened(whose, loaded, isolate=False, actors=3, decoder=f"{tmp_path}/slow.py:decode") as pool:
        pool.run(events, {}, {DECODE: rows_of(600)}, call=1)
        seats = pool.roster.seats
        pids = {seat.number: ray.get(seat.actor.__ray_call__.remote(lambda _: os.getpid())) for seat in seats}
        decoded = np.array([pids[owner] for owner in pool.owners[1].tolist()])
        scored = pool.run(events, {}, {0: rows_of(600)}, call=1).values[0]
        light = pool.run(ascending(8), {}, {1: rows_of(8)}, call=2).values[1]
    assert np.unique(decoded, return_counts=True)[1].max() < 400  # all three had a share
    assert (scored == decoded).mean() > 0.6  # an actor that has done its own takes from the others
    assert light.tolist() == [0.0] * 8


# -- how many there are


def test_a_pool_grows_with_its_work_and_shrinks_without(monkeypatch):
    monkeypatch.setattr(pools, "BACKLOG", 0.5)
    with opened(slow, actors=3, min_actors=1) as pool:
        assert pool.num_actors == 1
        outcome = pool.run(ascending(120), {}, {0: rows_of(120)}, call=0)
        np.testing.assert_array_equal(outcome.values[0], np.arange(120))
        assert until(lambda: pool.num_actors == 3, 40)
        monkeypatch.setattr(rosters, "IDLE", 0.2)
        time.sleep(0.4)
        pool.run(ascending(4), {}, {0: rows_of(4)}, call=1)
        assert pool.num_actors == 1
        assert pool.lost == 0


@pytest.mark.parametrize("isolate", [True, False])
def test_a_constructor_that_fails_is_quoted(isolate):
    pool = pool_of(Unlicensed, isolate=isolate)
    with pytest.raises(ValueError, match="no licence for key none"):
        pool.start()
    assert not pool.actors


def test_an_actor_that_dies_over_its_rewards_is_no_riddle(monkeypatch):
    monkeypatch.setattr(pools, "ATTEMPTS", 2)
    with pytest.raises(ValueError, match="reward actors died 2 times while they built the rewards: "):
        pool_of(Deadly, isolate=False, actors=1).start()


def test_a_place_that_does_not_exist_is_named_with_what_there_is(monkeypatch):
    monkeypatch.setattr(pools, "PLACING", 0.5)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"within 0\.5 s: each asks for 1000 CPU, and the cluster has 4 CPU \("):
        pool_of(value, num_cpus_per_actor=1000).start()
    with pytest.raises(ValueError, match=r"each asks for 0.1 CPU and 0.5 GPU, .* and 0 GPU \(0 free\)"):
        pool_of(Graphic).start()
    with pytest.raises(ValueError, match=r"each asks for 0.1 CPU and 2 reward, .* and 0 reward \(0 free\)"):
        pool_of(value, resources={"reward": 2}).start()
    assert time.monotonic() - start < 20


def test_rewards_of_one_pool_share_the_gpu_they_ask_for_unless_the_run_says_another_share():
    for told, share in (({}, 0.5), ({"num_gpus_per_actor": 0.25}, 0.25)):
        pool = pool_of(Graphic, Graphic, value, **told)
        assert pool.roster.terms.resources == {"CPU": 0.1, "GPU": share}
        assert not pool.isolate


def test_what_finds_no_room_holds_up_nobody(call):
    pool = pool_of(value, actors=8, num_cpus_per_actor=2)
    pool.start()
    try:
        outcome = pool.run(ascending(100), {}, {0: rows_of(100)}, call=call)
        np.testing.assert_array_equal(outcome.values[0], np.arange(100))
        assert pool.num_actors <= 2
    finally:
        pool.stop()


# -- the end


def test_a_run_that_is_interrupted_leaves_the_pool_usable_and_stop_leaves_no_process():
    with opened(slow) as pool:
        threading.Timer(0.4, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(ascending(900), {}, {0: rows_of(900)}, call=0)
        outcome = pool.run(-ascending(30), {}, {0: rows_of(30)}, call=1)
        np.testing.assert_array_equal(outcome.values[0], -np.arange(30.0))
        assert pool.lost == 0

        stopped = []

        def work():
            with pytest.raises(RuntimeError, match="the reward pool was stopped"):
                pool.run(ascending(900), {}, {0: rows_of(900)}, call=2)
            stopped.append(True)

        busy = threading.Thread(target=work)
        there = processes(pool)
        assert len(there) >= 2 * 2
        busy.start()
        time.sleep(0.4)
        pool.stop()
        busy.join(timeout=10)
        assert stopped
        assert psutil.wait_procs(there, timeout=10)[1] == []
        assert pool.num_actors == 0
