"""Flow-matching models as chains: the same marginals, the same expected x_0, and the same algorithms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from envs.toy import data
from envs.toy.flow import ToyFlow
from rayft.chain import Policy, forward_noise, reverse_process, sample
from rayft.denoise import Batch, event_losses
from rayft.domain import FlowDenoiser, build, fit
from rayft.schedule import linear, rectified
from rayft.space import FullSpace
from rayft.spec import algorithm

MEAN, SPREAD = 0.7, 0.5


class GaussianVelocity(nn.Module):
    """E[noise - x_0 | x_s] where x_0 ~ N(MEAN, spread^2): exact."""

    def __init__(self, spread: float = SPREAD, to_data: bool = False) -> None:
        super().__init__()
        self.spread, self.to_data = spread, to_data

    def forward(self, x, s):
        s = (1 - s if self.to_data else s).unsqueeze(-1)
        variance = (1 - s) ** 2 * self.spread**2 + s**2
        slope = (s - (1 - s) * self.spread**2) / variance
        velocity = -MEAN + slope * (x - (1 - s) * MEAN)
        return -velocity if self.to_data else velocity


def moments(num_steps, spread, sigma="beta"):
    """(mean, variance) of x_t under the exact chain for t = T .. 0: every transition is linear."""
    schedule = rectified(num_steps)
    process = reverse_process(schedule, sigma)
    policy = Policy(FlowDenoiser(GaussianVelocity(spread), schedule), process, FullSpace(), "x0")
    mean, variance, found = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), []
    for t in range(num_steps, 0, -1):
        found.append((mean.item(), variance.item()))
        step = torch.full((1,), t)
        slope = policy.mean(mean + 1, step, {}) - policy.mean(mean, step, {})
        mean, variance = policy.mean(mean, step, {}), slope[0] ** 2 * variance + process.sigma[t] ** 2
    return schedule.alpha_bar.flip(0), torch.tensor([*found, (mean.item(), variance.item())], dtype=torch.float64)


def distance(num_steps, spread, sigma="beta"):
    """How far the chain's marginals are from q(x_t), in mean and in variance, at the worst t."""
    alpha_bar, found = moments(num_steps, spread, sigma)
    wanted = torch.stack([alpha_bar.sqrt() * MEAN, alpha_bar * spread**2 + 1 - alpha_bar], -1)
    return (found - wanted).abs().amax(0)


def test_a_rectified_schedule_is_the_flow_s_line_from_data_to_noise():
    for shift in (1.0, 3.0):
        ab = rectified(10, shift).alpha_bar
        s = (1 - ab).sqrt() / (ab.sqrt() + (1 - ab).sqrt())
        u = torch.arange(11, dtype=torch.float64) / 10
        torch.testing.assert_close(s, shift * u / (1 + (shift - 1) * u))
    assert ab[0] == 1 and ab[-1] == 0
    with pytest.raises(ValueError, match=r"shift is 0\.0; it should be above 0"):
        rectified(10, 0.0)


