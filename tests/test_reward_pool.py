"""The reward pool on a real Ray: every score in its place, whoever dies, hangs, or is late."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import pytest
import ray

from rayft.rewards import roster as rosters
from rayft.rewards.pool import Placement, RewardPool
from rayft.rewards.worker import Limits
from rayft.score import DECODE, Part, Told

pytestmark = pytest.mark.usefixtures("ray_session")

FINITE = "rayft.reward:as_arrays"  # an event with a NaN decodes to nothing


def value(samples):
    return [float(sample[0]) for sample in samples]


def square(samples):
    return np.array([float(sample[0]) ** 2 for sample in samples]), {"length": [len(sample) for sample in samples]}


def fussy(samples):
    if any(sample[0] % 10 == 3 for sample in samples):
        raise RuntimeError("a three")
    return [1.0 for _ in samples]


def slow(samples):
    time.sleep(0.05 * len(samples))
    return value(samples)


def fatal(samples):
    for sample in samples:
        if sample[0] in (37, 202):
            os._exit(1)
    time.sleep(0.001 * len(samples))
    return value(samples)


def stuck(samples):
    while any(sample[0] == 23 for sample in samples):
        time.sleep(1)
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


def pool_of(*rewards, limits=None, decoder=None, **placement):
    parts = tuple(Part(f"part{i}", found, {}, f"part{i}") for i, found in enumerate(rewards))
    told = {"actors": 2, "num_cpus": 0.1, **placement}
    return RewardPool(Told(parts, decoder), limits or Limits(), Placement(**told))


@pytest.fixture
def opened():
    """Builds, starts, waits until all are up, and stops at the end."""
    pools = []

    def make(*rewards, **told):
        pool = pool_of(*rewards, **told)
        pools.append(pool)
        pool.start()
        until(lambda: pool.num_actors == (pool.placement.min_actors or pool.placement.actors))
        return pool

    yield make
    for pool in pools:
        pool.stop()


def until(holds, seconds=40):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ascending(num):
    return np.arange(float(num)).reshape(-1, 1)


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


def test_every_score_is_in_its_place_whatever_the_slicing(opened):
    pool = opened(value, square, fussy, decoder=FINITE, actors=3)
    for call in range(12):
        rng = np.random.default_rng(call)
        num = int(rng.integers(1, 3000))
        events = rng.permutation(num).astype(float).reshape(-1, 1)
        events[rng.random(num) < 0.1] = np.nan
        wanted = {part: np.flatnonzero(rng.random(num) < rng.random()) for part in range(3) if rng.random() < 0.7}
        outcome = pool.run(events, {}, wanted, call=call)
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
        assert set(outcome.errors) == {(2, row) for row in np.flatnonzero(asked[2] & threes).tolist()}
        np.testing.assert_array_equal(outcome.found, np.where(asked.any(0), 1.0 - np.isnan(numbers), np.nan))


def test_a_pool_without_actors_says_exactly_the_same(opened):
    events = ascending(500)
    events[::7] = np.nan
    scored = {0: rows_of(500), 1: rows_of(250), 2: rows_of(500)[::3]}
    told = []
    for num_actors in (0, 3):
        pool = opened(value, square, fussy, decoder=FINITE, actors=num_actors)
        decoded = pool.run(events, {}, {DECODE: rows_of(500)}, call=5, keys=True)
        told.append((plain(decoded), plain(pool.run(events, {}, scored, call=5))))
    assert told[0] == told[1]


def test_two_parts_are_asked_for_different_rows(opened):
    pool = opened(value, square)
    outcome = pool.run(ascending(300), {}, {0: rows_of(300)[:200], 1: rows_of(300)[100:]}, call=0)
    assert np.flatnonzero(~np.isnan(outcome.values[0])).tolist() == list(range(200))
    assert np.flatnonzero(~np.isnan(outcome.values[1])).tolist() == list(range(100, 300))
    assert outcome.calls == {0: 200, 1: 200}


def test_a_groupwise_reward_sees_all_its_samples_at_once(opened):
    pool = opened(Centred, value)
    outcome = pool.run(ascending(101), {}, {0: rows_of(101), 1: rows_of(101)}, call=0)
    np.testing.assert_allclose(outcome.values[0], np.arange(101) - 50.0)
    np.testing.assert_array_equal(outcome.values[1], np.arange(101))


SLOW_DECODER = """
import time

