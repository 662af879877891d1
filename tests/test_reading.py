"""A bank read at another temperature or radius says what a bank drawn for it would have said."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from envs.toy.masked import MaskedToy
from rayft import losses
from rayft.bench import Bench
from rayft.chain import Policy, expand, reverse_process
from rayft.domain import Denoiser, Domain
from rayft.payoff.pairs import Aim
from rayft.payoff.reading import View, cut, read
from rayft.payoff.source import Answer, Source
from rayft.payoff.weight import Running, bin_of, effective_size, name_of
from rayft.schedule import linear
from rayft.space import squared_norm

RADII = (0.25, 0.5, 0.75, 1.0, 1.25)
TEMPERATURES = {2: (0.2, 0.5, 1.0, 5.0), 60: (4.0, 6.0, 10.0, 30.0)}
NUM_STEPS = 10


class Shrink(Denoiser):
    """E[x_0 | x_t] of standard normal data, exactly."""

    prediction = "x0"

    def __init__(self, alpha_bar):
        super().__init__()
        self.register_buffer("alpha_bar", alpha_bar)

    def forward(self, x_t, timestep, context):
        return expand(self.alpha_bar[timestep].sqrt(), x_t) * x_t


class Normal(Domain):
    """Standard normal data in any dimension."""

    def __init__(self, dim):
        self.event_shape = (dim,)

    def schedule(self):
        return linear(NUM_STEPS, 0.02, 0.6)

    def denoiser(self):
        return Shrink(self.schedule().alpha_bar)

    def data(self, num_events, generator):
        return torch.randn(num_events, *self.event_shape, generator=generator, dtype=torch.float64), {}


def bench(domain, dtype=torch.float64):
    net = domain.denoiser().to(dtype).requires_grad_(False)
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    return Bench(domain, policy, policy, torch.device("cpu"), dtype)


def aim(num, radii, at="x_prev", sampler="importance"):
    return Aim(num, radii, "sigma", at, "mean", sampler, 5, None)


def quadratic(x):
    return -np.square(x - 0.5).sum(-1)


def made(b, told, num_pairs, reward=quadratic, seed=0, number=0):
    """One shard."""
    source = Source(b, told, num_pairs, seed, slope=lambda x, context: -(x - 0.5).square().flatten(1).sum(1))
    said = source.begin(number)
    while True:
        said = source.go_on(number, Answer(reward(said.events.reshape(len(said.events), -1)), {}, len(said.events)))
        if hasattr(said, "eps_star"):
            return said


def reading(b, shard, told, **view):
    process = b.reference.process
    full = {"temperature": 0.5, "radius": 1.0, "normalise": "batch", "timestep_weight": "vlb", "anchor": False, **view}
    rows = cut(shard, slice(None), process, b.domain.space, told)
    return read([rows], View(**full), told, process, Running())


def loss_and_gradient(b, shard, told, found, theta):
    """(loss, d loss / d theta) per row, over all candidates, of a policy that is off the pretrained mean by theta."""
    rows = cut(shard, slice(None), b.reference.process, b.domain.space, told)
    sigma = b.reference.sigma(torch.from_numpy(rows["t"])).numpy()
    away = rows["centre"][:, None] + rows["eps_star"] - rows["mean_ref"][:, None] - theta
    loss = (found.weight * np.square(away).sum(-1)).mean(1) / (2 * sigma**2)
    folded = found.chains.columns["weight"][0] * (rows["mean_ref"] + theta - found.chains.x[0]).sum(-1) / sigma**2
    return np.stack([loss, folded], -1)


@pytest.mark.parametrize("dim", [2, 60])
def test_twenty_temperatures_and_radii_from_one_bank_are_those_of_banks_drawn_for_each(dim):
    b, n = bench(Normal(dim)), 12_000
    told = aim(20, RADII)
    bank = made(b, told, n)
    calls = bank.num_calls
    misses = []
    for d in RADII:
        own = made(b, aim(4, (d,)), n, seed=1)
        for tau in TEMPERATURES[dim]:
            means, errors = [], []
            for shard, which in ((bank, told), (own, aim(4, (d,)))):
                found = reading(b, shard, which, temperature=tau, radius=d)
                values = loss_and_gradient(b, shard, which, found, 0.1)
                level = found.weight.mean(1)[:, None]  # mean 1: the ratio estimator's error
                means.append(values.mean(0))
                errors.append((values - level * values.mean(0)).std(0) / math.sqrt(n))
            misses.append(np.abs(means[0] - means[1]) / np.hypot(*errors))
    misses = np.array(misses)
    assert misses.max() < 4.0 and (misses > 3).mean() <= 0.05, misses  # 40 figures: one beyond 3 errors is chance
    assert np.sqrt((misses**2).mean()) < 1.5
    assert bank.num_calls == calls == 20 * n


def test_a_radius_read_with_too_few_candidates_shows_in_the_effective_size():
    b, told = bench(Normal(60)), aim(20, RADII)
    shard = made(b, told, 1000)
    near, between = (reading(b, shard, told, temperature=1e6, radius=d).effective for d in (1.0, 0.93))
    assert sum(near.values()) == pytest.approx(4 * 1000, rel=0.02)  # a fifth of all candidates, equally weighted
    assert sum(between.values()) < 0.05 * sum(near.values())


def test_effective_sizes_by_hand():
    weight, bins = np.array([[1.0, 1.0], [2.0, 0.0], [1.0, 3.0]]), np.array([0, 0, 1])
    assert effective_size(weight, bins) == pytest.approx({0: 16 / 6, 1: 1.6})
    assert bin_of(np.array([1, 5, 6, 50]), 50).tolist() == [0, 0, 1, 9]
    assert [name_of(label, 50) for label in (0, 9)] == ["1-5", "46-50"]
    assert [name_of(label, 4) for label in range(4)] == ["1", "2", "3", "4"]
    for steps in (7, 20, 33, 1000):
        for label in range(min(10, steps)):
            first, _, last = name_of(label, steps).partition("-")
            assert bin_of(np.array([int(first), int(last or first)]), steps).tolist() == [label, label]


@pytest.mark.parametrize("weighting", ["vlb", "simple"])
def test_without_tilt_and_radius_the_loss_and_its_gradient_are_ddpms(weighting):
    """tau -> inf, d = 0:  L = factor c_t^2 / (2 sigma_t^2) |eps - eps_theta|^2."""
    b, told = bench(Normal(3)), aim(1, (0.0,))
    shard = made(b, told, 500)
    found = reading(b, shard, told, temperature=1e12, radius=0.0, timestep_weight=weighting)
    rows = {k: torch.from_numpy(np.array(v)) for k, v in found.chains.gather(np.arange(500)).items()}
    process, t, x_t = b.reference.process, rows["t"], rows["x_t"]
    ab = process.schedule.alpha_bar[t]
    eps = (x_t - expand(ab.sqrt(), x_t) * torch.from_numpy(np.array(shard.x_0))) / expand((1 - ab).sqrt(), x_t)
    eps_theta = torch.randn(500, 3, dtype=torch.float64, requires_grad=True)
    keep, gain, _, _ = process.linear_in("eps")
    mean = expand(keep[t], x_t) * x_t + expand(gain[t], x_t) * eps_theta
    loss = losses.weighted_mle_loss(mean, rows["x_prev"], process.sigma[t], rows["weight"])
    c, sigma = process.eps_gain[t], process.sigma[t]
    factor = c**2 / (2 * sigma**2) if weighting == "vlb" else torch.ones(500).double()
    wanted = factor * squared_norm(eps - eps_theta)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-9)
    (own,), (theirs,) = (torch.autograd.grad(one.sum(), eps_theta) for one in (loss, wanted))
    torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalise", ["batch", "candidates"])
@pytest.mark.parametrize("sampler", ["importance", "annealing"])
def test_anchoring_keeps_the_gradients_mean_and_takes_most_of_its_noise(normalise, sampler):
    b, n = bench(Normal(2)), 20_000
    told = aim(4, (1.0,), sampler=sampler)
    shard = made(b, told, n)
    gradients = {}
    for anchor in (False, True):
        found = reading(b, shard, told, temperature=3.0, normalise=normalise, anchor=anchor)
        rows = {k: torch.from_numpy(np.array(v)) for k, v in found.chains.gather(np.arange(n)).items()}
        mean, sigma = (rows["mean_ref"] + 0.05).requires_grad_(), b.reference.sigma(rows["t"])
        if anchor:
            loss = losses.pull_loss(mean, rows["mean_ref"], rows["shift"], rows["weight"], sigma)
        else:
            loss = losses.weighted_mle_loss(mean, rows["x_prev"], sigma, rows["weight"])
        gradients[anchor] = torch.autograd.grad(loss.sum(), mean)[0].numpy()
    gap = gradients[True] - gradients[False]
    assert np.all(np.abs(gap.mean(0)) < 4 * gap.std(0) / math.sqrt(n))
    assert gradients[True].var(0).sum() < 0.6 * gradients[False].var(0).sum()


def test_anchored_rows_pull_nowhere_where_the_reward_says_nothing():
    b, told = bench(Normal(2)), aim(4, (1.0,))
    shard = made(b, told, 200, reward=lambda x: np.zeros(len(x)))
    columns = reading(b, shard, told, anchor=True).chains.columns
    assert np.abs(columns["shift"]).max() < 1e-12
    assert columns["weight"] == pytest.approx(1.0)


def test_the_anchor_is_the_plain_loss_where_nothing_is_subtracted():
    """pull_loss with weight W and shift W (x - mu_pre) has the gradient of W |x - mu|^2 / (2 sigma^2)."""
    g = torch.Generator().manual_seed(0)
    x, ref, mean = (torch.randn(7, 2, 3, dtype=torch.float64, generator=g) for _ in range(3))
    weight, sigma = (
        torch.rand(7, dtype=torch.float64, generator=g),
        torch.rand(7, dtype=torch.float64, generator=g) + 0.1,
    )
    mean.requires_grad_()
    one = losses.pull_loss(mean, ref, weight[:, None, None] * (x - ref), weight, sigma)
    other = losses.weighted_mle_loss(mean, x, sigma, weight)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), mean)[0] for loss in (one, other)))


@pytest.mark.parametrize("normalise", ["batch", "candidates", "timestep", "none"])
def test_searched_candidates_carry_no_weight_of_their_own(normalise):
    """q_pd's own draws weighted by exp(r/tau) as well would train at tau/2; pairs may carry Z."""
    b, told = bench(Normal(2)), aim(3, (1.0,), sampler="annealing")
    shard = made(b, told, 50)
    weight = reading(b, shard, told, normalise=normalise).weight
    assert np.all(weight == weight[:, :1])
    z = np.exp(shard.start / 0.5).mean(1)
    if normalise == "candidates":
        assert np.all(weight == 1)
    elif normalise == "batch":
        assert weight[:, 0] == pytest.approx(z / z.mean())


