"""The toy's rewards: one smooth, one with cliffs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayft.reward import DifferentiableReward, Reward


class Quadratic(DifferentiableReward):
    """r(x) = -|x - centre|^2 / 2: the tilt of a Gaussian by it is again a Gaussian."""

    def __init__(self, centre: tuple[float, float] = (0.8, 0.6)) -> None:
        self.centre = np.asarray(centre, dtype=np.float64)
        if self.centre.shape != (2,):
            raise ValueError(f"centre is {list(centre)}; the toy lives in the plane, so give two numbers")

    def __call__(self, samples: Sequence[np.ndarray]) -> np.ndarray:
        return -0.5 * np.square(np.stack(samples) - self.centre).sum(-1)

    def value(self, x_0: Any, context: Mapping[str, Any]) -> Any:
        """The same of a tensor."""
        return -0.5 * (x_0 - x_0.new_tensor(self.centre)).square().sum(-1)


class Stripes(Reward):
    """r(x) = 1 on every other stripe of the plane, 0 between: flat almost everywhere, no gradient to follow."""

    def __init__(self, width: float = 0.5) -> None:
        if width <= 0:
            raise ValueError(f"width is {width}; a stripe needs a positive width")
        self.width = width

    def __call__(self, samples: Sequence[np.ndarray]) -> np.ndarray:
        along = np.stack(samples) @ np.array([0.8, 0.6])
        return (np.floor(along / self.width) % 2 == 0).astype(np.float64)


class Spread(Reward):
    """For sets of points: r(x) = -(mean squared distance from their centre - target)^2."""

    def __init__(self, target: float = 2.0) -> None:
        self.target = target

    def __call__(self, samples: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([-((np.square(points[:, :2]).sum(-1).mean() - self.target) ** 2) for points in samples])
