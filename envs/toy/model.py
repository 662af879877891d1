"""Denoisers of the toy: a small trained network, and the exact one that it approximates.

E[x_0 | x_t] = sum_k p(k | x_t) [m_k + a s^2 (x_t - a m_k) / v],    a = sqrt(alpha_bar_t), v = a^2 s^2 + 1 - a^2
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from envs.toy.data import CENTRES, SPREAD, WEIGHTS
from rayft.domain import Denoiser
from rayft.schedule import Schedule
from rayft.space import Context


class TimeFeatures(nn.Module):
    """t/T and a few of its sines and cosines."""

    waves: Tensor

    def __init__(self, num_steps: int, num_waves: int = 4) -> None:
        super().__init__()
        self.num_steps, self.size = num_steps, 1 + 2 * num_waves
        self.register_buffer("waves", torch.pi * 2.0 ** torch.arange(num_waves), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        u = (timestep.to(self.waves.dtype) / self.num_steps).unsqueeze(-1)
        return torch.cat([u, (u * self.waves).sin(), (u * self.waves).cos()], -1)


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Three hidden layers."""
    layers = [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs))


class ToyDenoiser(Denoiser):
    """Noise prediction by a three-layer perceptron."""

    prediction = "eps"

    def __init__(self, num_steps: int, width: int = 64, dim: int = 2) -> None:
        super().__init__()
        self.time = TimeFeatures(num_steps)
        self.net = perceptron(dim + self.time.size, width, dim)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        return self.net(torch.cat([x_t, self.time(timestep).to(x_t.dtype)], -1))


class ExactDenoiser(Denoiser):
    """The mixture's own E[x_0 | x_t]; no parameters."""

    prediction = "x0"
    alpha_bar: Tensor

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.register_buffer("alpha_bar", schedule.alpha_bar, persistent=False)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        centres = CENTRES.to(x_t)
        a = self.alpha_bar[timestep].sqrt().to(x_t.dtype).reshape(-1, 1, 1)
        v = a**2 * SPREAD**2 + 1 - a**2
        gap = x_t.unsqueeze(1) - a * centres
        log_p = WEIGHTS.to(x_t).log() - gap.square().sum(-1) / (2 * v.squeeze(-1))
        mean = centres + a * SPREAD**2 * gap / v
        return (log_p.softmax(-1).unsqueeze(-1) * mean).sum(1)
