"""PPO (T Alg. 1): clipped policy gradient on whole chains, with the KL to the pretrained model inside the objective.

    loss_t = -min(rho_t A_t, clip(rho_t) A_t) + alpha KL_t(theta) / s,    A_t = (r - alpha sum_{later} KL - mean_t) / s

The KL of step t itself is a differentiable term; those of later steps enter the advantage (math, Sec. 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rayft import credit, losses
from rayft.algorithms.chains import ChainRL
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.chain import Chains
from rayft.draws import Draw
from rayft.rl.learner import DiffusionLearner
from rayft.rl.near import Credit
from rayft.settings import Count, NonNegative, Positive

Advantage = Callable[[np.ndarray], tuple[np.ndarray, Any]]


@dataclass(frozen=True)
class PPOSettings(Settings):
    """PPO's numbers."""

    alpha: NonNegative = 0.1
    """Temperature of J = E[r] - alpha KL(p || p_pre); 0 asks for reward alone."""
    clip: Positive = 0.2
    """Largest relative change of a transition's probability that is still rewarded in one update."""
    num_epochs: Count = 2
    """Passes over each batch of chains."""


class PPOLearner(DiffusionLearner):
    """Clipped surrogate plus this step's KL."""

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        surrogate = losses.ppo_loss(out["log_prob"], rows["log_prob"], rows["advantage"], self.config.clip)
        kl = losses.transition_kl(out["mean"], rows["mean_ref"], out["sigma"])
        ratio = (out["log_prob"] - rows["log_prob"]).exp()
        if self.fresh:
            self.say("guard_ratio", (ratio - 1).abs().max())
        loss = rows["alive"] * (surrogate + rows["kl_weight"] * kl)
        clipped = ((ratio - 1).abs() > self.config.clip).float()
        return loss, {"clipped": clipped, "ratio": ratio, "policy_loss": surrogate}


class PPO(ChainRL):
    """T Alg. 1 on RLlib."""

    @classmethod
    def get_default_config(cls) -> DiffusionConfig:
        return PPOConfig()

    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        told = {"rewards": rewards, "alpha": self.settings.alpha, "advantage_of": self.advantage_of()}
        return self.beside(draw, partial(credited, **told))

    def advantage_of(self) -> Advantage:
        """From returns to A_t, and to what each chain's was divided by: the KL beside it must be too."""
        return credit.advantage


def credited(chains: Chains, rewards: np.ndarray, alpha: float, advantage_of: Advantage) -> Credit:
    """Rows with A_t, the weight of their own KL, and whether they count."""
    dtype = chains.columns["log_prob"].dtype
    returns = credit.reward_to_go(rewards, chains.columns["kl"].astype(np.float64), alpha)
    advantage, scale = advantage_of(returns)
    scale = np.broadcast_to(scale, returns.shape[1])
    told = {"advantage": advantage, "alive": credit.alive(rewards), "kl_weight": credit.price(alpha, scale)}
    rows = {name: np.broadcast_to(value, advantage.shape).astype(dtype) for name, value in told.items()}
    spread = {"advantage_scale": float(scale.mean()), "advantage_max": float(np.abs(advantage).max())}
    return Credit(chains.keep("log_prob", "mean_ref").with_columns(**rows), {}, spread)


class PPOConfig(DiffusionConfig):
    """``PPOConfig().domain(...).reward(...).training(alpha=...)``."""

    settings_class = PPOSettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or PPO)

    def get_default_learner_class(self) -> type[PPOLearner]:
        return PPOLearner
