"""PPO (T Alg. 1): clipped policy gradient on whole chains, with the KL to the pretrained model inside the objective.

    loss_t = -min(rho_t A_t, clip(rho_t) A_t) + alpha KL_t(theta) / s,    A_t = (r - alpha sum_{later} KL - mean_t) / s

The KL of step t itself is a differentiable term; those of later steps enter the advantage (math, Sec. 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rayft import credit, losses
from rayft.algorithms.base import Credit
from rayft.algorithms.chains import ChainRL
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.draws import Draw
from rayft.rl.learner import DiffusionLearner
from rayft.settings import Count, NonNegative, Positive


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
        loss = rows["alive"] * (surrogate + self.scalars["kl_weight"] * kl)
        clipped = ((ratio - 1).abs() > self.config.clip).float()
        return loss, {"clipped": clipped, "ratio": ratio, "policy_loss": surrogate}


class PPO(ChainRL):
    """T Alg. 1 on RLlib."""

    @classmethod
    def get_default_config(cls) -> PPOConfig:
        return PPOConfig()

    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        columns = draw.chains.columns
        alpha = self.settings.alpha
        returns = credit.reward_to_go(rewards, columns["kl"].astype(np.float64), alpha)
        advantage, scale = credit.advantage(returns)
        dtype = columns["log_prob"].dtype
        alive = np.broadcast_to(credit.alive(rewards), advantage.shape)
        kept = draw.chains.keep("log_prob", "mean_ref")
        chains = kept.with_columns(advantage=advantage.astype(dtype), alive=alive.astype(dtype))
        spread = {"advantage_scale": scale, "advantage_max": float(np.abs(advantage).max())}
        return Credit(chains, {"kl_weight": alpha / scale if scale > 1e-8 else float(alpha > 0)}, spread)


class PPOConfig(DiffusionConfig):
    """``PPOConfig().domain(...).reward(...).training(alpha=...)``."""

    settings_class = PPOSettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or PPO)

    def get_default_learner_class(self) -> type[PPOLearner]:
        return PPOLearner
