"""The best of n: whole chains of the base, the one with the highest reward kept.

    KL <= log n - (n - 1)/n,    whatever the reward

No alpha, no gradient, nothing between start and end: at small KL it is hard to beat, and n grows as exp(KL).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayft.chain import expand, sample
from rayft.guidance.base import Draw, Ground
from rayft.settings import STRICT, Count
from rayft.space import Context


@dataclass(frozen=True)
class Settings:
    """The one number of the best of n."""

    __pydantic_config__ = STRICT

    n: Count = 8
    """Chains per event, all with its context; each is a reward call."""


def build(settings: Settings, ground: Ground) -> Draw:
    """What draws the events."""
    bench = ground.bench

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Context]:
        """One round of chains after the other, so that never more than ``num`` are held. Failed ones are never best."""
        context = bench.contexts(num, generator)
        x_0, highest = torch.empty(0), torch.empty(0)
        for number in range(settings.n):
            found = sample(bench.policy, bench.noise(num, context, generator), context, generator).x_0
            reward = ground.reward(found, context).double().nan_to_num(-torch.inf, posinf=-torch.inf)
            better = reward > highest if number else torch.ones_like(reward, dtype=torch.bool)
            x_0 = torch.where(expand(better.to(found.dtype), found).bool(), found, x_0) if number else found
            highest = torch.where(better, reward, highest) if number else reward
        return x_0, context

    return draw
