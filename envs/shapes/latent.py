"""What a cloud is as a whole, in 24 numbers: its kernel mean embedding, seen along the axes in which a data set varies.

    phi(cloud) = mean_i [cos(W x_i), sin(W x_i)],    z = A (phi - m),    A: principal axes over their deviations

The embedding tells any two distributions of points apart, so z needs no encoder to be trained. W is the same for all
models, m and A are fitted to the data and travel with a model's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

LATENT = 24  # numbers
ROWS = LATENT // 3  # of an event; the points come after them
NUM_WAVES, COARSE, FINE = 512, 0.5, 6.0  # of the embedding; |w|, for clouds of unit variance
SEED = 2304_07132
BLOCK = 64  # clouds at a time: 0.5 GB of angles at 2048 points
MIN_SHAPES = LATENT + 1


@dataclass(frozen=True)
class Latents:
    """m and A."""

    mean: Float[np.ndarray, " features"]
    axes: Float[np.ndarray, "latent features"]

    def of(self, phi: Float[np.ndarray, "cloud features"]) -> Float[np.ndarray, "cloud latent"]:
        """z of what has this embedding; about standard normal over the data that it was fitted to."""
        return ((phi - self.mean) @ self.axes.T).astype(np.float32)


@cache
def waves() -> Float[np.ndarray, "waves 3"]:
    """W: directions even over the sphere, lengths even in their logarithm."""
    rng = np.random.default_rng(SEED)
    direction = rng.normal(size=(NUM_WAVES, 3))
    length = np.exp(rng.uniform(np.log(COARSE), np.log(FINE), (NUM_WAVES, 1)))
    return (direction / np.linalg.norm(direction, axis=1, keepdims=True) * length).astype(np.float32)


def embedding(points: Float[np.ndarray, "cloud n 3"]) -> Float[np.ndarray, "cloud features"]:
    """phi of each cloud."""
    found = []
    for start in range(0, len(points), BLOCK):
        angle = points[start : start + BLOCK].astype(np.float32) @ waves().T
        found.append(np.concatenate([np.cos(angle).mean(1), np.sin(angle).mean(1)], 1))
    return np.concatenate(found).astype(np.float64)


def fit(phi: Float[np.ndarray, "cloud features"]) -> Latents:
    """The axes of these embeddings; the sign of each is the one with which its largest entry is positive."""
    if len(phi) < MIN_SHAPES:
        raise ValueError(f"there are {len(phi)} shapes to learn from, and a latent of {LATENT} needs {MIN_SHAPES}")
    mean = phi.mean(0)
    _, size, axes = np.linalg.svd(phi - mean, full_matrices=False)
    axes, deviation = axes[:LATENT], size[:LATENT] / np.sqrt(len(phi))
    if not deviation[-1] > 1e-6 * max(deviation[0], 1e-6):
        raise ValueError(f"the {len(phi)} shapes are too much alike to be told apart by {LATENT} numbers")
    axes = axes * np.sign(axes[np.arange(LATENT), np.abs(axes).argmax(1)])[:, None]
    return Latents(mean.astype(np.float32), (axes / deviation[:, None]).astype(np.float32))
