"""Backpropagation through chains: the exact gradient of J where it is known, whatever is kept or computed again."""

import pytest
import torch
from gaussian_line import ALPHA, PROCESSES, THETA, THETA_PRE, Line, exact_gradient, reward

from rayft.chain import Policy
from rayft.pathwise import Cut, climb
from rayft.seeds import torch_generator
from rayft.space import FullSpace

NUM = 60_000
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def noise_of(num):
    def noise(step):
        return torch.randn(num, 1, dtype=torch.float64, generator=torch_generator(0, 0, "path", step))

    return noise


def climbed(process, steps, again=False, num=NUM, alpha=ALPHA):
    """(gradient of J at THETA, x_0, KL)."""
    policy, reference = (Policy(Line(theta), process, FullSpace()) for theta in (THETA, THETA_PRE))
    x_T, num_steps = noise_of(num)(0), process.num_steps  # noqa: N806
    early = torch.arange(num).remainder(max(num_steps - steps, 1)) + steps + 1
    x_0, kl = climb(policy, reference, x_T, {}, noise_of(num), Cut(steps, again), early.clamp(max=num_steps))
    objective = (reward(x_0[:, 0]) - alpha * kl).mean()
    return torch.autograd.grad(objective, policy.network.theta)[0], x_0.detach(), kl.detach()


@every_process
def test_through_all_transitions_it_is_the_gradient_of_j(process):
    found, _, _ = climbed(process, process.num_steps)
    torch.testing.assert_close(found, exact_gradient(process), rtol=0.06, atol=0.02)


@every_process
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_computing_transitions_again_changes_no_bit_of_the_gradient(process, steps):
    kept, again = climbed(process, steps, num=500), climbed(process, steps, again=True, num=500)
    for one, other in zip(kept, again, strict=True):
        assert (one == other).all()


@every_process
def test_where_the_cut_is_does_not_move_the_chain(process):
    whole, short = climbed(process, process.num_steps, num=500), climbed(process, 1, num=500)
    torch.testing.assert_close(whole[1], short[1])


@every_process
@pytest.mark.parametrize("steps", [1, 3])
def test_one_early_transition_stands_for_the_kl_of_all_before_the_cut(process, steps):
    _, _, whole = climbed(process, process.num_steps)
    _, _, estimate = climbed(process, steps)
    error = (estimate.std() / NUM**0.5 + whole.std() / NUM**0.5).item()
    assert estimate.mean().item() == pytest.approx(whole.mean().item(), abs=4 * error)


@every_process
def test_through_the_last_transition_alone_the_gradient_is_that_of_its_mean(process):
    found, x_0, _ = climbed(process, 1, num=500, alpha=0.0)
    keep, gain, _, _ = process.linear_in("eps")
    x_1 = (x_0 - process.sigma[1] * noise_of(500)(1) - gain[1] * THETA[1]) / (keep[1] + gain[1] * THETA[0])
    slope = (1 - x_0) * gain[1]  # dr/dx_0 times dx_0/deps
    torch.testing.assert_close(found, torch.stack([(slope * x_1).mean(), slope.mean()]))
