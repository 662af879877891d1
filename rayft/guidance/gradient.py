"""Guidance by a reward's gradient (T Eq. 27): classifier guidance is the case r = log p(y | x) (R's baseline TPM).

    mu = mu_theta(x_t, t) + sigma_t^2 grad v(x_t, t) / alpha,    v = r(x0_hat(x_t)) (T Eq. 30) or r(x_t)

Right to first order in sigma_t: the shift drops how mu_theta itself bends. No training; every step costs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rayft.chain import Policy
from rayft.space import Context

ReadAt = Literal["x0_hat", "x_t"]
Slope = Callable[[Tensor, Context], Tensor]  # r(x_0) [batch], differentiable


class Guided(Policy):
    """A policy whose transitions lean towards a differentiable reward; ``sample`` and all else take it as any other.

    ``read_at: x_t`` asks the reward about the noisy event itself, which only one that was trained on noise understands.
    """

    def __init__(self, policy: Policy, reward: Slope, alpha: float, read_at: ReadAt = "x0_hat") -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; guidance needs a temperature above 0, small for a strong pull")
        self.__dict__.update(vars(policy))
        self.reward, self.alpha, self.read_at = reward, alpha, read_at

    def mean(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """mu, of every row at its own timestep."""
        mean, uphill = self._both(x_t, t, context)
        return mean + (self.sigma(t) ** 2 / self.alpha).to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1)) * uphill

    def mean_at(self, x_t: Tensor, step: int, context: Context) -> Tensor:
        """mu, with the whole batch at one timestep."""
        return self.mean(x_t, torch.full((len(x_t),), step, device=x_t.device), context)

    def _both(self, x_t: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """mu_theta and grad v, from one pass of the network."""
        keep, gain, keep_x0, gain_x0 = (
            row.to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1)) for row in self._on(x_t.device)[0][:4, t]
        )
        with torch.enable_grad():
            point = x_t.detach().requires_grad_(True)
            out = self._output(point, t, context)
            event = point if self.read_at == "x_t" else keep_x0 * point + gain_x0 * out
            (uphill,) = torch.autograd.grad(self.reward(event, context).sum(), point)
        mean = keep * x_t + gain * out.detach()
        return mean, torch.nan_to_num(self.space.project(uphill, context))
