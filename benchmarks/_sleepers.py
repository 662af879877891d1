"""A denoiser that takes its time asleep: work that any number of nodes can do side by side on one machine."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from envs.toy.domain import Toy
from envs.toy.model import ToyDenoiser
from rayft.domain import Denoiser
from rayft.space import Context


class SleepyDenoiser(ToyDenoiser):
    """Asleep for a while per row where it samples; awake where it learns."""

    def __init__(self, num_steps: int, seconds: float) -> None:
        super().__init__(num_steps)
        self.seconds = seconds

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        if not torch.is_grad_enabled():
            time.sleep(self.seconds * len(x_t))
        return super().forward(x_t, timestep, context)


class SleepyToy(Toy):
    """The toy, a chain of which takes ``chain_seconds``: half in the policy, half in the pretrained model."""

    def __init__(self, num_steps: int = 20, chain_seconds: float = 0.05) -> None:
        super().__init__(num_steps, None)
        self.chain_seconds = chain_seconds

    def denoiser(self) -> Denoiser:
        return SleepyDenoiser(self.num_steps, self.chain_seconds / (2 * self.num_steps))
