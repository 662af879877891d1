"""Distances between clouds: public code's numbers, identities, any number of workers, and what fails in one."""

from __future__ import annotations

from itertools import permutations
from time import perf_counter

import numpy as np
import pytest
from test_shape_metrics import GOLDEN, drawn

from envs.shapes import distances
from envs.shapes.distances import pairwise_chamfer, pairwise_emd


def test_distances_are_those_of_public_code():
    golden = np.load(GOLDEN)
    made, real = golden["sample_clouds"], golden["reference_clouds"]
    np.testing.assert_allclose(pairwise_chamfer(made, real), golden["chamfer"], rtol=1e-5)
    np.testing.assert_allclose(pairwise_emd(made, real), golden["emd"], rtol=1e-9)


def test_chamfer_counted_by_hand():
    x, y = np.array([[[0.0, 0, 0], [2, 0, 0]]]), np.array([[[0.0, 1, 0], [0, 3, 0], [0, 1, 0]]])
    assert pairwise_chamfer(x, y).item() == pytest.approx((1 + 5) / 2 + (1 + 9 + 1) / 3)


def test_emd_is_the_cheapest_of_all_matchings():
    x, y = drawn(1, 5, 1), drawn(1, 5, 2)
    lengths = np.linalg.norm(x[0].astype(float)[:, None] - y[0].astype(float), axis=-1)
    every = [lengths[np.arange(5), order].mean() for order in permutations(range(5))]
    assert pairwise_emd(x, y).item() == pytest.approx(min(every), rel=1e-12)


def test_points_in_another_order_are_the_same_cloud():
    x = drawn(3, 200)
    y = x[:, np.random.default_rng(1).permutation(200)]
    assert np.diag(pairwise_emd(x, y)) == pytest.approx(0, abs=1e-9)
    assert np.diag(pairwise_chamfer(x, y)) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(pairwise_emd(x, y), pairwise_emd(x, x), atol=1e-9)


def test_a_cloud_moved_as_a_whole_is_as_far_as_it_was_moved():
    x = drawn(2, 100)
    assert np.diag(pairwise_emd(x, x + np.float32([0.5, 0, 0]))) == pytest.approx(0.5, rel=1e-6)


def test_distances_are_symmetric_and_emd_keeps_to_the_triangle():
    x, y = drawn(4, 80, 1), drawn(5, 80, 2)
    for pairwise in (pairwise_chamfer, pairwise_emd):
        np.testing.assert_allclose(pairwise(x, y), pairwise(y, x).T, rtol=1e-12)
        whole = pairwise(x, x)
        np.testing.assert_allclose(whole, pairwise(x, x.copy()), atol=1e-12)
        assert (np.diag(whole) == 0).all() and (whole == whole.T).all()
    every = np.concatenate([x, y])
    d = pairwise_emd(every, every)
    assert (d[:, None] <= d[:, :, None] + d[None] + 1e-12).all()


def test_chamfer_of_large_clouds_is_that_of_all_distances(monkeypatch):
    x, y = drawn(1, 300, 1), drawn(1, 170, 2)
    square = np.square(x[0].astype(float)[:, None] - y[0].astype(float)).sum(-1)
    expected = square.min(1).mean() + square.min(0).mean()
    for block in (1, 1000, 10**6):
        monkeypatch.setattr(distances, "BLOCK", block)
        assert pairwise_chamfer(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_pot_and_scipy_find_the_same_distance(monkeypatch):
    pytest.importorskip("ot")
    x, y = drawn(3, 150, 1), drawn(3, 150, 2)
    by_pot = pairwise_emd(x, y)
    monkeypatch.setattr(distances, "pot", lambda: None)
    np.testing.assert_allclose(pairwise_emd(x, y), by_pot, rtol=1e-12)


@pytest.mark.parametrize("pairwise", [pairwise_chamfer, pairwise_emd])
def test_any_number_of_workers_gives_the_same_digits(pairwise):
    x, y = drawn(7, 60, 1), drawn(5, 60, 2)
    one = pairwise(x, y, 1)
    for num_workers in (2, 3, None):
        assert (pairwise(x, y, num_workers) == one).all()


def test_only_the_pairs_that_are_asked_for_are_measured_and_told():
    x, y, told = drawn(4, 20, 1), drawn(3, 20, 2), []
    needed = np.zeros((4, 3), bool)
    needed[[0, 0, 2], [1, 2, 0]] = True
    found = pairwise_emd(x, y, bar=lambda *done: told.append(done), needed=needed)
    assert (np.isfinite(found) == needed).all()
    assert (found[needed] == pairwise_emd(x, y)[needed]).all()
    assert told == [(1, 3), (2, 3), (3, 3)]
    pairwise_chamfer(x, x, bar=lambda *done: told.append(done))
    assert told[-1] == (6, 6)


def test_what_fails_in_a_worker_is_raised_and_the_others_stop(monkeypatch):
    calls = []

    def broken(x, y):
        calls.append(1)
        raise MemoryError("no room for 2048 x 2048 distances")

    monkeypatch.setattr(distances, "emd", broken)
    start = perf_counter()
    with pytest.raises(MemoryError, match="no room"):
        pairwise_emd(drawn(50, 10), drawn(50, 10), 2)
    assert len(calls) <= 100  # at most one pair of a row
    assert perf_counter() - start < 5