def test_a_running_normaliser_sees_all_that_came_before():
    running, rng = Running(), np.random.default_rng(0)
    rows = [rng.normal(size=(40, 3)) * 2 for _ in range(5)]
    bins = [rng.integers(0, 3, 40) for _ in range(5)]
    for some, where in zip(rows, bins, strict=True):
        told = running.add(where, some)
    all_rows, all_bins = np.concatenate(rows), np.concatenate(bins)
    for label in range(3):
        wanted = np.log(np.exp(all_rows[all_bins == label]).mean())
        assert told[bins[-1] == label] == pytest.approx(wanted)


def test_failed_candidates_weigh_nothing_and_silent_timesteps_are_named():
    b, told = bench(Normal(2)), aim(4, (1.0,))
    shard = made(b, told, 300)
    shard.rewards.setflags(write=True)
    shard.rewards[shard.t == 7] = np.nan
    shard.rewards[0, 1] = np.nan
    found = reading(b, shard, told)
    assert found.silent == [7]
    assert found.weight[0, 1] == 0 and found.weight[shard.t == 7].max() == 0
    assert np.isfinite(found.chains.x).all() and np.isfinite(found.chains.columns["weight"]).all()


def test_candidates_that_share_a_reward_count_as_one():
    b, early = bench(Normal(2)), aim(4, (1.0,))
    late = replace(early, x_0_above=NUM_STEPS // 2)
    told = [reading(b, made(b, one, 2000), one, temperature=1e6) for one in (early, late)]
    assert sum(told[0].effective.values()) == pytest.approx(4 * 2000, rel=0.01)
    num_late = int((told[1].chains.t[0] > NUM_STEPS // 2).sum())
    assert 500 < num_late < 1500
    assert sum(told[1].effective.values()) == pytest.approx(4 * (2000 - num_late) + num_late, rel=0.01)


def test_contexts_and_parts_travel_with_their_rows():
    b, told = bench(MaskedToy()), aim(2, (1.0,))
    source = Source(b, told, 30, 0)
    said = source.begin(3)
    flat = said.events.reshape(len(said.events), -1).sum(1)
    shard = source.go_on(3, Answer(flat, {"first": flat, "second": -flat}, 60))
    found = reading(b, shard, told)
    assert found.parts["second"] == pytest.approx(-found.rewards)
    assert np.array_equal(found.chains.context["class"], shard.context["class"])
    half = cut(shard, slice(10, 20), b.reference.process, b.domain.space, told)
    assert np.array_equal(half["x_t"], found.chains.x[1][10:20])
