"""Chains that follow one policy down to a timestep and another from there."""

import pytest
import torch
from test_chain import close, masked_toy, seeded, start

from rayft.chain import expand, sample, sample_roll_in


def test_rolling_in_under_the_reference_itself_gives_plain_chains():
    domain, policy = masked_toy()
    x_T, context = start(domain, policy, 40, 0)  # noqa: N806
    t = torch.arange(40) % 20 + 1
    plain = sample(policy, x_T, context, seeded(2))
    rolled, x_0 = sample_roll_in(policy, policy, x_T, t, context, seeded(2))
    each = torch.arange(40)
    close(x_0, plain.x_0)
    close(rolled.x[1], plain.x[t, each])
    close(rolled.x[0], plain.x[t - 1, each])


def test_roll_in_follows_the_policy_down_to_t_and_the_reference_from_there():
    domain, reference = masked_toy()
    _, policy = masked_toy(shift=0.4)
    x_T, context = start(domain, policy, 4000, 0)  # noqa: N806
    t = torch.randint(1, 21, (4000,), generator=seeded(5))
    rolled, x_0 = sample_roll_in(policy, reference, x_T, t, context, seeded(2))
    each = torch.arange(4000)
    assert torch.equal(rolled.t, t.unsqueeze(0)) and rolled.num_rows == 1
    close(rolled.x[1], sample(policy, x_T, context, seeded(2)).x[t, each])
    mean = reference.mean(rolled.x[1], t, context).detach()
    close(rolled.columns["mean_ref"][0], mean)
    standard = (rolled.x[0] - mean) / expand(reference.sigma(t), mean)
    close(domain.space.project(standard, context), standard)
    dim = domain.space.dim(standard, context)
    for part in (t <= 3, (t > 3) & (t < 15), t >= 15):
        assert float(standard[part].square().sum()) / float(dim[part].sum()) == pytest.approx(1, abs=0.04)
    first = t == 1
    close(x_0[first], rolled.x[0][first])


def test_the_continuation_is_the_reference_chain_of_its_transition():
    """From t = T on nothing of the policy is left, so x_0 is the reference's own."""
    domain, reference = masked_toy()
    _, policy = masked_toy(shift=0.4)
    x_T, context = start(domain, policy, 30, 0)  # noqa: N806
    last = torch.full((30,), 20)
    _, x_0 = sample_roll_in(policy, reference, x_T, last, context, seeded(2))
    close(x_0, sample(reference, x_T, context, seeded(2)).x_0)
