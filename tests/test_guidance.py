"""Guidance by a gradient: against the exact answer of a Gaussian, and against what it must not change."""

from __future__ import annotations

import pytest
import torch

from rayft.chain import Policy, reverse_process, sample
from rayft.guidance.gradient import Guided
from rayft.schedule import linear
from rayft.space import FullSpace

SCHEDULE = linear(100, 1e-3, 0.175)


def standard_normal(x_t, timestep, context):
    """E[noise | x_t] where x_0 ~ N(0, I): the whole of x_t but its signal."""
    return (1 - SCHEDULE.alpha_bar[timestep]).sqrt().to(x_t.dtype).reshape(-1, 1) * x_t


def slope(x_0, context):
    return x_0[:, 0]


@pytest.fixture
def policy():
    return Policy(standard_normal, reverse_process(SCHEDULE), FullSpace())


def drawn(policy, num=4096):
    x_T = torch.randn(num, 2, generator=torch.Generator().manual_seed(0))  # noqa: N806
    return sample(policy, x_T, {}, torch.Generator().manual_seed(1)).x_0


def test_a_linear_reward_moves_a_gaussian_by_its_slope_over_alpha(policy):
    """exp(x / alpha) N(0, 1) is N(1 / alpha, 1)."""
    before, after = drawn(policy), drawn(Guided(policy, slope, alpha=2.0))
    assert float(before.mean(0)[0]) == pytest.approx(0, abs=0.05)
    assert float(after.mean(0)[0]) == pytest.approx(0.5, abs=0.06)
    assert float(after.mean(0)[1]) == pytest.approx(0, abs=0.05)
    assert float(after.std(0)[0]) == pytest.approx(1, abs=0.05)


def test_an_infinite_temperature_guides_nobody(policy):
    assert torch.allclose(drawn(policy, 64), drawn(Guided(policy, slope, alpha=1e12), 64), atol=1e-5)


def test_a_batch_at_one_timestep_is_the_same_as_rows_at_theirs(policy):
    guided, x_t = Guided(policy, lambda x, _: -x.square().sum(1), alpha=0.5), torch.randn(3, 2)
    rows = guided.mean(x_t, torch.full((3,), 40), {})
    assert torch.allclose(guided.mean_at(x_t, 40, {}), rows)
    assert not torch.allclose(rows, policy.mean_at(x_t, 40, {}))


def test_read_at_x_t_the_network_is_not_asked_about_the_reward(policy):
    guided, x_t = Guided(policy, slope, alpha=1.0, read_at="x_t"), torch.randn(3, 2)
    shift = guided.mean_at(x_t, 40, {}) - policy.mean_at(x_t, 40, {})
    expected = float(policy.sigma(torch.tensor([40])) ** 2)
    assert torch.allclose(shift, torch.tensor([expected, 0.0]).expand(3, 2), atol=1e-6)


def test_a_reward_without_a_finite_slope_moves_nothing(policy):
    guided, x_t = Guided(policy, lambda x, _: (x - x).sum(1).sqrt(), alpha=1.0), torch.randn(3, 2)
    assert torch.allclose(guided.mean_at(x_t, 40, {}), policy.mean_at(x_t, 40, {}))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(policy, alpha):
    with pytest.raises(ValueError, match="temperature above 0"):
        Guided(policy, slope, alpha)
