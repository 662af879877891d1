"""Pairs (x_0, t): where they come from, what must be independent, and what a seed gives back."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch import nn

from envs.toy.masked import MEANS, SPREAD, MaskedToy
from rayft.bench import Bench
from rayft.chain import Policy, expand, posterior_mean, reverse_process, sample
from rayft.domain import Denoiser, Domain
from rayft.payoff.pairs import Aim, draw_pairs, place
from rayft.schedule import linear
from rayft.space import squared_norm


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, rtol=1e-8, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def bench(domain=None, shift=0.0, dtype=torch.float64):
    domain = domain or MaskedToy()
    process = reverse_process(domain.schedule())
    net = domain.denoiser().to(dtype).requires_grad_(False)
    if shift:
        nn.init.constant_(net.residual[-1].bias, shift)
    policy = Policy(net, process, domain.space, net.prediction)
    return Bench(domain, policy, policy, torch.device("cpu"), dtype)


class NoData(MaskedToy):
    """The masked toy where a user brings a model and no data."""

    def data(self, num_events, generator):
        return None


class Empty(MaskedToy):
    def data(self, num_events, generator):
        x_0, context = super().data(num_events, generator)
        return x_0[:0], {k: v[:0] for k, v in context.items()}


class Zero(Denoiser):
    prediction = "x0"

    def forward(self, x_t, timestep, context):
        return torch.zeros_like(x_t)


class Normals(Domain):
    """Data that are standard normal numbers, as noise is."""

    event_shape = (1,)

    def schedule(self):
        return linear(6, 0.1, 0.6)

    def denoiser(self):
        return Zero()

    def data(self, num_events, generator):
        return torch.randn(num_events, 1, generator=generator), {}


def unpacked(b, pairs):
    """The noise that a pair was made with."""
    ab = b.reference.process.schedule.alpha_bar[pairs.t]
    return (pairs.x_t - expand(ab.sqrt(), pairs.x_t) * pairs.x_0) / expand((1 - ab).sqrt(), pairs.x_t)


def test_pairs_are_data_under_forward_noise_at_timesteps_drawn_evenly():
    b, n = bench(), 12_000
    pairs = draw_pairs(b, n, seeded(0), 1, "mean")
    t, context, space = pairs.t, pairs.context, b.domain.space
    noise = unpacked(b, pairs)
    assert chisquare(torch.bincount(t, minlength=21)[1:].numpy()).pvalue > 1e-3
    close(space.project(pairs.x_0, context), pairs.x_0, atol=1e-6)  # data are float32
    around = pairs.x_0 - space.project(MEANS[context["class"]].double(), context)
    dim = space.dim(pairs.x_0, context)
    assert float(squared_norm(around).sum() / dim.sum()) == pytest.approx(SPREAD**2, rel=0.02)
    for part in (t <= 5, t > 15):
        assert float(squared_norm(noise)[part].sum() / dim[part].sum()) == pytest.approx(1, rel=0.03)
    close(space.project(noise, context), noise, atol=1e-6)
    close(posterior_mean(b.reference.process, pairs.x_t, pairs.x_0, t), pairs.centre)


def test_a_sampled_centre_spreads_as_the_posterior_does():
    """q(x_prev | x_t, x_0) has variance gamma_t, and none at t = 1."""
    b, n = bench(), 12_000
    pairs = draw_pairs(b, n, seeded(0), 1, "sample")
    process, t = b.reference.process, pairs.t
    ab = process.schedule.alpha_bar
    gamma = (1 - ab[t - 1]) / (1 - ab[t]) * (1 - ab[t] / ab[t - 1])
    off = pairs.centre - posterior_mean(process, pairs.x_t, pairs.x_0, t)
    dim = b.domain.space.dim(off, pairs.context)
    assert float(off[t == 1].abs().max()) == 0
    later = t > 1
    share = squared_norm(off)[later] / (gamma * dim)[later]
    assert float((share * dim[later]).sum() / dim[later].sum()) == pytest.approx(1, abs=0.03)


def test_without_data_pairs_start_from_the_pretrained_models_samples():
    b, n = bench(NoData(), shift=0.5), 4000
    pairs = draw_pairs(b, n, seeded(0), 1, "mean")
    own = sample(b.reference, *b.start(n, seeded(1)), seeded(2))
    found, wanted = (group_means(b, *told) for told in ((pairs.x_0, pairs.context), (own.x_0, own.context)))
    assert np.allclose(found, wanted, atol=0.06)


def group_means(b, x_0, context):
    groups = b.domain.groups(context)
    return [x_0[groups == g][:, 0].mean(0).tolist() for g in groups.unique()]


def test_an_empty_data_set_is_named():
    with pytest.raises(ValueError, match="gave 0 of 50 events: is it empty"):
        draw_pairs(bench(Empty()), 50, seeded(0), 1, "mean")


@pytest.mark.parametrize("num_steps", [20, 30, 42])
def test_the_noise_level_says_nothing_of_the_datum_it_is_put_on(num_steps):
    """t is drawn apart from x_0 and its context (R Eq. 13: E_D E_t)."""
    b = bench(MaskedToy(num_steps))
    pairs = draw_pairs(b, 3000, seeded(0), 1, "mean")
    group = b.domain.groups(pairs.context).numpy()
    table = np.zeros((num_steps, int(group.max()) + 1))
    np.add.at(table, (pairs.t.numpy() - 1, group), 1)
    assert chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


def test_no_random_number_serves_both_a_datum_and_its_noise():
    """Data and forward noise come from streams of their own: no value of one turns up in the other."""
    b = bench(Normals(), dtype=torch.float32)
    pairs = draw_pairs(b, 512, seeded(0), 1, "mean")
    gap = (pairs.x_0[:, None, 0] - unpacked(b, pairs)[None, :, 0]).abs()
    expected = 512 * 512 * 2e-5 / math.sqrt(4 * math.pi)  # chance hits within 1e-5 of two independent normal samples
    assert int((gap < 1e-5).sum()) < expected + 5 * math.sqrt(expected) + 5


@pytest.mark.parametrize("centre", ["mean", "sample"])
def test_a_seed_gives_the_same_x_t_and_centre_back(centre):
    b = bench()
    pairs = draw_pairs(b, 40, seeded(3), 77, centre)
    told = (b.reference.process, b.domain.space, pairs.x_0, pairs.t, pairs.context)
    x_t, x_tilde = place(*told, 77, centre)
    assert torch.equal(x_t, pairs.x_t) and torch.equal(x_tilde, pairs.centre)
    assert not torch.equal(place(*told, 78, centre)[0], pairs.x_t)


def test_above_a_timestep_the_data_are_judged_and_below_it_the_candidates():
    b = bench()
    pairs = draw_pairs(b, 200, seeded(1), 2, "mean")
    shift = 0.1 * torch.randn(200, 3, *pairs.x_0.shape[1:], dtype=torch.float64)
    plain = Aim(3, (1.0,), "sigma", "x0_hat", "mean", "importance", 0, None)
    question, all_read = pairs.question(shift, replace(plain, x_0_above=8)), pairs.question(shift, plain).events
    late = (pairs.t > 8).repeat_interleave(3)
    assert 0 < late.sum() < len(late)
    assert len(question.events) == 600 - 2 * int((pairs.t > 8).sum()), "one answer is enough for all candidates"
    told = question.events[question.asked]
    assert pairs.question(shift, plain).asked is None
    close(pairs.question(shift, replace(plain, reward_at="x_0")).events, pairs.x_0)
    close(told[late], pairs.x_0.repeat_interleave(3, 0)[late])
    close(told[~late], all_read[~late])
