"""Rewards of a cloud's geometry alone, without a network. A sample is an array [point, 3].

None depends on where a cloud is, nor, measured in its own deviation, on how large. What has no extent to measure is a
failure and scores None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from envs.shapes.data import in_one_place
from envs.shapes.surface import open3d
from rayft.reward import Reward

AXES = "xyz"
FLAT = 1e-6  # an extent below this share of the whole is none
WORST = -10.0  # of a ratio that should have been another: e^10 times too large or small


class Symmetry(Reward):
    """How nearly a cloud is its own mirror image across the plane through its mean:  -mean_i min_j |x_i - mirror x_j|.

    In deviations of the cloud. 0 is perfect, and a random sample of a symmetric surface comes as near as its points lie
    to each other.
    """

    undecodable = -2 * math.sqrt(3)  # no cloud is further from its mirror image

    def __init__(self, axis: str = "y") -> None:
        if not isinstance(axis, str) or len(axis) != 1 or axis not in AXES:
            raise ValueError(f"axis is {axis!r}; give x, y or z")
        self.axis = AXES.index(axis)

    def __call__(self, samples: Sequence[np.ndarray]) -> list[float | None]:
        from scipy.spatial import KDTree

        mirror = np.ones(3)
        mirror[self.axis] = -1
        return _each(samples, lambda cloud: -float(KDTree(cloud * mirror).query(cloud)[0].mean()))


class Extent(Reward):
    """The ratio of two extents, as axes="z/x": height over length. With a ``target``, -|log(ratio / target)|.

    An extent lies between two quantiles, so that a few lost points do not matter.
    """

    def __init__(self, axes: str = "z/x", target: float | None = None, quantile: float = 0.02) -> None:
        above, _, below = axes.partition("/") if isinstance(axes, str) else ("", "", "")
        if above not in AXES or below not in AXES or len(above) != 1 or len(below) != 1 or above == below:
            raise ValueError(f"axes is {axes!r}; give two different ones of x, y and z, such as 'z/x'")
        if target is not None and not (isinstance(target, float | int) and 0 < target < math.inf):
            raise ValueError(f"target is {target!r}; give the ratio that is wanted, a number above 0, or leave it out")
        if not (isinstance(quantile, float | int) and 0 <= quantile < 0.5):
            raise ValueError(f"quantile is {quantile!r}; give the share of points beyond either end, 0 to below 0.5")
        self.above, self.below = AXES.index(above), AXES.index(below)
        self.target, self.quantile = target, quantile
        self.undecodable = 0.0 if target is None else WORST

    def __call__(self, samples: Sequence[np.ndarray]) -> list[float | None]:
        return _each(samples, self._score)

    def _score(self, cloud: np.ndarray) -> float | None:
        low, high = np.quantile(cloud, [self.quantile, 1 - self.quantile], axis=0)
        extent = high - low
        if extent[self.below] <= FLAT or (self.target is not None and extent[self.above] <= FLAT):
            return None
        ratio = float(extent[self.above] / extent[self.below])
        return ratio if self.target is None else max(WORST, -abs(math.log(ratio / self.target)))


class HullVolume(Reward):
    """The volume of the convex hull of a cloud at unit variance: 8 for a cube's corners. Points far out raise it."""

    def __init__(self) -> None:
        open3d()  # known to be there before anything is scored

    def __call__(self, samples: Sequence[np.ndarray]) -> list[float | None]:
        return _each(samples, self._score)

    def _score(self, cloud: np.ndarray) -> float | None:
        if len(cloud) < 4 or np.linalg.svd(cloud, compute_uv=False)[-1] <= FLAT * math.sqrt(len(cloud)):
            return None  # flat
        o3d = open3d()
        hull, _ = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(cloud)).compute_convex_hull()
        a, b, c = np.asarray(hull.vertices)[np.asarray(hull.triangles)].transpose(1, 0, 2)
        return float(np.abs(np.einsum("ij,ij->i", a, np.cross(b, c))).sum()) / 6  # the mean, 0, lies inside


def _each(samples: Sequence[np.ndarray], score: Callable[[np.ndarray], float | None]) -> list[float | None]:
    """``score`` of every cloud at zero mean and unit variance; None for one that has neither."""
    found: list[float | None] = []
    for sample in samples:
        cloud = np.asarray(sample, np.float64)
        if cloud.ndim != 2 or cloud.shape[1] != 3 or not np.isfinite(cloud).all() or in_one_place(cloud):
            found.append(None)
        else:
            cloud = cloud - cloud.mean(0)
            found.append(score(cloud / cloud.std()))
    return found
