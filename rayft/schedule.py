"""Noise schedules: how much signal is left at each timestep.

q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I),    t = 0 .. T
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Variance-preserving schedule. ``alpha_bar[t]`` is indexed by t, 0 included, so it needs no shift.

    ``timestep[t]`` is what the denoiser was trained to call this noise level: t itself until the chain is respaced.
    ``alpha_bar[0]`` is kept as given: 1 for most models, ``1 - 1e-5`` for EDM, whose chain ends at z_0.
    """

    alpha_bar: Float[Tensor, " T_plus_1"]
    timestep: Int[Tensor, " T_plus_1"]

    def __post_init__(self) -> None:
        alpha_bar = self.alpha_bar
        if alpha_bar.ndim != 1 or len(alpha_bar) < 2 or self.timestep.shape != alpha_bar.shape:
            raise ValueError("a schedule needs alpha_bar and timestep of shape [T + 1] with T >= 1")
        if not bool((alpha_bar[1:] < alpha_bar[:-1]).all()) or alpha_bar[0] > 1 or alpha_bar[-1] < 0:
            raise ValueError("alpha_bar must fall strictly from at most 1 at t = 0 to at least 0 at t = T")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.alpha_bar) - 1

    def respace(self, num_steps: int) -> Schedule:
        """The same noise levels, fewer of them: ``num_steps`` timesteps spread evenly over 1..T, T always kept."""
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps is {num_steps}; this model's schedule allows 1 to {self.num_steps}")
        kept = torch.linspace(0, self.num_steps, num_steps + 1, dtype=torch.float64).round().long()
        return Schedule(self.alpha_bar[kept], self.timestep[kept])


def from_alpha_bar(alpha_bar: Float[Tensor, " T_plus_1"]) -> Schedule:
    """A schedule from its table, ``alpha_bar[0]`` first."""
    return Schedule(alpha_bar.double(), torch.arange(len(alpha_bar)))


def from_betas(betas: Tensor) -> Schedule:
    """A schedule from beta_1 .. beta_T (DDPM's usual table, without an entry for t = 0)."""
    betas = torch.as_tensor(betas).double()
    if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError("betas must be one row of numbers strictly between 0 and 1")
    return from_alpha_bar(torch.cat([betas.new_ones(1), torch.cumprod(1 - betas, 0)]))


def linear(num_steps: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:  # noqa: N803
    """beta_t rises linearly (DDPM; R's point clouds use beta_T = 0.05 at T = 100)."""
    return from_betas(torch.linspace(beta_1, beta_T, num_steps, dtype=torch.float64))


def cosine(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alpha_bar_t = f(t)/f(0) with f(t) = cos^2((t/T + s)/(1 + s) pi/2), beta_t capped."""
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def polynomial(num_steps: int, power: float = 2.0, precision: float = 1e-5, min_alpha: float = 1e-3) -> Schedule:
    """EDM's schedule: alpha_bar_t = (1 - 2s) (1 - (t/T)^p)^2 + s with s = precision.

    The square falls by at most a factor ``min_alpha`` a step, so that the last steps stay finite; ``alpha_bar_0`` is
    just below 1: the chain ends at z_0.
    """
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    squared = (1 - u**power) ** 2
    ratio = (squared[1:] / squared[:-1]).clamp(min=min_alpha, max=1.0)
    squared = torch.cat([squared[:1], squared[0] * torch.cumprod(ratio, 0)])
    return from_alpha_bar((1 - 2 * precision) * squared + precision)


def rectified(num_steps: int, shift: float = 1.0) -> Schedule:
    """The levels of a rectified flow x_s = (1 - s) x_0 + s noise at s = t/T, as a variance-preserving schedule.

        x_t = x_s / c,    c = sqrt((1-s)^2 + s^2),    alpha_bar = (1-s)^2 / c^2,    alpha_bar_T = 0

    ``shift`` above 1 has more of the levels where noise is: s = shift u / (1 + (shift - 1) u) at u = t/T.
    """
    if shift <= 0:
        raise ValueError(f"shift is {shift}; it should be above 0, and 1 spreads the levels of a flow evenly")
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    s = shift * u / (1 + (shift - 1) * u)
    return from_alpha_bar((1 - s) ** 2 / ((1 - s) ** 2 + s**2))


NAMED = {"linear": linear, "cosine": cosine, "polynomial": polynomial, "rectified": rectified}
