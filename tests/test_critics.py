"""Value networks: 0 everywhere at first, one number a chain, and blind to what a score is blind to."""

from pathlib import Path

import numpy as np
import pytest
import torch

from envs.toy.domain import Toy
from rayft import domain as domains
from rayft.algorithms.backprop import BackpropConfig
from rayft.algorithms.pcl import PCLConfig

GOLDEN = Path(__file__).parent / "golden"
DATA = {"data": str(GOLDEN / "molecules/dsgdb9nsd")}
TOLD = {
    "toy": {},
    "toy_masked": {},
    "toy_flow": {},
    "conditioned": {"domain": "toy", "classes": ["a", "b"]},
    "molecules": DATA,
    "molecules_conditional": {**DATA, "weights": None},
    "molecules_edm": {**DATA, "model": str(GOLDEN / "edm/conditional"), "at": {"alpha": 0, "gap": 0}},
    "shapes": {"num_points": 16},
    "shapes_conditional": {"num_points": 16, "weights": None},
}


def asked(name, num=5):
    """(critic with random last weights, x_t, timestep, context) of a domain."""
    domain = domains.build(name, TOLD[name])
    torch.manual_seed(0)
    critic, generator = domain.critic(), torch.Generator().manual_seed(0)
    context = domain.context(num, generator)
    x_t = domain.space.project(torch.randn(num, *domain.event_shape, generator=generator), context)
    every = domain.schedule().timestep
    return critic, x_t, every[torch.randint(1, len(every), (num,), generator=generator)], context


def woken(critic):
    for parameter in critic.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    return critic


@pytest.mark.parametrize("name", TOLD)
def test_a_value_is_one_number_for_each_chain_and_0_at_first(name):
    critic, *told = asked(name)
    assert critic(*told).shape == (5,)
    assert (critic(*told) == 0).all()
    assert critic(*told).dtype == told[0].dtype


@pytest.mark.parametrize("name", TOLD)
def test_every_weight_of_it_is_used_so_that_learners_can_share_it(name):
    critic, *told = asked(name)
    woken(critic)(*told).sum().backward()
    unused = [n for n, p in critic.named_parameters() if p.grad is None]
    assert unused == []


def test_it_knows_a_molecule_again_that_was_turned_or_whose_atoms_were_renamed():
    critic, x_t, t, context = asked("molecules")
    woken(critic)
    before = critic(x_t, t, context)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    turned = torch.cat([x_t[..., :3] @ turn, x_t[..., 3:]], -1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(x_t.shape[1]))
    renamed = critic(x_t[:, order], t, {"mask": context["mask"][:, order]})
    torch.testing.assert_close(critic(turned, t, context), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(renamed, before, rtol=1e-4, atol=1e-4)
    assert (critic(2 * x_t, t, context) - before).abs().max() > 1e-3


def test_it_knows_a_cloud_again_whose_points_come_in_another_order():
    critic, x_t, t, context = asked("shapes")
    woken(critic)
    before = critic(x_t, t, context)
    order = torch.cat([torch.arange(8), 8 + torch.randperm(16, generator=torch.Generator().manual_seed(2))])
    torch.testing.assert_close(critic(x_t[:, order], t, context), before, rtol=1e-4, atol=1e-4)
    assert (critic(torch.cat([x_t[:, :8], 2 * x_t[:, 8:]], 1), t, context) - before).abs().max() > 1e-3


class Column(torch.nn.Module):
    def forward(self, x_t, timestep, context):
        return x_t.sum(1, keepdim=True)


class Pair(Column):
    def forward(self, x_t, timestep, context):
        return x_t.sum(1), timestep


class Broken(Column):
    def forward(self, x_t, timestep, context):
        return context["absent"]


@pytest.mark.parametrize(
    ("critic", "why"),
    [
        (Column, r"value network of Odd gives \(2, 1\) for 2 chains; it should give one number for each"),
        (Pair, "value network of Odd gives tuple for 2 chains"),
        (Broken, r"value network of Odd fails on x_t of shape \(2, 2\): KeyError"),
    ],
)
@pytest.mark.parametrize("config", [PCLConfig().training(alpha=0.5), BackpropConfig().training(surrogate=2)])
def test_a_value_network_that_gives_something_else_is_refused_before_anything_is_drawn(config, critic, why):
    class Odd(Toy):
        def critic(self):
            return critic()

    with pytest.raises(ValueError, match=why):
        config.copy(copy_frozen=False).domain(Odd).reward("quadratic").validate()
