"""The best that Gaussian transitions of the chain's own sigma_t can do on the toy, found in two ways.

    V_t(x) = max_mu E[V_{t-1}(mu + sigma_t z)] - alpha |mu - mu_pre(x, t)|^2 / (2 sigma_t^2),    V_0 = r

``backpropagated`` climbs J with the denoiser itself, by long reward backpropagation (T Alg. 2); ``exact`` solves the
recursion on a grid over the plane, for means of any shape: J = E_{x_T} V_T(x_T), which no network can exceed.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from rayft.chain import Policy
from rayft.seeds import torch_generator
from rayft.space import squared_norm

CENTRE = torch.tensor([0.8, 0.6])
LR, BATCH, EMA = 2e-3, 512, 0.98


def quadratic(x_0: Tensor) -> Tensor:
    """The toy's reward in torch, to differentiate: -|x - (0.8, 0.6)|^2 / 2."""
    return -0.5 * squared_norm(x_0 - CENTRE.to(x_0))


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


@torch.no_grad()
def exact(reference: Policy, alpha: float, spacing: float = 0.05, reach: float = 5.0) -> float:
    """J of the best Gaussian transitions, on a grid over [-reach, reach]^2; halving ``spacing`` moves it by 1e-5.

    Between grid points a function is its second-order expansion about the nearest one.
    """
    axis = torch.arange(-reach, reach + spacing / 2, spacing, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    value = quadratic(points)
    for step in range(1, reference.process.num_steps + 1):
        sigma = float(reference.process.sigma[step])
        expected = _Expansion(_smooth(value.reshape(len(axis), -1), sigma, spacing), spacing, reach)
        before = reference.mean_at(points.float(), step, {}).double()
        mean = before
        for _ in range(100):  # mu = mu_pre + sigma^2 / alpha * gradient of E V
            move = before + sigma**2 / alpha * expected(mean)[1] - mean
            mean = mean + 0.7 * move
            if move.abs().max() < 1e-6:
                break
        value = expected(mean)[0] - alpha * squared_norm(mean - before) / (2 * sigma**2)
    weight = (-0.5 * squared_norm(points)).exp()
    return float(value @ weight / weight.sum())


class _Expansion:
    """A function on the grid, with its gradient, anywhere."""

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