def decode(x_0, context):
    time.sleep(0.002 * len(x_0))
    return list(x_0)
"""


def test_samples_are_scored_where_they_were_decoded(opened, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_DECODER)
    pool = opened(whose, isolate=False, actors=3, decoder=f"{tmp_path}/slow.py:decode")
    events = ascending(600)
    pool.run(events, {}, {DECODE: rows_of(600)}, call=1)
    pids = {seat.number: ray.get(seat.actor.__ray_call__.remote(lambda _: os.getpid())) for seat in pool.roster.seats}
    decoded = np.array([pids[owner] for owner in pool.owners[1].tolist()])
    scored = pool.run(events, {}, {0: rows_of(600)}, call=1).values[0]
    assert np.unique(decoded, return_counts=True)[1].max() < 400  # all three had a share
    assert (scored == decoded).mean() > 0.6  # an actor that has done its own takes from the others


def test_neither_actor_nor_child_loads_torch(opened):
    for isolate in (True, False):
        outcome = opened(loaded, isolate=isolate).run(ascending(8), {}, {0: rows_of(8)}, call=0)
        assert outcome.values[0].tolist() == [0.0] * 8


# -- who dies


def test_an_actor_killed_mid_call_loses_nothing_and_blames_nobody(opened):
    pool = opened(slow, actors=2)
    threading.Timer(0.7, lambda: ray.kill(pool.actors[0])).start()
    outcome = pool.run(ascending(80), {}, {0: rows_of(80)}, call=0)
    np.testing.assert_array_equal(outcome.values[0], np.arange(80))
    assert not outcome.errors
    assert pool.lost == 1


def test_samples_that_take_their_actor_with_them_are_blamed_and_no_others(opened):
    pool = opened(fatal, isolate=False, attempts=2)
    outcome = pool.run(ascending(300), {}, {0: rows_of(300)}, call=0)
    reason = "lost: the reward actor died 2 times under this sample"
    assert outcome.errors == {(0, 37): reason, (0, 202): reason}
    expected = np.arange(300.0)
    expected[[37, 202]] = np.nan
    np.testing.assert_array_equal(outcome.values[0], expected)


def test_a_sample_that_hangs_its_actor_is_timed_out_and_no_other(opened):
    pool = opened(stuck, isolate=False, limits=Limits(timeout=0.5))
    outcome = pool.run(ascending(60), {}, {0: rows_of(60)}, call=0)
    assert list(outcome.errors) == [(0, 23)]
    assert outcome.errors[0, 23].startswith("timed out: no answer within ")
    assert np.isnan(outcome.values[0]).sum() == 1


# -- who is late


def test_a_straggler_is_sent_again_and_its_first_answer_counts_once(opened, tmp_path):
    flag = str(tmp_path / "once")

    def late_once(samples):
        for sample in samples:
            if sample[0] == 90:
                try:
                    os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                time.sleep(12)
        return value(samples)

    pool = opened(late_once, actors=2)
    start = time.monotonic()
    outcome = pool.run(ascending(100), {}, {0: rows_of(100)}, call=0)
    assert time.monotonic() - start < 8
    np.testing.assert_array_equal(outcome.values[0], np.arange(100))
    assert pool.stats["resent"] >= 1
    assert pool.lost == 0
    again = pool.run(ascending(50), {}, {0: rows_of(50)}, call=1)  # one actor is still at it
    np.testing.assert_array_equal(again.values[0], np.arange(50))


def test_a_pool_grows_with_its_work_and_shrinks_without(opened, monkeypatch):
    pool = opened(slow, actors=3, min_actors=1)
    assert pool.num_actors == 1
    outcome = pool.run(ascending(150), {}, {0: rows_of(150)}, call=0)
    np.testing.assert_array_equal(outcome.values[0], np.arange(150))
    until(lambda: pool.num_actors == 3)
    monkeypatch.setattr(rosters, "IDLE", 0.2)
    time.sleep(0.4)
    pool.run(ascending(4), {}, {0: rows_of(4)}, call=1)
    assert pool.num_actors == 1
    assert pool.lost == 0


# -- who never comes up


@pytest.mark.parametrize("isolate", [True, False])
def test_a_constructor_that_fails_is_quoted(isolate):
    pool = pool_of(Unlicensed, isolate=isolate)
    with pytest.raises(ValueError, match="no licence for key none"):
        pool.start()
    assert not pool.actors


def test_an_actor_that_dies_over_its_rewards_is_no_riddle():
    with pytest.raises(ValueError, match="reward actors died 2 times while they built the rewards: "):
        pool_of(Deadly, isolate=False, actors=1, attempts=2).start()


def test_a_place_that_does_not_exist_is_named_with_what_there_is():
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"within 1 s: each asks for 1000 CPU, and the cluster has 4 CPU \("):
        pool_of(value, num_cpus=1000, startup_s=1).start()
    with pytest.raises(ValueError, match=r"each asks for 0.1 CPU and 0.5 GPU, .* and 0 GPU \(0 free\)"):
        pool_of(Graphic, startup_s=1).start()
    assert time.monotonic() - start < 20


def test_what_finds_no_room_holds_up_nobody(opened):
    pool = pool_of(value, actors=8, num_cpus=2)
    pool.start()
    try:
        outcome = pool.run(ascending(100), {}, {0: rows_of(100)}, call=0)
        np.testing.assert_array_equal(outcome.values[0], np.arange(100))
        assert pool.num_actors <= 2
    finally:
        pool.stop()


# -- the end


def test_stop_leaves_no_process(opened):
    pool = opened(slow)
    pool.run(ascending(20), {}, {0: rows_of(20)}, call=0)

    def work():
        with pytest.raises(RuntimeError, match="the reward pool was stopped"):
            pool.run(ascending(900), {}, {0: rows_of(900)}, call=1)

    busy = threading.Thread(target=work)
    there = processes(pool)
    assert len(there) >= 2 * 2
    busy.start()
    time.sleep(0.5)
    pool.stop()
    busy.join(timeout=10)
    assert not busy.is_alive()
    assert psutil.wait_procs(there, timeout=10)[1] == []
    assert pool.num_actors == 0


def test_a_run_that_is_interrupted_leaves_the_pool_usable(opened):
    pool = opened(slow)
    threading.Timer(0.6, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(ascending(600), {}, {0: rows_of(600)}, call=0)
    outcome = pool.run(-ascending(30), {}, {0: rows_of(30)}, call=1)
    np.testing.assert_array_equal(outcome.values[0], -np.arange(30.0))
    assert pool.lost == 0


NODE_LOSS = """
import json, threading, time
import numpy as np, ray
from ray.cluster_utils import Cluster
from rayft.rewards.pool import Placement, RewardPool
from rayft.rewards.worker import Limits
from rayft.score import Part, Told

