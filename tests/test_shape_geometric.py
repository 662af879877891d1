"""Rewards of a cloud's geometry: known answers, and no answer where there is nothing to measure."""

from __future__ import annotations

import numpy as np
import pytest

from envs.shapes.generated import generated
from envs.shapes.geometric import Extent, HullVolume, Symmetry

pytest.importorskip("libusb_package", reason="needs Open3D: pip install 'rayft[shapes]'")

CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
POINT, PLANE = np.ones((50, 3)), np.random.default_rng(0).normal(size=(50, 3)) * [1, 1, 0]
BROKEN = np.full((50, 3), np.nan)


@pytest.fixture
def cloud() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)


def test_a_mirrored_cloud_is_symmetric_on_that_axis_alone(cloud):
    right = np.abs(cloud) + np.float32([0, 0.5, 0])
    whole = np.concatenate([right, right * [1, -1, 1]])
    (score,) = Symmetry("y")([whole])
    assert score == pytest.approx(0, abs=1e-6)
    assert Symmetry("x")([whole])[0] < -0.1


def test_symmetry_is_the_mean_distance_to_the_nearest_mirrored_point():
    shape = np.array([[0, 1, 0], [0, -1, 0], [3, 1, 0], [-3, 0, 1], [0, -1, -1]], float)
    centred = shape - shape.mean(0)
    mirrored = centred * [1, -1, 1]
    nearest = np.linalg.norm(centred[:, None] - mirrored[None], axis=2).min(1)
    assert Symmetry()([shape])[0] == pytest.approx(-nearest.mean() / centred.std())


@pytest.mark.parametrize(
    "reward",
    [Symmetry(), Extent(), Extent("x/y", target=0.7), HullVolume()],
    ids=["symmetry", "extent", "extent-target", "hull"],
)
def test_place_and_size_do_not_matter(reward, cloud):
    assert reward([cloud * 7 + [3, -20, 5]]) == pytest.approx(reward([cloud]), rel=1e-4)


def test_no_cloud_is_less_symmetric_than_what_decodes_to_nothing():
    apart = np.concatenate([np.full((999, 3), [0, 1e-3, 0]), [[0, 1, 0]], [[1e-4, 0, 0]]])
    (score,) = Symmetry()([apart])
    assert Symmetry.undecodable < score < 0


def test_the_extent_of_a_box_is_its_proportion():
    box = np.random.default_rng(0).uniform(size=(20000, 3)) * [4, 2, 1]
    assert Extent("z/x")([box]) == pytest.approx([0.25], abs=0.01)
    assert Extent("x/y")([box]) == pytest.approx([2.0], abs=0.05)
    assert Extent("z/x", quantile=0)([CORNERS * [4, 2, 1]]) == pytest.approx([0.25])


def test_a_target_is_met_at_zero_and_missed_alike_on_both_sides():
    box = CORNERS * [4, 2, 1]
    scores = [Extent("z/x", target=target, quantile=0)([box])[0] for target in (0.25, 0.5, 0.125)]
    assert scores == pytest.approx([0, -np.log(2), -np.log(2)])
    assert Extent("z/x", target=1e9, quantile=0)([box]) == [-10.0] == [Extent(target=1).undecodable]


def test_lost_points_do_not_change_the_extent(cloud):
    lost = np.concatenate([cloud, [[0, 0, 50]]])
    assert Extent()([lost]) == pytest.approx(Extent()([cloud]), rel=0.05)


def test_the_hull_of_a_box_has_its_volume():
    """A cube's corners have unit variance at a side of 2; a box's are scaled by the root mean square of its sides."""
    assert HullVolume()([CORNERS * 5]) == pytest.approx([8])
    assert HullVolume()([CORNERS * [4, 2, 1]]) == pytest.approx([8 * 8 / (21 / 3) ** 1.5])


@pytest.mark.parametrize("reward", [Symmetry(), Extent(), HullVolume()], ids=["symmetry", "extent", "hull"])
def test_what_has_no_extent_has_no_score_and_the_others_keep_theirs(reward, cloud):
    found = reward([cloud, POINT, BROKEN, np.zeros((0, 3)), cloud])
    assert found[0] == found[4] is not None and found[1:4] == [None] * 3


def test_flat_clouds_have_no_hull_and_no_ratio_over_nothing():
    assert HullVolume()([PLANE, PLANE * [1, 0, 0], PLANE[:3]]) == [None] * 3
    assert Extent("x/z")([PLANE]) == [None] and Extent("z/x")([PLANE]) == [0.0]
    assert Extent("z/x", target=1.0)([PLANE]) == [None]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Symmetry("w"), "axis is 'w'; give x, y or z"),
        (lambda: Symmetry(""), "axis is ''; give"),
        (lambda: Extent("z"), "axes is 'z'; give two different ones"),
        (lambda: Extent("x/x"), "axes is 'x/x'"),
        (lambda: Extent(target=0), "target is 0; give the ratio"),
        (lambda: Extent(quantile=0.5), "quantile is 0.5; give the share"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_jets_are_symmetric_and_helicopters_taller_than_jets():
    shapes = generated(num_per_class={"jet": 4, "helicopter": 4})
    jets = list(shapes.points[:4])
    assert min(Symmetry("y")(jets)) > -0.1 > max(Symmetry("x")(jets))
    heights = np.array(Extent("z/x")(list(shapes.points)))
    assert heights[:4].max() < heights[4:].min()
