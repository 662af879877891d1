"""Guidance by a reward's gradient (T Eq. 27): classifier guidance is the case r = log p(y | x) (R's baseline TPM).

    mu = mu_theta(x_t, t) + sigma_t^2 grad v(x_t, t) / alpha,    v = r(x0_hat(x_t)) (T Eq. 30) or r(x_t)

Right to first order in sigma_t: the shift drops how mu_theta itself bends. No training; every step costs a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rayft.chain import Policy, expand
from rayft.guidance.base import Shifted, Slope
from rayft.space import Context

ReadAt = Literal["x0_hat", "x_t"]


class Guided(Shifted):
    """A policy whose transitions lean towards a differentiable reward.

    ``read_at: x_t`` asks the reward about the noisy event itself, which only one that was trained on noise understands.
    Where sqrt(alpha_bar_t) is under ``least_signal`` nothing is moved: x0_hat is the denoiser's error, magnified.
    """

    def __init__(
        self, policy: Policy, reward: Slope, alpha: float, read_at: ReadAt = "x0_hat", least_signal: float = 0.0
    ) -> None:
        super().__init__(policy, alpha)
        self.reward, self.read_at = reward, read_at
        self.legible = policy.process.schedule.alpha_bar.sqrt() >= least_signal

    def moved(self, x_t: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """mu_theta and sigma_t^2 grad v / alpha, from one pass of the network."""
        legible = self.legible.to(t.device)[t]
        if not bool(legible.any()):
            return self.base.mean(x_t, t, context), torch.zeros_like(x_t)
        keep, gain, keep_x0, gain_x0 = (
            row.to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1)) for row in self._on(x_t.device)[0][:4, t]
        )
        with torch.enable_grad():
            point = x_t.detach().requires_grad_(True)
            out = self._output(point, t, context)
            event = point if self.read_at == "x_t" else keep_x0 * point + gain_x0 * out
            (gradient,) = torch.autograd.grad(self.reward(event, context).sum(), point)
        shift = self.uphill(t, gradient / self.alpha, context)
        return keep * x_t + gain * out.detach(), shift * expand(legible.double(), shift)
