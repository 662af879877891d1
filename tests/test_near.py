"""Chains that stay with remote runners: learned from as if they had come by the driver, and drawn again if lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import ray
from ray.exceptions import RayError

from rayft.algorithms import chains as chain_algorithms
from rayft.algorithms.grpo import GRPOConfig
from rayft.algorithms.pcl import PCLConfig
from rayft.algorithms.ppo import PPOConfig
from rayft.algorithms.rwmle import RWMLEConfig
from rayft.algorithms.rwmle import credited as weighted
from rayft.draws import Afar
from rayft.rl.near import Lost, credited, node_of

EVEN = partial(weighted, weight=np.ones(32))  # workers import it: a test's own function they could not
CONFIGS = {"ppo": PPOConfig, "grpo": GRPOConfig, "rwmle": RWMLEConfig, "pcl": PCLConfig}


def small(name="ppo", learners=1, **training):
    """Two runners; chains stay with them where there are learners."""
    told = {"chains": 32, "minibatch_size": 32, "precision": "float64", "alpha": 0.2, **training}
    config = CONFIGS[name]().domain("toy").reward("quadratic").chain(num_steps=8).training(**told)
    config.env_runners(num_env_runners=2, num_cpus_per_env_runner=0.5)
    config.learners(num_learners=learners, num_cpus_per_learner=0.5)
    return config.evaluate(every=0, chains=16, pretrained_chains=16)


def trained(config, iterations=2):
    algo = config.build_algo()
    try:
        rows = [algo.train() for _ in range(iterations)]
        told = [{k: row[k] for k in ("reward_mean", "kl", "reward_calls_lifetime") if k in row} for row in rows]
        return algo.policy_state(), told
    finally:
        algo.stop()


def same(one, other, tolerance=1e-10):
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=tolerance, err_msg=name)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["ppo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("grpo", "rwmle", "pcl"))])
def test_learning_from_chains_that_stay_is_learning_from_chains_that_came(name):
    near, told = trained(small(name, learners=0))
    afar, told_afar = trained(small(name, learners=1))
    same(near, afar)
    assert told == told_afar


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_learners_finish_with_a_batch_that_does_not_divide_evenly():
    """33 chains of 8 transitions in minibatches of 32: 8 whole ones, and a rest that nobody waits for."""
    one, told = trained(small(learners=0, chains=33))
    two, told_two = trained(small(learners=2, chains=33))
    same(one, two)
    assert told == told_two


@pytest.fixture(scope="module")
def algo(ray_session):
    made = small().build_algo()
    yield made
    made.stop()


def test_the_driver_holds_a_reference_for_every_learner_and_no_chain(algo):
    credit, _ = algo.experience()
    assert [isinstance(ref, ray.ObjectRef) for ref in credit.chains] == [True]
    assert ray.get(credit.chains[0]).num_chains == 32


def test_nobody_sends_chains_for_a_verdict(algo):
    draw = algo.collect("evaluate", chain_algorithms.draw_current, 16, chains="dropped")
    assert draw.chains is None
    assert draw.kl.shape == (16,)
    assert draw.events.shape == (16, 2)


def test_what_credit_raises_comes_back_as_it_is_and_a_lost_part_as_lost(algo):
    draw = algo.collect("train", algo.draw_function(), 32, chains="stay")
    group, here = algo.learner_group, [node_of(None)]

    with pytest.raises(ValueError, match="could not be broadcast"):
        credited(group, partial(weighted, weight=np.ones(31)), draw.chains.refs, here)
    kill_runners(algo, draw)
    with pytest.raises(Lost):
        credited(group, EVEN, draw.chains.refs, here)


def test_chains_that_die_with_their_runners_are_drawn_again_the_same_and_paid_once(algo):
    pieces = algo.draw_scored(algo.iteration)
    draw, scores = chain_algorithms.join([p.draw for p in pieces]), algo.settled([p.scores for p in pieces])
    whole = algo.credit(draw, scores.rewards)
    expected, paid = ray.get(whole.chains[0]), algo.counts["reward_calls"]
    kill_runners(algo, draw)
    credit, again, same_scores = algo.credit_whole(draw, scores)
    assert isinstance(again.chains, Afar)
    assert same_scores is scores
    found = ray.get(credit.chains[0])
    np.testing.assert_array_equal(found.x, expected.x)
    np.testing.assert_array_equal(found.columns["advantage"], expected.columns["advantage"])
    assert algo.counts["reward_calls"] == paid


def test_a_runner_that_ray_itself_starts_anew_does_not_draw_from_the_weights_it_was_born_with(algo):
    """Ray does so behind RLlib's back, which then takes it for the one it knew."""
    weights = algo.policy_state()
    algo.set_policy({name: 0.9 * value for name, value in weights.items()})
    expected = algo.collect("train", algo.draw_function(), 32)
    kill_runners(algo, algo.collect("train", algo.draw_function(), 32, chains="stay"))
    for actor in algo.env_runner_group._worker_manager.actors().values():
        wait_for_start(actor)
    drawn = algo.collect("train", algo.draw_function(), 32)
    algo.set_policy(weights)
    np.testing.assert_array_equal(drawn.chains.x, expected.chains.x)


def test_chains_that_come_out_differently_are_scored_again(algo):
    """As with ``staleness``, where weights have moved on since the lost ones were drawn."""
    draw = algo.collect("train", algo.draw_function(), 32, iteration=7, chains="stay")
    scores = algo.score(draw)
    kill_runners(algo, draw)
    weights = algo.policy_state()
    algo.set_policy({name: 0.9 * value for name, value in weights.items()})
    credit, again, fresh = algo.credit_whole(draw, scores)
    algo.set_policy(weights)
    assert (again.events != draw.events).any()
    np.testing.assert_allclose(fresh.rewards, algo.score(again).rewards)
    np.testing.assert_array_equal(ray.get(credit.chains[0]).x_0, again.events)


def kill_runners(algo, draw):
    """Returns when what they held is gone."""
    pids = algo.env_runner_group.foreach_env_runner(lambda runner: os.getpid(), local_env_runner=False)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Lost):
        wait_for_loss(algo, draw.chains.refs)


def wait_for_loss(algo, refs):
    until = time.monotonic() + 30
    while time.monotonic() < until:
        credited(algo.learner_group, EVEN, refs, [node_of(None)])
        time.sleep(0.05)


def wait_for_start(actor):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(RayError):
            return ray.get(actor.ping.remote())
        time.sleep(0.1)
    raise AssertionError("the runner did not come back")
