"""A learned stand-in for a black box: it tells the scores, its gradient leads uphill, and what is far it doubts."""

import numpy as np
import pytest
import torch

from envs.toy.domain import Toy
from rayft.surrogate import Seen, Surrogate


def scored(num, seed=0, spread=1.0):
    x_0 = np.random.default_rng(seed).normal(size=(num, 2)).astype(np.float32) * np.float32(spread)
    return Seen(x_0, -0.5 * np.square(x_0 - [0.8, 0.6]).sum(1), {})


def fitted(num=3, pessimism=0.0, seen=None, steps=400):
    surrogate = Surrogate(Toy(), num, pessimism)
    surrogate.fit(seen or [scored(512)], steps, torch.Generator().manual_seed(0))
    return surrogate


def test_it_tells_scores_that_it_has_not_seen_and_which_way_is_up():
    surrogate, new = fitted(), scored(512, seed=1)
    x_0 = torch.from_numpy(new.x_0).requires_grad_()
    value = surrogate.value(x_0, {})
    rest = np.square(value.detach().numpy() - new.rewards).mean() / new.rewards.var()
    assert rest < 0.05
    (slope,) = torch.autograd.grad(value.sum(), x_0)
    uphill = torch.tensor([0.8, 0.6]) - x_0.detach()
    assert torch.cosine_similarity(slope, uphill).median() > 0.9


def test_where_its_networks_disagree_it_promises_less():
    near, far = torch.zeros(64, 2), torch.full((64, 2), 8.0)
    hopeful, doubtful = fitted(), fitted(pessimism=2.0)
    gap = [(hopeful.value(x, {}) - doubtful.value(x, {})).mean().item() for x in (near, far)]
    assert 0 <= gap[0] < 0.2
    assert gap[1] > 5 * gap[0]


def test_failed_scores_teach_nothing():
    clean, holed = scored(256), scored(256)
    holed.rewards[100:] = np.nan
    cut = Seen(clean.x_0[:100], clean.rewards[:100], {})
    one, other = fitted(seen=[holed], steps=20), fitted(seen=[cut], steps=20)
    x_0 = torch.from_numpy(clean.x_0)
    assert (one.value(x_0, {}) == other.value(x_0, {})).all()


def test_where_every_score_has_failed_it_says_so():
    nothing = Seen(np.zeros((4, 2), np.float32), np.full(4, np.nan), {})
    with pytest.raises(ValueError, match="every reward has failed"):
        fitted(seen=[nothing])


def test_what_it_told_of_the_newest_scores_before_it_saw_them_is_said():
    surrogate, generator = Surrogate(Toy(), 2, 0.0), torch.Generator().manual_seed(0)
    assert np.isnan(surrogate.fit([scored(512)], 300, generator))
    assert 0.8 < surrogate.fit([scored(512), scored(256, seed=2)], 1, generator) <= 1


def test_its_weights_travel_as_arrays():
    one, other = fitted(steps=10), Surrogate(Toy(), 3, 0.0)
    other.load_numpy(one.numpy())
    x_0 = torch.from_numpy(scored(16).x_0)
    assert (one.value(x_0, {}) == other.value(x_0, {})).all()


def test_first_scores_that_are_all_alike_set_no_scale():
    flat, later = scored(64), scored(64, seed=1, spread=3.0)
    flat.rewards[:] = -123.4
    surrogate, generator = Surrogate(Toy(), 2, 0.0), torch.Generator().manual_seed(0)
    surrogate.fit([flat], 5, generator)
    assert surrogate.scale == 1
    surrogate.fit([flat, later], 5, generator)
    both = np.concatenate([flat.rewards, later.rewards])
    assert (surrogate.centre.item(), surrogate.scale.item()) == pytest.approx((both.mean(), both.std()), rel=1e-5)
    surrogate.fit([flat, later, scored(64, spread=9.0)], 5, generator)
    assert surrogate.scale.item() == pytest.approx(both.std(), rel=1e-5)  # what was learned keeps its meaning
