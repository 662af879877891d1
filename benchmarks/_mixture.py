"""The two mixtures in the plane that torchgfn trains diffusion samplers on, as a reward over a plain Gaussian.

    r(x_0) = log target(x_0) - log N(x_0; 0, I),    alpha = 1,    so that p* is the target and J* = log Z = 0

Events are in units of ``UNIT``. The pretrained chain is the Gaussian's own, and a ``v`` network that is 0 is exact for
it: every x_t is N(0, I), and a transition is N(sqrt(1 - beta_t) x_t, beta_t I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from envs.toy.model import TimeFeatures
from rayft.critic import Critic
from rayft.domain import Denoiser, Domain
from rayft.reward import Reward
from rayft.schedule import Schedule, from_alpha_bar
from rayft.space import Context

UNIT, STEPS, WIDTH = 5.0, 32, 64
NARROWEST, LEFT = 0.1, 0.99  # variances of what the schedule is even for, at t = 0 and at T


@dataclass(frozen=True)
class Target:
    """Two Gaussians. [component, ...]"""

    weights: list[float]
    centres: list[list[float]]
    covariances: list[list[list[float]]]

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log p(x) of points [point, 2]."""
        covariances, gap = np.array(self.covariances), x[:, None] - np.array(self.centres)
        square = np.einsum("nki,kij,nkj->nk", gap, np.linalg.inv(covariances), gap)
        scale = np.log(self.weights) - 0.5 * np.log(np.linalg.det(2 * math.pi * covariances))
        return np.logaddexp.reduce(scale - 0.5 * square, 1)


TARGETS = {  # torchgfn's "gmm2", by the seed that it draws one with
    "tutorial": Target(  # 2, which its example of a diffusion sampler takes
        weights=[0.4588415, 0.5411585],
        centres=[[-4.7677574, -4.0301771], [6.2845149, -8.1616812]],
        covariances=[
            [[7.2462435, 4.8446050], [4.8446050, 7.6748529]],
            [[6.5480957, -1.4171909], [-1.4171909, 1.9993575]],
        ],
    ),
    "default": Target(  # 3, which the target's class takes
        weights=[0.4658074, 0.5341926],
        centres=[[-8.2870169, -5.2637897], [6.0254893, 1.6432407]],
        covariances=[
            [[2.8070770, -0.7583838], [-0.7583838, 2.0721996]],
            [[3.9509588, 6.6051321], [6.6051321, 12.8192310]],
        ],
    ),
}


class LogRatio(Reward):
    """log target(x_0) - log N(x_0; 0, I), both of the event."""

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]

    def __call__(self, samples: Sequence[Any]) -> np.ndarray:
        x_0 = np.stack(samples).astype(np.float64)
        plain = -0.5 * np.square(x_0).sum(1) - math.log(2 * math.pi)
        return self.target.log_density(UNIT * x_0) + 2 * math.log(UNIT) - plain


class Drift(Denoiser):
    """A perceptron of x_t and the time, 0 until it is trained."""

    prediction = "v"
    times: Tensor

    def __init__(self, num_steps: int, width: int) -> None:
        super().__init__()
        features = TimeFeatures(num_steps)
        self.register_buffer("times", features(torch.arange(num_steps + 1)), persistent=False)
        last = nn.Linear(width, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        layers = [nn.Linear(2 + features.size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        return self.net(torch.cat([x_t, self.times.to(x_t.dtype)[timestep]], -1))


class Exact(Denoiser):
    """E[x_0 | x_t] of a target: its modes' own, weighed by p(mode | x_t). No parameters."""

    prediction = "x0"

    def __init__(self, target: Target, schedule: Schedule) -> None:
        super().__init__()
        self.log_weights = torch.tensor(target.weights).log()
        self.centres = torch.tensor(target.centres) / UNIT
        self.covariances = torch.tensor(target.covariances) / UNIT**2
        self.alpha_bar = schedule.alpha_bar.float()

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        a = self.alpha_bar[timestep].sqrt().reshape(-1, 1, 1)
        spread = a.unsqueeze(-1) ** 2 * self.covariances + (1 - a.unsqueeze(-1) ** 2) * torch.eye(2)
        gap = x_t.unsqueeze(1) - a * self.centres
        pull = torch.linalg.solve(spread, gap)
        log_p = self.log_weights - 0.5 * spread.logdet() - 0.5 * (gap * pull).sum(-1)
        mean = self.centres + a * torch.einsum("kij,nkj->nki", self.covariances, pull)
        return (log_p.softmax(-1).unsqueeze(-1) * mean).sum(1)


class Gaussian(Domain):
    """N(0, I) in the plane, and its exact chain."""

    event_shape = (2,)
    rewards: Mapping[str, str] = {"log_ratio": "benchmarks._mixture:LogRatio"}

    def schedule(self) -> Schedule:
        """Even in the log variance of what is narrow: v_t = 1 - alpha_bar_t (1 - v_0) = v_0^(1 - u) v_T^u, u = t / T.

        Within a mode of variance v_t the exact transition is narrower than beta_t, by 1 + beta_t / v_t, and a Gaussian
        of variance beta_t stands for it: that costs least where all steps are as long beside v_t.
        """
        u = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        return from_alpha_bar((1 - NARROWEST ** (1 - u) * LEFT**u) / (1 - NARROWEST))

    def denoiser(self) -> Denoiser:
        return Drift(STEPS, WIDTH)

    def critic(self) -> nn.Module:
        return Critic(self.event_shape, STEPS, width=WIDTH)
