"""Reward-weighted maximum likelihood (T Alg. 3, Eq. 24-26): imitate the pretrained model's own chains, weighted.

    L = E_{roll-in} [ w |x_prev - mu_theta(x_t, t)|^2 / (2 sigma_t^2) ],    w = exp(r(x_0)/alpha) / mean,

with x_0 continued from x_t under the pretrained model. Any roll-in is valid (T Lemma 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rayft import credit, losses
from rayft.algorithms.base import Credit
from rayft.algorithms.chains import ChainRL
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.draws import Draw, DrawFunction, draw_pretrained, draw_roll_in
from rayft.rl.learner import DiffusionLearner
from rayft.settings import Positive


@dataclass(frozen=True)
class RWMLESettings(Settings):
    """Reward-weighted MLE's numbers."""

    alpha: Positive = 0.1
    """Temperature of the weights exp(r/alpha) and of J."""
    roll_in: Literal["pretrained", "current"] = "pretrained"
    """pretrained: one pretrained chain serves all t; current: T Alg. 3, one usable transition per chain."""
    anchor: bool = True
    """Subtracts the noise that a weight of 1 would carry: same expected gradient, far less of it wandering."""


class RWMLELearner(DiffusionLearner):
    """Weighted cross-entropy, anchored or plain."""

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.config.anchor:
            loss = losses.anchored_loss(out["mean"], rows["x_prev"], rows["mean_ref"], out["sigma"], rows["weight"])
        else:
            loss = losses.weighted_mle_loss(out["mean"], rows["x_prev"], out["sigma"], rows["weight"])
        return loss, {"kl_rows": losses.transition_kl(out["mean"], rows["mean_ref"], out["sigma"])}


class RWMLE(ChainRL):
    """T Alg. 3 on RLlib."""

    @classmethod
    def get_default_config(cls) -> RWMLEConfig:
        return RWMLEConfig()

    def draw_function(self) -> DrawFunction:
        return draw_pretrained if self.settings.roll_in == "pretrained" else draw_roll_in

    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        groups = self.domain.groups({k: torch.from_numpy(v) for k, v in draw.chains.context.items()})
        weight = credit.exponential_weight(rewards, self.settings.alpha, None if groups is None else groups.numpy())
        every = np.broadcast_to(weight, draw.chains.t.shape).astype(draw.chains.x.dtype)
        share = {"effective_share": credit.effective_share(weight)}
        return Credit(draw.chains.keep("mean_ref").with_columns(weight=every), {}, share)


class RWMLEConfig(DiffusionConfig):
    """``RWMLEConfig().domain(...).reward(...).training(alpha=...)``."""

    settings_class = RWMLESettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or RWMLE)

    def num_rows(self, num_steps: int) -> int:
        return self.settings().chains * (num_steps if self.roll_in == "pretrained" else 1)

    def get_default_learner_class(self) -> type[RWMLELearner]:
        return RWMLELearner
