"""The ball that candidates lie in, cut into shells so that one set of draws serves every radius up to the largest.

    eps_star in shell j: uniform over  d_{j-1} < |eps_star| <= d_j,    equally many candidates in each shell

Uniform in the whole ball of radius d, a candidate of shell j weighs    base_j = S (d_j^D - d_{j-1}^D) / d^D    where
|eps_star| <= d, else 0: exact for every d <= d_S, in any dimension D. In a high one only the outermost shell counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rayft.chain import Process, expand
from rayft.space import Context, Space, squared_norm

RadiusUnit = Literal["absolute", "sigma", "kl"]
TOLERANCE = 1e-5  # float32 rounds lengths


def radius_at(process: Process, t: Tensor, radius: float, unit: RadiusUnit, dim: Tensor | float) -> Tensor:
    """d for each row. ``absolute``: R's own; ``sigma``: radius sigma_t sqrt(dim); ``kl``: a budget of nats per chain.

    A shift of length d costs at most d^2 / (2 sigma_t^2) nats, so ``kl`` gives d_t = sigma_t sqrt(2 radius / T).
    """
    sigma = process.sigma.to(t.device)[t]
    if unit == "absolute":
        return torch.full_like(sigma, radius)
    if unit == "sigma":
        return radius * sigma * torch.as_tensor(dim, dtype=sigma.dtype, device=sigma.device).sqrt()
    return sigma * (2 * radius / process.num_steps) ** 0.5


def relative(radii: Sequence[float], unit: RadiusUnit) -> np.ndarray:
    """The radii as lengths, up to a factor that each row has of its own."""
    lengths = np.asarray(radii, dtype=np.float64)
    return np.sqrt(lengths) if unit == "kl" else lengths


def shell_of(num_candidates: int, num_shells: int) -> np.ndarray:
    """Which shell each candidate of a row is drawn in: equally many in each, the innermost first."""
    return np.repeat(np.arange(num_shells), num_candidates // num_shells)


def uniform_shell(
    space: Space,
    like: Float[Tensor, "row *event"],
    inner: Float[Tensor, " row"],
    outer: Float[Tensor, " row"],
    context: Context,
    generator: torch.Generator,
) -> Float[Tensor, "row *event"]:
    """eps_star uniform between two radii, inside the space; ``inner`` = 0 is the ball.

    Direction times d (rho^D + (1 - rho^D) u)^(1/D), rho = inner / outer.
    """
    drawn = torch.randn(like.shape, dtype=like.dtype, generator=generator)
    direction = space.project(drawn.to(like.device), context)
    u = torch.rand(len(like), dtype=torch.float64, generator=generator).to(like.device)
    dim = torch.as_tensor(space.dim(like, context), dtype=torch.float64, device=like.device)
    kept = torch.where(outer > 0, inner / outer.clamp(min=1e-300), 0.0).double() ** dim
    length = outer * (kept + (1 - kept) * u) ** (1 / dim)
    return direction * expand(length / squared_norm(direction).sqrt().clamp(min=1e-30), like)


def base_log_weight(
    reach: Float[np.ndarray, "row cand"], shells: Int[np.ndarray, " cand"], edges: np.ndarray, d: float, dim: np.ndarray
) -> Float[np.ndarray, "row cand"]:
    """log of the density of U(ball of d) over that of the candidates, whose mean is 1; -inf outside.

    ``edges`` are the shells' outer radii and ``reach`` the length of each shift, all in units in which the ball has
    radius ``d``; ``dim`` is D of each row.
    """
    dim = np.asarray(dim, dtype=np.float64).reshape(-1, 1)
    outer = edges[shells][None]
    inner = np.concatenate([[0.0], edges[:-1]])[shells][None]
    if d == 0:
        return np.where(outer > 0, -np.inf, np.log(len(edges))) + 0.0 * dim
    with np.errstate(divide="ignore"):
        volume = dim * np.log(outer / d) + np.log1p(-((inner / np.maximum(outer, 1e-300)) ** dim))
    inside = (reach <= d * (1 + TOLERANCE)) & (outer > 0)
    return np.where(inside, np.log(len(edges)) + volume, -np.inf)
