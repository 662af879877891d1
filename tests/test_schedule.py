"""Schedules and the coefficients they give, against Bayes' rule, EDM's published table and DDPM's numbers."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from rayft.chain import reverse_process
from rayft.schedule import cosine, from_alpha_bar, from_betas, linear, polynomial

SCHEDULES = {
    "ddpm": linear(1000),
    "short linear": linear(20, 0.005, 0.5),
    "cosine": cosine(40),
    "edm": polynomial(1000),
    "ddpm respaced": linear(1000).respace(37),
    "edm respaced": polynomial(1000).respace(50),
    "one step": linear(100, 1e-4, 0.05).respace(1),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def close(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=rtol, atol=atol)


# tables


def test_the_polynomial_schedule_is_edms_published_gamma():
    gamma = torch.from_numpy(np.load(Path(__file__).parent / "golden" / "edm_gamma.npy")).double()
    alpha_bar = polynomial(1000, power=2.0, precision=1e-5).alpha_bar
    close(alpha_bar, torch.sigmoid(-gamma), rtol=0, atol=1e-7)
    close(torch.log((1 - alpha_bar) / alpha_bar), gamma, rtol=0, atol=2e-6)  # float32 of the published table


def test_the_linear_schedule_is_ddpms():
    alpha_bar = linear(1000).alpha_bar
    assert alpha_bar[0] == 1
    assert float(alpha_bar[1000]) == pytest.approx(4.0358e-5, rel=1e-4)
    close(alpha_bar[1:], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def test_t_is_not_shifted_in_the_point_cloud_schedule_of_the_paper():
    """beta_t/(1 - alpha_bar_t), the share of variance a posterior mean lacks: math.md, Sec. 3."""
    ab = linear(100, 1e-4, 0.05).alpha_bar
    lacking = [float((1 - ab[t] / ab[t - 1]) / (1 - ab[t])) for t in (1, 2, 3, 10, 50)]
    assert lacking == pytest.approx([1.0, 0.86, 0.61, 0.20, 0.05], abs=0.006)


def test_the_cosine_schedule_is_its_formula_until_beta_is_capped():
    u = (np.arange(41) / 40 + 0.008) / 1.008
    f = np.cos(u * np.pi / 2) ** 2
    close(cosine(40).alpha_bar[:-1], (f / f[0])[:-1])
    beta_T = 1 - float(cosine(40).alpha_bar[-1] / cosine(40).alpha_bar[-2])  # noqa: N806
    assert beta_T == pytest.approx(0.999)


def test_betas_multiply_up_to_alpha_bar():
    close(from_betas(torch.tensor([0.5, 0.2, 0.75])).alpha_bar, [1.0, 0.5, 0.4, 0.1], rtol=1e-7)


@pytest.mark.parametrize("total", [1, 2, 7, 50])
def test_respacing_keeps_noise_levels_their_trained_timesteps_the_start_and_T(total):  # noqa: N802
    schedule = linear(total, 0.001, 0.3)
    for num_steps in range(1, total + 1):
        fewer = schedule.respace(num_steps)
        assert fewer.num_steps == num_steps
        assert int(fewer.timestep[0]) == 0 and int(fewer.timestep[-1]) == total
        assert bool((fewer.timestep.diff() > 0).all())
        assert torch.equal(fewer.alpha_bar, schedule.alpha_bar[fewer.timestep])


def test_respacing_twice_still_names_the_trained_timesteps():
    schedule = linear(1000)
    twice = schedule.respace(100).respace(10)
    assert torch.equal(twice.timestep, schedule.respace(10).timestep)
    assert torch.equal(twice.alpha_bar, schedule.alpha_bar[twice.timestep])


@pytest.mark.parametrize("num_steps", [0, -1, 51])
def test_respacing_to_an_impossible_number_of_steps_says_what_is_allowed(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}; this model's schedule allows 1 to 50"):
        linear(50).respace(num_steps)


@pytest.mark.parametrize("alpha_bar", [[1.0, 0.5, 0.5], [1.0, 0.4, 0.5], [1.1, 0.5], [1.0, 0.5, -0.1]])
def test_alpha_bar_that_does_not_fall_is_refused(alpha_bar):
    with pytest.raises(ValueError, match="alpha_bar must fall strictly from at most 1"):
        from_alpha_bar(torch.tensor(alpha_bar))


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.0], [0.1, -0.1], [[0.1]], [0.1, float("nan")]])
def test_betas_outside_zero_to_one_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be one row of numbers strictly between 0 and 1"):
        from_betas(torch.tensor(betas))


# the reverse process


@every_schedule
def test_the_posterior_is_bayes_rule(schedule):
    """q(x_prev | x_t, x_0) ~ q(x_t | x_prev) q(x_prev | x_0), two Gaussians, wherever noise is left at t - 1."""
    process = reverse_process(schedule, "gamma")
    ab, ab_prev = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    noisy = ab_prev < 1
    ab, ab_prev = ab[noisy], ab_prev[noisy]
    alpha = ab / ab_prev
    precision = 1 / (1 - ab_prev) + alpha / (1 - alpha)
    close(process.from_x0[1:][noisy], ab_prev.sqrt() / (1 - ab_prev) / precision, rtol=1e-7)
    close(process.from_xt[1:][noisy], alpha.sqrt() / (1 - alpha) / precision, rtol=1e-7)
    close(process.sigma[1:][noisy] ** 2, 1 / precision, rtol=1e-7)


@every_schedule
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.05])
def test_the_posterior_chains_back_to_the_marginal(schedule, eta):
    """x_0 -> x_t -> x_prev has the law of x_0 -> x_prev, in mean and in variance; DDIM's eta keeps it too."""
    process = reverse_process(schedule, "gamma", eta)
    ab, ab_prev = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    from_x0, from_xt, sigma = process.from_x0[1:], process.from_xt[1:], process.sigma[1:]
    close(from_x0 + from_xt * ab.sqrt(), ab_prev.sqrt())
    spread = from_xt**2 * (1 - ab) + sigma**2
    noisy = ab_prev < 1  # elsewhere sigma_1 = sigma_2 stands in for 0
    close(spread[noisy], (1 - ab_prev)[noisy])
    assert int((~noisy).sum()) <= 1


