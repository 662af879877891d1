"""The pay-off distribution: its ball, its weights, and the tilt they produce, which has a closed form."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ive
from scipy.stats import kstest

from rayft.chain import reverse_process
from rayft.payoff.ball import radius_at, uniform_shell
from rayft.payoff.weight import candidate_weight, fold
from rayft.schedule import linear, polynomial
from rayft.space import FullSpace, MaskedSpace, squared_norm

NAN = float("nan")
MASKS = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
LOG = math.log


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ball(space, num_rows, shape, radius, num_candidates, context, seed=0):
    """[cand, row, *event], uniform in the whole ball."""
    like, generator = torch.empty(num_rows, *shape, dtype=torch.float64), seeded(seed)
    told = (torch.zeros(num_rows).double(), radius.double(), context, generator)
    return torch.stack([uniform_shell(space, like, *told) for _ in range(num_candidates)])


# the ball


@pytest.mark.parametrize("dim", [1, 2, 7, 60])
def test_the_ball_is_uniform_in_radius_direction_and_second_moment(dim):
    n, d = 20_000, 0.7
    shift = ball(FullSpace(), n, (dim,), torch.full((n,), d), 2, {}).flatten(0, 1)
    length = squared_norm(shift).sqrt()
    assert float(length.max()) <= d * (1 + 1e-12)
    assert kstest((length / d).numpy() ** dim, "uniform").pvalue > 1e-3
    covariance, wanted = shift.T @ shift / len(shift), d**2 / (dim + 2)
    assert float((covariance - wanted * torch.eye(dim).double()).abs().max()) < 6 * wanted * math.sqrt(2 / len(shift))
    assert float(shift.mean(0).norm()) < 4 * math.sqrt(wanted * dim / len(shift))


@pytest.mark.parametrize("mask", MASKS, ids=["four", "two", "three"])
def test_the_ball_lies_in_the_space_and_knows_its_dimension(mask):
    space, n, d = MaskedSpace(2), 20_000, 1.3
    context = {"mask": mask.expand(n, -1)}
    shift = ball(space, n, (4, 3), torch.full((n,), d), 1, context)[0]
    torch.testing.assert_close(space.project(shift, context), shift)
    dim = int(mask.sum()) * 3 - 2
    length = squared_norm(shift).sqrt()
    assert kstest((length / d).numpy() ** dim, "uniform").pvalue > 1e-3
    unit = torch.eye(12, dtype=torch.float64).reshape(12, 4, 3)
    projector = space.project(unit, {"mask": mask.expand(12, -1)}).flatten(1)
    covariance, wanted = shift.flatten(1).T @ shift.flatten(1) / n, d**2 / (dim + 2)
    assert float((covariance - wanted * projector).abs().max()) < 6 * wanted * math.sqrt(2 / n)


def test_every_row_has_its_own_radius_and_its_own_mask():
    radius, context = torch.tensor([0.0, 1e-3, 5.0]), {"mask": MASKS}
    shift = ball(MaskedSpace(2), 3, (4, 3), radius, 2000, context)
    length = shift.flatten(2).norm(dim=-1)
    assert float(length[:, 0].max()) == 0
    for row, dim in ((1, 4), (2, 7)):
        assert float((length[:, row] / radius[row]).mean()) == pytest.approx(dim / (dim + 1), abs=0.02)
    assert float(shift[:, ~MASKS.bool()].abs().max()) == 0


def test_a_row_without_free_directions_is_not_shifted():
    shift = ball(MaskedSpace(3), 1, (4, 3), torch.ones(1), 5, {"mask": torch.tensor([[1, 0, 0, 0]])})
    assert float(shift.abs().max()) == 0


# its radius


PROCESSES = {"beta": reverse_process(linear(30), "beta"), "edm": reverse_process(polynomial(1000).respace(30), "gamma")}


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_the_three_radius_units(process):
    t, dim = torch.tensor([1, 7, 30]), torch.tensor([10.0, 4.0, 7.0])
    sigma = process.sigma[t]
    assert radius_at(process, t, 0.4, "absolute", dim).tolist() == [0.4] * 3
    torch.testing.assert_close(radius_at(process, t, 0.4, "sigma", dim), 0.4 * sigma * dim.double().sqrt())
    torch.testing.assert_close(radius_at(process, t, 0.4, "sigma", 9.0), 1.2 * sigma)
    torch.testing.assert_close(radius_at(process, t, 0.4, "kl", dim), sigma * math.sqrt(0.8 / 30))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("kappa", [0.5, 20.0])
def test_shifts_as_long_as_the_kl_radius_spend_the_budget_over_the_chain(process, kappa):
    t = torch.arange(1, 31)
    d = radius_at(process, t, kappa, "kl", 1e6)
    assert float((d**2 / (2 * process.sigma[t] ** 2)).sum()) == pytest.approx(kappa)


# weights by hand

REWARDS = np.log(np.array([[1.0, 3.0], [2.0, 2.0], [8.0, NAN]]))  # three rows of two candidates
T = np.array([5, 9, 9])


@pytest.mark.parametrize(
    ("normalise", "wanted"),
    [
        ("none", [[1, 2, 8], [3, 2, 0]]),
        ("batch", [[3 / 8, 3 / 4, 3], [9 / 8, 3 / 4, 0]]),
        ("candidates", [[0.5, 1, 2], [1.5, 1, 0]]),
        ("timestep", [[0.5, 2 / 3, 8 / 3], [1.5, 2 / 3, 0]]),
    ],
)
def test_candidate_weights_by_hand(normalise, wanted):
    assert candidate_weight(REWARDS, T, 1.0, normalise) == pytest.approx(np.array(wanted).T)
    assert candidate_weight(0.2 * REWARDS, T, 0.2, normalise) == pytest.approx(np.array(wanted).T)


@pytest.mark.parametrize("normalise", ["batch", "candidates", "timestep"])
def test_normalised_weights_survive_huge_rewards_and_forget_a_common_shift(normalise):
    rewards = np.random.default_rng(0).normal(size=(6, 4)) * 3
    t = np.array([1, 1, 2, 2, 3, 3])
    plain = candidate_weight(rewards, t, 0.5, normalise)
    assert plain.mean() == pytest.approx(1)
    assert candidate_weight(rewards + 1e6, t, 0.5, normalise) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("normalise", ["batch", "candidates", "timestep", "none"])
def test_a_batch_of_failures_weighs_nothing(normalise):
    assert np.all(candidate_weight(np.full((4, 3), NAN), np.arange(4), 0.1, normalise) == 0)


def test_one_candidate_normalised_by_its_candidates_weighs_1_whatever_its_reward():
    rewards = np.random.default_rng(1).normal(size=(50, 1)) * 100
    assert candidate_weight(rewards, np.arange(50), 0.01, "candidates").tolist() == [[1.0]] * 50
    equal = np.repeat(rewards, 4, axis=1)  # d = 0: all candidates are one point
    assert candidate_weight(equal, np.arange(50), 0.01, "candidates").tolist() == [[1.0] * 4] * 50


def test_batch_weights_keep_the_data_tilt_and_candidate_weights_lose_it():
    """Row weights under ``batch`` estimate Z(x_t, x_0) = E_U exp(r/tau), up to one factor."""
    rewards = np.random.default_rng(2).normal(size=(8, 5))
    z = np.exp(rewards / 0.5).mean(1)
    _, batch = fold(np.zeros((8, 5, 1)), candidate_weight(rewards, np.ones(8, dtype=int), 0.5, "batch"))
    assert batch == pytest.approx(z / z.mean())
    _, own = fold(np.zeros((8, 5, 1)), candidate_weight(rewards, np.ones(8, dtype=int), 0.5, "candidates"))
    assert own == pytest.approx(np.ones(8))


def test_folding_by_hand():
    candidates = np.array([[[0.0], [4.0]], [[1.0], [3.0]], [[5.0], [7.0]]])  # [row, cand, feature]
    mean, weight = fold(candidates, np.array([[1.0, 3.0], [0.0, 2.0], [0.0, 0.0]]))
    assert mean.tolist() == [[3.0], [3.0], [6.0]]
    assert weight.tolist() == [2.0, 1.0, 0.0]
    assert fold(candidates.astype(np.float32), np.ones((3, 2)))[0].dtype == np.float32


# the tilt


def mean_shift(shift, slope, tau, normalise):
    """E_{q_pd}[eps_star] along ``slope`` for r = slope . eps_star, every candidate of every row pooled."""
    shift = shift.transpose(0, 1)
    rewards = (shift @ slope).numpy()
    t = np.ones(len(shift), dtype=int)
    weight = candidate_weight(rewards, t, tau, normalise)
    x_prev, row_weight = fold(shift.numpy(), weight)
    return (row_weight[:, None] * x_prev).sum(0) / row_weight.sum()


@pytest.mark.parametrize("dim", [2, 5, 12])
def test_a_linear_reward_shifts_candidates_by_d_squared_grad_over_dim_plus_2_tau_to_first_order(dim):
    n, d, tau = 300_000, 0.8, 2.0
    slope = torch.linspace(-1, 1, dim + 1, dtype=torch.float64)[1:]
    slope = slope / slope.norm() * 0.8  # |grad| d / tau = 0.32
    shift = ball(FullSpace(), n, (dim,), torch.full((n,), d), 1, {}, seed=dim)
    wanted = d**2 * slope / ((dim + 2) * tau)
    found = mean_shift(shift, slope, tau, "batch")
    error = d / math.sqrt((dim + 2) * n)
    assert np.abs(found - wanted.numpy()).max() < 4.5 * error + 0.02 * float(wanted.norm())
    along = float(found @ slope.numpy()) / float(wanted @ slope)
    assert along == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("k", [0.3, 2.0, 6.0])
def test_a_linear_reward_tilts_the_ball_as_bessel_functions_say(k):
    """E[eps_star] = d I_{D/2+1}(k) / I_{D/2}(k) along the gradient, k = |grad| d / tau: exact at any strength."""
    n, dim, d, tau = 200_000, 4, 1.5, 0.5
    slope = torch.tensor([k * tau / d, 0.0, 0.0, 0.0]).double()
    shift = ball(FullSpace(), n, (dim,), torch.full((n,), d), 1, {}, seed=3)
    found = mean_shift(shift, slope, tau, "batch")
    wanted = d * ive(dim / 2 + 1, k) / ive(dim / 2, k)
    assert found[0] == pytest.approx(wanted, abs=0.008)
    assert np.abs(found[1:]).max() < 0.015


def test_few_candidates_shift_less_under_candidate_weights_and_many_reach_the_true_tilt():
    """Self-normalised weights are consistent, with a bias of O(1/K) towards no shift (math.md, Sec. 3)."""
    dim, d, tau, slope = 2, 1.0, 0.5, torch.tensor([1.0, 0.0]).double()
    true = d * ive(2, d / tau) / ive(1, d / tau)
    gaps = []
    for num_candidates in (1, 4, 8, 32):
        n = 64_000 // num_candidates
        shift = ball(FullSpace(), n, (dim,), torch.full((n,), d), num_candidates, {}, seed=4)
        gaps.append(true - mean_shift(shift, slope, tau, "candidates")[0])
    assert gaps[0] == pytest.approx(true, abs=0.01)  # one candidate: no shift at all
    assert gaps[1] > gaps[2] > gaps[3] > -0.01
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.35)
    assert gaps[3] < 0.1 * true
