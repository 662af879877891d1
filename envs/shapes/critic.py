"""A value of clouds under noise, for path consistency and value-weighted guidance.

    v(x_t, t) = head(z_t, t, mean_i f(p_i), max_i f(p_i)),    x_t = (z_t, points p_i)

The points may come in any order and number, as the denoiser's may.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from envs.shapes.latent import LATENT, ROWS
from envs.shapes.model import ConcatSquash, Residual, Times
from rayft.space import Context

POINT, WIDTH, NUM_LAYERS = 64, 128, 2


class CloudCritic(nn.Module):
    """It begins as 0 everywhere. With ``num_classes`` above 0 it also reads the chain's ``label``."""

    def __init__(self, num_steps: int, num_classes: int = 0) -> None:
        super().__init__()
        self.time = Times(num_steps)
        self.first = ConcatSquash(3, POINT, self.time.size)
        self.second = ConcatSquash(POINT, POINT, self.time.size)
        self.enter = nn.Linear(LATENT + 2 * POINT + self.time.size, WIDTH)
        self.label = nn.Embedding(num_classes, WIDTH) if num_classes else None
        self.body = nn.ModuleList(Residual(WIDTH, self.time.size) for _ in range(NUM_LAYERS))
        self.last = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, x_t: Float[Tensor, "batch rows 3"], timestep: Int[Tensor, " batch"], context: Context
    ) -> Float[Tensor, " batch"]:
        time = self.time(timestep, x_t.dtype)
        points = silu(self.second(silu(self.first(x_t[:, ROWS:], time)), time))
        seen = [x_t[:, :ROWS].flatten(1), points.mean(1), points.amax(1), time]
        h = self.enter(torch.cat(seen, 1))
        if self.label is not None:
            h = h + self.label(context["label"].long())
        for layer in self.body:
            h = layer(h, time)
        return self.last(silu(h)).squeeze(1)