def slow(samples):
    time.sleep(0.05 * len(samples))
    return [float(sample[0]) for sample in samples]

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, logging_level=50, log_to_driver=False)
pool = RewardPool(Told((Part("slow", slow),)), Limits(), Placement(actors=3))
pool.start()
while pool.num_actors < 3:
    time.sleep(0.05)
home = lambda _: ray.get_runtime_context().get_node_id()
homes = ray.get([seat.actor.__ray_call__.remote(home) for seat in pool.roster.seats])
threading.Timer(1.5, lambda: cluster.remove_node(node, allow_graceful=False)).start()
start = time.monotonic()
outcome = pool.run(np.arange(240.0).reshape(-1, 1), {}, {0: np.arange(240)}, call=0)
seconds = time.monotonic() - start
ended = time.monotonic()
while (alive := [n["NodeID"] for n in ray.nodes() if n["Alive"]]) and len(alive) > 1 and time.monotonic() - ended < 30:
    time.sleep(0.05)
gone = sum(home not in alive for home in homes)
cluster.add_node(num_cpus=2)
while pool.num_actors < 3 and time.monotonic() - ended < 60:
    time.sleep(0.05)
seen = {"right": outcome.values[0].tolist() == list(range(240)), "errors": len(outcome.errors), "lost": pool.lost}
seen |= {"gone": gone, "seconds": seconds, "again": pool.num_actors}
pool.stop()
print("SEEN" + json.dumps(seen), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_lost_mid_call_loses_nothing_and_its_actors_come_back_with_the_next():
    with tempfile.TemporaryDirectory(prefix="ray") as apart:  # or another Ray on this machine would join the cluster
        told = {"capture_output": True, "text": True, "env": os.environ | {"RAY_TMPDIR": apart}}
        done = subprocess.run([sys.executable, "-c", NODE_LOSS], **told)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.partition("SEEN")[2].splitlines()[0])
    assert (seen["right"], seen["errors"], seen["gone"], seen["lost"], seen["again"]) == (True, 0, 2, 2, 3)
