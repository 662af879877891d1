"""The toy as a Domain: a point in the plane, fifty steps of noise, a denoiser of 10,000 weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.toy import data
from envs.toy.model import ToyDenoiser
from envs.toy.render import scatter
from rayft.domain import Denoiser, Domain, load_weights
from rayft.schedule import Schedule, linear

WEIGHTS = Path(__file__).parent / "weights" / "toy.safetensors"


class Toy(Domain):
    """Mixture of four Gaussians in the plane. Weights: ``rayft pretrain toy_pretrain``."""

    event_shape = (2,)
    rewards: Mapping[str, str] = {
        "quadratic": "envs.toy.reward:Quadratic",
        "stripes": "envs.toy.reward:Stripes",
        "corner": "envs.toy.reward:Corner",
    }

    def __init__(self, num_steps: int = 50, weights: str | None = str(WEIGHTS)) -> None:
        self.num_steps, self.weights = num_steps, weights

    def schedule(self) -> Schedule:
        return linear(self.num_steps, 0.1 / self.num_steps, 17.5 / self.num_steps)

    def denoiser(self) -> Denoiser:
        net = ToyDenoiser(self.num_steps)
        if self.weights is not None:
            load_weights(net, Path(self.weights))
        return net

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return data.draw(num_events, generator), {}

    def picture(self, panels: Mapping[str, np.ndarray]) -> Any:
        return scatter(panels)
