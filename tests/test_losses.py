"""Losses by hand and by identity: DDPM's loss, folded candidates, the anchor's vanishing gradient, PPO's clip."""

import numpy as np
import pytest
import torch

from rayft import losses
from rayft.chain import expand, forward_noise, posterior_mean, reverse_process
from rayft.payoff.weight import candidate_weight, fold
from rayft.schedule import linear, polynomial
from rayft.space import squared_norm

PROCESSES = {
    "beta": reverse_process(linear(12, 0.01, 0.5), "beta"),
    "gamma": reverse_process(linear(12, 0.01, 0.5), "gamma"),
    "ddim": reverse_process(linear(12, 0.01, 0.5), "gamma", 0.4),
    "edm": reverse_process(polynomial(1000).respace(12), "gamma"),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def gradient(loss, at):
    return torch.autograd.grad(loss.sum(), at, retain_graph=True)[0]


# PPO


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped: nothing to gain from going on
        (0.5, 2.0, -1.0, -1.0),  # a mistake is corrected at full slope
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_ppo_losses_by_hand(ratio, advantage, loss, slope):
    """Clip 0.2; ``slope`` is dL/d log p."""
    log_prob = torch.tensor([ratio]).double().log().requires_grad_()
    found = losses.ppo_loss(log_prob, torch.zeros(1).double(), torch.tensor([advantage]).double(), 0.2)
    assert found.item() == pytest.approx(loss)
    assert gradient(found, log_prob).item() == pytest.approx(slope)


def test_at_theta_old_the_ratio_is_1_and_the_gradient_is_the_policy_gradient():
    log_prob, advantage = drawn(0, 100).requires_grad_(), drawn(1, 100)
    for clip in (1e-6, 0.2):
        loss = losses.ppo_loss(log_prob, log_prob.detach(), advantage, clip)
        close(loss, -advantage)
        close(gradient(loss, log_prob), -advantage)


def test_a_failed_chains_advantage_of_0_costs_nothing_however_far_the_policy_moved():
    log_prob = torch.tensor([-3.0, 0.0, 3.0]).requires_grad_()
    loss = losses.ppo_loss(log_prob, torch.zeros(3), torch.zeros(3), 0.2)
    assert loss.abs().tolist() == [0.0] * 3
    assert gradient(loss, log_prob).abs().tolist() == [0.0] * 3


# KL


def test_the_kl_of_a_transition_by_hand():
    mean, mean_ref = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert losses.transition_kl(mean, mean_ref, torch.tensor([0.5, 3.0])).tolist() == [10.0, 0.5]


# RGDM


@every_process
def test_rgdm_without_radius_and_tilt_is_ddpms_noise_loss(process):
    """tau -> inf, d = 0:  L = c_t^2 / (2 sigma_t^2) |eps - eps_theta|^2, at every t."""
    t = torch.arange(60) % 12 + 1
    x_0, eps, eps_theta = drawn(3, 60, 2, 3), drawn(4, 60, 2, 3), drawn(5, 60, 2, 3)
    x_t = forward_noise(process.schedule, x_0, t, eps)
    keep, gain, _, _ = process.linear_in("eps")
    mean = expand(keep[t], x_t) * x_t + expand(gain[t], x_t) * eps_theta
    rewards = np.random.default_rng(0).normal(size=(60, 1))
    weight = torch.from_numpy(candidate_weight(rewards, t.numpy(), 1e12, "batch")).sum(1)
    loss = losses.weighted_mle_loss(mean, posterior_mean(process, x_t, x_0, t), process.sigma[t], weight)
    c, sigma = process.eps_gain[t], process.sigma[t]
    close(loss, c**2 / (2 * sigma**2) * squared_norm(eps - eps_theta), rtol=1e-7)
    close(loss * 2 * sigma**2 / c**2, squared_norm(eps - eps_theta), rtol=1e-7)  # timestep_weight: simple


@every_process
def test_rgdm_is_noise_prediction_with_a_shifted_target(process):
    """x_tilde + eps_star as target is eps - eps_star / c_t as noise."""
    t = torch.arange(60) % 12 + 1
    x_0, eps, eps_theta, eps_star = (drawn(seed, 60, 3) for seed in (6, 7, 8, 9))
    x_t = forward_noise(process.schedule, x_0, t, eps)
    keep, gain, _, _ = process.linear_in("eps")
    mean = expand(keep[t], x_t) * x_t + expand(gain[t], x_t) * eps_theta
    x_prev = posterior_mean(process, x_t, x_0, t) + eps_star
    c, sigma, weight = process.eps_gain[t], process.sigma[t], drawn(10, 60).exp()
    wanted = weight * c**2 / (2 * sigma**2) * squared_norm(eps - eps_star / expand(c, x_t) - eps_theta)
    close(losses.weighted_mle_loss(mean, x_prev, sigma, weight), wanted, rtol=1e-7)


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_rgdm_is_minimised_by_the_payoff_weighted_mean(tau):
    candidates = drawn(11, 16, 4, 3)  # [cand, row, feature]
    rewards = drawn(12, 16, 4)
    raw = (rewards / tau).exp()
    weight = torch.from_numpy(candidate_weight(rewards.T.numpy(), np.ones(4, dtype=int), tau, "batch")).T
    best = ((raw.unsqueeze(-1) * candidates).sum(0) / raw.sum(0).unsqueeze(-1)).requires_grad_()
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0]).double()

    def cost(mean):
        return sum(losses.weighted_mle_loss(mean, candidates[k], sigma, weight[k]).sum() for k in range(16))

    close(gradient(cost(best), best), torch.zeros(4, 3).double())
    for seed in range(3):
        assert float(cost(best + 0.1 * drawn(20 + seed, 4, 3))) > float(cost(best))


