"""The soft value of a chain, fitted on the base's own chains, and the policy that climbs it.

    v(x_t, t) = alpha log E_base[ exp(r(x_0)/alpha) | x_t ] = w(mu_base(x_t, t), t)
    mu        = mu_base + sigma_t^2 grad w(mu_base, t) / alpha

x_0 depends on x_t through mu_base alone, so v is a function w of it; and x_prev ~ N(mu_base, sigma_t^2) tilted by
exp(v/alpha) has exactly this mean. T Eq. 27 takes the gradient in x_t, into which the Jacobian of mu_base enters: right
for many small steps. Of a Gaussian and the exact v, alpha 0.5, it attains 0.81, 0.92 and 0.987 of J* at T = 5, 10 and
50, the gradient at the mean 0.88, 0.94 and 0.988.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rayft.chain import Policy
from rayft.guidance.base import Shifted
from rayft.space import Context


class Value:
    """v of ``base``'s chains. The critic is asked about mu_base in place of x_t, and says (v - level) / alpha."""

    def __init__(self, critic: nn.Module, base: Policy, alpha: float, level: float) -> None:
        self.critic, self.base, self.alpha, self.level = critic, base, alpha, level

    def of_mean(self, mean: Tensor, t: Int[Tensor, " batch"], context: Context) -> Float[Tensor, " batch"]:
        """(w(mu_base, t) - level) / alpha."""
        return self.critic(mean, self.base.timestep(t), context)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> Float[Tensor, " batch"]:
        """v(x_t, t), t >= 1."""
        scaled = self.of_mean(self.base.mean(x_t, t, context), t, context)
        return self.level + self.alpha * scaled


class Climbing(Shifted):
    """The base, guided by a fitted value."""

    def __init__(self, value: Value) -> None:
        super().__init__(value.base, value.alpha)
        self.value = value

    def moved(self, x_t: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """mu_base and sigma_t^2 grad w / alpha."""
        mean = self.base.mean(x_t, t, context).detach()
        with torch.enable_grad():
            point = mean.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.value.of_mean(point, t, context).sum(), point)
        return mean, self.uphill(t, gradient, context)
