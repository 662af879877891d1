"""How a value network is fitted, by Monte Carlo or by bootstrapping on itself.

    L = E[ exp((y - h)/alpha) + h/alpha ],    y = r(x_0), or v of the same chain some transitions later

dL/dh = 0 is exp(h/alpha) = E[exp(y/alpha) | x_t], so the minimiser is exactly v. The squared error of exp(h/alpha)
(T Eq. 28) has the same minimiser and weighs by exp(2 h/alpha): only the best chains would count.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayft.chain import Policy
from rayft.domain import value_network
from rayft.guidance.base import Ground, Temperature
from rayft.guidance.value import Value
from rayft.guidance.walks import Walks, walked
from rayft.seeds import address, torch_generator
from rayft.settings import Count, Positive

NUM_ROWS, NUM_JUDGED, NUM_LOOKS = 1024, 8192, 20
HIGHEST = 3.0  # exp(z) goes on as its tangent from here: one lucky chain must not throw the network
DECAY = 0.99  # of the moving average, which is kept, and which bootstrapping looks at
WORTHWHILE, LEAST_LEARNT = 0.01, 0.01  # nats that knowing r would be worth; the share of them that is something
HELD_OUT = 8  # one chain in so many is not trained on


@dataclass(frozen=True)
class FitSettings(Temperature):
    """What guides with a fitted value are told."""

    chains: Count = 8192
    """Chains of the base that v is fitted on; their rewards are all the calls there are."""
    steps: Count = 1500
    """Steps of the fit, of 1,024 transitions each."""
    lr: Positive = 2e-3
    """Adam's learning rate at the start; it falls to 0 as a cosine."""
    value: str | None = None
    """A .safetensors file that keeps v: written where there is none, read where there is one."""


@dataclass(frozen=True)
class Fit:
    """A critic, its moving average, and what they are fitted on; y lies ``ahead`` kept transitions, r if None."""

    critic: nn.Module
    slow: nn.Module
    base: Policy
    walks: Walks
    device: torch.device
    ahead: int | None

    def loss(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        """L of these transitions."""
        return log_domain_loss(self._asked(self.critic, *rows), self._wanted(*rows))

    @torch.no_grad()
    def judged(self, rows: tuple[Tensor, Tensor]) -> float:
        """L of the moving average with y = r, whatever it was fitted to: its least is the same, and it stays put."""
        reward = self.walks.reward[rows[1]].to(self.device)
        return float(log_domain_loss(self._asked(self.slow, *rows), reward))

    def follow(self, step: int) -> None:
        """The moving average, one step on."""
        decay = min(DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(self.slow.parameters(), self.critic.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def _wanted(self, row: Tensor, chain: Tensor) -> Tensor:
        reward = self.walks.reward[chain].to(self.device)
        if self.ahead is None:
            return reward
        later = self._asked(self.slow, (row - self.ahead).clamp(min=0), chain)
        return torch.where((row >= self.ahead).to(self.device), later, reward)

    def _asked(self, critic: nn.Module, row: Tensor, chain: Tensor) -> Tensor:
        mean, t, context = self.walks.take(row, chain, self.device)
        return critic(mean, self.base.timestep(t), context)


def fitted(settings: FitSettings, ground: Ground, ahead: int | None = None) -> Value:
    """v as the moving average has it, where it judged the chains that were held out best."""
    bench, critic = ground.bench, tried(ground)
    walks, level = walked(settings.chains, settings.alpha, ground)
    slow = copy.deepcopy(critic).requires_grad_(False)
    fit = Fit(critic, slow, bench.policy, walks, bench.device, ahead)
    optimizer = torch.optim.Adam(critic.parameters(), lr=settings.lr)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch_generator(ground.seed, 0, "guidance fit")
    judges = _rows(walks, NUM_JUDGED, generator, held_out=True)
    best: tuple[float, dict[str, Any]] = (math.inf, slow.state_dict())
    for step in range(settings.steps):
        optimizer.zero_grad()
        fit.loss(_rows(walks, NUM_ROWS, generator, held_out=False)).backward()
        optimizer.step()
        fall.step()
        fit.follow(step)
        if (step + 1) % math.ceil(settings.steps / NUM_LOOKS) == 0 or step + 1 == settings.steps:
            ground.tell("fitting a value", step + 1, settings.steps)
            judged = fit.judged(judges)
            if judged < best[0]:
                best = judged, copy.deepcopy(slow.state_dict())
    _learnt(walks.reward, walks.reward[judges[1]], best[0], ground)
    slow.load_state_dict(best[1])
    return Value(slow, bench.policy, settings.alpha, level)


def _learnt(reward: Tensor, judged: Tensor, loss: float, ground: Ground) -> None:
    """Refuses a value that knows no more of r than its level. Of a flat h, E[exp(y)] = 1; of h = y, 1 + E[y]."""
    possible, found = -float(reward.mean()), float(soft_exp(judged).mean()) - loss
    if possible > WORTHWHILE and not found > LEAST_LEARNT * possible:
        raise ValueError(
            f"from {len(reward)} chains the value network learnt nothing of {ground.reward.name}, and would guide "
            "nowhere: give it more guide.chains and guide.steps or a finer Domain.critic, or take smc or best_of_n"
        )


def tried(ground: Ground) -> nn.Module:
    """A fresh critic of the domain's, alike for one seed, that has been asked once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(ground.seed, 0, "critic"))
        return value_network(ground.bench.domain).to(ground.bench.device)


def soft_exp(z: Tensor) -> Tensor:
    """exp(z), and from ``HIGHEST`` on its tangent: clipped, yet what lies above still pulls."""
    return z.clamp(max=HIGHEST).exp() + math.exp(HIGHEST) * (z - HIGHEST).clamp(min=0)


def log_domain_loss(h: Float[Tensor, " row"], y: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    """E[exp(y - h) + h], both over alpha: least where exp(h) = E exp(y) (T Eq. 28, in the log domain)."""
    return (soft_exp(y - h) + h).mean()


def _rows(walks: Walks, num: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor]:
    """(row, chain) of random transitions, of the chains that are trained on or of the others."""
    num_rows, num_chains = walks.t.shape
    chain = torch.arange(num_chains)
    chain = chain[(chain % HELD_OUT == 0) == held_out]
    picked = torch.randint(len(chain), (num,), generator=generator)
    return torch.randint(num_rows, (num,), generator=generator), chain[picked]
