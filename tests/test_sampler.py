"""Pay-off samplers: shells, moments of q_pd against a grid, and searches that reach the maximum of the ball."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from envs.toy.domain import Toy
from envs.toy.masked import MaskedToy
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process
from rayft.payoff.ball import base_log_weight, radius_at, relative, shell_of
from rayft.payoff.pairs import Aim, Pairs, draw_pairs
from rayft.payoff.sampler import begin, questions
from rayft.payoff.weight import candidate_weight

RADII = (0.5, 1.0, 1.5, 2.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bench(domain=None, dtype=torch.float64):
    domain = domain or Toy()
    net = domain.denoiser().to(dtype).requires_grad_(False)
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    return Bench(domain, policy, policy, torch.device("cpu"), dtype)


def aim(num=8, radii=(1.0,), unit="sigma", at="x_prev", sampler="importance", steps=30, temperature=None):
    return Aim(num, radii, unit, at, "mean", sampler, steps, temperature)


def answered(pairs, told, reward, seed=0):
    """A search to its end, its questions answered by ``reward``; also how many events it asked about."""
    search, asked = begin(pairs, told, seeded(seed), slope=lambda x, context: reward(x)), 0
    question = next(search)
    while True:
        asked += len(question.events)
        value = reward(question.events).numpy()
        try:
            question = search.send(value[:, None])
        except StopIteration as finished:
            return finished.value, asked


def one_pair(b, t, num):
    """The same (x_0, t, noise) many times over."""
    pairs = draw_pairs(b, 1, seeded(1), 2, "mean")
    x_0, t = pairs.x_0.expand(num, -1), torch.full((num,), t)
    process = b.reference.process
    x_t = process.schedule.alpha_bar[t].sqrt()[:, None] * x_0 + 0.3
    return Pairs(b, x_0, t, x_t, process.from_x0[t][:, None] * x_0 + process.from_xt[t][:, None] * x_t, {})


def test_candidates_lie_in_their_shells_inside_the_space_equally_many_in_each():
    b = bench(MaskedToy())
    pairs, told = draw_pairs(b, 500, seeded(0), 1, "mean"), aim(8, RADII)
    found, asked = answered(pairs, told, lambda x: x.flatten(1).sum(1))
    assert asked == 500 * 8 == 500 * questions(told)
    dim = b.domain.space.dim(pairs.x_0, pairs.context)
    unit = radius_at(b.reference.process, pairs.t, 1.0, "sigma", dim)
    reach = found.eps_star.flatten(2).norm(dim=2) / unit[:, None]
    for cand, shell in enumerate(shell_of(8, 4)):
        inner, outer = (0.0, *RADII)[shell], RADII[shell]
        assert inner <= float(reach[:, cand].min()) and float(reach[:, cand].max()) <= outer * (1 + 1e-9)
        rank = ((reach[:, cand] ** dim - inner**dim) / (outer**dim - inner**dim)).numpy()
        assert kstest(rank, "uniform").pvalue > 1e-3
    flat = {k: v.repeat_interleave(8, 0) for k, v in pairs.context.items()}
    eps = found.eps_star.flatten(0, 1)
    torch.testing.assert_close(b.domain.space.project(eps, flat), eps)


@pytest.mark.parametrize("dim", [2, 60])
@pytest.mark.parametrize("d", [0.5, 1.0, 1.3, 2.0])
def test_base_weights_turn_shells_into_the_uniform_ball(dim, d):
    """E[base f(|eps|)] = E_{U(ball)} f(|eps|), d on the grid of radii or between them."""
    n, shells, rng = 400_000, shell_of(8, 4), np.random.default_rng(0)
    inner, outer = np.array([0.0, *RADII[:-1]])[shells], np.array(RADII)[shells]
    u = rng.random((n // 8, 8))
    reach = (inner**dim + (outer**dim - inner**dim) * u) ** (1 / dim)
    weight = np.exp(base_log_weight(reach, shells, relative(RADII, "sigma"), d, np.full(n // 8, float(dim))))
    for power in (0, 2):
        values = weight * (reach / d) ** power
        error = values.mean(1).std() / math.sqrt(n // 8)
        assert abs(values.mean() - dim / (dim + power)) < 4 * error + 1e-12
    assert np.all(weight[reach > d * 1.001] == 0)


def test_a_kl_radius_is_a_length_by_its_root():
    assert relative((1.0, 4.0), "kl").tolist() == [1.0, 2.0]


def test_a_shell_of_radius_0_is_the_centre_itself():
    b = bench()
    found, _ = answered(draw_pairs(b, 20, seeded(0), 1, "mean"), aim(4, (0.0, 1.0)), lambda x: x.sum(1))
    assert float(found.eps_star[:, :2].abs().max()) == 0 and float(found.eps_star[:, 2:].abs().min()) > 0
    reach, shells = found.eps_star.norm(dim=2).numpy(), shell_of(4, 2)
    weight = np.exp(base_log_weight(reach, shells, np.array([0.0, 1.0]), 0.0, np.full(20, 2.0)))
    assert weight.tolist() == [[2.0, 2.0, 0.0, 0.0]] * 20


@pytest.mark.parametrize("at", ["x_prev", "x0_hat"])
@pytest.mark.parametrize("t", [1, 10, 35])
def test_importance_moments_are_those_of_q_pd_on_a_grid(at, t):
    """E_{q_pd}[eps_star] and E_{q_pd}[|eps_star|^2], for r read at the candidate and at x0_hat, within 3 errors."""
    b, tau, n = bench(), 0.3, 4000
    pairs = one_pair(b, t, n)
    radius = float(radius_at(b.reference.process, pairs.t[:1], 1.0, "sigma", 2.0))

    def reward(x):
        return torch.sin(3 * x[:, 0]) + 0.5 * x[:, 1]

    found, _ = answered(pairs, aim(32, at=at), reward)
    weight = candidate_weight(found.told[..., 0], pairs.t.numpy(), tau, "batch")
    eps = found.eps_star.numpy()
    axis = torch.linspace(-1, 1, 601, dtype=torch.float64) * radius
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    grid = grid[grid.norm(dim=1) <= radius]
    chosen = Pairs(b, *(v[:1] for v in (pairs.x_0, pairs.t, pairs.x_t, pairs.centre)), {})
    density = (reward(chosen.question(grid[None], aim(at=at)).events) / tau).exp()
    for f in (lambda e: e[..., 0], lambda e: e[..., 1], lambda e: (e**2).sum(-1)):
        wanted = float((density * f(grid)).sum() / density.sum())
        values = (weight * (f(eps) - wanted)).mean(1)  # the ratio estimator's error, by the delta method
        assert abs((weight * f(eps)).mean() / weight.mean() - wanted) < 3 * values.std() / math.sqrt(n) + 1e-4 * radius


def bump(x):
    """One maximum of 1 inside the ball around 0, none elsewhere, and ripples on the way."""
    at = torch.tensor([0.5, -0.3], dtype=x.dtype)
    away = (x - at).square().sum(1)
    return torch.exp(-2 * away) + 0.02 * torch.cos(25 * x[:, 0]) - 0.02


def slope(x):
    return 1 + x[:, 0] + 2 * x[:, 1]


def still(b, num):
    """Candidates around 0 in a ball of 1."""
    zero = torch.zeros(num, 2, dtype=torch.float64)
    return Pairs(b, zero, torch.full((num,), 5), zero, zero, {})


@pytest.mark.parametrize("sampler", ["annealing", "gradient"])
@pytest.mark.parametrize(("reward", "best"), [(bump, 0.999), (slope, 1 + math.sqrt(5))], ids=["inside", "on its edge"])
def test_searches_reach_the_balls_maximum_within_a_hundredth(sampler, reward, best):
    b = bench()
    told = aim(4, unit="absolute", sampler=sampler, steps=120 if sampler == "annealing" else 60)
    found, asked = answered(still(b, 50), told, reward)
    assert asked == 50 * questions(told)
    assert float(found.eps_star.norm(dim=2).max()) <= 1 + 1e-9
    reached = found.told[..., 0].max(1)
    assert reached.min() > 0.99 * best
    np.testing.assert_allclose(found.told[..., 0].ravel(), reward(found.eps_star.flatten(0, 1)).numpy())


def test_annealing_that_ends_at_a_temperature_draws_from_q_pd():
    """A linear reward in the unit disc: E[eps_star] = I_2(k)/I_1(k) along it, k = |grad|/tau."""
    from scipy.special import ive

    b, tau = bench(), 0.5
    told = aim(4, unit="absolute", sampler="annealing", steps=80, temperature=tau)
    found, _ = answered(still(b, 2000), told, lambda x: x[:, 0])
    mean = found.eps_star.flatten(0, 1).mean(0)
    wanted = ive(2, 1 / tau) / ive(1, 1 / tau)
    assert float(mean[0]) == pytest.approx(wanted, abs=0.03)
    assert abs(float(mean[1])) < 0.03
    assert float(found.eps_star.norm(dim=2).max()) <= 1 + 1e-9


def test_a_search_survives_failed_rewards_and_never_keeps_one():
    b, lame = bench(), np.random.default_rng(0)

    def reward(x):
        value = slope(x)
        value[torch.from_numpy(lame.random(len(x)) < 0.3)] = torch.nan
        return value

    found, _ = answered(still(b, 50), aim(4, unit="absolute", sampler="annealing", steps=150), reward)
    assert np.isfinite(found.told).all()
    assert found.told[..., 0].max(1).min() > 0.97 * (1 + math.sqrt(5))


def test_a_search_in_a_space_stays_in_it():
    b = bench(MaskedToy())
    pairs = draw_pairs(b, 30, seeded(0), 1, "mean")
    flat = {k: v.repeat_interleave(2, 0) for k, v in pairs.context.items()}
    for sampler in ("annealing", "gradient"):
        found, _ = answered(pairs, aim(2, sampler=sampler, steps=5), lambda x: x.flatten(1).square().sum(1))
        eps = found.eps_star.flatten(0, 1)
        torch.testing.assert_close(b.domain.space.project(eps, flat), eps)