@pytest.mark.parametrize("schedule", [rectified(20), rectified(20, 3.0), linear(20, 1e-3, 0.5)], ids=str)
@pytest.mark.parametrize("to_data", [False, True])
def test_a_velocity_gives_the_expected_x_0_on_any_schedule(schedule, to_data):
    net = FlowDenoiser(GaussianVelocity(to_data=to_data), schedule, to_data)
    t = torch.arange(1, 21)
    x_t = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ab = schedule.alpha_bar[t].unsqueeze(-1)
    exact = MEAN + ab.sqrt() * SPREAD**2 / (ab * SPREAD**2 + 1 - ab) * (x_t - ab.sqrt() * MEAN)
    torch.testing.assert_close(net(x_t, t, {}), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_steps", [5, 50])
def test_the_chain_has_the_flow_s_marginals_exactly_where_data_have_unit_variance(num_steps):
    assert distance(num_steps, 1.0).max() < 1e-12


@pytest.mark.parametrize("sigma", ["beta", "gamma"])
def test_elsewhere_they_come_nearer_with_every_step(sigma):
    errors = [distance(num_steps, SPREAD, sigma) for num_steps in (10, 20, 40, 80)]
    ratios = [float(b[1] / a[1]) for a, b in itertools.pairwise(errors)]
    print(sigma, "variance wrong by", [round(float(e[1]), 4) for e in errors])
    assert all(ratio < 0.65 for ratio in ratios) and errors[-1][1] < 0.02
    assert all(e[0] < 0.02 for e in errors)


def test_chain_and_flow_end_in_the_same_law():
    schedule, generator = rectified(50), torch.Generator().manual_seed(0)
    net, noise = FlowDenoiser(GaussianVelocity(), schedule), torch.randn(20_000, 1, generator=generator)
    x, s = noise.clone(), net.time.float()
    for t in range(50, 0, -1):  # Euler's steps along the velocity
        x = x + (s[t - 1] - s[t]) * net.net(x, s[t].expand(len(x)))
    policy = Policy(net, reverse_process(schedule), FullSpace(), "x0")
    x_0 = sample(policy, noise, {}, generator).x_0
    for found in (x, x_0):
        assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
        assert float(found.std()) == pytest.approx(SPREAD, abs=0.02)


def test_the_loss_of_pretraining_is_flow_matching_s_own():
    domain, generator = ToyFlow(num_steps=20), torch.Generator().manual_seed(0)
    net, schedule = domain.denoiser(), domain.schedule()
    x_0, noise = data.draw(64, generator), torch.randn(64, 2, generator=generator)
    t = torch.randint(1, 21, (64,), generator=generator)
    losses = event_losses(domain, schedule, net, Batch(x_0, t, noise, {}, 64))
    s = t / 20
    x_s = (1 - s).unsqueeze(-1) * x_0 + s.unsqueeze(-1) * noise
    direct = (net.net(x_s, s) - (noise - x_0)).square().mean(-1)
    torch.testing.assert_close(losses, direct, rtol=1e-3, atol=1e-4)


def test_the_shipped_flow_draws_the_mixture():
    domain, generator = ToyFlow(), torch.Generator().manual_seed(0)
    net = domain.denoiser().requires_grad_(False)
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    x_0 = sample(policy, torch.randn(8192, 2, generator=generator), {}, generator).x_0
    real = data.draw(8192, generator)
    corners = [torch.cdist(x, data.CENTRES).argmin(-1).bincount(minlength=4) / len(x) for x in (x_0, real)]
    assert (corners[0] - corners[1]).abs().max() < 0.03
    assert (x_0.mean(0) - real.mean(0)).abs().max() < 0.06


def test_a_user_s_own_flow_is_a_plain_domain_and_gets_its_weights_back():
    told = {"network": "envs.toy.flow:Velocity", "event_shape": [2], "prediction": "velocity"}
    domain = build("plain", {**told, "betas": {"name": "rectified", "num_steps": 20}})
    net, own = domain.denoiser(), ToyFlow().denoiser()
    state = own.exported().state_dict()
    assert net.exported().state_dict().keys() == state.keys()
    fit(net, state, "an export")
    x, t = torch.randn(5, 2), torch.arange(1, 6)
    x_t = forward_noise(domain.schedule(), x, t, torch.randn(5, 2))
    torch.testing.assert_close(net(x_t, t, {}), own(x_t, t, {}))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prediction": "velocty"}, r"prediction is 'velocty' \(did you mean 'velocity'\?\)"),
        ({"prediction": "velocity", "first_timestep": 1}, "a velocity's time is a number from 0 to 1"),
    ],
)
def test_what_is_no_flow_is_refused(more, said):
    told = {"network": "envs.toy.flow:Velocity", "event_shape": [2], "betas": {"name": "rectified", "num_steps": 20}}
    with pytest.raises(ValueError, match=said):
        build("plain", {**told, **more})


def test_a_flow_is_fine_tuned_to_the_known_optimum(ray_session):
    config = algorithm("ppo")().domain("toy_flow").reward("quadratic").training(alpha=0.5, minibatch_size=2048)
    algo = config.evaluate(every=0, chains=2048, pretrained_chains=8192).build_algo()
    for _ in range(12):
        algo.train()
    verdict = algo.evaluate_policy().scalars()
    algo.stop()
    print("attained by a flow:", round(verdict["attained"], 3))
    assert verdict["attained"] > 0.85


def test_weights_even_in_noise_are_0_where_noise_says_nothing():
    process = reverse_process(rectified(10))
    weight = process.even_in("eps")
    keep = process.schedule.alpha_bar[1:-1]
    gain = process.from_x0[1:-1] * ((1 - keep) / keep).sqrt()
    assert weight[-1] == 0
    torch.testing.assert_close(weight[1:-1], 2 * process.sigma[1:-1] ** 2 / gain**2)
    assert torch.isfinite(weight[1:]).all()
