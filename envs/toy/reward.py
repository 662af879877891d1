"""The toy's rewards: one smooth, one with cliffs, and one that is told where to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs.toy.mixture import CENTRES, SPREAD, WEIGHTS
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


class Corner(Reward):
    """r(x, y) = log p(y | x), y the corner of the mixture that x was drawn at: what domain ``conditioned`` is for.

    ``y`` counts the corners from the upper right, against the clock.
    """

    def __call__(self, samples: Sequence[np.ndarray], conditions: Sequence[Mapping[str, Any]] = ()) -> np.ndarray:
        if len(conditions) < len(samples) or not all("y" in told for told in conditions):
            raise ValueError("corner needs a condition y of 0 to 3: take the domain conditioned with four classes")
        gap = np.stack(samples)[:, None] - np.asarray(CENTRES)
        log_p = np.log(WEIGHTS) - np.square(gap).sum(-1) / (2 * SPREAD**2)
        y = np.array([int(told["y"]) for told in conditions])
        return log_p[np.arange(len(y)), y] - np.logaddexp.reduce(log_p, axis=-1)


class Spread(Reward):
    """For sets of points: r(x) = -(mean squared distance from their centre - target)^2."""

    def __init__(self, target: float = 2.0) -> None:
        self.target = target

    def __call__(self, samples: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([-((np.square(points[:, :2]).sum(-1).mean() - self.target) ** 2) for points in samples])
