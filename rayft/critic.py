"""A value network v(x_t, t): what path consistency and value-weighted guidance learn about the way to a reward.

    v(x_0, 0) = r(x_0),    v(x_t, t) = alpha log E_pre[ exp(r(x_0) / alpha) | x_t ] at the optimum (T Eq. 13)

``Domain.critic`` gives the one that fits its events; this is the plain one, for a few numbers in no special order.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rayft.space import Context

NUM_WAVES = 6


class Critic(nn.Module):
    """A perceptron over x_t, the time and all numbers of the context. It begins as 0 everywhere."""

    waves: Tensor

    def __init__(self, event_shape: tuple[int, ...], num_steps: int, num_context: int = 0, width: int = 128) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.register_buffer("waves", torch.pi * 2.0 ** torch.arange(NUM_WAVES), persistent=False)
        size = math.prod(event_shape) + num_context + 1 + 2 * NUM_WAVES
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        layers = [nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), last)

    def forward(
        self, x_t: Float[Tensor, "batch *event"], timestep: Int[Tensor, " batch"], context: Context
    ) -> Float[Tensor, " batch"]:
        u = (timestep.to(x_t.dtype) / self.num_steps).unsqueeze(-1)
        angle = u * self.waves.to(x_t.dtype)
        told = [context[key].to(x_t.dtype).reshape(len(x_t), -1) for key in sorted(context)]
        return self.net(torch.cat([x_t.flatten(1), u, angle.sin(), angle.cos(), *told], -1)).squeeze(-1)
