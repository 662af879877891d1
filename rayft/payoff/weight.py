"""What candidates weigh at one temperature and radius, and how the K of a pair become one row to learn from.

    w = base exp(r/tau) / mean,    loss of a pair = sum_k w_k |x_k - mu|^2 / K = W |x_w - mu|^2 + const

Only draws that know their own density can be weighed again at another (tau, d); the effective sample size says how far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Normalise = Literal["batch", "candidates", "timestep", "none"]
NUM_BINS = 10  # of timesteps, for the effective sample size and the running normaliser


@dataclass
class Running:
    """log of the mean weight in each bin of timesteps, over all that was seen."""

    log_sum: dict[int, float] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)

    def copy(self) -> Running:
        """One that goes on by itself."""
        return Running(dict(self.log_sum), dict(self.count))

    def add(self, bins: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
        """The log mean of each row's bin, these rows included; the value of an empty bin is 0."""
        for label in np.unique(bins):
            rows = log_weight[bins == label]
            top = max(float(rows.max()), self.log_sum.get(int(label), -np.inf))
            if np.isfinite(top):
                own = np.exp(rows - top).sum() + np.exp(self.log_sum.get(int(label), -np.inf) - top)
                self.log_sum[int(label)] = top + float(np.log(own))
            self.count[int(label)] = self.count.get(int(label), 0) + rows.size
        told = {k: v - np.log(self.count[k]) for k, v in self.log_sum.items()}
        return np.array([told.get(int(label), 0.0) for label in bins])


def bin_of(t: Int[np.ndarray, " row"], num_steps: int) -> np.ndarray:
    """Ten bins of timesteps, fewer in a shorter chain."""
    bins = min(NUM_BINS, num_steps)
    return (t - 1) * bins // num_steps


def name_of(label: int, num_steps: int) -> str:
    """The timesteps of a bin: ``1-5``."""
    bins = min(NUM_BINS, num_steps)
    first, last = -(-label * num_steps // bins) + 1, -(-(label + 1) * num_steps // bins)
    return f"{first}-{last}" if last > first else f"{first}"


def candidate_weight(
    rewards: Float[np.ndarray, "row cand"],
    t: Int[np.ndarray, " row"],
    tau: float,
    normalise: Normalise,
    base: Float[np.ndarray, "row cand"] | float = 0.0,
    running: Running | None = None,
    num_steps: int = 1,
) -> Float[np.ndarray, "row cand"]:
    """w = base exp(r/tau), divided by its mean over what ``normalise`` names; failed candidates (NaN) get 0.

    ``batch`` keeps the data tilt Z(x_t, x_0) = E_U exp(r/tau) (R Eq. 13); ``candidates`` divides it out (R Eq. 12),
    so one candidate or d = 0 gives weight 1; ``timestep`` compares rewards of like t only, over all that a ``running``
    mean has seen where there is one; ``none`` is raw. ``base`` is a log weight (``ball.base_log_weight``).
    """
    scaled = np.where(np.isfinite(rewards), rewards / tau, -np.inf) + base
    if normalise == "none":
        return np.exp(scaled)
    if normalise == "candidates":
        top = scaled.max(axis=1, keepdims=True)
        raw = np.exp(scaled - np.where(np.isfinite(top), top, 0.0))
        return raw / np.maximum(raw.mean(axis=1, keepdims=True), 1e-300)
    if normalise == "timestep" and running is not None:
        return np.exp(scaled - running.add(bin_of(t, num_steps), scaled)[:, None])
    weight = np.zeros_like(scaled)
    labels = np.zeros_like(t) if normalise == "batch" else t
    for label in np.unique(labels):
        members = labels == label
        top = scaled[members].max()
        if np.isfinite(top):
            raw = np.exp(scaled[members] - top)
            weight[members] = raw / raw.mean()
    return weight


def fold(
    candidates: Float[np.ndarray, "row cand *event"], weight: Float[np.ndarray, "row cand"]
) -> tuple[np.ndarray, np.ndarray]:
    """(x_prev, w): the weighted mean candidate and the mean weight of each row."""
    total = weight.sum(axis=1, keepdims=True)
    share = np.where(total > 0, weight / np.maximum(total, 1e-300), 1 / weight.shape[1])
    mean = np.einsum("rk,rk...->r...", share.astype(candidates.dtype), candidates)
    return mean, total[:, 0] / weight.shape[1]


def effective_size(weight: Float[np.ndarray, "row cand"], bins: Int[np.ndarray, " row"]) -> dict[int, float]:
    """(sum w)^2 / sum w^2 in each bin of timesteps: as many equally weighted candidates would say as much."""
    told = {}
    for label in np.unique(bins):
        some = weight[bins == label]
        told[int(label)] = float(some.sum() ** 2 / max(np.square(some).sum(), 1e-300))
    return told
