"""The base's own chains as a value is fitted on them: mu_base on the way, and the reward at the end.

level = alpha log E_base exp(r/alpha),    of which v is the version that has seen x_t
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rayft.chain import sample
from rayft.guidance.base import Ground
from rayft.seeds import torch_generator

BATCH = 256
NUM_KEPT = 64  # transitions of a chain; of longer chains each batch keeps others
FEWEST = 10.0  # equally weighted chains that they must be worth


@dataclass(frozen=True)
class Walks:
    """mu_base at rising timesteps of each chain, and r(x_0)/alpha less the level. On the CPU."""

    mean: Float[Tensor, "row chain *event"]
    t: Int[Tensor, "row chain"]
    reward: Float[Tensor, " chain"]
    context: dict[str, Tensor]

    def take(self, row: Tensor, chain: Tensor, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What a critic is asked about these transitions."""
        context = {k: v[chain].to(device) for k, v in self.context.items()}
        return self.mean[row, chain].to(device), self.t[row, chain].to(device), context


def walked(num_chains: int, alpha: float, ground: Ground) -> tuple[Walks, float]:
    """So many chains of the base, those left out whose reward failed; and their level."""
    parts = []
    for start in range(0, num_chains, BATCH):
        ground.tell("drawing chains", start, num_chains)
        parts.append(_batch(start, min(BATCH, num_chains - start), alpha, ground))
    ground.tell("drawing chains", num_chains, num_chains)
    mean, t = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("mean", "t"))
    reward = torch.cat([part.reward for part in parts])
    context = {k: torch.cat([part.context[k] for part in parts]) for k in parts[0].context}
    level = _level(reward, alpha)
    return Walks(mean, t, (reward - level).to(mean.dtype), context), level * alpha


def _batch(start: int, num: int, alpha: float, ground: Ground) -> Walks:
    bench, generator = ground.bench, torch_generator(ground.seed, start, "guidance chains")
    x_T, context = bench.start(num, generator)  # noqa: N806
    chains = sample(bench.policy, x_T, context, generator, reference=bench.policy)
    reward = ground.reward(chains.x_0, context).cpu().double() / alpha
    known = reward.isfinite()
    rows = torch.randperm(chains.num_rows, generator=generator)[:NUM_KEPT].sort().values
    mean, t = (part[rows.to(part.device)].cpu()[:, known] for part in (chains.columns["mean_ref"], chains.t))
    return Walks(mean, t, reward[known], {k: v.cpu()[known] for k, v in context.items()})


def _level(reward: Float[Tensor, " chain"], alpha: float) -> float:
    """log E exp(r/alpha), where the chains can tell."""
    total = torch.logsumexp(reward, 0)
    worth = float((2 * total - torch.logsumexp(2 * reward, 0)).exp()) if len(reward) else 0.0
    if worth < FEWEST:
        raise ValueError(
            f"at alpha {alpha:g} the {len(reward)} chains whose reward is known are worth {worth:.1f} equally weighted "
            "ones, too few to fit a value on; take a larger guide.alpha or more guide.chains"
        )
    return float(total) - math.log(len(reward))