@every_schedule
def test_beta_is_the_forward_variance_around_the_same_posterior_mean(schedule):
    beta, gamma = reverse_process(schedule, "beta"), reverse_process(schedule, "gamma")
    close(beta.from_x0, gamma.from_x0)
    close(beta.from_xt, gamma.from_xt)
    close(beta.sigma[1:] ** 2, 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1])


@every_schedule
def test_c_t_is_ddpms_for_full_noise(schedule):
    ab, ab_prev = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    alpha = ab / ab_prev
    wanted = (1 - alpha) / (alpha.sqrt() * (1 - ab).sqrt())
    for sigma in ("beta", "gamma"):
        close(reverse_process(schedule, sigma).eps_gain[1:], wanted, rtol=1e-7)


@every_schedule
@pytest.mark.parametrize("eta", [0.7, 0.1])
def test_c_t_is_ddims_for_less_noise(schedule, eta):
    ab, ab_prev = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    variance = eta**2 * (1 - ab / ab_prev) * (1 - ab_prev) / (1 - ab)
    wanted = (ab_prev * (1 - ab) / ab).sqrt() - (1 - ab_prev - variance).clamp(min=0).sqrt()
    close(reverse_process(schedule, "gamma", eta).eps_gain[1:], wanted, rtol=1e-7)


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_the_last_step_borrows_its_neighbours_noise_where_its_own_is_zero(eta):
    process = reverse_process(linear(30, 0.001, 0.3), "gamma", eta)
    assert process.sigma[1] == process.sigma[2] > 0
    assert float(process.from_xt[1]) == 0 and float(process.from_x0[1]) == 1  # the mean of the last step is x0_hat


def test_a_chain_of_one_step_has_noise_all_the_same():
    process = reverse_process(from_betas(torch.tensor([0.9])), "gamma")
    assert float(process.sigma[1]) ** 2 == pytest.approx(0.9)


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_a_schedule_that_ends_in_noise_keeps_its_own_last_variance(num_steps):
    schedule = polynomial(1000).respace(num_steps)
    ab = schedule.alpha_bar
    assert float(ab[0]) == pytest.approx(1 - 1e-5, abs=1e-12)
    gamma_1 = float((1 - ab[1] / ab[0]) * (1 - ab[0]) / (1 - ab[1]))
    process = reverse_process(schedule, "gamma")
    assert float(process.sigma[1]) ** 2 == pytest.approx(gamma_1, rel=1e-9)
    assert process.sigma[1] != process.sigma[2]


@pytest.mark.parametrize(
    ("sigma", "eta", "sentence"),
    [
        ("gamma", 0.0, "eta is 0.0; a chain with a density needs 0 < eta <= 1"),
        ("beta", 0.0, "eta is 0.0; a chain with a density needs 0 < eta <= 1"),
        ("gamma", 1.5, "eta is 1.5; a chain with a density needs 0 < eta <= 1"),
        ("beta", 0.5, "eta is 0.5 with sigma 'beta'; .* set sigma to 'gamma'"),
        ("posterior", 1.0, "sigma is 'posterior'; choose 'beta'"),
    ],
)
def test_a_chain_without_a_density_is_refused_in_a_sentence(sigma, eta, sentence):
    with pytest.raises(ValueError, match=sentence):
        reverse_process(linear(10), sigma, eta)


def test_every_process_is_finite_and_noisy():
    for schedule, (sigma, eta) in itertools.product(
        SCHEDULES.values(), [("beta", 1.0), ("gamma", 1.0), ("gamma", 0.1)]
    ):
        process = reverse_process(schedule, sigma, eta)
        assert bool((process.sigma[1:] > 0).all())
        assert bool(torch.isfinite(torch.stack(process.linear_in("eps"))).all())
