"""The best that Gaussian transitions of the chain's own sigma_t can do on the toy, found in two ways.

    V_t(x) = max_mu E[V_{t-1}(mu + sigma_t z)] - alpha |mu - mu_pre(x, t)|^2 / (2 sigma_t^2),    V_0 = r

``backpropagated`` climbs J with the denoiser itself, by long reward backpropagation (T Alg. 2). ``Plane`` solves the
recursion on a grid, for means of any shape: J = E_{x_T} V_T(x_T), which no network can exceed; and J* beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayft.chain import Policy
from rayft.seeds import torch_generator
from rayft.space import squared_norm

CENTRE = torch.tensor([0.8, 0.6])
LR, BATCH, EMA = 2e-3, 512, 0.98


def quadratic(x_0: Tensor) -> Tensor:
    """The toy's reward in torch, to differentiate: -|x - (0.8, 0.6)|^2 / 2."""
    return -0.5 * squared_norm(x_0 - CENTRE.to(x_0))


def stripes(x_0: Tensor, width: float) -> Tensor:
    """The toy's other reward: 1 on every other stripe of the plane, 0 between."""
    return ((x_0 @ CENTRE.to(x_0) / width).floor() % 2 == 0).to(x_0.dtype)


def backpropagated(reference: Policy, alpha: float, seed: int, num_iterations: int) -> Policy:
    """A copy of ``reference`` after pathwise gradients of J: no RLlib, no estimate of an advantage.

    Noise comes in antithetic pairs, the step size falls to 0 as a cosine, and the weights are averaged.
    """
    assert isinstance(reference.network, nn.Module)
    net = copy.deepcopy(reference.network).requires_grad_(True)
    slow = copy.deepcopy(net).requires_grad_(False)
    policy = Policy(net, reference.process, reference.space)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iterations)
    generator = torch_generator(seed, 0, "backpropagation")
    for _ in range(num_iterations):
        optimizer.zero_grad()
        (-_objective(policy, reference, alpha, generator)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        fall.step()
        with torch.no_grad():
            for average, parameter in zip(slow.parameters(), net.parameters(), strict=True):
                average.lerp_(parameter, 1 - EMA)
    return Policy(slow, reference.process, reference.space)


def _objective(policy: Policy, reference: Policy, alpha: float, generator: torch.Generator) -> Tensor:
    """J of one batch of chains, differentiable through all of them."""

    def noise() -> Tensor:
        half = torch.randn(BATCH // 2, 2, generator=generator)
        return torch.cat([half, -half])

    x, kl = noise(), torch.zeros(BATCH)
    for step in range(policy.process.num_steps, 0, -1):
        sigma = float(policy.process.sigma[step])
        mean = policy.mean_at(x, step, {})
        kl = kl + squared_norm(mean - reference.mean_at(x, step, {})) / (2 * sigma**2)
        x = mean + sigma * noise()
    return (quadratic(x) - alpha * kl).mean()


@dataclass(frozen=True)
class Plane:
    """The square [-reach, reach]^2 on which the recursions are solved; halving ``spacing`` moves J by 1e-5."""

    reference: Policy
    spacing: float = 0.05
    reach: float = 5.0
    reward: Callable[[Tensor], Tensor] = quadratic

    @property
    def points(self) -> Float[Tensor, "point 2"]:
        axis = torch.arange(-self.reach, self.reach + self.spacing / 2, self.spacing, dtype=torch.float64)
        return torch.cartesian_prod(axis, axis)

    @torch.no_grad()
    def ceiling(self, alpha: float) -> float:
        """J of the best Gaussian transitions, by the recursion above."""
        value = self.reward(self.points)
        for sigma, before in self._steps():
            ahead, mean = self._ahead(value, sigma), before
            for _ in range(100):  # mu = mu_pre + sigma^2 / alpha * gradient of E V
                move = before + sigma**2 / alpha * ahead(mean)[1] - mean
                mean = mean + 0.7 * move
                if move.abs().max() < 1e-6:
                    break
            value = ahead(mean)[0] - alpha * squared_norm(mean - before) / (2 * sigma**2)
        return self._start(value)

    def optimum(self, alpha: float) -> float:
        """J* = alpha log E_pre exp(r/alpha), without sampling."""
        return alpha * math.log(self.expected((self.reward(self.points) / alpha).exp()))

    @torch.no_grad()
    def expected(self, value: Float[Tensor, " point"]) -> float:
        """E_pre of a function of x_0."""
        for sigma, before in self._steps():
            value = self._ahead(value, sigma)(before)[0]
        return self._start(value)

    def _steps(self) -> Iterator[tuple[float, Tensor]]:
        """sigma_t and mu_pre at every point, from the end of the chain backwards."""
        for step in range(1, self.reference.process.num_steps + 1):
            mean = self.reference.mean_at(self.points.float(), step, {}).double()
            yield float(self.reference.process.sigma[step]), mean

    def _ahead(self, value: Tensor, sigma: float) -> _Expansion:
        """mu -> E f(mu + sigma z)."""
        size = math.isqrt(len(value))
        return _Expansion(_smooth(value.reshape(size, size), sigma, self.spacing), self.spacing, self.reach)

    def _start(self, value: Tensor) -> float:
        """E over x_T ~ N(0, I)."""
        weight = (-0.5 * squared_norm(self.points)).exp()
        return float(value @ weight / weight.sum())


class _Expansion:
    """A function on the grid, with its gradient, anywhere: to second order about the nearest point."""

    def __init__(self, value: Tensor, spacing: float, reach: float) -> None:
        gradient = torch.stack(torch.gradient(value, spacing=spacing, edge_order=2))
        curvature = [torch.stack(torch.gradient(g, spacing=spacing, edge_order=2)) for g in gradient]
        self.spacing, self.reach, self.size = spacing, reach, len(value)
        self.value, self.gradient = value, gradient.movedim(0, -1)
        self.curvature = torch.stack(curvature).movedim((0, 1), (-2, -1))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index = ((x + self.reach) / self.spacing).round().long().clamp(0, self.size - 1)
        i, j = index.unbind(-1)
        step = x - (index * self.spacing - self.reach)
        bend = (self.curvature[i, j] @ step.unsqueeze(-1)).squeeze(-1)
        gradient = self.gradient[i, j]
        return self.value[i, j] + ((gradient + 0.5 * bend) * step).sum(-1), gradient + bend


def _smooth(value: Tensor, sigma: float, spacing: float) -> Tensor:
    """E f(x + sigma z), one axis after the other; beyond the edge f goes on as a parabola."""
    num = math.ceil(6 * sigma / spacing)
    weight = (-0.5 * (torch.arange(-num, num + 1, dtype=value.dtype) * spacing / sigma) ** 2).exp()
    k = torch.arange(1, num + 1, dtype=value.dtype).unsqueeze(1)
    for _ in range(2):
        ahead = [v[0] + k * (v[0] - v[1]) + k * (k + 1) / 2 * (v[0] - 2 * v[1] + v[2]) for v in (value, value.flip(0))]
        padded = torch.cat([ahead[0].flip(0), value, ahead[1]])
        value = nn.functional.conv1d(padded.T.unsqueeze(1), (weight / weight.sum()).view(1, 1, -1)).squeeze(1)
    return value
