"""The supply of pay-off shards: the same bits whoever draws them, made once, ahead of need, and again where lost."""

import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import ray
from ray.exceptions import RayError

from rayft.algorithms.rgdm import make_source
from rayft.compose import recipe
from rayft.domain import build
from rayft.payoff.bank import open_bank
from rayft.payoff.pairs import Aim
from rayft.rewards.service import RewardService
from rayft.rewards.settings import ScoringSettings
from rayft.supply import Supply, Terms

AIM = Aim(4, (1.0,), "sigma", "x0_hat", "mean", "importance", 0, None)
PAIRS = 64


source = partial(make_source, ("toy", {}), ("beta", 1.0, None), "float32", AIM, PAIRS, 0, ("quadratic", {}))


@pytest.fixture(scope="module")
def service(ray_session):
    world = build("toy", {})
    made = RewardService(
        recipe("quadratic", {}, None, world.rewards), world.decoder, world.canonical, world.rewards, ScoringSettings()
    )
    made.start()
    yield made
    made.stop()


@pytest.fixture
def opened(service):
    supplies = []

    def open_one(bank=None, actors=0, lead=2, num_shards=None, make=source):
        supplies.append(Supply(make, service, bank, Terms(actors, lead, num_shards, 0, num_cpus=0.5)))
        return supplies[-1]

    yield open_one
    for supply in supplies:
        supply.close()


def manifest():
    return {"what": "test", "shard_pairs": PAIRS}


def calls(supply):
    return sum(scores.num_calls for scores in supply.drain())


def same(a, b):
    for name in ("number", "seed", "num_calls"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("x_0", "t", "eps_star", "rewards", "mean_ref"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_shard_is_the_same_from_the_driver_from_actors_and_from_a_bank(opened, tmp_path):
    here, away = opened(), opened(actors=1)
    kept = opened(open_bank(tmp_path, manifest()), actors=1)
    for number in (0, 1, 2):
        shards = [supply.take(number) for supply in (here, away, kept)]
        same(shards[0], shards[1])
        same(shards[0], shards[2])
    assert calls(here) == 3 * PAIRS * 4


def test_a_finished_bank_pays_nothing_and_is_read_in_another_order_each_time(opened, tmp_path):
    bank = open_bank(tmp_path, manifest())
    first = opened(bank, num_shards=5)
    order = [first.take(position).number for position in range(15)]
    assert order[:5] == [0, 1, 2, 3, 4]
    assert sorted(order[5:10]) == sorted(order[10:15]) == [0, 1, 2, 3, 4]
    assert len({tuple(order[i : i + 5]) for i in (0, 5, 10)}) > 1
    assert calls(first) == 5 * PAIRS * 4
    second = opened(bank, num_shards=5)
    assert [second.take(position).number for position in range(15)] == order
    assert calls(second) == 0 and second.missing(0, 15) == 0


def test_without_a_bank_what_is_read_again_is_kept_in_memory(opened):
    supply = opened(num_shards=2)
    for position in range(6):
        supply.take(position)
    assert calls(supply) == 2 * PAIRS * 4


def test_two_readers_of_one_bank_make_each_shard_once(opened, tmp_path):
    supplies = [opened(open_bank(tmp_path, manifest())) for _ in range(3)]

    def read(supply):
        for number in range(6):
            supply.take(number)

    threads = [threading.Thread(target=read, args=(supply,)) for supply in supplies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(calls(supply) for supply in supplies) == 6 * PAIRS * 4


def test_actors_run_ahead_by_the_lead_and_no_further(opened, tmp_path):
    bank = open_bank(tmp_path, manifest())
    supply = opened(bank, actors=1, lead=3)
    supply.take(0)
    until(lambda: all(bank.has(number) for number in range(4)))
    time.sleep(0.2)
    assert not bank.has(4)
    supply.last = 5
    for position in range(1, 5):
        supply.take(position)
    time.sleep(0.2)
    assert not bank.has(5)  # the run ends there


def test_a_lost_actor_is_replaced_and_its_shard_made_again(opened):
    supply, wanted = opened(actors=1, lead=0), opened()
    same(supply.take(0), wanted.take(0))
    pid: int = ray.get(supply.actors[0].__ray_call__.remote(lambda actor: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    same(supply.take(1), wanted.take(1))


@pytest.mark.parametrize("actors", [0, 1])
def test_what_is_wrong_with_a_source_is_said_and_not_tried_for_ever(opened, actors):
    def broken():
        raise ValueError("the data set gave 0 of 64 events: is it empty?")

    supply = opened(actors=actors, make=broken)
    with pytest.raises(ValueError, match="is it empty") as found:
        supply.take(0)
    assert not isinstance(found.value, RayError), "a run would start again at a lost process"


def until(true, seconds=15.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
