"""Reward actors that die, hang or are late, and nodes that go: nothing is lost, and only the guilty are blamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import ray
from pools import ascending, opened

from rayft.rewards import pool as pools
from rayft.rewards.worker import Limits


def value(samples):  # here, for no scoring process can import what a test imports
    return [float(sample[0]) for sample in samples]


def slow(samples):
    time.sleep(0.02 * len(samples))
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


# -- who dies


@pytest.mark.usefixtures("ray_session")
def test_an_actor_killed_mid_call_loses_nothing_and_blames_nobody():
    with opened(slow) as pool:
        threading.Timer(0.4, lambda: ray.kill(pool.actors[0])).start()
        outcome = pool.run(ascending(100), {}, {0: np.arange(100)}, call=0)
        np.testing.assert_array_equal(outcome.values[0], np.arange(100))
        assert not outcome.errors
        assert pool.lost == 1


@pytest.mark.usefixtures("ray_session")
def test_samples_that_take_their_actor_with_them_are_blamed_and_no_others(monkeypatch):
    monkeypatch.setattr(pools, "ATTEMPTS", 2)
    with opened(fatal, isolate=False) as pool:
        outcome = pool.run(ascending(300), {}, {0: np.arange(300)}, call=0)
    reason = "lost: the reward actor died 2 times under this sample"
    assert outcome.errors == {(0, 37): reason, (0, 202): reason}
    expected = np.arange(300.0)
    expected[[37, 202]] = np.nan
    np.testing.assert_array_equal(outcome.values[0], expected)


# -- who is late


@pytest.mark.usefixtures("ray_session")
def test_a_sample_that_hangs_its_actor_is_timed_out_and_no_other(monkeypatch):
    monkeypatch.setattr(pools, "GRACE", 1.0)
    with opened(stuck, isolate=False, limits=Limits(timeout=0.5)) as pool:
        outcome = pool.run(ascending(60), {}, {0: np.arange(60)}, call=0)
    assert list(outcome.errors) == [(0, 23)]
    assert outcome.errors[0, 23].startswith("timed out: no answer within ")
    assert np.isnan(outcome.values[0]).sum() == 1


@pytest.mark.usefixtures("ray_session")
def test_a_straggler_is_sent_again_and_its_first_answer_counts_once(tmp_path):
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

    with opened(late_once) as pool:
        start = time.monotonic()
        outcome = pool.run(ascending(100), {}, {0: np.arange(100)}, call=0)
        assert time.monotonic() - start < 8
        np.testing.assert_array_equal(outcome.values[0], np.arange(100))
        assert pool.stats["resent"] >= 1
        assert pool.lost == 0
        again = pool.run(ascending(50), {}, {0: np.arange(50)}, call=1)  # one actor is still at it
        np.testing.assert_array_equal(again.values[0], np.arange(50))


# -- whole nodes


NODE_LOSS = """
import json, threading, time
import numpy as np, ray
from ray.cluster_utils import Cluster
from rayft.rewards.pool import RewardPool
from rayft.rewards.settings import Placement
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
