"""Rows read at x_0, drawn again by weight: the same expected gradient, less noise, nothing paid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_reading import NUM_STEPS, Normal, aim, bench, made, reading

from envs.toy.masked import MaskedToy
from rayft.payoff.reading import View
from rayft.payoff.refresh import refreshed

NUM = 40_000
AT_DATA = aim(1, (0.0,), at="x_0")


def view(**told):
    return View(
        **{"temperature": 0.5, "radius": 0.0, "normalise": "batch", "timestep_weight": "vlb", "anchor": True} | told
    )


def again(b, shard, told, seed=0, timesteps=None, **how):
    seen = view(**how)
    found = reading(b, shard, told, **vars(seen))
    return found, refreshed(found, shard.x_0, seen, told, b, torch.Generator().manual_seed(seed), timesteps)


def pulls(found):
    """Each row's pull on the mean, weighted as the likelihood is."""
    return found.chains.columns["shift"][0]


@pytest.mark.parametrize("timestep_weight", ["vlb", "simple"])
def test_the_expected_pull_is_that_of_weighted_rows_and_its_noise_is_smaller(timestep_weight):
    b = bench(Normal(2))
    before, after = again(b, made(b, AT_DATA, NUM), AT_DATA, timestep_weight=timestep_weight, temperature=0.2)
    level = before.weight.mean(1)[:, None] - 1  # the anchored pull of weighted rows: (w - 1) times the row's own
    spread = [pulls(found).std(0) for found in (before, after)]
    assert np.abs(pulls(before).mean(0) - pulls(after).mean(0)).max() < 4 * max(s.max() for s in spread) / NUM**0.5
    assert np.abs(pulls(after).mean(0)).min() > 5 * spread[1].max() / NUM**0.5, "no tilt to tell from noise"
    assert (spread[1] < 0.8 * spread[0]).all()
    assert level.std() > 1


def test_failed_data_are_never_drawn_and_timesteps_are_even():
    b = bench(Normal(2))
    shard = made(b, AT_DATA, 8000, lambda x: np.where(x[:, 0] < 0, np.nan, 0.0))
    _, after = again(b, shard, AT_DATA)
    centre_of_t_1 = after.chains.x[0][after.chains.t[0] == 1]  # the posterior's mean there is x_0 itself
    assert (shard.x_0[:, 0] < 0).sum() > 3000
    assert (centre_of_t_1[:, 0] >= 0).all()
    assert np.bincount(after.chains.t[0], minlength=NUM_STEPS + 1)[1:] == pytest.approx(8000 / NUM_STEPS, rel=0.15)


def test_rows_below_the_timestep_stay_as_they_were():
    b, told = bench(Normal(2)), replace(aim(4, (1.0,)), x_0_above=4)
    before, after = again(b, made(b, told, 2000), told, radius=1.0)
    early = before.chains.t[0] <= 4
    assert 0 < early.sum() < 2000
    assert np.array_equal(after.chains.x[:, early], before.chains.x[:, early])
    assert (after.chains.t[0][~early] > 4).all()
    assert np.array_equal(after.chains.columns["weight"][0][early], before.chains.columns["weight"][0][early])
    assert (after.chains.columns["weight"][0][~early] == 1).all()


def test_rows_at_timesteps_left_out_stay_and_the_others_are_even_and_of_all_data():
    b = bench(Normal(2))
    shard = made(b, AT_DATA, 8000)
    before, after = again(b, shard, AT_DATA, timesteps=(3, 5), temperature=0.2)
    out = (before.chains.t[0] < 3) | (before.chains.t[0] > 5)
    assert np.array_equal(after.chains.x[:, out], before.chains.x[:, out])
    assert np.bincount(after.chains.t[0][~out], minlength=6)[3:] == pytest.approx([(~out).sum() / 3] * 3, rel=0.1)
    assert (after.chains.columns["weight"][0][~out] == 1).all()


def test_contexts_travel_with_their_data():
    b = bench(MaskedToy(), torch.float32)
    shard = made(b, AT_DATA, 500)
    _, after = again(b, shard, AT_DATA)
    mask = after.chains.context["mask"].astype(bool)
    assert (after.chains.x[1][~mask] == 0).all()
    assert (np.abs(after.chains.x[1]).sum(-1)[mask] > 0).all()


def test_one_seed_is_one_set_of_rows():
    b = bench(Normal(2))
    shard = made(b, AT_DATA, 100)
    same, other = (again(b, shard, AT_DATA, seed)[1].chains.x for seed in (0, 1))
    assert np.array_equal(same, again(b, shard, AT_DATA, 0)[1].chains.x)
    assert not np.array_equal(same, other)
