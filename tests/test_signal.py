"""What is read on the way says all of the sample at the end of the chain, and nothing at its start."""

import numpy as np
import pytest
import torch

from envs.toy.domain import Toy
from envs.toy.masked import MaskedToy
from envs.toy.reward import Quadratic, Stripes
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process
from rayft.payoff.pairs import Aim
from rayft.payoff.signal import MIN_PROBES, probe, signal


def read(domain, reward, reward_at="x0_hat", num=2000):
    """The signal of a reward on data, and the events that were asked about."""
    net = domain.denoiser().requires_grad_(False)
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    bench = Bench(domain, policy, policy, torch.device("cpu"), torch.float32)
    x_0, context = domain.data(num, torch.Generator().manual_seed(0))
    question, t = probe(bench, x_0, context, Aim(8, (1.0,), "sigma", reward_at, "mean", "importance", 0, None), 3)
    known = np.array([float(one) for one in reward([x.numpy() for x in x_0[: len(t)]])])
    found = np.array([float(one) for one in reward([x.numpy() for x in question.events])])
    return signal(known, found, t, policy.process.num_steps), question


def test_a_smooth_reward_is_read_early_and_narrow_stripes_only_at_the_end():
    smooth, _ = read(Toy(), Quadratic())
    narrow, _ = read(Toy(), Stripes(0.25))
    assert list(smooth) == [f"{5 * i + 1}-{5 * i + 5}" for i in range(10)]
    assert smooth["1-5"] > 0.9
    assert smooth["11-15"] > 0.5
    assert narrow["1-5"] > 0.3
    assert abs(narrow["31-35"]) < 0.3  # three standard errors


def test_a_timestep_costs_one_score_for_each_of_its_samples():
    _, question = read(Toy(), Quadratic())
    assert len(question.events) == 1000
    _, few = read(Toy(), Quadratic(), num=250)
    assert len(few.events) == 250


def test_padding_stays_empty_where_the_space_says_so():
    domain = MaskedToy()
    told, question = read(domain, lambda events: [np.square(x).sum() for x in events], "x_prev", 400)
    projected = domain.space.project(question.events, question.context)
    assert torch.allclose(projected, question.events, atol=1e-6)
    assert told


@pytest.mark.parametrize("broken", ["known", "read"])
def test_failed_scores_are_left_out(broken):
    rng = np.random.default_rng(0)
    known, t = rng.standard_normal(400), np.repeat(np.arange(1, 5), 100)
    columns = {"known": known.copy(), "read": 2 * known}
    columns[broken][: 100 - MIN_PROBES + 1] = np.nan  # one too few are left at t = 1
    assert signal(columns["known"], columns["read"], t, 4) == pytest.approx({"2": 1.0, "3": 1.0, "4": 1.0})


def test_a_reading_that_does_not_differ_says_nothing():
    known, t = np.arange(100.0), np.ones(100, dtype=int)
    assert signal(known, np.ones(100), t, 1) == {"1": 0.0}
    assert signal(np.ones(100), known, t, 1) == {}
