"""From events to what rewards are given: the points of each cloud, without the latent that the chain carried along."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from envs.shapes.latent import ROWS

FARTHEST = 100.0  # deviations of the data; a chain that has left them for good decodes to nothing


def clouds(x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> list[np.ndarray | None]:
    """[n, 3] each; ``None`` where one is not finite or has no extent that anything could be said of."""
    points = x_0[:, ROWS:]
    with np.errstate(invalid="ignore", over="ignore"):
        sound = (
            np.isfinite(points).all((1, 2))
            & (np.abs(points).max((1, 2)) < FARTHEST)
            & (np.ptp(points, axis=1).max(1) > 0)
        )
    return [cloud if good else None for cloud, good in zip(points, sound, strict=True)]
