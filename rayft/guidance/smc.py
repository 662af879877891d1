"""Sequential Monte Carlo: chains of the base side by side, the promising ones continued more than once.

    target at t:  p_base(x_{t:T}) exp(r(x0_hat(x_t))/alpha),    w *= exp((r(x0_hat(x_prev)) - r(x0_hat(x_t)))/alpha)

What x0_hat says wrongly on the way is set right at the end, where x0_hat(x_0) = x_0: with many particles the events are
draws of exp(r/alpha) p_base. No gradient, no fit; but events of one group may have come from one chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rayft.guidance.base import Draw, Ground, Temperature, repeated
from rayft.settings import Count, ShareOrAll
from rayft.space import Context


@dataclass(frozen=True)
class Settings(Temperature):
    """The numbers of sequential Monte Carlo."""

    particles: Count = 32
    """Chains of one group, which share a context; all of them are drawn from."""
    threshold: ShareOrAll = 0.5
    """A group is resampled where its chains are worth fewer than this share of equally weighted ones."""
    every: Count = 1
    """Transitions between two readings of the reward; the finished event is always read."""


def build(settings: Settings, ground: Ground) -> Draw:
    """What draws the events."""
    return Swarm(settings, ground).draw


@dataclass(frozen=True)
class Swarm:
    """Groups of particles."""

    settings: Settings
    ground: Ground

    @torch.no_grad()
    def draw(self, num: int, generator: torch.Generator) -> tuple[Tensor, Context]:
        """Events of as many groups as ``num`` needs; of the last group some may be left out."""
        bench, base, size = self.ground.bench, self.ground.bench.policy, self.settings.particles
        num_groups = -(-num // size)
        context = repeated(bench.contexts(num_groups, generator), size)
        x = bench.noise(num_groups * size, context, generator)
        steps = base.process.num_steps
        promise = self._promise(x, steps, context, torch.zeros(len(x), device=x.device))
        log_w = promise / self.settings.alpha
        for step in range(steps, 0, -1):
            x, promise, log_w = self._resampled(x, promise, log_w, self.settings.threshold, generator)
            mean = base.mean_at(x, step, context)
            sigma = base.sigma(torch.tensor([step], device=x.device)).to(x.dtype)
            x = mean + sigma * base.noise(mean, context, generator)
            if (step - 1) % self.settings.every == 0:
                before, promise = promise, self._promise(x, step - 1, context, promise)
                log_w = log_w + (promise - before) / self.settings.alpha
        x, _, _ = self._resampled(x, promise, log_w, 1 - 1e-6, generator)
        if num < len(x):  # resampling leaves a group in its parents' order, and its first are not drawn by weight
            order = torch.rand(num_groups, size, generator=generator).argsort(1)
            x = x[torch.arange(len(x)).unflatten(0, order.shape).gather(1, order).flatten().to(x.device)]
        return x[:num], {k: v[:num] for k, v in context.items()}

    def _promise(self, x: Tensor, step: int, context: Context, before: Tensor) -> Float[Tensor, " chain"]:
        """r at x0_hat. Where it failed: what it was before, and of a finished event that nobody wants it."""
        x_0 = self.ground.bench.policy.x0_hat(x, torch.full((len(x),), step, device=x.device), context)
        found = self.ground.reward(x_0, context).to(before)
        return torch.where(found.isfinite(), found, before if step else torch.full_like(before, -torch.inf))

    def _resampled(
        self, x: Tensor, promise: Tensor, log_w: Tensor, threshold: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x, promise, log w) after groups that are worth too little were drawn again."""
        share = log_w.unflatten(0, (-1, self.settings.particles)).double().softmax(1)
        share = torch.where(share.isnan(), 1 / share.shape[1], share)  # all of a group failed
        poor = 1 / share.square().sum(1) < threshold * share.shape[1]
        if not bool(poor.any()):
            return x, promise, log_w
        parent = torch.arange(len(x), device=x.device).unflatten(0, share.shape)
        chosen = systematic(share, generator)
        parent = torch.where(poor.unsqueeze(1), parent.gather(1, chosen), parent).flatten()
        return x[parent], promise[parent], torch.where(poor.repeat_interleave(share.shape[1]), 0.0, log_w)


def systematic(share: Float[Tensor, "group chain"], generator: torch.Generator) -> Tensor:
    """As many of each chain as its share, to within one: a comb with one random start for each group."""
    num = share.shape[1]
    start = torch.rand(len(share), 1, generator=generator, dtype=torch.float64).to(share.device)
    comb = (torch.arange(num, device=share.device) + start) / num
    edges = share.cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], comb).clamp(max=num - 1)
