"""A learned stand-in for a black-box reward, where an algorithm needs a gradient (T Sec. 7).

    r_hat(x_0) = mean_i f_i(x_0) - lambda sd_i f_i(x_0),    f_i fitted to (x_0, r) pairs by least squares

The members differ by their first weights and the order of what they see: where they agree, data were near. Each is the
domain's own value network at t = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayft.domain import Domain
from rayft.space import Context

BATCH, LR = 256, 1e-3
NO_SPREAD = 1e-8  # a deviation at which all scores are the same


@dataclass(frozen=True)
class Seen:
    """Finished events and what they scored. numpy."""

    x_0: np.ndarray
    rewards: np.ndarray
    context: Mapping[str, np.ndarray]


class Surrogate(nn.Module):
    """``num`` networks and the scale of what they learned. Knows nothing until it is fitted."""

    centre: Tensor
    scale: Tensor

    def __init__(self, domain: Domain, num: int, pessimism: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.members = nn.ModuleList(domain.critic() for _ in range(num))
        self.pessimism = pessimism
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.optimizer = torch.optim.Adam(self.members.parameters(), lr=LR) if num else None

    def value(self, x_0: Tensor, context: Context) -> Float[Tensor, " batch"]:
        """r_hat, differentiable in x_0."""
        start = torch.zeros(len(x_0), dtype=torch.long, device=x_0.device)
        found = torch.stack([member(x_0, start, context) for member in self.members])
        doubt = found.std(0) if len(found) > 1 else torch.zeros_like(found[0])
        return self.centre + self.scale * (found.mean(0) - self.pessimism * doubt)

    def fit(self, seen: Sequence[Seen], num_steps: int, generator: torch.Generator) -> float:
        """Goes on learning from all that was scored; the share of the newest scores' variance that it tells before."""
        known = [np.isfinite(one.rewards) for one in seen]
        if not any(mask.any() for mask in known):
            raise ValueError("every reward has failed so far, and there is nothing to learn from: look at the errors")
        pick = [(one, mask) for one, mask in zip(seen, known, strict=True) if mask.any()]
        x_0 = torch.from_numpy(np.concatenate([one.x_0[mask] for one, mask in pick])).float()
        scores = np.concatenate([one.rewards[mask] for one, mask in pick]).astype(np.float64)
        rewards = torch.from_numpy(scores).float()
        keys = seen[0].context
        context = {k: torch.from_numpy(np.concatenate([one.context[k][mask] for one, mask in pick])) for k in keys}
        newest = int(pick[-1][1].sum())
        told = self._told(x_0, rewards, context, newest) if len(seen) > 1 else float("nan")
        if len(scores) == newest or scores[:-newest].std() < NO_SPREAD:  # these are the first that differ
            self.centre.fill_(scores.mean())
            self.scale.fill_(scores.std() if scores.std() > NO_SPREAD else 1.0)
        aim = (rewards - self.centre) / self.scale
        assert self.optimizer is not None
        with torch.enable_grad():
            for _ in range(num_steps):
                loss = torch.zeros(())
                for member in self.members:
                    rows = torch.randint(len(aim), (min(BATCH, len(aim)),), generator=generator)
                    start = torch.zeros(len(rows), dtype=torch.long)
                    found = member(x_0[rows], start, {k: v[rows] for k, v in context.items()})
                    loss = loss + (found - aim[rows]).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
        return told

    @torch.no_grad()
    def _told(self, x_0: Tensor, rewards: Tensor, context: Context, newest: int) -> float:
        found = self.value(x_0[-newest:], {k: v[-newest:] for k, v in context.items()})
        rest = (rewards[-newest:] - found).square().mean()
        return float(1 - rest / rewards[-newest:].var(correction=0).clamp(min=1e-12))

    def moments(self) -> dict[str, Any]:
        """Where Adam was, which goes on from there."""
        return {} if self.optimizer is None else self.optimizer.state_dict()

    def load_moments(self, state: Mapping[str, Any]) -> None:
        """What ``moments`` gave."""
        if self.optimizer is not None and state:
            self.optimizer.load_state_dict(dict(state))

    def numpy(self) -> dict[str, np.ndarray]:
        """Its weights, to be sent."""
        return {k: v.detach().cpu().numpy() for k, v in self.state_dict().items()}

    def load_numpy(self, state: Mapping[str, np.ndarray]) -> None:
        """What ``numpy`` gave."""
        self.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
