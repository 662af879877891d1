"""The toy as a rectified flow: a small velocity network u(x, s) = noise - x_0 on the chain of the same marginals.

x_s = (1 - s) x_0 + s noise,    dx/ds = u(x, s)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from envs.toy.domain import Toy
from envs.toy.model import TimeFeatures, perceptron
from rayft.domain import Denoiser, FlowDenoiser, load_weights
from rayft.schedule import Schedule, rectified

WEIGHTS = Path(__file__).parent / "weights" / "toy_flow.safetensors"


class Velocity(nn.Module):
    """A plain module, as users of flows have it: ``net(x, s)`` with s from 0 (data) to 1 (noise)."""

    def __init__(self, width: int = 64, dim: int = 2) -> None:
        super().__init__()
        self.time = TimeFeatures(1)
        self.net = perceptron(dim + self.time.size, width, dim)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.net(torch.cat([x, self.time(s).to(x.dtype)], -1))


class ToyFlow(Toy):
    """The same mixture, drawn by a flow. Weights: ``rayft pretrain toy_flow_pretrain``."""

    def __init__(self, num_steps: int = 20, weights: str | None = str(WEIGHTS)) -> None:
        super().__init__(num_steps, weights)

    def schedule(self) -> Schedule:
        return rectified(self.num_steps)

    def denoiser(self) -> Denoiser:
        net = FlowDenoiser(Velocity(), self.schedule())
        if self.weights is not None:
            load_weights(net, Path(self.weights))
        return net
