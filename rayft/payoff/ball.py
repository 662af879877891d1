"""RGDM's pay-off distribution, by importance: candidates around the posterior mean, weighted by their reward.

    q_pd(x_prev | x_t, x_0) ~ exp(r(x_prev)/tau) 1[|x_prev - x_tilde| <= d],    x_prev = x_tilde + eps_star,

with eps_star from the base, uniform in the ball, and w = exp(r/tau) as its weight (R Eq. 9-13). The base does not
depend on theta: the pay-off distribution is stationary.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rayft.chain import Process, expand
from rayft.space import Context, Space, squared_norm

RadiusUnit = Literal["absolute", "sigma", "kl"]
Normalise = Literal["batch", "candidates", "timestep", "none"]


def radius_at(process: Process, t: Tensor, radius: float, unit: RadiusUnit, dim: Tensor | float) -> Tensor:
    """d for each row. ``absolute``: R's own; ``sigma``: radius sigma_t sqrt(dim); ``kl``: a budget of nats per chain.

    A shift of length d costs at most d^2 / (2 sigma_t^2) nats, so ``kl`` gives d_t = sigma_t sqrt(2 radius / T).
    """
    sigma = process.sigma.to(t.device)[t]
    if unit == "absolute":
        return torch.full_like(sigma, radius)
    if unit == "sigma":
        return radius * sigma * torch.as_tensor(dim, dtype=sigma.dtype).sqrt()
    return sigma * (2 * radius / process.num_steps) ** 0.5


def uniform_ball(
    space: Space,
    like: Float[Tensor, "row *event"],
    radius: Float[Tensor, " row"],
    num_candidates: int,
    context: Context,
    generator: torch.Generator,
) -> Float[Tensor, "cand row *event"]:
    """eps_star uniform in the ball of each row's radius, inside the space: direction times d u^(1/dim)."""
    shifts = []
    for _ in range(num_candidates):
        drawn = torch.randn(like.shape, dtype=like.dtype, generator=generator)
        direction = space.project(drawn.to(like.device), context)
        u = torch.rand(len(like), dtype=like.dtype, generator=generator).to(like.device)
        length = radius.to(like.dtype) * u ** (1 / torch.as_tensor(space.dim(like, context), dtype=like.dtype))
        shifts.append(direction * expand(length / squared_norm(direction).sqrt().clamp(min=1e-30), like))
    return torch.stack(shifts)


def candidate_weight(
    rewards: Float[np.ndarray, "cand row"], t: Int[np.ndarray, " row"], tau: float, normalise: Normalise
) -> Float[np.ndarray, "cand row"]:
    """w = exp(r/tau), divided by its mean over what ``normalise`` names; failed candidates (NaN) get 0.

    ``batch`` keeps the data tilt Z(x_t, x_0) = E_U exp(r/tau) (R Eq. 13); ``candidates`` divides it out (R Eq. 12),
    so one candidate or d = 0 gives weight 1; ``timestep`` compares rewards of the same t only; ``none`` is raw.
    """
    scaled = np.where(np.isfinite(rewards), rewards / tau, -np.inf)
    if normalise == "none":
        return np.exp(scaled)
    if normalise == "candidates":
        top = scaled.max(axis=0, keepdims=True)
        raw = np.exp(scaled - np.where(np.isfinite(top), top, 0.0))
        return raw / np.maximum(raw.mean(axis=0, keepdims=True), 1e-300)
    weight = np.zeros_like(scaled)
    labels = np.zeros_like(t) if normalise == "batch" else t
    for label in np.unique(labels):
        members = labels == label
        top = scaled[:, members].max()
        if np.isfinite(top):
            raw = np.exp(scaled[:, members] - top)
            weight[:, members] = raw / raw.mean()
    return weight


def fold(
    candidates: Float[np.ndarray, "cand row *event"], weight: Float[np.ndarray, "cand row"]
) -> tuple[np.ndarray, np.ndarray]:
    """(x_prev, w): the weighted mean candidate and the mean weight of each row.

    sum_k w_k |x_k - mu|^2 = (sum_k w_k) |mean - mu|^2 + const, so K candidates train as one row.
    """
    total = weight.sum(axis=0)
    share = np.where(total > 0, weight / np.maximum(total, 1e-300), 1 / len(weight))
    mean = np.einsum("kr,kr...->r...", share, candidates)
    return mean.astype(candidates.dtype), total / len(weight)