@pytest.mark.parametrize("normalise", ["batch", "candidates", "timestep", "none"])
def test_folded_candidates_have_the_gradient_of_all_of_them(normalise):
    candidates, t, sigma = drawn(13, 8, 6, 2, 3), np.array([1, 1, 2, 2, 2, 3]), drawn(14, 6).exp()
    rewards = drawn(15, 8, 6).numpy()
    rewards[2, 1] = rewards[5, 3] = np.nan
    rewards[:, 4] = np.nan  # a row without one live candidate
    weight = candidate_weight(rewards.T, t, 0.7, normalise).T
    mean = drawn(16, 6, 2, 3).requires_grad_()
    every = sum(losses.weighted_mle_loss(mean, candidates[k], sigma, torch.from_numpy(weight[k])) for k in range(8))
    x_prev, row_weight = fold(candidates.transpose(0, 1).numpy(), weight.T)
    folded = losses.weighted_mle_loss(mean, torch.from_numpy(x_prev), sigma, torch.from_numpy(row_weight))
    wanted = gradient(every / 8, mean)
    close(gradient(folded, mean), wanted)
    assert float(wanted[4].abs().max()) == 0
    assert float(wanted[[0, 1, 2, 3, 5]].abs().min()) > 0


# reward-weighted MLE and its anchor


def test_the_likelihood_loss_has_the_gradient_of_the_log_probability():
    mean, x_prev, sigma, weight = (
        drawn(17, 5, 3).requires_grad_(),
        drawn(18, 5, 3),
        drawn(19, 5).exp(),
        drawn(20, 5).exp(),
    )
    log_prob = torch.distributions.Normal(mean, sigma.unsqueeze(1)).log_prob(x_prev).sum(1)
    wanted = gradient(-weight * log_prob, mean)
    close(gradient(losses.weighted_mle_loss(mean, x_prev, sigma, weight), mean), wanted)


def antithetic(seed, n):
    """Draws of N(mean_ref, sigma^2) in mirrored pairs: their average is mean_ref exactly."""
    z = drawn(seed, n, 3)
    return torch.cat([z, -z])


def test_the_anchored_loss_has_the_expected_gradient_of_the_plain_one():
    """One parameter vector for all rows; E[x_prev | x_t] = mu_pre makes the two added terms cancel, whatever w is."""
    mean, mean_ref = torch.tensor([0.3, -0.2, 0.9]).double().requires_grad_(), torch.tensor([0.1, 0.2, 0.5]).double()
    noise, sigma = antithetic(21, 500), torch.full((1000,), 0.7).double()
    x_prev = mean_ref + sigma.unsqueeze(1) * noise
    weight = (1.5 * x_prev.sum(1)).exp()
    weight = weight / weight.mean()
    spread_out = mean.expand(1000, 3)
    plain = losses.weighted_mle_loss(spread_out, x_prev, sigma, weight)
    anchored = losses.anchored_loss(spread_out, x_prev, mean_ref.expand(1000, 3), sigma, weight)
    wanted = gradient(plain, mean)
    close(gradient(anchored, mean), wanted)
    assert float(wanted.norm()) > 100


def test_the_anchored_gradient_is_0_row_by_row_where_w_is_1_and_the_model_is_the_pretrained_one():
    mean_ref, sigma, ones = drawn(22, 50, 3), drawn(23, 50).exp(), torch.ones(50).double()
    x_prev, mean = mean_ref + drawn(24, 50, 3), mean_ref.clone().requires_grad_()
    anchored = losses.anchored_loss(mean, x_prev, mean_ref, sigma, ones)
    assert float(gradient(anchored, mean).abs().max()) == 0
    assert float(gradient(losses.weighted_mle_loss(mean, x_prev, sigma, ones), mean).abs().min()) > 0


def test_away_from_the_pretrained_model_a_weight_of_1_pulls_back_to_it():
    mean_ref, x_prev = drawn(25, 50, 3), drawn(26, 50, 3)
    mean = (mean_ref + 0.5).requires_grad_()
    ones, sigma = torch.ones(50).double(), torch.full((50,), 2.0).double()
    pull = gradient(losses.anchored_loss(mean, x_prev, mean_ref, sigma, ones), mean)
    close(pull, torch.full_like(pull, 0.5 / 4))


def test_near_the_pretrained_model_the_anchor_takes_the_noise_out_of_the_gradient():
    mean_ref, sigma = torch.zeros(2000, 3).double(), torch.ones(2000).double()
    x_prev = drawn(27, 2000, 3)
    weight = 1 + 0.1 * torch.tanh(drawn(28, 2000))
    mean = mean_ref.clone().requires_grad_()
    anchored = gradient(losses.anchored_loss(mean, x_prev, mean_ref, sigma, weight), mean)
    plain = gradient(losses.weighted_mle_loss(mean, x_prev, sigma, weight), mean)
    assert float(anchored.var()) < 0.01 * float(plain.var())
