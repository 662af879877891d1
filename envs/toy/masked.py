"""A toy with padding, sizes and classes: sets of two to four points whose law is one Gaussian per (size, class).

    x_0 ~ N(P m_class, spread^2 P)  with P the centred, masked space,  so  E[x_0 | x_t]  is linear in x_t

The denoiser is that exact answer plus a small trainable residual which starts at zero: pretrained without training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from envs.toy.model import TimeFeatures
from rayft.domain import Denoiser, Domain
from rayft.schedule import Schedule, linear
from rayft.space import Context, MaskedSpace

NUM_POINTS, SPREAD = 4, 0.3
SPACE = MaskedSpace(num_centred=2)
MEANS = torch.tensor(
    [
        [[1.0, 0.0, 0.5], [-1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, -1.0, 0.5]],
        [[0.5, 0.5, -0.5], [-0.5, 0.5, -0.5], [-0.5, -0.5, -0.5], [0.5, -0.5, -0.5]],
    ]
)


class MaskedToyDenoiser(Denoiser):
    """The exact E[x_0 | x_t] of the Gaussian, plus a residual per point (zero before fine-tuning)."""

    prediction = "x0"
    alpha_bar: Tensor

    def __init__(self, schedule: Schedule, width: int = 32) -> None:
        super().__init__()
        self.time = TimeFeatures(schedule.num_steps)
        self.register_buffer("alpha_bar", schedule.alpha_bar, persistent=False)
        last = nn.Linear(width, 3)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.residual = nn.Sequential(nn.Linear(3 + 3 + 2 + self.time.size, width), nn.SiLU(), last)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        ab = self.alpha_bar[timestep].to(x_t.dtype).reshape(-1, 1, 1)
        mean = SPACE.project(MEANS.to(x_t)[context["class"]], context)
        exact = mean + SPREAD**2 * ab.sqrt() / (SPREAD**2 * ab + 1 - ab) * (x_t - ab.sqrt() * mean)
        label = nn.functional.one_hot(context["class"], 2).to(x_t.dtype)
        told = torch.cat([label, self.time(timestep).to(x_t.dtype)], -1).unsqueeze(1).expand(-1, NUM_POINTS, -1)
        return exact + self.residual(torch.cat([x_t, exact, told], -1))


class MaskedToy(Domain):
    """Sets of 2 to 4 points in the plane with one feature each, in two classes; padding is zero, no drift."""

    event_shape = (NUM_POINTS, 3)
    space = SPACE
    rewards: Mapping[str, str] = {"spread": "envs.toy.reward:Spread"}
    decoder = "envs.toy.decode:points"

    def __init__(self, num_steps: int = 20) -> None:
        self.num_steps = num_steps

    def schedule(self) -> Schedule:
        return linear(self.num_steps, 0.1 / self.num_steps, 17.5 / self.num_steps)

    def denoiser(self) -> Denoiser:
        return MaskedToyDenoiser(self.schedule())

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = torch.randint(2, NUM_POINTS + 1, (num_chains,), generator=generator)
        label = torch.randint(0, 2, (num_chains,), generator=generator)
        return {"mask": (torch.arange(NUM_POINTS) < size.unsqueeze(1)).float(), "class": label}

    def groups(self, context: Context) -> Tensor:
        return context["mask"].sum(-1).long() * 2 + context["class"]

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        context = self.context(num_events, generator)
        noise = torch.randn(num_events, *self.event_shape, generator=generator)
        return self.space.project(MEANS[context["class"]] + SPREAD * noise, context), context
