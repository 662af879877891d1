"""A cloud in 24 numbers: what they must not depend on, and what they must tell apart."""

from __future__ import annotations

import numpy as np
import pytest

from envs.shapes.data import normalised
from envs.shapes.generated import generated
from envs.shapes.latent import LATENT, embedding, fit


@pytest.fixture(scope="module")
def clouds():
    return normalised(generated("aircraft", 20, num_points=2048).points)


def test_an_embedding_is_the_mean_over_points_whatever_their_order(clouds):
    shuffled = clouds[:3, np.random.default_rng(0).permutation(clouds.shape[1])]
    np.testing.assert_allclose(embedding(shuffled), embedding(clouds[:3]), atol=1e-5)
    halves = (embedding(clouds[:3, :1024]) + embedding(clouds[:3, 1024:])) / 2
    np.testing.assert_allclose(halves, embedding(clouds[:3]), atol=1e-5)


def test_over_the_data_the_latent_has_no_mean_unit_variance_and_no_correlation(clouds):
    phi = embedding(clouds)
    z = fit(phi).of(phi)
    assert z.shape == (len(clouds), LATENT)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(LATENT), atol=1e-2)


def test_other_points_of_the_same_shape_have_nearly_its_latent(clouds):
    told = fit(embedding(clouds))
    here, there = (told.of(embedding(half)) for half in (clouds[:, :1024], clouds[:, 1024:]))
    gap = np.linalg.norm(here[:, None] - there[None], axis=-1)
    assert (gap.argmin(1) == np.arange(len(clouds))).mean() > 0.9


def test_the_axes_do_not_depend_on_the_order_of_the_shapes(clouds):
    order = np.random.default_rng(0).permutation(len(clouds))
    phi = embedding(clouds)
    np.testing.assert_allclose(fit(phi[order]).of(phi)[:, :8], fit(phi).of(phi)[:, :8], atol=1e-2)


def test_too_few_shapes_and_shapes_all_alike_are_refused(clouds):
    with pytest.raises(ValueError, match="there are 24 shapes to learn from, and a latent of 24 needs 25"):
        fit(embedding(clouds[:24]))
    with pytest.raises(ValueError, match="too much alike"):
        fit(np.repeat(embedding(clouds[:1]), 40, 0))
