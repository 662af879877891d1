"""Denoisers of point clouds: R's concatsquash network over single points, and what tells it which shape it is drawing.

    h <- (W h + b) * sigmoid(G c + g) + B c,    widths 3-128-256-512-256-128-3,  LeakyReLU,  plus the input

A cloud's points are independent given its latent z. A chain carries both: the first rows of an event are z, three
numbers a row and scaled up, so that at every t the shape is settled before its points are. What fine-tuning moves is
their joint law: to draw other shapes, it need not break the one from z to points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, silu

from envs.shapes.latent import LATENT, NUM_WAVES, ROWS, Latents
from rayft.domain import Denoiser
from rayft.space import Context

WIDTHS = (3, 128, 256, 512, 256, 128, 3)  # R Sec. 5.1
NUM_TIMES = 3  # beta, sin beta, cos beta: what the public network is told of t
NUM_OCTAVES = 6


class ConcatSquash(nn.Module):
    """A linear layer on every point, gated and shifted by what is known of the whole cloud."""

    def __init__(self, inputs: int, outputs: int, context: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.shift = nn.Linear(context, outputs, bias=False)
        self.gate = nn.Linear(context, outputs)

    def forward(self, h: Float[Tensor, "batch n inputs"], context: Float[Tensor, "batch context"]) -> Tensor:
        gate, shift = self.gate(context).sigmoid().unsqueeze(1), self.shift(context).unsqueeze(1)
        return torch.addcmul(shift, self.layer(h), gate)


class PointwiseNet(nn.Module):
    """R's noise estimator: ``(points, beta_t, context) -> noise``; each point by itself."""

    def __init__(self, context: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConcatSquash(i, o, context + NUM_TIMES) for i, o in pairwise(widths))

    def forward(
        self, points: Float[Tensor, "batch n 3"], beta: Float[Tensor, " batch"], context: Float[Tensor, "batch context"]
    ) -> Float[Tensor, "batch n 3"]:
        beta = beta.to(context.dtype).unsqueeze(1)
        told = torch.cat([beta, beta.sin(), beta.cos(), context], 1)
        h = points
        for number, layer in enumerate(self.layers, 1):
            h = layer(h, told)
            if number < len(self.layers):
                h = leaky_relu(h, inplace=not torch.is_grad_enabled())
        return points + h


class Times(nn.Module):
    """t / T, and sines and cosines of it."""

    waves: Tensor

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps, self.size = num_steps, 1 + 2 * NUM_OCTAVES
        self.register_buffer("waves", math.pi * 2.0 ** torch.arange(NUM_OCTAVES), persistent=False)

    def forward(self, timestep: Int[Tensor, " batch"], dtype: torch.dtype) -> Float[Tensor, "batch size"]:
        u = (timestep.to(dtype) / self.num_steps).unsqueeze(1)
        return torch.cat([u, (u * self.waves).sin(), (u * self.waves).cos()], 1)


class Residual(nn.Module):
    """h + f(h, t)."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.norm, self.time = nn.LayerNorm(width), nn.Linear(times, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.normal_(self.narrow.weight, std=0.02)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        return h + self.narrow(silu(self.wide(self.norm(h) + self.time(time))))


class ShapeDenoiser(Denoiser):
    """Noise in z by a residual network; noise in the points by R's, told what that one makes of z_t.

    With ``num_classes`` above 0 it also reads the chain's ``label``, an integer: the baseline "3D-DDPM".
    """

    prediction = "eps"
    beta: Tensor
    mean: Tensor
    axes: Tensor

    def __init__(
        self,
        beta: Float[Tensor, " T_plus_1"],
        num_classes: int = 0,
        width: int = 256,
        num_layers: int = 3,
        context: int = 128,
    ) -> None:
        super().__init__()
        self.register_buffer("beta", beta.float(), persistent=False)
        self.register_buffer("mean", torch.zeros(2 * NUM_WAVES))
        self.register_buffer("axes", torch.zeros(LATENT, 2 * NUM_WAVES))
        self.time = Times(len(beta) - 1)
        self.enter = nn.Linear(LATENT + self.time.size, width)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.body = nn.ModuleList(Residual(width, self.time.size) for _ in range(num_layers))
        self.noise, self.told = nn.Linear(width, LATENT), nn.Linear(width, context)
        self.points = PointwiseNet(context)

    @property
    def latents(self) -> Latents:
        """What z means to these weights."""
        return Latents(self.mean.cpu().float().numpy(), self.axes.cpu().float().numpy())

    def remember(self, latents: Latents) -> None:
        """Fixes what z means, before a training."""
        self.mean.copy_(torch.from_numpy(latents.mean))
        self.axes.copy_(torch.from_numpy(latents.axes))

    def forward(self, x_t: Float[Tensor, "batch rows 3"], timestep: Int[Tensor, " batch"], context: Context) -> Tensor:
        z_t, points = x_t[:, :ROWS].flatten(1), x_t[:, ROWS:]
        time = self.time(timestep, x_t.dtype)
        h = self.enter(torch.cat([z_t, time], 1))
        if self.label is not None:
            h = h + self.label(context["label"].long())
        for layer in self.body:
            h = layer(h, time)
        told = self.told(silu(h))
        noise = self.noise(h).unflatten(1, (ROWS, 3))
        return torch.cat([noise, self.points(points, self.beta[timestep], told)], 1)
